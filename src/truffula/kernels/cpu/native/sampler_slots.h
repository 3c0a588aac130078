// The sampler with its sequences: each has a slot, where what it draws is counted.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "sampler.h"
#include "sequence_state.h"

namespace truffula {

class Sampler {
 public:
  Sampler(std::int64_t vocab, std::int32_t slots);
  Sampler(const Sampler&) = delete;
  Sampler& operator=(const Sampler&) = delete;

  void set_sequence(std::int32_t slot, std::unique_ptr<SequenceState> state);

  // Call it before the rows of a step. Throws std::invalid_argument when `args` name a slot, id, draw or mask that does
  // not exist; then rewinds the sequences to these draws. A step that fails after it may be begun again.
  void begin(std::int64_t rows, const SampleArgs& args);
  // The most logprobs that a row wants besides that of its id.
  std::int32_t width(std::int64_t rows, const SampleArgs& args) const;
  // `sample_row` of sampler.h; counts what is drawn. Distinct rows with distinct scratch may run at once.
  void sample(const float* logits, std::int64_t row, const SampleArgs& args, const SampleOut& out,
              SampleScratch& scratch);

  std::int64_t vocab() const { return vocab_; }

 private:
  SequenceState& sequence_of(std::int32_t slot) const { return *sequences_[static_cast<std::size_t>(slot)]; }
  void check_row(std::int64_t row, const SampleArgs& args);

  std::int64_t vocab_;
  std::vector<std::unique_ptr<SequenceState>> sequences_;
  std::vector<std::int64_t> drawn_in_;  // per slot, the last step that drew for it
  std::int64_t step_ = 0;
};

}  // namespace truffula

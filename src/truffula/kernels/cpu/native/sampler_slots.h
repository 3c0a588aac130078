// The sampling state of all sequence slots.
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

  // Called before the rows of a step. Throws std::invalid_argument when `args` name a slot, id, draw or mask that does
  // not exist; otherwise rewinds the sequences to these draws. A step that fails later may be repeated.
  void begin(std::int64_t rows, const SampleArgs& args);
  // The largest number of top logprobs that a row requests.
  std::int32_t width(std::int64_t rows, const SampleArgs& args) const;
  // `sample_row` of sampler.h; counts the drawn token. Different rows with different scratch may run concurrently.
  void sample(const float* logits, std::int64_t row, const SampleArgs& args, const SampleOut& out,
              SampleScratch& scratch);

  std::int64_t vocab() const { return vocab_; }

 private:
  SequenceState& sequence_of(std::int32_t slot) const { return *sequences_[static_cast<std::size_t>(slot)]; }
  // Ids that the sequence in a slot may draw: the first of the vocabulary.
  std::int64_t width_of(std::int32_t slot) const {
    const std::int32_t own = sequence_of(slot).sampling.width;
    return own ? own : vocab_;
  }
  void check_row(std::int64_t row, const SampleArgs& args);

  std::int64_t vocab_;
  std::vector<std::unique_ptr<SequenceState>> sequences_;
  std::vector<std::int64_t> drawn_in_;  // per slot, the last step that drew for it
  std::int64_t step_ = 0;
};

}  // namespace truffula

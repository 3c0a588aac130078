// What the sampler keeps of each sequence: how it is sampled and, where penalties need it, the tokens it has seen.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace truffula {

// How the tokens of one sequence are drawn: SequenceSampling of inputs.py, by the same names.
struct SequenceSampling {
  float temperature = 0.0f;                       // 0: the most likely id
  float top_p = 1.0f, min_p = 0.0f, typical_p = 1.0f;
  float repetition = 1.0f, frequency = 0.0f, presence = 0.0f;
  std::int32_t top_k = 0;                         // 0: all
  std::int32_t n_logprobs = -1, n_prompt_logprobs = -1;  // -1: none, not even that of the id
  std::uint64_t seed = 0;
  std::uint32_t choice = 0, min_tokens = 0;
  bool warped = false;                            // logprobs of the distribution drawn from, instead of the model's
  std::vector<std::int32_t> bias_ids, banned_ids;
  std::vector<float> bias_values;

  bool penalised() const { return repetition != 1.0f || frequency != 0.0f || presence != 0.0f; }
};

// Counts are kept only with penalties: 8 bytes for each distinct id, 4 for each completion token.
class SequenceState {
 public:
  // Throws std::invalid_argument when an id is not below `vocab`, or biases and their ids are unequal in number.
  SequenceState(SequenceSampling sampling, std::span<const std::int32_t> prompt,
                std::span<const std::int32_t> completion, std::int64_t vocab);

  const SequenceSampling sampling;

  // Distinct ids seen so far, and how often each is in the completion (0: only in the prompt). Empty without penalties.
  const std::vector<std::int32_t>& seen_ids() const { return ids_; }
  const std::vector<std::int32_t>& seen_counts() const { return counts_; }

  // Whether the first `draw` tokens of the completion are known.
  bool has(std::uint32_t draw) const { return !sampling.penalised() || draw <= completion_.size(); }
  // Forgets the tokens from number `draw` on, and makes room for one, so that `count` cannot fail.
  void rewind(std::uint32_t draw);
  void count(std::int32_t id) noexcept;

 private:
  std::vector<std::int32_t> ids_, counts_, completion_;
  std::size_t prompt_ids_ = 0;  // of ids_, the first so many are in the prompt
};

}  // namespace truffula

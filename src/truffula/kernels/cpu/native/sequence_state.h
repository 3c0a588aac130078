// The sampling state of one sequence: its parameters and, with penalties, the counts of its tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace truffula {

// SequenceSampling of inputs.py, under the same names.
struct SequenceSampling {
  float temperature = 0.0f;                       // 0: greedy
  float top_p = 1.0f, min_p = 0.0f, typical_p = 1.0f;
  float repetition = 1.0f, frequency = 0.0f, presence = 0.0f;
  std::int32_t top_k = 0;                         // 0: all
  std::int32_t width = 0;                         // ids that may be drawn; 0: all
  std::int32_t n_logprobs = -1, n_prompt_logprobs = -1;  // -1: none
  std::uint64_t seed = 0;
  std::uint32_t choice = 0, min_tokens = 0;
  bool warped = false;                            // logprobs are of the distribution after penalties and truncation
  std::vector<std::int32_t> bias_ids, banned_ids;
  std::vector<float> bias_values;

  bool penalised() const { return repetition != 1.0f || frequency != 0.0f || presence != 0.0f; }
};

// Counts tokens only with penalties: 8 bytes per distinct id, 4 per completion token.
class SequenceState {
 public:
  // Throws std::invalid_argument when an id is not below the width, or that is above `vocab`, or biases and their ids are unequal in number.
  SequenceState(SequenceSampling sampling, std::span<const std::int32_t> prompt,
                std::span<const std::int32_t> completion, std::int64_t vocab);

  const SequenceSampling sampling;

  // The distinct ids seen, and the count of each in the completion (0: only in the prompt). Empty without penalties.
  const std::vector<std::int32_t>& seen_ids() const { return ids_; }
  const std::vector<std::int32_t>& seen_counts() const { return counts_; }

  // Whether the first `draw` tokens of the completion are known.
  bool has(std::uint32_t draw) const { return !sampling.penalised() || draw <= completion_.size(); }
  // Removes the tokens from number `draw` on, and reserves memory for one more, so that `count` cannot fail.
  void rewind(std::uint32_t draw);
  void count(std::int32_t id) noexcept;

 private:
  std::vector<std::int32_t> ids_, counts_, completion_;
  std::size_t prompt_ids_ = 0;  // this many of ids_ are in the prompt
};

}  // namespace truffula

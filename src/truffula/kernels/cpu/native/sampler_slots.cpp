#include "sampler_slots.h"

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <utility>

namespace truffula {
namespace {

void require(bool holds, const char* why) {
  if (!holds) throw std::invalid_argument(why);
}

}  // namespace

Sampler::Sampler(std::int64_t vocab, std::int32_t slots)
    : vocab_(vocab), sequences_(static_cast<std::size_t>(slots)), drawn_in_(static_cast<std::size_t>(slots)) {}

void Sampler::set_sequence(std::int32_t slot, std::unique_ptr<SequenceState> state) {
  require(slot >= 0 && static_cast<std::size_t>(slot) < sequences_.size(), "slot: no such sequence slot");
  sequences_[static_cast<std::size_t>(slot)] = std::move(state);
}

void Sampler::check_row(std::int64_t row, const SampleArgs& args) {
  const std::int32_t slot = args.row_slot[row], mask_row = args.mask_row[row];
  require(slot >= 0 && static_cast<std::size_t>(slot) < sequences_.size() && sequences_[static_cast<std::size_t>(slot)],
          "row_slot: a slot that holds no sequence");
  const std::int64_t width = width_of(slot);
  require(args.target[row] < width, "target: outside the vocabulary");
  if (args.target[row] >= 0) return;
  require(drawn_in_[static_cast<std::size_t>(slot)] != step_, "row_slot: two rows draw for one slot");
  drawn_in_[static_cast<std::size_t>(slot)] = step_;
  require(sequence_of(slot).has(args.draw[row]), "draw: beyond the tokens of the sequence");
  if (mask_row < 0) return;
  require(mask_row < args.masks, "mask_row: no such mask");
  const std::uint32_t* mask = args.mask + mask_row * args.words;
  const std::uint32_t last = width % 32 ? (1u << (width % 32)) - 1 : ~0u;
  const std::int64_t full = mask_words(width) - 1;
  require((mask[full] & last) != 0 || std::any_of(mask, mask + full, [](std::uint32_t word) { return word != 0; }),
          "mask: a row that allows no id");
}

void Sampler::begin(std::int64_t rows, const SampleArgs& args) {
  ++step_;
  for (std::int64_t r = 0; r < rows; ++r) check_row(r, args);
  for (std::int64_t r = 0; r < rows; ++r)
    if (args.target[r] < 0) sequence_of(args.row_slot[r]).rewind(args.draw[r]);
}

std::int32_t Sampler::width(std::int64_t rows, const SampleArgs& args) const {
  std::int32_t most = 0;
  for (std::int64_t r = 0; r < rows; ++r) {
    const SequenceSampling& p = sequence_of(args.row_slot[r]).sampling;
    most = std::max(most, args.target[r] >= 0 ? p.n_prompt_logprobs : p.n_logprobs);
  }
  return most;
}

void Sampler::sample(const float* logits, std::int64_t row, const SampleArgs& args, const SampleOut& out,
                     SampleScratch& scratch) {
  SequenceState& sequence = sequence_of(args.row_slot[row]);
  sample_row(logits, width_of(args.row_slot[row]), row, sequence, args, out, scratch);
  if (args.target[row] < 0) sequence.count(out.ids[row]);
}

}  // namespace truffula

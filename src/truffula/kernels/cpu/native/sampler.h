// From logits to tokens: penalties, truncation, the draw, and logprobs, one row at a time.
//
// The specification is truffula/kernels/sampling.py: same ids (ties to the lower), same logprobs within the rounding of
// float32, whatever the batch. A row is worked on alone, in double and in an order fixed by its own contents, so its
// outcome cannot depend on its neighbours, on the thread, or on the width of the machine's vectors. (It does depend on
// whether the thread flushes denormals, if only for denormal logits, temperatures and limits.)
//
// Nothing here sorts a vocabulary unless the answer needs most of it. See sampler.cpp for how.
#pragma once

#include <cstdint>
#include <vector>

#include "sampler_loops.h"
#include "sequence_state.h"

namespace truffula {

// What is asked of the rows: the arrays of inputs.py's SampleInputs, by the same names.
struct SampleArgs {
  const std::int32_t* row_slot;
  const std::int32_t* target;    // -1: draw; else this id is scored by the model's own distribution
  const std::uint32_t* draw;     // completion tokens before this one
  const std::int32_t* mask_row;  // -1: every id is allowed
  const std::uint32_t* mask;     // [masks, words of 32 ids]
  std::int64_t masks;
};

// What comes back: StepOutput of inputs.py. `width` is the largest `n_logprobs` of the step (0 where none is above).
struct SampleOut {
  std::int32_t* ids;      // [R]
  float* logprob;         // [R]
  std::uint8_t* finite;   // [R]
  std::int32_t* top_ids;  // [R, width], -1 beyond what a row has
  float* top_logprobs;    // [R, width], -inf beyond what a row has
  std::int32_t width;
};

// One id while a row is narrowed down.
struct SampleItem {
  double rank;    // higher is kept longer; ties to the lower id
  double weight;  // its share of the distribution at this stage
  std::int32_t id;
};

// What one thread needs, reused row after row. `sample_row` sizes it; `reserve` does so ahead, where a failure to get
// memory can still be told. At most 58 bytes per id, touched only as far as rows ask for it.
struct SampleScratch {
  const SampleLoops* loops = nullptr;  // null: the portable ones
  std::vector<float> maxima;           // of the logits, per block
  std::vector<double> scores;          // logits after penalties and bias; only rows that have any
  std::vector<double> score_maxima;    // of the scores, per block
  std::vector<double> sums;            // of the weights, per block
  std::vector<double> pivots;          // maxima to choose a threshold from
  std::vector<SampleItem> items;       // the ids kept, ascending
  std::vector<SampleItem> order;       // the same, best first or on the way to it

  void reserve(std::int64_t vocab);
};

// The words of a mask over `vocab` ids.
constexpr std::int64_t mask_words(std::int64_t vocab) { return (vocab + 31) / 32; }

// Choose (or score) the id of `row`, which is of `sequence` and whose `vocab` (> 0) logits these are, and write its part
// of `out`. Slots, ids and masks in `args` must exist (Sampler::begin checks them).
//
// Logits that hold NaN or +Inf, or nothing above -Inf, come back with `finite` 0 and id 0; so do those that penalties
// or bias turn into NaN or +Inf, and a row whose temperature is negative or NaN. Distinct rows with distinct scratch
// may run at once.
void sample_row(const float* logits, std::int64_t vocab, std::int64_t row, const SequenceState& sequence,
                const SampleArgs& args, const SampleOut& out, SampleScratch& scratch);

}  // namespace truffula

// From logits to tokens: penalties, truncation, the draw, and logprobs, one row at a time.
//
// The specification is truffula/kernels/sampling.py: same ids (ties to the lower), same logprobs within the rounding of
// float32, whatever the batch. Each row is computed alone, in double and in an order fixed by its own values, so its
// result does not depend on other rows, on the thread, or on the width of the machine's vectors. (It does depend on
// whether the thread flushes denormals, for denormal logits, temperatures and limits only.)
//
// The vocabulary is sorted only for rows whose result needs most of it. sampler.cpp describes the methods.
#pragma once

#include <cstdint>
#include <vector>

#include "sampler_loops.h"
#include "sequence_state.h"

namespace truffula {

// The arrays of SampleInputs (inputs.py), under the same names.
struct SampleArgs {
  const std::int32_t* row_slot;
  const std::int32_t* target;    // -1: draw; else this id is scored by the model's own distribution
  const std::uint32_t* draw;     // completion tokens before this one
  const std::int32_t* mask_row;  // -1: every id is allowed
  const std::uint32_t* mask;     // [masks, words], of 32 ids each
  std::int64_t masks, words;
};

// The arrays of StepOutput (inputs.py). `width` is the largest `n_logprobs` of the step, at least 0.
struct SampleOut {
  std::int32_t* ids;      // [R]
  float* logprob;         // [R]
  std::uint8_t* finite;   // [R]
  std::int32_t* top_ids;  // [R, width], -1 after a row's last
  float* top_logprobs;    // [R, width], -inf after a row's last
  std::int32_t width;
};

// A candidate id.
struct SampleItem {
  double rank;    // higher is kept longer; ties to the lower id
  double weight;  // its share of the distribution at this stage
  std::int32_t id;
};

// The most scratch memory of a sampler, per id of the vocabulary.
constexpr std::int64_t kSampleScratchBytes = 58;

// Scratch memory of one thread, reused for all rows. `reserve` allocates it in advance, where bad_alloc can be
// reported. Only what the rows use is touched.
struct SampleScratch {
  const SampleLoops* loops = nullptr;  // null: the portable ones
  std::vector<float> maxima;           // of the logits, per block
  std::vector<double> scores;          // logits after penalties and bias; only rows that have any
  std::vector<double> score_maxima;    // of the scores, per block
  std::vector<double> sums;            // of the weights, per block
  std::vector<double> pivots;          // maxima from which a threshold is selected
  std::vector<SampleItem> items;       // the ids kept, ascending
  std::vector<SampleItem> order;       // the same, partly or wholly sorted, best first

  void reserve(std::int64_t vocab);
};

// The words of a mask over `vocab` ids.
constexpr std::int64_t mask_words(std::int64_t vocab) { return (vocab + 31) / 32; }

// Draws (or scores) the id of `row`, a row of `sequence` with these `vocab` (> 0) logits, and writes its part of `out`.
// Slots, ids and masks in `args` must exist (Sampler::begin checks them).
//
// `finite` and the id are 0 when the logits hold NaN or +Inf, or nothing above -Inf, before or after penalties and
// bias, and when the temperature is negative or NaN. Different rows with different scratch may run concurrently.
void sample_row(const float* logits, std::int64_t vocab, std::int64_t row, const SequenceState& sequence,
                const SampleArgs& args, const SampleOut& out, SampleScratch& scratch);

}  // namespace truffula

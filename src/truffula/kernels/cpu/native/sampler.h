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

namespace truffula {

// What is asked of the rows: the arrays of inputs.py's SampleInputs, by the same names. Per row, but for the CSR ones
// (`seen_*`, `bias_*`), where row r owns [start[r], start[r + 1]). Ids must be valid: see `sample_ids_valid`.
struct SampleArgs {
  const float* temperature;        // 0: the most likely id
  const std::int32_t* top_k;       // 0: all
  const float* top_p;              // 1: all
  const float* min_p;              // 0: all
  const float* typical_p;          // 1: all
  const float* repetition;         // 1: none
  const float* frequency;          // 0: none
  const float* presence;           // 0: none
  const std::int32_t* n_logprobs;  // -1: none, not even that of the id
  const std::uint64_t* seed;
  const std::uint32_t* choice;
  const std::uint32_t* draw;
  const std::int32_t* target;      // -1: sample; else this id is scored
  const std::uint8_t* warped;      // logprobs of the distribution sampled from, instead of the model's
  const std::int32_t* seen_start;
  const std::int32_t* seen_ids;
  const std::int32_t* seen_counts;
  const std::int32_t* bias_start;
  const std::int32_t* bias_ids;
  const float* bias_values;
};

// What comes back: SampledRows of inputs.py. `width` is the largest `n_logprobs` of the step (0 where none is above).
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

// Whether the CSR starts ascend from 0 and every id and target of `rows` rows is below `vocab`: ask once a step, since
// `sample_row` trusts them.
bool sample_ids_valid(std::int64_t rows, std::int64_t vocab, const SampleArgs& args) noexcept;

// Choose (or score) the id of `row`, whose `vocab` (> 0) logits these are, and write its part of `out`.
//
// Logits that hold NaN or +Inf, or nothing above -Inf, come back with `finite` 0 and id 0; so do those that penalties
// or bias turn into NaN or +Inf, and a row whose temperature is negative or NaN. Distinct rows with distinct scratch
// may run at once.
void sample_row(const float* logits, std::int64_t vocab, std::int64_t row, const SampleArgs& args,
                const SampleOut& out, SampleScratch& scratch);

}  // namespace truffula

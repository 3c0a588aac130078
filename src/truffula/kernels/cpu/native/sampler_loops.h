// The sampler's loops over a whole vocabulary, as a table, since they gain from wider vectors. Plain C structs, for the
// same reason as kernels.h: files compiled with different instruction sets fill it.
#pragma once

#include <stdint.h>

namespace truffula {

constexpr int64_t kSampleBlock = 64;

// All work on whole blocks of 64 values. Every table gives the same bits: sums are taken in 8 lanes, then as a tree.
struct SampleLoops {
  // maxima[b] of block b; 0 if any value is NaN (its block's maximum is then anything).
  int32_t (*maxima_f32)(const float* x, int64_t blocks, float* maxima);
  int32_t (*maxima_f64)(const double* x, int64_t blocks, double* maxima);
  // sums[b] of exp((x - best) / temperature) over block b; `weights` [64] is left with those of the last block.
  void (*weigh_f32)(const float* x, int64_t blocks, double best, double temperature, double* weights, double* sums);
  void (*weigh_f64)(const double* x, int64_t blocks, double best, double temperature, double* weights, double* sums);
};

}  // namespace truffula

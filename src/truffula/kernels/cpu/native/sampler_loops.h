// The sampler's loops over a whole vocabulary: a table per instruction set, as they gain from wider vectors. Plain C
// structs only, for the reason given in kernels.h.
#pragma once

#include <stdint.h>

namespace truffula {

constexpr int64_t kSampleBlock = 64;

// All process whole blocks of 64 values. Every table gives the same bits: sums have 8 lanes, which are added as a tree.
struct SampleLoops {
  // maxima[b] of block b; 0 if any value is NaN (then its block's maximum is undefined).
  int32_t (*maxima_f32)(const float* x, int64_t blocks, float* maxima);
  int32_t (*maxima_f64)(const double* x, int64_t blocks, double* maxima);
  // sums[b] of exp((x - best) / temperature) over block b; `weights` [64] receives the weights of the last block.
  void (*weigh_f32)(const float* x, int64_t blocks, double best, double temperature, double* weights, double* sums);
  void (*weigh_f64)(const double* x, int64_t blocks, double best, double temperature, double* weights, double* sums);
};

}  // namespace truffula

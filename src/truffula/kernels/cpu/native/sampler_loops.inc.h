// Defines the SampleLoops of the instruction set that the including file is compiled for. Everything has internal
// linkage and nothing is from std::, so that the linker cannot use code compiled for AVX-512 in a file compiled for
// less.
//
// The vectors are explicit, because compilers do not vectorise these loops: they must respect NaN and signed zeros in a
// maximum, and the order of a sum. Results do not depend on the width: lanes are independent, sums always have 8 lanes,
// and nothing may be fused (-ffp-contract=off).
#pragma once

#include <stdint.h>
#include <string.h>

#include "sampler_loops.h"

namespace truffula {
namespace {
namespace sampling {

#if defined(__AVX512F__) && defined(__AVX512DQ__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kDoubles = kBytes / 8;

template <class T>
using Vector [[gnu::vector_size(kBytes)]] = T;
using Doubles = Vector<double>;
using Words = Vector<uint64_t>;

// exp(x) for x <= 0 (or slightly above), within 2 ulp; 0 below -708, where doubles become denormal: such a weight is
// below the rounding of any sum with a term of 1. No branches.
// Method: Cephes exp.c (Moshier): x = n ln 2 + r, exp(r) = 1 + 2 r P(r^2) / (Q(r^2) - r P(r^2)).
[[gnu::always_inline]] inline void exp_nonpositive(const Doubles& x, Doubles& out) {
  constexpr double kToInteger = 0x1.8p52;  // adding it rounds to an integer, held in the low bits of the mantissa
  const Doubles lowest = Doubles{} - 708.0;
  const Doubles clamped = x > lowest ? x : lowest;
  const Doubles shifted = clamped * 1.4426950408889634074 + kToInteger;
  const Doubles n = shifted - kToInteger;
  const Doubles r = (clamped - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  const Doubles rr = r * r;
  const Doubles p = r * ((1.26177193074810590878e-4 * rr + 3.02994407707441961300e-2) * rr + 9.99999999999999999910e-1);
  const Doubles q =
      ((3.00198505138664455042e-6 * rr + 2.52448340349684104192e-3) * rr + 2.27265548208155028766e-1) * rr + 2.0;
  const Doubles power = (Doubles)(((Words)shifted << 52) + (uint64_t{1023} << 52));
  const Doubles result = (1.0 + 2.0 * (p / (q - p))) * power;
  out = (Doubles)((Words)result & (Words)(x > lowest));
}

// The same for one value, with the same bits.
[[maybe_unused]] inline double exp_nonpositive(double x) {
  Doubles lanes = Doubles{} + x;
  exp_nonpositive(lanes, lanes);
  return lanes[0];
}

// The larger value of each lane: maxps, which ignores NaN, so NaN is detected separately.
template <class V>
[[gnu::always_inline]] inline void raise(V& most, const V& other) {
  most = other > most ? other : most;
}

using Four [[gnu::vector_size(16)]] = float;
using Two [[gnu::vector_size(16)]] = double;

// The largest lane, by shuffles, because compilers turn a loop over lanes into branches.
inline float largest(Four v) {
  raise(v, __builtin_shufflevector(v, v, 2, 3, 0, 1));
  raise(v, __builtin_shufflevector(v, v, 1, 0, 3, 2));
  return v[0];
}
inline double largest(Two v) {
  raise(v, __builtin_shufflevector(v, v, 1, 0));
  return v[0];
}

template <class T>
int32_t maxima(const T* x, int64_t blocks, T* out) {
  using Lanes = Vector<T>;
  using Short [[gnu::vector_size(16)]] = T;
  constexpr int64_t lanes = kBytes / static_cast<int64_t>(sizeof(T));
  auto ordered = Lanes{} == Lanes{};  // no NaN seen
  for (int64_t b = 0; b < blocks; ++b, x += kSampleBlock) {
    Lanes even, odd;  // two chains, to hide their latency
    memcpy(&even, x, sizeof(even));
    memcpy(&odd, x + lanes, sizeof(odd));
    ordered &= (even == even) & (odd == odd);
    for (int64_t i = 2 * lanes; i < kSampleBlock; i += 2 * lanes) {
      Lanes next, after;
      memcpy(&next, x + i, sizeof(next));
      memcpy(&after, x + i + lanes, sizeof(after));
      ordered &= (next == next) & (after == after);
      raise(even, next);
      raise(odd, after);
    }
    raise(even, odd);
    Short parts[kBytes / 16];
    memcpy(parts, &even, sizeof(parts));
    for (int i = 1; i < kBytes / 16; ++i) raise(parts[0], parts[i]);
    out[b] = largest(parts[0]);
  }
  int32_t sound = 1;
  for (int64_t i = 0; i < lanes; ++i) sound &= ordered[i] != 0;
  return sound;
}

template <bool divided, class T>
void weigh_blocks(const T* x, int64_t blocks, double best, double temperature, double* weights, double* sums) {
  using Values [[gnu::vector_size(kDoubles * sizeof(T))]] = T;
  constexpr int kChains = 8 / kDoubles;
  for (int64_t b = 0; b < blocks; ++b, x += kSampleBlock) {
    Doubles chains[kChains] = {};
    for (int64_t i = 0; i < kSampleBlock; i += 8) {
      for (int j = 0; j < kChains; ++j) {
        Values values;
        memcpy(&values, x + i + j * kDoubles, sizeof(values));
        Doubles score = __builtin_convertvector(values, Doubles) - best;
        if constexpr (divided) score /= temperature;
        exp_nonpositive(score, score);
        memcpy(weights + i + j * kDoubles, &score, sizeof(score));
        chains[j] += score;
      }
    }
    double lane[8];
    memcpy(lane, chains, sizeof(lane));
    sums[b] = ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
  }
}

template <class T>
void weigh(const T* x, int64_t blocks, double best, double temperature, double* weights, double* sums) {
  // A division costs a sixth, and x / 1.0 is x.
  if (temperature == 1.0) weigh_blocks<false>(x, blocks, best, temperature, weights, sums);
  else weigh_blocks<true>(x, blocks, best, temperature, weights, sums);
}

}  // namespace sampling

constexpr SampleLoops kSampleLoops{sampling::maxima<float>, sampling::maxima<double>, sampling::weigh<float>,
                                   sampling::weigh<double>};

}  // namespace
}  // namespace truffula

// The limits of products: loops over the instructions they consist of, and a loop that reads memory.
#pragma once

#include "ints.h"
#include "tiles.inc.h"
#include "vec.h"

namespace truffula {
namespace {

// What the instructions of a table compute: floats; two bfloat16 at once; whole numbers of 8 bits, of 16.
enum Peak : int32_t { kFloatPeak = 0, kPairPeak = 1, kBytePeak = 2, kWordPeak = 3 };

#if defined(__AVX512F__)
constexpr int kChains = 16;  // times a latency of four or eight: two products a cycle
#elif defined(__AVX2__)
constexpr int kChains = 6;  // of two registers
#else
constexpr int kChains = 2;
#endif

// Operands are loaded anew each round, and chains begin with numbers of their own that the compiler cannot know: what
// doesn't change, or is equal, would be computed once.
#define TF_FORGET() __asm__ volatile("" ::: "memory")

static float float_peak(int64_t rounds, const float* operands) {
  V sums[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) sums[i] = load((const float*)operands + i);
  for (int64_t round = 0; round < rounds; ++round) {
    TF_FORGET();
    const V a = load(operands);
#if defined(__FMA__) || defined(__AVX512F__)
    const V b = load(operands + kLanes);
#endif
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) {
#if defined(__FMA__) || defined(__AVX512F__)
      sums[i] = fma(a, b, sums[i]);
#else  // a product of its own: equal ones would be made once
      sums[i] = fma(a, load(operands + kLanes * (i + 1)), sums[i]);
#endif
    }
  }
  V all = zero();
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) all = all + sums[i];
  return sum_of(all);
}

#if defined(TRUFFULA_TILES)
// Four products of full tiles, as many as there are sums for: 16 rows, 16 outputs and a line's inputs each.
static int64_t tile_peak(int64_t rounds, int inputs, bool pairs) {
  const TileShapes shapes(pairs ? 64 : kBlock, inputs / (pairs ? 2 : 4));
  take_shapes(shapes);
  for (int64_t round = 0; round < rounds; ++round) {
    if (pairs) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    } else {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
  }
  _tile_release();
  return rounds * 4 * 2 * kTile * kLanes * inputs;
}
#elif defined(__AVX512BF16__)
static float pair_peak(int64_t rounds, const uint8_t* operands) {
  V sums[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) sums[i] = load((const float*)operands + i);
  for (int64_t round = 0; round < rounds; ++round) {
    TF_FORGET();
    const I a = line_at(operands), b = line_at(operands + 64);
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) sums[i] = dot_pairs(sums[i], a, b);
  }
  V all = zero();
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) all = all + sums[i];
  return sum_of(all);
}
#endif

// One step of a chain as the products make it: with 8-bit dot products, or pairs that are held in 16 bits, or 16-bit
// numbers whose sums are 32-bit at once.
TF_INLINE I byte_step(I sums, I a, I b) {
#if (defined(__AVX2__) || defined(__AVX512F__)) && !defined(__AVX512VNNI__)
  return add16(sums, maddubs(a, b));
#else
  return dot_bytes(sums, a, b);
#endif
}
TF_INLINE I word_step(I sums, I a, I b) {
#if (defined(__AVX2__) || defined(__AVX512F__)) && !defined(__AVX512VNNI__)
  return add32(sums, madd(a, b));
#else
  (void)a, (void)b;
  return sums;
#endif
}

template <bool WORDS>
static float int_peak(int64_t rounds, const uint8_t* operands) {
  I sums[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) sums[i] = line_at(operands + 4 * i);
  for (int64_t round = 0; round < rounds; ++round) {
    TF_FORGET();
    const I a = line_at(operands);
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) {
      const I b = line_at(operands + 64 * (i + 1));  // equal products would be made once for all chains
      sums[i] = WORDS ? word_step(sums[i], a, b) : byte_step(sums[i], a, b);
    }
  }
  V all = zero();
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) all = all + floats_of(sums[i]);
  return sum_of(all);
}

// Runs the instructions of a kind from registers. Returns the number of operations (a product and a sum are two), 0
// where the instruction set has none of the kind.
static int64_t peak(int32_t kind, int64_t rounds) {
  alignas(64) float zeros[(kChains + 1) * kLanes] = {};
  const float* operands = zeros;
  __asm__ volatile("" : "+r"(operands) : : "memory");
  volatile float kept = 0.0f;
#if defined(TRUFFULA_TILES)
  if (kind == kPairPeak) return tile_peak(rounds, 2 * kTileLines, true);
  if (kind == kBytePeak) return tile_peak(rounds, kBlock, false);
#endif
  int64_t each = 0;  // operations of a step: 16 outputs, so many products of each, and as many sums
  if (kind == kFloatPeak) {
    kept = float_peak(rounds, operands);
    each = 2 * kLanes;
#if defined(__AVX512BF16__) && !defined(TRUFFULA_TILES)
  } else if (kind == kPairPeak) {
    kept = pair_peak(rounds, (const uint8_t*)operands);
    each = 4 * kLanes;
#endif
  } else if (kind == kBytePeak) {
    kept = int_peak<false>(rounds, (const uint8_t*)operands);
    each = 8 * kLanes;
#if (defined(__AVX2__) || defined(__AVX512F__)) && !defined(__AVX512VNNI__)
  } else if (kind == kWordPeak) {
    kept = int_peak<true>(rounds, (const uint8_t*)operands);
    each = 4 * kLanes;
#endif
  }
  (void)kept;
  return rounds * kChains * each;
}

// Reads `bytes`, a multiple of 256. The caller must use the result, or the compiler removes the loop.
static uint32_t read_through(const uint8_t* data, int64_t bytes) {
  I kept[4] = {all32(0), all32(0), all32(0), all32(0)};
  for (int64_t at = 0; at < bytes; at += 256) {
    __builtin_prefetch(data + at + 4096);
    __builtin_prefetch(data + at + 4160);
    __builtin_prefetch(data + at + 4224);
    __builtin_prefetch(data + at + 4288);
    for (int i = 0; i < 4; ++i) kept[i] = kept[i] | line_at(data + at + 64 * i);
  }
  uint32_t lanes[kLanes];
  const I all = (kept[0] | kept[1]) | (kept[2] | kept[3]);
  memcpy(lanes, &all, sizeof lanes);
  uint32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= lanes[i];
  return any;
}

#undef TF_FORGET

}  // namespace
}  // namespace truffula

// Products with quantised matrices: integers within a block of 32 inputs, float32 across blocks. Each row of x is first
// quantised to 8 bits, block by block. The integer sum of a block is exact with any instruction set; blocks are added
// in ascending order to one accumulator. So a row's result depends on that row alone.
#pragma once

#include "prefetch.h"
#include "ints.h"
#include "vec.h"

namespace truffula {
namespace {

// The head of a block of a quantised row of x, before its 32 values. `correction` is the start value of the block's
// sums (int32: minus the weights' offset times the sum of the values), or for kQ4_1 scale * sum (float).
struct BlockHead {
  float scale;
  int32_t correction;
};

// Tables without 8-bit dot products read x for kQ8_0 as 16-bit integers, each four in the order 0 2 1 3.
#if (defined(__AVX2__) || defined(__AVX512F__)) && !defined(__AVX512VNNI__)
constexpr bool kWideBytes = true;
#else
constexpr bool kWideBytes = false;
#endif
TF_INLINE constexpr bool wide(int format) { return kWideBytes && format == kQ8_0; }
TF_INLINE constexpr int64_t x_block_bytes(int format) { return (int64_t)sizeof(BlockHead) + (wide(format) ? 64 : 32); }
// Lines of 64 bytes per block, and bytes of scales per block, which follow all lines.
TF_INLINE constexpr int64_t lines_of(int format) { return format == kQ8_0 ? 8 : format == kQ5_0 ? 5 : 4; }
TF_INLINE constexpr int64_t scale_bytes(int format) { return format == kQ4_1 ? 64 : 32; }

TF_INLINE I four_of(const uint8_t* p) {  // four values of x (or two 16-bit ones) in every lane
  int32_t x;
  memcpy(&x, p, sizeof x);
  return all32(x);
}
TF_INLINE BlockHead head_of(const uint8_t* block) {
  BlockHead head;
  memcpy(&head, block, sizeof head);
  return head;
}

// Sums of a block with 8-bit weights. With an 8-bit dot product: (q + 128) * x, starting at -128 * sum(x). Without: q
// in the upper byte of 16 bits times x in 16 bits, which gives 256 times the sum and fits 32 bits.
template <int MR, int NP>
TF_INLINE void byte_sums(I (&sums)[MR][NP], const uint8_t* x, int64_t stride, const uint8_t* lines, int64_t panel_bytes) {
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    if constexpr (kWideBytes) {
#if (defined(__AVX2__) || defined(__AVX512F__)) && !defined(__AVX512VNNI__)
      I even[NP], odd[NP];
      for (int p = 0; p < NP; ++p) {
        const I w = line_at(lines + p * panel_bytes + 64 * j);
        even[p] = up16(w, 8);
        odd[p] = w & all32((int32_t)0xff00ff00u);
      }
      for (int r = 0; r < MR; ++r) {
        const uint8_t* four = x + r * stride + sizeof(BlockHead) + 8 * j;
        const I a = four_of(four), b = four_of(four + 4);
        for (int p = 0; p < NP; ++p) sums[r][p] = add32(add32(sums[r][p], madd(even[p], a)), madd(odd[p], b));
      }
#endif
    } else {
#if defined(__AVX512VNNI__) || !defined(__AVX2__)
      I w[NP];
      for (int p = 0; p < NP; ++p) w[p] = flip_signs(line_at(lines + p * panel_bytes + 64 * j));
      for (int r = 0; r < MR; ++r) {
        const I a = four_of(x + r * stride + sizeof(BlockHead) + 4 * j);
        for (int p = 0; p < NP; ++p) sums[r][p] = dot_bytes(sums[r][p], w[p], a);
      }
#endif
    }
  }
#if (defined(__AVX2__) || defined(__AVX512F__)) && !defined(__AVX512VNNI__)
  for (int r = 0; r < MR; ++r)
    for (int p = 0; p < NP; ++p) sums[r][p] = down32(sums[r][p], 8);
#endif
}

// Line j of a block's nibbles: inputs 4 j ... in the low halves, 16 + 4 j ... in the high ones; kQ5_0 adds the fifth
// bits from the block's last line, where bit g of byte b belongs to input 4 g + b.
template <int FORMAT>
TF_INLINE void nibbles_of(I* low, I* high, const uint8_t* lines, int j) {
  const I mask = all32(0x0f0f0f0f), w = line_at(lines + 64 * j);
  *low = w & mask;
  *high = down16(w, 4) & mask;
  if constexpr (FORMAT == kQ5_0) {
    const I bits = line_at(lines + 256), fifth = all32(0x10101010);
    *low = *low | (up16(bits, 4 - j) & fifth);
    *high = *high | (down16(bits, j) & fifth);
  }
}

// Sums of a block with weights 0 .. 15 (kQ5_0: 0 .. 31). Without an 8-bit dot product pairs are summed in 16 bits,
// which hold 8 pairs of at most 15 * 127 * 2, or 4 pairs of kQ5_0.
template <int MR, int NP, int FORMAT>
TF_INLINE void nibble_sums(I (&sums)[MR][NP], const uint8_t* x, int64_t stride, const uint8_t* lines,
                           int64_t panel_bytes) {
#if (defined(__AVX2__) || defined(__AVX512F__)) && !defined(__AVX512VNNI__)
  constexpr int kHold = FORMAT == kQ5_0 ? 2 : 4;
#pragma GCC unroll 2
  for (int from = 0; from < 4; from += kHold) {
    I pairs[MR][NP];
    for (int r = 0; r < MR; ++r)
      for (int p = 0; p < NP; ++p) pairs[r][p] = all32(0);
#pragma GCC unroll 4
    for (int j = from; j < from + kHold; ++j) {
      I low[NP], high[NP];
      for (int p = 0; p < NP; ++p) nibbles_of<FORMAT>(low + p, high + p, lines + p * panel_bytes, j);
      for (int r = 0; r < MR; ++r) {
        const uint8_t* four = x + r * stride + sizeof(BlockHead) + 4 * j;
        const I a = four_of(four), b = four_of(four + 16);
        for (int p = 0; p < NP; ++p)
          pairs[r][p] = add16(add16(pairs[r][p], maddubs(low[p], a)), maddubs(high[p], b));
      }
    }
    for (int r = 0; r < MR; ++r)
      for (int p = 0; p < NP; ++p) sums[r][p] = add32(sums[r][p], madd(pairs[r][p], all32(0x00010001)));
  }
#else
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    I low[NP], high[NP];
    for (int p = 0; p < NP; ++p) nibbles_of<FORMAT>(low + p, high + p, lines + p * panel_bytes, j);
    for (int r = 0; r < MR; ++r) {
      const uint8_t* four = x + r * stride + sizeof(BlockHead) + 4 * j;
      const I a = four_of(four), b = four_of(four + 16);
      for (int p = 0; p < NP; ++p) sums[r][p] = dot_bytes(dot_bytes(sums[r][p], low[p], a), high[p], b);
    }
  }
#endif
}

// y[r, 16 p ...] = x[r] W^T for MR rows and NP panels.
template <int MR, int NP, int FORMAT>
static void quant_tile(const uint8_t* x, int64_t stride, const uint8_t* panel, int64_t panel_bytes, int64_t blocks,
                       float* y, int64_t y_stride, PrefetchDistance ahead) {
  V acc[MR][NP];
  for (int r = 0; r < MR; ++r)
    for (int p = 0; p < NP; ++p) acc[r][p] = zero();
  const uint8_t* scales = panel + blocks * lines_of(FORMAT) * 64;
  for (int64_t block = 0; block < blocks; ++block) {
    const uint8_t* lines = panel + block * lines_of(FORMAT) * 64;
    const uint8_t* at = x + block * x_block_bytes(FORMAT);
    for (int j = 0; j < lines_of(FORMAT); ++j) prefetch_lines<NP>(lines + 64 * j, panel_bytes, ahead);
    I sums[MR][NP];
    for (int r = 0; r < MR; ++r)
      for (int p = 0; p < NP; ++p)
        sums[r][p] = all32(FORMAT == kQ4_1 || wide(FORMAT) ? 0 : head_of(at + r * stride).correction);
    if constexpr (FORMAT == kQ8_0) byte_sums<MR, NP>(sums, at, stride, lines, panel_bytes);
    else nibble_sums<MR, NP, FORMAT>(sums, at, stride, lines, panel_bytes);
    for (int p = 0; p < NP; ++p) {
      const uint8_t* of = scales + p * panel_bytes + block * scale_bytes(FORMAT);
      __builtin_prefetch(of + (p ? ahead.second : ahead.first), 0, 2);
      const V scale = load_half(of);
      for (int r = 0; r < MR; ++r)
        acc[r][p] = fma(floats_of(sums[r][p]), scale * set1(head_of(at + r * stride).scale), acc[r][p]);
      if constexpr (FORMAT == kQ4_1) {
        const V least = load_half(of + 32);
        for (int r = 0; r < MR; ++r) {
          float shift;
          memcpy(&shift, at + r * stride + offsetof(BlockHead, correction), sizeof shift);
          acc[r][p] = fma(least, set1(shift), acc[r][p]);
        }
      }
    }
  }
  for (int r = 0; r < MR; ++r)
    for (int p = 0; p < NP; ++p) store(y + r * y_stride + kLanes * p, acc[r][p]);
}

template <int NP, int FORMAT>
static void quant_rows(int rows, const uint8_t* x, int64_t stride, const uint8_t* panel, int64_t panel_bytes,
                       int64_t blocks, float* y, int64_t y_stride, PrefetchDistance ahead) {
#define TF_CASE(n)                                                                                               \
  case n:                                                                                                        \
    if constexpr (n <= kQuantRows)                                                                               \
      return quant_tile<n, NP, FORMAT>(x, stride, panel, panel_bytes, blocks, y, y_stride, ahead);               \
    break;
  switch (rows) { TF_CASE(1) TF_CASE(2) TF_CASE(3) TF_CASE(4) TF_CASE(5) TF_CASE(6) }
#undef TF_CASE
}

template <int FORMAT>
static void quant_product(int rows, int panels, const uint8_t* x, int64_t stride, const uint8_t* panel,
                          int64_t panel_bytes, int64_t blocks, float* y, int64_t y_stride) {
  const int tiles = tiles_of(rows, kQuantRows);
  for (int t = 0; t < tiles; ++t) {
    const int r = first_row(rows, t, tiles, kQuantRows), count = first_row(rows, t + 1, tiles, kQuantRows) - r;
    const uint8_t* from = x + r * stride;
    float* to = y + r * y_stride;
    const PrefetchDistance ahead = prefetch_distance(t, tiles, panels, panel_bytes);
    if (panels == 2 && count <= kQuantTwo) {
      quant_rows<2, FORMAT>(count, from, stride, panel, panel_bytes, blocks, to, y_stride, ahead);
    } else {
      for (int p = 0; p < panels; ++p)
        quant_rows<1, FORMAT>(count, from, stride, panel + p * panel_bytes, panel_bytes, blocks, to + kLanes * p,
                              y_stride, single_panel(ahead, p));
    }
  }
}

TF_INLINE void quant_product_of(const Packed* w, int rows, int panels, const uint8_t* x, int64_t stride,
                                const uint8_t* panel, float* y, int64_t y_stride) {
  const int64_t blocks = w->inputs / kBlock, bytes = w->panel_bytes;
  if (w->format == kQ8_0) quant_product<kQ8_0>(rows, panels, x, stride, panel, bytes, blocks, y, y_stride);
  else if (w->format == kQ4_0) quant_product<kQ4_0>(rows, panels, x, stride, panel, bytes, blocks, y, y_stride);
  else if (w->format == kQ4_1) quant_product<kQ4_1>(rows, panels, x, stride, panel, bytes, blocks, y, y_stride);
  else quant_product<kQ5_0>(rows, panels, x, stride, panel, bytes, blocks, y, y_stride);
}

// Quantises 32 values of x to 8 bits: the largest magnitude becomes 127. A non-finite value makes the whole block NaN.
static void quantise_block(const float* x, int format, uint8_t* to) {
  const V a = load(x), b = load(x + kLanes);
  const V wrong = (a - a) + (b - b);
  const float most = max_of(where_nan(wrong, set1(INFINITY), vmax(vabs(a), vabs(b))));
  const bool finite = most < INFINITY, any = finite && most > 1e-30f;
  const V by = set1(any ? 127.0f / most : 0.0f);
  uint8_t kept[kBlock], *bytes = wide(format) ? kept : to + sizeof(BlockHead);  // reading bytes just stored would stall
  const int32_t sum = to_bytes(finite ? nearest(a * by) : zero(), finite ? nearest(b * by) : zero(), bytes);
  BlockHead head;
  head.scale = finite ? (any ? most / 127.0f : 0.0f) : NAN;
  head.correction = sum * (format == kQ8_0 ? -128 : format == kQ5_0 ? -16 : -8);
  if (format == kQ4_1) {
    const float shift = head.scale * (float)sum;
    memcpy(&head.correction, &shift, sizeof shift);
  }
  memcpy(to, &head, sizeof head);
  if (!wide(format)) return;
  int16_t pairs[kBlock];
  for (int i = 0; i < kBlock; i += 4) {
    pairs[i] = (int8_t)bytes[i];
    pairs[i + 1] = (int8_t)bytes[i + 2];
    pairs[i + 2] = (int8_t)bytes[i + 1];
    pairs[i + 3] = (int8_t)bytes[i + 3];
  }
  memcpy(to + sizeof head, pairs, sizeof pairs);
}

// Stores a row of bfloat16 values as pairs of inputs 2k and 2k + 1, padded with zeros.
static void pair_row(const float* x, int inputs, uint8_t* to) {
  uint16_t* halves = (uint16_t*)to;
  int k = 0;
  for (; k + kLanes <= inputs; k += kLanes) store_halves(halves + k, load(x + k));
  for (; k < inputs; ++k) halves[k] = to_bf16(x[k]);
  for (; k < pair_row_bytes(inputs) / 2; ++k) halves[k] = 0;
}

static void quantise(const QuantiseCall* c, int32_t row_lo, int32_t row_hi) {
  if (!is_quantised(c->format)) {
    for (int32_t r = row_lo; r < row_hi; ++r)
      pair_row(c->x.data + r * c->x.stride, c->inputs, c->to + r * c->stride);
    return;
  }
  for (int32_t r = row_lo; r < row_hi; ++r)
    for (int32_t block = 0; block < c->inputs / kBlock; ++block)
      quantise_block(c->x.data + r * c->x.stride + block * kBlock, c->format,
                     c->to + r * c->stride + block * x_block_bytes(c->format));
}

// Dequantises the weights of one output.
static void unpack_lane(const uint8_t* panel, int format, int64_t inputs, int64_t lane, float* out) {
  const int64_t blocks = inputs / kBlock;
  for (int64_t block = 0; block < blocks; ++block) {
    const uint8_t* lines = panel + block * lines_of(format) * 64 + 4 * lane;
    const uint8_t* of = panel + blocks * lines_of(format) * 64 + block * scale_bytes(format) + 2 * lane;
    uint16_t halves[2] = {0, 0};
    memcpy(halves, of, 2);
    if (format == kQ4_1) memcpy(halves + 1, of + 32, 2);
    const float scale = half_to_float(halves[0]), least = half_to_float(halves[1]);
    for (int k = 0; k < kBlock; ++k) {
      int q;
      if (format == kQ8_0) {
        q = (int8_t)lines[k / 4 * 64 + k % 4];
      } else {
        q = lines[k % 16 / 4 * 64 + k % 4] >> (k < 16 ? 0 : 4) & 15;
        if (format == kQ5_0) q = (q | (lines[256 + k % 4] >> (k / 4) & 1) << 4) - 16;
        if (format == kQ4_0) q -= 8;
      }
      const float value = (float)q * scale;
      out[block * kBlock + k] = format == kQ4_1 ? value + least : value;
    }
  }
}

}  // namespace
}  // namespace truffula

// Products with scaled matrices. The numbers of a group of inputs are unpacked to bfloat16, which holds them exactly, and
// multiplied as those of a bfloat16 matrix; the sums of a group start from zero, are multiplied by its scales, and are
// added to those of the groups before it. So a row's result depends on that row alone, and is the same in all tables
// whose bfloat16 products are.
#pragma once

#include "ints.h"
#include "products.inc.h"
#include "tiles.inc.h"
#include "vec.h"

namespace truffula {
namespace {

constexpr int64_t kMostGroup = 128;

TF_INLINE uint16_t bf16_of_e4m3(uint8_t code) {
  const uint32_t size = code & 0x7fu;
  const float small = (float)size * 0x1p-9f;  // without a leading one
  uint32_t bits;
  memcpy(&bits, &small, sizeof bits);
  if (size >= 8) bits = (size << 20) + (120u << 23);
  return (uint16_t)(bits >> 16 | (code & 0x80u) << 8);
}

#if defined(__AVX2__) || defined(__AVX512F__)
// A line's numbers as two lines of pairs: of inputs 0 and 1, and of inputs 2 and 3. The upper byte of a bfloat16 (sign
// and seven bits of the exponent) follows from the code's upper half, the lower byte (a bit of the exponent, and the
// mantissa) is its lower half; both are corrected for numbers without a leading one.
TF_INLINE void unpack_line(const uint8_t* line, uint8_t* to) {
  static constexpr uint8_t kUpper[16] = {60, 61, 62, 63, 64, 65, 66, 67, 188, 189, 190, 191, 192, 193, 194, 195};
  static constexpr uint8_t kUpperOfSmall[16] = {196, 255, 255, 255};
  static constexpr uint8_t kLowerOfSmall[16] = {0, 0xf0, 0x60, 0x90, 0xc0, 0xd0, 0xe0, 0xf0};
  const I codes = line_at(line), low = all32(0x0f0f0f0f);
  const I small = add8(codes & all32(0x7f7f7f7f), all32(0x70707070));  // bit 7 is set where the size is 16 or more
  const I lower = add8(up16(codes, 4) & all32((int32_t)0xf0f0f0f0u), lookup(kLowerOfSmall, small));
  const I upper = add8(lookup(kUpper, down16(codes, 4) & low), lookup(kUpperOfSmall, small));
  store_line(to, interleave_low(lower, upper));
  store_line(to + 64, interleave_high(lower, upper));
}
#else
TF_INLINE void unpack_line(const uint8_t* line, uint8_t* to) {
  for (int pair = 0; pair < 2; ++pair)
    for (int i = 0; i < 2 * kLanes; ++i) {
      const uint16_t half = bf16_of_e4m3(line[i / 8 * 16 + 8 * pair + i % 8]);
      memcpy(to + 64 * pair + 2 * i, &half, sizeof half);
    }
}
#endif

// sums = rows r .. r + rows of x times the `count` lines of inputs k ...
TF_INLINE void multiply_group(const LinearCall* c, int r, int rows, int panels, int64_t k, const uint8_t* lines,
                              int64_t count, float* sums) {
  constexpr int64_t kStride = 2 * kLanes;
  const int64_t bytes = 64 * count;
#if defined(__AVX512BF16__)
  if (c->quantised_x) {
    const uint8_t* pairs = c->quantised_x + r * c->quantised_stride + 2 * k;
#if defined(TRUFFULA_TILES)
    __asm__ volatile("" ::: "memory");  // the lines are written before tiles are loaded from them
    return pair_tile_product(rows, panels, pairs, c->quantised_stride, lines, bytes, sums, kStride, false);
#else
    return pair_product<false>(rows, panels, pairs, c->quantised_stride, lines, bytes, sums, kStride);
#endif
  }
#endif
  const float* x = c->x.data + r * c->x.stride + k;
  product_of<kScattered>(kBF16, rows, panels, x, c->x.stride, lines, bytes, 2 * count, sums, kStride);
}

// y = rows r .. r + rows of x times a unit of panels. ROWS: the most rows, of whole tiles.
template <int ROWS>
static void scaled_product(const LinearCall* c, int r, int rows, int panels, const uint8_t* panel, float* y,
                           int64_t y_stride) {
  alignas(64) uint8_t lines[2 * 32 * kMostGroup];
  alignas(64) float sums[ROWS * 2 * kLanes];
  const int64_t each = group_inputs(c->w.format), bytes = c->w.panel_bytes, inputs = c->w.inputs;
  const PrefetchDistance ahead = r == 0 ? prefetch_distance(0, 1, panels, bytes) : PrefetchDistance{0, 0};
  for (int64_t k = 0; k < inputs; k += each) {
    const int64_t packed = 16 * (inputs - k < each ? inputs - k : each);  // bytes of the group in a panel
    for (int p = 0; p < panels; ++p) {
      const uint8_t* from = panel + p * bytes + 16 * k;
      for (int64_t at = 0; at < packed; at += 64) {
        __builtin_prefetch(from + at + (p ? ahead.second : ahead.first), 0, 2);
        unpack_line(from + at, lines + 2 * (p * packed + at));
      }
    }
    multiply_group(c, r, rows, panels, k, lines, packed / 32, sums);
    for (int p = 0; p < panels; ++p) {
      const uint8_t* scales = panel + p * bytes + 16 * inputs + 64 * (k / each);
      __builtin_prefetch(scales + (p ? ahead.second : ahead.first), 0, 2);
      const V scale = load((const float*)scales);
      for (int i = 0; i < rows; ++i) {
        const V sum = load(sums + (2 * i + p) * kLanes);
        float* to = y + i * y_stride + kLanes * p;
        store(to, k ? fma(sum, scale, load(to)) : sum * scale);
      }
    }
  }
}

// Dequantises the weights of one output.
static void unpack_scaled_lane(const uint8_t* panel, int format, int64_t inputs, int64_t lane, float* out) {
  const float* scales = (const float*)(panel + 16 * inputs) + lane;
  const uint8_t* codes = panel + lane / 4 * 16 + lane % 4 * 2;
  for (int64_t k = 0; k < inputs; ++k)
    out[k] = to_float(bf16_of_e4m3(codes[k / 4 * 64 + k % 4 / 2 * 8 + k % 2])) * scales[k / group_inputs(format) * kLanes];
}

}  // namespace
}  // namespace truffula

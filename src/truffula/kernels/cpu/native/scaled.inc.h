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

// Rows up to which lines are unpacked to registers, for each tile of rows; more rows share lines in memory.
#if defined(__AVX512F__)
constexpr int kFewRows = 8;
#else
constexpr int kFewRows = 2;
#endif

// The bits as bfloat16 of an e4m3 whose halves are exchanged.
TF_INLINE uint16_t bf16_of_e4m3(uint8_t code) {
  const uint32_t size = (code & 7u) << 4 | code >> 4;
  const float small = (float)size * 0x1p-9f;  // without a leading one
  uint32_t bits;
  memcpy(&bits, &small, sizeof bits);
  if (size >= 8) bits = (size << 20) + (120u << 23);
  return (uint16_t)(bits >> 16 | (code & 8u) << 12);
}

// A line's numbers as two lines of pairs: of inputs 0 and 1, and of inputs 2 and 3.
struct Lines {
  I first, second;
};

#if defined(__AVX2__) || defined(__AVX512F__)
// The upper byte of a bfloat16 (its sign and seven bits of the exponent) follows from one half of the code, the lower
// byte (a bit of the exponent, and the mantissa) is the other half. Numbers without a leading one, of which a checkpoint
// has few, are corrected: those with three zeros behind their sign.
TF_INLINE Lines unpack_line(const uint8_t* line) {
  static constexpr uint8_t kUpper[16] = {60, 61, 62, 63, 64, 65, 66, 67, 188, 189, 190, 191, 192, 193, 194, 195};
  const I codes = line_at(line);
  I lower = codes & all32((int32_t)0xf0f0f0f0u), upper = lookup(kUpper, codes & all32(0x0f0f0f0f));
  if (__builtin_expect(any_without(codes, 0x07070707), 0)) {
    static constexpr uint8_t kUpperOfSmall[16] = {196, 255, 255, 255}, kLowerOfSmall[16] = {0, 0xf0, 0x60, 0x90, 0xc0, 0xd0, 0xe0, 0xf0};
    const I others = add8(codes & all32(0x07070707), all32(0x7f7f7f7f)) & all32((int32_t)0x80808080u);  // not corrected
    const I at = (down16(codes, 4) & all32(0x0f0f0f0f)) | others;
    lower = add8(lower, lookup(kLowerOfSmall, at));
    upper = add8(upper, lookup(kUpperOfSmall, at));
  }
  return {interleave_low(lower, upper), interleave_high(lower, upper)};
}
#else
TF_INLINE Lines unpack_line(const uint8_t* line) {
  uint16_t halves[2][2 * kLanes];
  for (int pair = 0; pair < 2; ++pair)
    for (int i = 0; i < 2 * kLanes; ++i) halves[pair][i] = bf16_of_e4m3(line[i / 8 * 16 + 8 * pair + i % 8]);
  return {line_at((const uint8_t*)halves[0]), line_at((const uint8_t*)halves[1])};
}
#endif

// Two pairs of x, or four floats, times a line's numbers, in the order of `multiply`.
TF_INLINE V add_products(V sum, const Lines& w, const float* x) {
  sum = fma(odd_of(w.first), set1(x[1]), sum);
  sum = fma(even_of(w.first), set1(x[0]), sum);
  sum = fma(odd_of(w.second), set1(x[3]), sum);
  return fma(even_of(w.second), set1(x[2]), sum);
}
#if defined(__AVX512BF16__)
TF_INLINE V add_products(V sum, const Lines& w, const uint8_t* x) {
  return dot_pairs(dot_pairs(sum, w.first, four_of(x)), w.second, four_of(x + 4));
}
#endif

// y[r, 16 p ...] = x[r] W^T for MR rows and NP panels, x as floats or as pairs; `each`: the inputs of a group.
template <int MR, int NP, class T>
static void scaled_tile(const T* x, int64_t stride, const Packed* w, int64_t each, const uint8_t* panel, float* y,
                        int64_t y_stride, PrefetchDistance ahead) {
  constexpr int64_t kFour = sizeof(T) == 1 ? 8 : 4;  // of four inputs
  const int64_t bytes = w->panel_bytes, inputs = w->inputs;
  V total[MR][NP];
  RowsAt<MR, T> at(x, stride);
  for (int64_t k = 0; k < inputs; k += each) {
    V sums[MR][NP];
    for (int r = 0; r < MR; ++r)
      for (int p = 0; p < NP; ++p) sums[r][p] = zero();
    const uint8_t *line = panel + 16 * k, *end = panel + 16 * (k + each < inputs ? k + each : inputs);
    for (; line < end; line += 64, at.step(kFour)) {
      prefetch_lines<NP>(line, bytes, ahead);
      Lines lines[NP];
      for (int p = 0; p < NP; ++p) lines[p] = unpack_line(line + p * bytes);
      for (int r = 0; r < MR; ++r)
        for (int p = 0; p < NP; ++p) sums[r][p] = add_products(sums[r][p], lines[p], at.row(r));
    }
    const uint8_t* scales = panel + 16 * inputs + 64 * (k / each);
    prefetch_lines<NP>(scales, bytes, ahead);
    for (int p = 0; p < NP; ++p) {
      const V scale = load((const float*)(scales + p * bytes));
      for (int r = 0; r < MR; ++r) total[r][p] = k ? fma(sums[r][p], scale, total[r][p]) : sums[r][p] * scale;
    }
  }
  for (int r = 0; r < MR; ++r)
    for (int p = 0; p < NP; ++p) store(y + r * y_stride + kLanes * p, total[r][p]);
}

template <int NP, class T>
static void scaled_rows(int rows, const T* x, int64_t stride, const Packed* w, int64_t each, const uint8_t* panel,
                        float* y, int64_t y_stride, PrefetchDistance ahead) {
#define TF_CASE(n)                                                                             \
  case n:                                                                                      \
    if constexpr (n <= kFewRows)                                                               \
      return scaled_tile<n, NP>(x, stride, w, each, panel, y, y_stride, ahead);                \
    break;
  switch (rows) { TF_CASE(1) TF_CASE(2) TF_CASE(3) TF_CASE(4) TF_CASE(5) TF_CASE(6) TF_CASE(7) TF_CASE(8) }
#undef TF_CASE
}

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

static void few_rows(const LinearCall* c, int r, int rows, int panels, int64_t each, const uint8_t* panel, float* y,
                     int64_t y_stride, PrefetchDistance ahead) {
#if defined(__AVX512F__)
  constexpr int kTogether = 2;
#else
  constexpr int kTogether = 1;  // more registers than there are
#endif
  const auto run = [&](const auto* x, int64_t stride) {
    if (panels == kTogether) return scaled_rows<kTogether>(rows, x, stride, &c->w, each, panel, y, y_stride, ahead);
    for (int p = 0; p < panels; ++p)
      scaled_rows<1>(rows, x, stride, &c->w, each, panel + p * c->w.panel_bytes, y + kLanes * p, y_stride, single_panel(ahead, p));
  };
#if defined(__AVX512BF16__)
  if (c->quantised_x) return run(c->quantised_x + r * c->quantised_stride, c->quantised_stride);
#endif
  run(c->x.data + r * c->x.stride, c->x.stride);
}

// y = rows r .. r + rows of x times a unit of panels. ROWS: the most rows, of whole tiles.
template <int ROWS>
static void scaled_product(const LinearCall* c, int r, int rows, int panels, const uint8_t* panel, float* y,
                           int64_t y_stride) {
  const int64_t each = group_inputs(c->w.format), bytes = c->w.panel_bytes, inputs = c->w.inputs;
  const PrefetchDistance ahead = r == 0 ? prefetch_distance(0, 1, panels, bytes) : PrefetchDistance{0, 0};
  #if defined(TRUFFULA_TILES)
  const bool few = rows <= kFewRows && !tiled(c);
#else
  const bool few = rows <= kFewRows;
#endif
  if (few) return few_rows(c, r, rows, panels, each, panel, y, y_stride, ahead);
  alignas(64) uint8_t lines[2 * 32 * kMostGroup];
  alignas(64) float sums[ROWS * 2 * kLanes];
  for (int64_t k = 0; k < inputs; k += each) {
    const int64_t packed = 16 * (inputs - k < each ? inputs - k : each);  // bytes of the group in a panel
    for (int p = 0; p < panels; ++p) {
      const uint8_t* from = panel + p * bytes + 16 * k;
      for (int64_t at = 0; at < packed; at += 64) {
        __builtin_prefetch(from + at + (p ? ahead.second : ahead.first), 0, 2);
        const Lines made = unpack_line(from + at);
        store_line(lines + 2 * (p * packed + at), made.first);
        store_line(lines + 2 * (p * packed + at) + 64, made.second);
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

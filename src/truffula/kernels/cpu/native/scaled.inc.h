// Products with scaled matrices. The numbers of a group of inputs are unpacked to a format that holds them exactly, FP8
// to bfloat16 and NF4 to float32, and multiplied as those of a matrix in this format; the sums of a group start from
// zero, are multiplied by its scales, and are added to those of the groups before it. FP4 has scales for so few inputs
// that its numbers are multiplied by them when they are unpacked. So a row's result depends on that row alone, and is the
// same in all tables whose products with such a matrix are.
#pragma once

#include "ints.h"
#include "products.inc.h"
#include "tiles.inc.h"
#include "vec.h"

namespace truffula {
namespace {

// Unpacked lines of the largest group of a panel.
constexpr int64_t kMostLines = 64;

// Of bitsandbytes' codes.
alignas(64) static constexpr float kNF4Numbers[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
    -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

alignas(64) static constexpr float kE2M1Numbers[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                                       -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

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

TF_INLINE float of_e4m3(uint8_t code) { return to_float(bf16_of_e4m3((uint8_t)(code << 4 | code >> 4))); }

// The e4m3 at byte `n` of each 32-bit number, from its halves, of which the lower one has a bit of the exponent; a second
// product corrects those without a leading one. All steps are exact.
TF_INLINE V from_e4m3(I codes, int n) {
  alignas(64) static constexpr float kLower[16] = {1.0f, 1.125f, 1.25f, 1.375f, 1.5f, 1.625f, 1.75f, 1.875f,
                                                   2.0f, 2.25f,  2.5f,  2.75f,  3.0f, 3.25f,  3.5f,  3.75f};
  alignas(64) static constexpr float kUpper[16] = {0x1p-7f,  0x1p-5f,  0x1p-3f,  0x1p-1f,  0x1p1f,  0x1p3f,  0x1p5f,  0x1p7f,
                                                   -0x1p-7f, -0x1p-5f, -0x1p-3f, -0x1p-1f, -0x1p1f, -0x1p3f, -0x1p5f, -0x1p7f};
  alignas(64) static constexpr float kOfSmall[16] = {-8.0f, -7.0f, -6.0f, -5.0f, -4.0f, -3.0f, -2.0f, -1.0f};
  alignas(64) static constexpr float kSmall[16] = {0x1p-10f, 0, 0, 0, 0, 0, 0, 0, -0x1p-10f};
  const V correction = entries_of(load(kOfSmall), codes, 8 * n) * entries_of(load(kSmall), codes, 8 * n + 4);
  return fma(entries_of(load(kLower), codes, 8 * n), entries_of(load(kUpper), codes, 8 * n + 4), correction);
}

// The scales of FP4 for inputs 16 n .. 16 n + 15 of the group whose scales are at `scales`; the panel's factors at `end`.
TF_INLINE V fp4_scale(const uint8_t* scales, const uint8_t* end, int n) {
  return from_e4m3(line_at(scales), n) * load((const float*)end) / load((const float*)(end + 64));
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
    static constexpr uint8_t kUpperOfSmall[16] = {196, 255, 255, 255};
    static constexpr uint8_t kLowerOfSmall[16] = {0, 0xf0, 0x60, 0x90, 0xc0, 0xd0, 0xe0, 0xf0};
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

// sums += MR rows of x, as floats or as pairs, times a line of NP panels. kFP8_128 stands for kFP8_32 too. kFP4_16 has
// `scales`.
template <int FORMAT, int MR, int NP, class T>
TF_INLINE void multiply_line(V (&sums)[MR][NP], const RowsAt<MR, T>& at, const uint8_t* line, int64_t bytes,
                             const V (&scales)[NP]) {
  if constexpr (has_four_bits(FORMAT)) {
    const V table = load(FORMAT == kNF4 ? kNF4Numbers : kE2M1Numbers);
    I codes[NP];
    for (int p = 0; p < NP; ++p) codes[p] = line_at(line + p * bytes);
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      V w[NP];
      for (int p = 0; p < NP; ++p) {
        w[p] = entries_of(table, codes[p], 4 * k);
        if constexpr (FORMAT == kFP4_16) w[p] = w[p] * scales[p];
      }
      for (int r = 0; r < MR; ++r) {
        const V b = set1(at.row(r)[k]);
        for (int p = 0; p < NP; ++p) sums[r][p] = fma(w[p], b, sums[r][p]);
      }
    }
  } else {
    for (int p = 0; p < NP; ++p) {
      const Lines w = unpack_line(line + p * bytes);
      for (int r = 0; r < MR; ++r) sums[r][p] = add_products(sums[r][p], w, at.row(r));
    }
  }
}

// y[r, 16 p ...] = x[r] W^T for MR rows and NP panels; `each`: the inputs of a group.
template <int FORMAT, int MR, int NP, class T>
static void scaled_tile(const T* x, int64_t stride, const Packed* w, int64_t each, const uint8_t* panel, float* y,
                        int64_t y_stride, PrefetchDistance ahead) {
  constexpr int64_t kInput = scaled_input_bytes(FORMAT), kStep = 64 / kInput * (sizeof(T) == 1 ? 2 : 1);  // a line's x
  const int64_t bytes = w->panel_bytes, inputs = w->inputs;
  V total[MR][NP];
  RowsAt<MR, T> at(x, stride);
  for (int64_t k = 0; k < inputs; k += each) {
    V sums[MR][NP];
    for (int r = 0; r < MR; ++r)
      for (int p = 0; p < NP; ++p) sums[r][p] = zero();
    const uint8_t* const first = panel + kInput * k;
    const uint8_t *line = first, *end = panel + kInput * (k + each < inputs ? k + each : inputs);
    const uint8_t* scales = panel + scales_at(FORMAT, inputs) + 64 * (k / each);
    V scale[NP];
    for (; line < end; line += 64, at.step(kStep)) {
      prefetch_lines<NP>(line, bytes, ahead);
      if constexpr (FORMAT == kFP4_16) {
        if ((line - first) % 128 == 0)
          for (int p = 0; p < NP; ++p)
            scale[p] = fp4_scale(scales + p * bytes, panel + p * bytes + scales_end(FORMAT, inputs), (int)((line - first) / 128));
      }
      multiply_line<FORMAT>(sums, at, line, bytes, scale);
    }
    prefetch_lines<NP>(scales, bytes, ahead);
    for (int p = 0; p < NP; ++p) {
      if constexpr (FORMAT == kFP4_16) {
        for (int r = 0; r < MR; ++r) total[r][p] = k ? sums[r][p] + total[r][p] : sums[r][p];
      } else {
        scale[p] = load((const float*)(scales + p * bytes));
        for (int r = 0; r < MR; ++r) total[r][p] = k ? fma(sums[r][p], scale[p], total[r][p]) : sums[r][p] * scale[p];
      }
    }
  }
  for (int r = 0; r < MR; ++r)
    for (int p = 0; p < NP; ++p) store(y + r * y_stride + kLanes * p, total[r][p]);
}

template <int FORMAT, int NP, class T>
static void scaled_rows(int rows, const T* x, int64_t stride, const Packed* w, int64_t each, const uint8_t* panel,
                        float* y, int64_t y_stride, PrefetchDistance ahead) {
#define TF_CASE(n)                                                                             \
  case n:                                                                                      \
    if constexpr (n <= kFewRows)                                                               \
      return scaled_tile<FORMAT, n, NP>(x, stride, w, each, panel, y, y_stride, ahead);        \
    break;
  switch (rows) { TF_CASE(1) TF_CASE(2) TF_CASE(3) TF_CASE(4) TF_CASE(5) TF_CASE(6) TF_CASE(7) TF_CASE(8) }
#undef TF_CASE
}

template <int FORMAT, class T>
static void few_rows(const LinearCall* c, int rows, int panels, const T* x, int64_t stride, const uint8_t* panel,
                     float* y, int64_t y_stride, PrefetchDistance ahead) {
  const int64_t each = group_inputs(c->w.format);
#if defined(__AVX512F__)
  if (panels == 2) return scaled_rows<FORMAT, 2>(rows, x, stride, &c->w, each, panel, y, y_stride, ahead);
#else  // registers suffice for a row alone
  if (panels == 2 && rows == 1) return scaled_tile<FORMAT, 1, 2>(x, stride, &c->w, each, panel, y, y_stride, ahead);
#endif
  for (int p = 0; p < panels; ++p)
    scaled_rows<FORMAT, 1>(rows, x, stride, &c->w, each, panel + p * c->w.panel_bytes, y + kLanes * p, y_stride,
                           single_panel(ahead, p));
}

// sums = rows r .. r + rows of x times the `count` unpacked lines of inputs k ...
template <int FORMAT>
TF_INLINE void multiply_group(const LinearCall* c, int r, int rows, int panels, int64_t k, const uint8_t* lines,
                              int64_t count, float* sums) {
  constexpr int64_t kStride = 2 * kLanes;
  const int64_t bytes = 64 * count;
  const float* x = c->x.data + r * c->x.stride + k;
  if constexpr (has_four_bits(FORMAT))
    return product<kF32, kScattered>(rows, panels, x, c->x.stride, lines, bytes, count, sums, kStride);
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
  product<kBF16, kScattered>(rows, panels, x, c->x.stride, lines, bytes, 2 * count, sums, kStride);
}

// Unpacks `bytes` bytes of a panel's lines; returns the number of lines made. kFP4_16 has `scales` and
// `factors`.
template <int FORMAT>
TF_INLINE int64_t unpack_group(const uint8_t* from, int64_t bytes, uint8_t* to, int64_t ahead, const uint8_t* scales,
                               const uint8_t* factors) {
  uint8_t *const start = to, *const first = (uint8_t*)from;
  V scale = zero();
  for (const uint8_t* end = from + bytes; from < end; from += 64) {
    __builtin_prefetch(from + ahead, 0, 2);
    if constexpr (has_four_bits(FORMAT)) {
      const V table = load(FORMAT == kNF4 ? kNF4Numbers : kE2M1Numbers);
      const I codes = line_at(from);
      if (FORMAT == kFP4_16 && (from - first) % 128 == 0) scale = fp4_scale(scales, factors, (int)((from - first) / 128));
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k, to += 64) {
        const V numbers = entries_of(table, codes, 4 * k);
        store((float*)to, FORMAT == kFP4_16 ? numbers * scale : numbers);
      }
    } else {
      const Lines made = unpack_line(from);
      store_line(to, made.first);
      store_line(to + 64, made.second);
      to += 128;
    }
  }
  return (to - start) / 64;
}

// `scaled_product` where lines are unpacked to memory, once for all rows.
template <int FORMAT, int ROWS>
static void many_rows(const LinearCall* c, int r, int rows, int panels, const uint8_t* panel, float* y,
                      int64_t y_stride, PrefetchDistance ahead) {
  constexpr int64_t kInput = scaled_input_bytes(FORMAT);
  alignas(64) uint8_t lines[2 * 64 * kMostLines];
  alignas(64) float sums[ROWS * 2 * kLanes];
  const int64_t each = group_inputs(c->w.format), bytes = c->w.panel_bytes, inputs = c->w.inputs;
  for (int64_t k = 0; k < inputs; k += each) {
    const int64_t packed = kInput * (inputs - k < each ? inputs - k : each);
    int64_t count = 0;
    const int64_t scales_of_group = scales_at(FORMAT, inputs) + 64 * (k / each);
    for (int p = 0; p < panels; ++p) {
      const uint8_t* of = panel + p * bytes;
      count = unpack_group<FORMAT>(of + kInput * k, packed, lines + 64 * count * p, p ? ahead.second : ahead.first,
                                   of + scales_of_group, of + scales_end(FORMAT, inputs));
    }
    multiply_group<FORMAT>(c, r, rows, panels, k, lines, count, sums);
    for (int p = 0; p < panels; ++p) {
      const uint8_t* scales = panel + p * bytes + scales_of_group;
      __builtin_prefetch(scales + (p ? ahead.second : ahead.first), 0, 2);
      const V scale = FORMAT == kFP4_16 ? set1(1.0f) : load((const float*)scales);
      for (int i = 0; i < rows; ++i) {
        const V sum = load(sums + (2 * i + p) * kLanes);
        float* to = y + i * y_stride + kLanes * p;
        store(to, k ? fma(sum, scale, load(to)) : sum * scale);
      }
    }
  }
}

// y = rows r .. r + rows of x times a unit of panels. ROWS: the most rows, of whole tiles.
template <int FORMAT, int ROWS>
static void scaled_product_of(const LinearCall* c, int r, int rows, int panels, const uint8_t* panel, float* y,
                              int64_t y_stride) {
  const PrefetchDistance ahead = r == 0 ? prefetch_distance(0, 1, panels, c->w.panel_bytes) : PrefetchDistance{0, 0};
#if defined(TRUFFULA_TILES)
  const bool few = rows <= kFewRows && !tiled(c);
#else
  const bool few = rows <= kFewRows;
#endif
  if (!few) return many_rows<FORMAT, ROWS>(c, r, rows, panels, panel, y, y_stride, ahead);
#if defined(__AVX512BF16__) && !defined(TRUFFULA_TILES)
  if constexpr (reads_pairs(FORMAT)) {
    const int64_t stride = c->quantised_stride;
    if (c->quantised_x)
      return few_rows<FORMAT>(c, rows, panels, c->quantised_x + r * stride, stride, panel, y, y_stride, ahead);
  }
#endif
  few_rows<FORMAT>(c, rows, panels, c->x.data + r * c->x.stride, c->x.stride, panel, y, y_stride, ahead);
}

template <int ROWS>
TF_INLINE void scaled_product(const LinearCall* c, int r, int rows, int panels, const uint8_t* panel, float* y,
                              int64_t y_stride) {
  if (c->w.format == kNF4) scaled_product_of<kNF4, ROWS>(c, r, rows, panels, panel, y, y_stride);
  else if (c->w.format == kFP4_16) scaled_product_of<kFP4_16, ROWS>(c, r, rows, panels, panel, y, y_stride);
  else scaled_product_of<kFP8_128, ROWS>(c, r, rows, panels, panel, y, y_stride);
}

// Dequantises the weights of one output.
static void unpack_scaled_lane(const uint8_t* panel, int format, int64_t inputs, int64_t lane, float* out) {
  const uint8_t* scales = panel + scales_at(format, inputs) + 4 * lane;
  const float* factors = (const float*)(panel + scales_end(format, inputs)) + lane;  // of kFP4_16
  const uint8_t* codes = panel + (has_four_bits(format) ? 4 * lane : lane / 4 * 16 + lane % 4 * 2);
  for (int64_t k = 0; k < inputs; ++k) {
    const uint8_t* scale = scales + 64 * (k / group_inputs(format));
    const int half = codes[k / 8 * 64 + k % 8 / 2] >> k % 2 * 4 & 15;  // of four bits
    if (format == kFP4_16) out[k] = kE2M1Numbers[half] * (of_e4m3(scale[k % 64 / 16]) * factors[0] / factors[kLanes]);
    else if (format == kNF4) out[k] = kNF4Numbers[half] * *(const float*)scale;
    else out[k] = to_float(bf16_of_e4m3(codes[k / 4 * 64 + k % 4 / 2 * 8 + k % 2])) * *(const float*)scale;
  }
}

}  // namespace
}  // namespace truffula

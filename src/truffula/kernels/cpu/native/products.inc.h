// Products with matrices in panels. Every output is summed in one fixed order, whatever tile computes it, so a row's
// result depends neither on the other rows nor on its place among them.
//   Rows that hold bfloat16 values: one accumulator, k ascending (AMX has its own order, see tiles.inc.h).
//   Rows in float32: one accumulator per kSumInputs inputs, k ascending; the partial sums are added in ascending order.
// Rounding errors grow with the length of a chain: a single chain over all inputs has errors two to four times as
// large.
#pragma once

#include "prefetch.h"
#include "quant.inc.h"
#include "tiles.inc.h"
#include "vec.h"

namespace truffula {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 12;  // 12 rows x 2 panels: 24 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kTileRows = 6;  // 6 rows x 1 panel of two registers: 12 accumulators of 16
#else
constexpr int kTileRows = 2;
#endif
// Even, so that no pair is split. With 64 the error of a whole model is 6 % smaller and a product takes 2 % longer.
constexpr int64_t kSumInputs = 128;

// Prefetches scattered data, which the hardware does not predict.
TF_INLINE void prefetch(const uint8_t* data, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(data + at, 0, 2);
}

// Reads MR rows through a pointer to every third one. With a pointer per row gcc spills them to the stack; with an
// array of pointers it does not keep a tile's sums in registers.
template <int MR, class T>
struct RowsAt {
  const T *a, *b, *c, *d;
  int64_t stride;

  inline __attribute__((always_inline)) RowsAt(const T* x, int64_t rows_apart)
      : a(x), b(x + 3 * rows_apart), c(x + 6 * rows_apart), d(x + 9 * rows_apart), stride(rows_apart) {}
  inline __attribute__((always_inline)) const T* row(int r) const {
    return (r < 3 ? a : r < 6 ? b : r < 9 ? c : d) + r % 3 * stride;
  }
  inline __attribute__((always_inline)) void step(int64_t by) {
    a += by, b += by, c += by, d += by;
    if constexpr (MR > 8) asm("" : "+r"(a), "+r"(b), "+r"(c), "+r"(d));
  }
};

// acc += rows of x times lines k_lo .. k_hi of NP panels. The odd input of a pair is added first, as VDPBF16PS does.
// STREAM: panels are adjacent in memory, so lines `ahead` are prefetched.
template <int MR, int NP, int FORMAT, bool STREAM, class LINES>
TF_INLINE void multiply(V (&acc)[MR][NP], const float* x, int64_t stride, const uint8_t* panel, int64_t panel_bytes,
                        int64_t k_lo, int64_t k_hi, LINES lines, PrefetchDistance ahead = {}) {
  RowsAt<MR, float> at(x + k_lo, stride);
  if constexpr (FORMAT == kF32) {
    for (int64_t k = k_lo; k < k_hi; ++k, at.step(1)) {
      if constexpr (STREAM) prefetch_lines<NP>(panel + lines.bytes * k, panel_bytes, ahead);
      V w[NP];
      for (int p = 0; p < NP; ++p) w[p] = floats_of(panel + p * panel_bytes + lines.bytes * k, lines);
      for (int r = 0; r < MR; ++r) {
        const V b = set1(*at.row(r));
        for (int p = 0; p < NP; ++p) acc[r][p] = fma(w[p], b, acc[r][p]);
      }
    }
  } else {
    const uint8_t* line = panel + lines.bytes / 2 * k_lo;  // k_lo is even
    int64_t k = k_lo;
    for (; k + 1 < k_hi; k += 2, line += lines.bytes, at.step(2)) {
      if constexpr (STREAM) prefetch_lines<NP>(line, panel_bytes, ahead);
      V w[NP];
      for (int p = 0; p < NP; ++p) w[p] = odd_in<FORMAT>(line + p * panel_bytes, lines);
      for (int r = 0; r < MR; ++r) {
        const V b = set1(at.row(r)[1]);
        for (int p = 0; p < NP; ++p) acc[r][p] = fma(w[p], b, acc[r][p]);
      }
      for (int p = 0; p < NP; ++p) w[p] = even_in<FORMAT>(line + p * panel_bytes, lines);
      for (int r = 0; r < MR; ++r) {
        const V b = set1(*at.row(r));
        for (int p = 0; p < NP; ++p) acc[r][p] = fma(w[p], b, acc[r][p]);
      }
    }
    if (k < k_hi)
      for (int r = 0; r < MR; ++r)
        for (int p = 0; p < NP; ++p)
          acc[r][p] = fma(last_in<FORMAT>(line + p * panel_bytes, lines), set1(*at.row(r)), acc[r][p]);
  }
}

// How a product reads its matrix and writes its result. Weights are streamed, with sums in one chain or in blocks. Keys
// and adapters are scattered in memory; the panels of adapters are `Columns`, and add to the values that are there or not.
enum Use : int { kStream, kStreamBlocks, kScattered, kScatteredColumns, kAddScatteredColumns };

// y[r, 16 p ...] = x[r] W^T, block by block. y holds the sum of the earlier blocks, as a tile fills the registers.
template <int MR, int NP, int FORMAT>
TF_INLINE void tile_in_blocks(const float* x, int64_t stride, const uint8_t* panel, int64_t panel_bytes, int64_t inputs,
                              float* y, int64_t y_stride, PrefetchDistance ahead) {
  int64_t k = 0;
  do {
    V acc[MR][NP];
    for (int r = 0; r < MR; ++r)
      for (int p = 0; p < NP; ++p) acc[r][p] = zero();
    const int64_t end = k + kSumInputs < inputs ? k + kSumInputs : inputs;
    multiply<MR, NP, FORMAT, true>(acc, x, stride, panel, panel_bytes, k, end, Full{}, ahead);
    for (int r = 0; r < MR; ++r)
      for (int p = 0; p < NP; ++p) {
        float* sum = y + r * y_stride + kLanes * p;
        store(sum, k ? load(sum) + acc[r][p] : acc[r][p]);
      }
    k = end;
  } while (k < inputs);
}

// y[r, 16 p ...] (+)= x[r] W^T for MR rows and NP panels.
template <int MR, int NP, int FORMAT, Use USE>
static void tile(const float* x, int64_t stride, const uint8_t* panel, int64_t panel_bytes, int64_t inputs, float* y,
                 int64_t y_stride, PrefetchDistance ahead) {
  if constexpr (USE == kStreamBlocks)
    return tile_in_blocks<MR, NP, FORMAT>(x, stride, panel, panel_bytes, inputs, y, y_stride, ahead);
  V acc[MR][NP];
  for (int r = 0; r < MR; ++r)
    for (int p = 0; p < NP; ++p) acc[r][p] = USE == kAddScatteredColumns ? load(y + r * y_stride + kLanes * p) : zero();
  if constexpr (USE == kScatteredColumns || USE == kAddScatteredColumns)
    multiply<MR, NP, FORMAT, false>(acc, x, stride, panel, panel_bytes, 0, inputs, Columns{});
  else multiply<MR, NP, FORMAT, USE == kStream>(acc, x, stride, panel, panel_bytes, 0, inputs, Full{}, ahead);
  for (int r = 0; r < MR; ++r)
    for (int p = 0; p < NP; ++p) store(y + r * y_stride + kLanes * p, acc[r][p]);
}

template <int NP, int FORMAT, Use USE>
static void tile_rows(int rows, const float* x, int64_t stride, const uint8_t* panel, int64_t panel_bytes,
                      int64_t inputs, float* y, int64_t y_stride, PrefetchDistance ahead) {
#define TF_CASE(n)                                                                                             \
  case n:                                                                                                      \
    if constexpr (n <= kTileRows)                                                                              \
      return tile<n, NP, FORMAT, USE>(x, stride, panel, panel_bytes, inputs, y, y_stride, ahead);              \
    break;
  switch (rows) {
    TF_CASE(1) TF_CASE(2) TF_CASE(3) TF_CASE(4) TF_CASE(5) TF_CASE(6)
    TF_CASE(7) TF_CASE(8) TF_CASE(9) TF_CASE(10) TF_CASE(11) TF_CASE(12)
  }
#undef TF_CASE
}

// One or two adjacent panels. Both in one tile where registers allow: with few rows, and always with 32 registers.
template <int FORMAT, Use USE>
static void product(int rows, int panels, const float* x, int64_t stride, const uint8_t* panel, int64_t panel_bytes,
                    int64_t inputs, float* y, int64_t y_stride) {
#if defined(__AVX512F__)
  const int most_for_two = kTileRows;
#else
  const int most_for_two = 2;
#endif
  const int tiles = tiles_of(rows, kTileRows);
  for (int t = 0; t < tiles; ++t) {
    const int r = first_row(rows, t, tiles, kTileRows), count = first_row(rows, t + 1, tiles, kTileRows) - r;
    const float* from = x + r * stride;
    float* to = y + r * y_stride;
    // The memory after a scattered panel belongs to something else: nothing to prefetch.
    const PrefetchDistance ahead = USE == kStream || USE == kStreamBlocks ? prefetch_distance(t, tiles, panels, panel_bytes) : PrefetchDistance{0, 0};
    if (panels == 2 && count <= most_for_two) {
      tile_rows<2, FORMAT, USE>(count, from, stride, panel, panel_bytes, inputs, to, y_stride, ahead);
    } else {
      for (int p = 0; p < panels; ++p)
        tile_rows<1, FORMAT, USE>(count, from, stride, panel + p * panel_bytes, panel_bytes, inputs, to + kLanes * p,
                                  y_stride, single_panel(ahead, p));
    }
  }
}

template <Use USE>
TF_INLINE void product_of(int32_t format, int rows, int panels, const float* x, int64_t stride, const uint8_t* panel,
                          int64_t panel_bytes, int64_t inputs, float* y, int64_t y_stride) {
  if (format == kF32) return product<kF32, USE>(rows, panels, x, stride, panel, panel_bytes, inputs, y, y_stride);
  if constexpr (USE == kScatteredColumns || USE == kAddScatteredColumns)
    if (format == kF16) return product<kF16, USE>(rows, panels, x, stride, panel, panel_bytes, inputs, y, y_stride);
  product<kBF16, USE>(rows, panels, x, stride, panel, panel_bytes, inputs, y, y_stride);
}

#if defined(__AVX512BF16__) && !defined(TRUFFULA_TILES)
// `tile` for rows of bfloat16 pairs: the same sums in the same order, two inputs per instruction.
template <int MR, int NP>
static void pair_tile(const uint8_t* x, int64_t stride, const uint8_t* panel, int64_t panel_bytes, int64_t lines,
                      float* y, int64_t y_stride, PrefetchDistance ahead) {
  V acc[MR][NP];
  for (int r = 0; r < MR; ++r)
    for (int p = 0; p < NP; ++p) acc[r][p] = zero();
  RowsAt<MR, uint8_t> at(x, stride);
  for (int64_t k = 0; k < lines; ++k, at.step(4)) {
    const uint8_t* line = panel + 64 * k;
    prefetch_lines<NP>(line, panel_bytes, ahead);
    I w[NP];
    for (int p = 0; p < NP; ++p) w[p] = line_at(line + p * panel_bytes);
    for (int r = 0; r < MR; ++r) {
      const I b = four_of(at.row(r));
      for (int p = 0; p < NP; ++p) acc[r][p] = dot_pairs(acc[r][p], w[p], b);
    }
  }
  for (int r = 0; r < MR; ++r)
    for (int p = 0; p < NP; ++p) store(y + r * y_stride + kLanes * p, acc[r][p]);
}

template <int NP>
static void pair_rows(int rows, const uint8_t* x, int64_t stride, const uint8_t* panel, int64_t panel_bytes,
                      int64_t lines, float* y, int64_t y_stride, PrefetchDistance ahead) {
#define TF_CASE(n) \
  case n:          \
    return pair_tile<n, NP>(x, stride, panel, panel_bytes, lines, y, y_stride, ahead);
  switch (rows) {
    TF_CASE(1) TF_CASE(2) TF_CASE(3) TF_CASE(4) TF_CASE(5) TF_CASE(6)
    TF_CASE(7) TF_CASE(8) TF_CASE(9) TF_CASE(10) TF_CASE(11) TF_CASE(12)
  }
#undef TF_CASE
}

// STREAM: as in `multiply`.
template <bool STREAM>
static void pair_product(int rows, int panels, const uint8_t* x, int64_t stride, const uint8_t* panel,
                         int64_t panel_bytes, float* y, int64_t y_stride) {
  const int tiles = tiles_of(rows, kTileRows);
  for (int t = 0; t < tiles; ++t) {
    const int r = first_row(rows, t, tiles, kTileRows), count = first_row(rows, t + 1, tiles, kTileRows) - r;
    const PrefetchDistance ahead = STREAM ? prefetch_distance(t, tiles, panels, panel_bytes) : PrefetchDistance{0, 0};
    const auto run = panels == 2 ? pair_rows<2> : pair_rows<1>;
    run(count, x + r * stride, stride, panel, panel_bytes, panel_bytes / 64, y + r * y_stride, y_stride, ahead);
  }
}
#endif

}  // namespace
}  // namespace truffula

// Products with packed matrices. Every output is summed in one order, whatever tile it is in: a row's result depends
// neither on the other rows nor on where it stands. Rows of bfloat16 numbers: one accumulator walks k upward (tiles have
// an order of their own, see tiles.inc.h). Rows of float32: so within kSumInputs inputs, and these sums are added up,
// ascending. Rounding errors grow with the length of a chain: one of all inputs is off by two to four times as much.
#pragma once

#include "ahead.h"
#include "quant.inc.h"
#include "tiles.inc.h"
#include "vec.h"

namespace truffula {
namespace {

#if defined(TRUFFULA_TILES)
constexpr int32_t kPairs = kPairsByTiles;
constexpr int32_t kFineRows = 96;
#elif defined(__AVX512BF16__)
constexpr int32_t kPairs = kPairsInOrder;
constexpr int32_t kFineRows = 16;
#else
constexpr int32_t kPairs = kNoPairs;
constexpr int32_t kFineRows = 16;
#endif

#if defined(__AVX512F__)
constexpr int kTileRows = 12;  // 12 rows x 2 panels: 24 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kTileRows = 6;  // 6 rows x 1 panel of two registers: 12 accumulators of 16
#else
constexpr int kTileRows = 2;
#endif
#if defined(TRUFFULA_TILES)
constexpr int kBlockRows = 96;  // between two epilogues: a multiple of every tile's rows
#else
constexpr int kBlockRows = 48;
#endif
constexpr int kUnitPanels = 2;
// Even, so that a pair is never cut. On a whole model 64 is off by 6 % less and a product takes 2 % longer.
constexpr int64_t kSumInputs = 128;

// Reads ahead what will be needed next and no hardware foresees: a few hundred bytes here and there.
TF_INLINE void prefetch(const uint8_t* data, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(data + at, 0, 2);
}

// Where MR rows are read: a pointer to each third one. Left to itself gcc keeps one for each row, on the stack. (An array
// of them would keep it from holding a tile's sums in registers.)
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

// Lines k_lo .. k_hi of NP panels times rows of x, onto acc. Of a pair the odd input comes first, as VDPBF16PS has it.
// STREAM: panels follow each other in memory, so read `ahead`.
template <int MR, int NP, int FORMAT, bool STREAM>
TF_INLINE void multiply(V (&acc)[MR][NP], const float* x, int64_t stride, const uint8_t* panel, int64_t panel_bytes,
                        int64_t k_lo, int64_t k_hi, Ahead ahead = {}) {
  RowsAt<MR, float> at(x + k_lo, stride);
  if constexpr (FORMAT == kF32) {
    for (int64_t k = k_lo; k < k_hi; ++k, at.step(1)) {
      if constexpr (STREAM) read_ahead<NP>(panel + 64 * k, panel_bytes, ahead);
      V w[NP];
      for (int p = 0; p < NP; ++p) w[p] = load((const float*)(panel + p * panel_bytes + 64 * k));
      for (int r = 0; r < MR; ++r) {
        const V b = set1(*at.row(r));
        for (int p = 0; p < NP; ++p) acc[r][p] = fma(w[p], b, acc[r][p]);
      }
    }
  } else {
    const uint8_t* line = panel + 32 * k_lo;  // k_lo is even
    int64_t k = k_lo;
    for (; k + 1 < k_hi; k += 2, line += 64, at.step(2)) {
      if constexpr (STREAM) read_ahead<NP>(line, panel_bytes, ahead);
      V w[NP];
      for (int p = 0; p < NP; ++p) w[p] = odd_of(line + p * panel_bytes);
      for (int r = 0; r < MR; ++r) {
        const V b = set1(at.row(r)[1]);
        for (int p = 0; p < NP; ++p) acc[r][p] = fma(w[p], b, acc[r][p]);
      }
      for (int p = 0; p < NP; ++p) w[p] = even_of(line + p * panel_bytes);
      for (int r = 0; r < MR; ++r) {
        const V b = set1(*at.row(r));
        for (int p = 0; p < NP; ++p) acc[r][p] = fma(w[p], b, acc[r][p]);
      }
    }
    if (k < k_hi)
      for (int r = 0; r < MR; ++r)
        for (int p = 0; p < NP; ++p)
          acc[r][p] = fma(even_of(line + p * panel_bytes), set1(*at.row(r)), acc[r][p]);
  }
}

// How a product is used: weights stream by, their sums in one chain or in blocks; keys and adapters lie scattered, and
// adapters add to what is there.
enum Use : int { kStream, kStreamBlocks, kScattered, kAddScattered };

// y[r, 16 p ...] = x[r] W^T, block by block: y holds the sum of the blocks behind, for a tile fills the registers.
template <int MR, int NP, int FORMAT>
TF_INLINE void tile_in_blocks(const float* x, int64_t stride, const uint8_t* panel, int64_t panel_bytes, int64_t inputs,
                              float* y, int64_t y_stride, Ahead ahead) {
  int64_t k = 0;
  do {
    V acc[MR][NP];
    for (int r = 0; r < MR; ++r)
      for (int p = 0; p < NP; ++p) acc[r][p] = zero();
    const int64_t end = k + kSumInputs < inputs ? k + kSumInputs : inputs;
    multiply<MR, NP, FORMAT, true>(acc, x, stride, panel, panel_bytes, k, end, ahead);
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
                 int64_t y_stride, Ahead ahead) {
  if constexpr (USE == kStreamBlocks)
    return tile_in_blocks<MR, NP, FORMAT>(x, stride, panel, panel_bytes, inputs, y, y_stride, ahead);
  V acc[MR][NP];
  for (int r = 0; r < MR; ++r)
    for (int p = 0; p < NP; ++p) acc[r][p] = USE == kAddScattered ? load(y + r * y_stride + kLanes * p) : zero();
  multiply<MR, NP, FORMAT, USE == kStream>(acc, x, stride, panel, panel_bytes, 0, inputs, ahead);
  for (int r = 0; r < MR; ++r)
    for (int p = 0; p < NP; ++p) store(y + r * y_stride + kLanes * p, acc[r][p]);
}

template <int NP, int FORMAT, Use USE>
static void tile_rows(int rows, const float* x, int64_t stride, const uint8_t* panel, int64_t panel_bytes,
                      int64_t inputs, float* y, int64_t y_stride, Ahead ahead) {
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

// One or two adjacent panels. Two at once where registers allow: with few rows, and always with 32 registers.
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
    // What lies scattered has nothing behind it, and two of it may be the same.
    const Ahead ahead = USE == kStream || USE == kStreamBlocks ? ahead_of(t, tiles, panels, panel_bytes) : Ahead{0, 0};
    if (panels == 2 && count <= most_for_two) {
      tile_rows<2, FORMAT, USE>(count, from, stride, panel, panel_bytes, inputs, to, y_stride, ahead);
    } else {
      for (int p = 0; p < panels; ++p)
        tile_rows<1, FORMAT, USE>(count, from, stride, panel + p * panel_bytes, panel_bytes, inputs, to + kLanes * p,
                                  y_stride, ahead_alone(ahead, p));
    }
  }
}

template <Use USE>
TF_INLINE void product_of(int32_t format, int rows, int panels, const float* x, int64_t stride, const uint8_t* panel,
                          int64_t panel_bytes, int64_t inputs, float* y, int64_t y_stride) {
  if (format == kF32) product<kF32, USE>(rows, panels, x, stride, panel, panel_bytes, inputs, y, y_stride);
  else product<kBF16, USE>(rows, panels, x, stride, panel, panel_bytes, inputs, y, y_stride);
}

#if defined(__AVX512BF16__) && !defined(TRUFFULA_TILES)
// As `tile`, with rows of bfloat16 pairs: the same sums in the same order, two inputs an instruction.
template <int MR, int NP>
static void pair_tile(const uint8_t* x, int64_t stride, const uint8_t* panel, int64_t panel_bytes, int64_t lines,
                      float* y, int64_t y_stride, Ahead ahead) {
  V acc[MR][NP];
  for (int r = 0; r < MR; ++r)
    for (int p = 0; p < NP; ++p) acc[r][p] = zero();
  RowsAt<MR, uint8_t> at(x, stride);
  for (int64_t k = 0; k < lines; ++k, at.step(4)) {
    const uint8_t* line = panel + 64 * k;
    read_ahead<NP>(line, panel_bytes, ahead);
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
                      int64_t lines, float* y, int64_t y_stride, Ahead ahead) {
#define TF_CASE(n) \
  case n:          \
    return pair_tile<n, NP>(x, stride, panel, panel_bytes, lines, y, y_stride, ahead);
  switch (rows) {
    TF_CASE(1) TF_CASE(2) TF_CASE(3) TF_CASE(4) TF_CASE(5) TF_CASE(6)
    TF_CASE(7) TF_CASE(8) TF_CASE(9) TF_CASE(10) TF_CASE(11) TF_CASE(12)
  }
#undef TF_CASE
}

static void pair_product(int rows, int panels, const uint8_t* x, int64_t stride, const uint8_t* panel,
                         int64_t panel_bytes, float* y, int64_t y_stride) {
  const int tiles = tiles_of(rows, kTileRows);
  for (int t = 0; t < tiles; ++t) {
    const int r = first_row(rows, t, tiles, kTileRows), count = first_row(rows, t + 1, tiles, kTileRows) - r;
    const Ahead ahead = ahead_of(t, tiles, panels, panel_bytes);
    const auto run = panels == 2 ? pair_rows<2> : pair_rows<1>;
    run(count, x + r * stride, stride, panel, panel_bytes, panel_bytes / 64, y + r * y_stride, y_stride, ahead);
  }
}
#endif

// What adapters add to rows r .. r + rows of panels first .. first + panels, held in y.
static void add_deltas(const LinearCall* c, int r, int rows, int first, int panels, float* y, int64_t y_stride) {
  for (int d = 0; d < c->num_deltas; ++d) {
    const Delta* delta = c->deltas + d;
    const int lo = delta->lo > r ? delta->lo : r;
    const int hi = delta->hi < r + rows ? delta->hi : r + rows;
    // Panels of the unit that it acts on: both in a row, or (gate and up) one of the two.
    const int last = delta->first + (delta->b.panels - 1) * delta->step;
    if (lo >= hi || last < first || delta->first >= first + panels) continue;
    const float* h = delta->h + (lo - delta->lo) * delta->h_stride;
    float* to = y + (lo - r) * y_stride;
    const int64_t bytes = delta->b.panel_bytes;
    if (delta->step == 1) {
      const int from = delta->first > first ? delta->first : first;
      const int count = (last < first + panels - 1 ? last : first + panels - 1) - from + 1;
      const uint8_t* panel = delta->b.data + (from - delta->first) * bytes;
      product_of<kAddScattered>(delta->b.format, hi - lo, count, h, delta->h_stride, panel, bytes, delta->b.inputs,
                       to + kLanes * (from - first), y_stride);
      if (last >= first + panels) prefetch(panel + count * bytes, count * bytes);
    } else {
      const int at = (first - delta->first + 1) / 2;
      const uint8_t* panel = delta->b.data + at * bytes;
      product_of<kAddScattered>(delta->b.format, hi - lo, 1, h, delta->h_stride, panel, bytes, delta->b.inputs,
                       to + kLanes * (delta->first + 2 * at - first), y_stride);
      if (last >= first + panels) prefetch(panel + bytes, bytes);
    }
  }
}

// Columns of one row to what is stored, in the order of program.Epilogue.
TF_INLINE void finish(const LinearCall* c, const float* y, const float* up, int panel, int row, int column, int count) {
  V a = load(y);
  if (c->bias) a = a + load(c->bias + (int64_t)kLanes * panel);
  if (c->clip >= 0.0f) a = vmin(set1(c->clip), vmax(set1(-c->clip), a));  // in this order NaN stays
  a = activated(a, c->activation);
  if (up) {
    V b = load(up);
    if (c->bias) b = b + load(c->bias + (int64_t)kLanes * (panel + 1));
    if (c->clip >= 0.0f) b = vmin(set1(c->clip), vmax(set1(-c->clip), b));
    a = a * b;
  }
  if (c->scale != 1.0f) a = a * set1(c->scale);
  if (c->residual.data) a = a + load_n(c->residual.data + row * c->residual.stride + column, count);
  if (c->softcap != 0.0f) a = softcapped(a, c->softcap);
  store_n(c->out.data + row * c->out.stride + column, rounded(a, c->round_out), count);
}

// Sums of rows r .. r + rows and the unit's panels.
TF_INLINE void multiply_rows(const LinearCall* c, int r, int rows, int panels, const uint8_t* panel, float* y,
                             int64_t y_stride) {
#if defined(TRUFFULA_TILES)
  if (tiled(c)) return tile_product(c, r, rows, panels, panel, y, y_stride);
#endif
  const uint8_t* quantised = c->quantised_x ? c->quantised_x + r * c->quantised_stride : nullptr;
  const float* x = c->x.data + r * c->x.stride;
  if (is_quantised(c->w.format))
    quant_product_of(&c->w, rows, panels, quantised, c->quantised_stride, panel, y, y_stride);
#if defined(__AVX512BF16__) && !defined(TRUFFULA_TILES)
  else if (c->w.format == kBF16 && quantised)
    pair_product(rows, panels, quantised, c->quantised_stride, panel, c->w.panel_bytes, y, y_stride);
#endif
  else if (c->in_blocks)
    product_of<kStreamBlocks>(c->w.format, rows, panels, x, c->x.stride, panel, c->w.panel_bytes, c->w.inputs, y, y_stride);
  else
    product_of<kStream>(c->w.format, rows, panels, x, c->x.stride, panel, c->w.panel_bytes, c->w.inputs, y, y_stride);
}

static void linear(const LinearCall* c, int32_t unit_lo, int32_t unit_hi) {
  alignas(64) float y[kBlockRows * kUnitPanels * kLanes];
  const int64_t y_stride = kUnitPanels * kLanes;
#if defined(TRUFFULA_TILES)
  const Tiles tiles(c);
#endif
  for (int32_t unit = unit_lo; unit < unit_hi; ++unit) {
    const int first = unit * kUnitPanels;
    const int panels = c->w.panels - first < kUnitPanels ? c->w.panels - first : kUnitPanels;
    const uint8_t* panel = c->w.data + first * c->w.panel_bytes;
    for (int r = 0; r < c->rows; r += kBlockRows) {
      const int rows = c->rows - r < kBlockRows ? c->rows - r : kBlockRows;
      multiply_rows(c, r, rows, panels, panel, y, y_stride);
      if (c->num_deltas) add_deltas(c, r, rows, first, panels, y, y_stride);
      for (int p = 0; p < panels; p += c->glu ? 2 : 1) {
        const int column = kLanes * (c->glu ? unit : first + p);
        const int count = c->out_width - column < kLanes ? c->out_width - column : kLanes;
        for (int i = 0; i < rows; ++i)
          finish(c, y + i * y_stride + kLanes * p, c->glu ? y + i * y_stride + kLanes : nullptr, first + p, r + i,
                 column, count);
      }
    }
  }
}

// A row's k are cut into four quarters, always: one chain of dependent sums would be slow for a single row, and every
// row has to be summed in the same way. (0 + 1) + (2 + 3).
template <int FORMAT>
static void shrink_rows(const ShrinkCall* c, int32_t panel, int32_t row_lo, int32_t row_hi) {
  const uint8_t* data = c->a.data + panel * c->a.panel_bytes;
  const int64_t quarter = c->a.inputs / 8 * 2;  // even: a pair is never cut
  const V scale = load(c->column_scale + (int64_t)kLanes * panel) * set1(c->weight);
  for (int32_t r = row_lo; r < row_hi; ++r) {
    const float* x = c->x.data + r * c->x.stride;
    V part[4][1][1];
    for (int q = 0; q < 4; ++q) part[q][0][0] = zero();
    if constexpr (FORMAT == kF32) {
      const int64_t common = c->a.inputs - 3 * quarter < quarter ? c->a.inputs - 3 * quarter : quarter;
      int64_t k = 0;
      for (; k < common; ++k)
        for (int q = 0; q < 4; ++q)
          part[q][0][0] = fma(load((const float*)(data + 64 * (k + q * quarter))), set1(x[k + q * quarter]), part[q][0][0]);
      for (int q = 0; q < 3; ++q)
        multiply<1, 1, FORMAT, false>(part[q], x, 0, data, 0, q * quarter + k, (q + 1) * quarter);
      multiply<1, 1, FORMAT, false>(part[3], x, 0, data, 0, 3 * quarter + k, c->a.inputs);
    } else {
      const int64_t last = c->a.inputs - 3 * quarter;
      const int64_t common = (last < quarter ? last : quarter) / 2 * 2;
      int64_t k = 0;
      for (; k < common; k += 2)
        for (int q = 0; q < 4; ++q) {
          const int64_t at = k + q * quarter;
          part[q][0][0] = fma(odd_of(data + 32 * at), set1(x[at + 1]), part[q][0][0]);
          part[q][0][0] = fma(even_of(data + 32 * at), set1(x[at]), part[q][0][0]);
        }
      for (int q = 0; q < 3; ++q)
        multiply<1, 1, FORMAT, false>(part[q], x, 0, data, 0, q * quarter + k, (q + 1) * quarter);
      multiply<1, 1, FORMAT, false>(part[3], x, 0, data, 0, 3 * quarter + k, c->a.inputs);
    }
    const V sum = (part[0][0][0] + part[1][0][0]) + (part[2][0][0] + part[3][0][0]);
    store(c->h.data + r * c->h.stride + (int64_t)kLanes * panel, sum * scale);
  }
}

// Several rows share what is loaded of A; quarter after quarter, so that the sums are those of a single row.
template <int FORMAT>
static void shrink_tiles(const ShrinkCall* c, int32_t panel) {
  constexpr int MR = 4;
  const uint8_t* data = c->a.data + panel * c->a.panel_bytes;
  const int64_t quarter = c->a.inputs / 8 * 2;
  const V scale = load(c->column_scale + (int64_t)kLanes * panel) * set1(c->weight);
  int32_t r = 0;
  for (; r + MR <= c->rows; r += MR) {
    const float* x = c->x.data + r * c->x.stride;
    V sum[4][MR][1];
    for (int q = 0; q < 4; ++q) {
      for (int i = 0; i < MR; ++i) sum[q][i][0] = zero();
      multiply<MR, 1, FORMAT, true>(sum[q], x, c->x.stride, data, 0, q * quarter, q < 3 ? (q + 1) * quarter : c->a.inputs,
                                     Ahead{2048, 0});
    }
    for (int i = 0; i < MR; ++i)
      store(c->h.data + (r + i) * c->h.stride + (int64_t)kLanes * panel,
            ((sum[0][i][0] + sum[1][i][0]) + (sum[2][i][0] + sum[3][i][0])) * scale);
  }
  if (r < c->rows) shrink_rows<FORMAT>(c, panel, r, c->rows);
}

static void shrink(const ShrinkCall* c, int32_t panel_lo, int32_t panel_hi) {
  for (int32_t panel = panel_lo; panel < panel_hi; ++panel) {
    if (c->a.format == kF32) shrink_tiles<kF32>(c, panel);
    else shrink_tiles<kBF16>(c, panel);
  }
}

}  // namespace
}  // namespace truffula

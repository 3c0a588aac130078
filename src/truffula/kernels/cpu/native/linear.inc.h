// Linear layers: products, what adapters do to them, and the epilogue; and the adapters' products with A.
#pragma once

#include "products.inc.h"
#include "scaled.inc.h"
#include "vec.h"

namespace truffula {
namespace {

// kBlockRows: rows that are multiplied before their epilogue, a multiple of every tile's rows.
#if defined(TRUFFULA_TILES)
constexpr int32_t kPairs = kPairsByTiles;
constexpr int32_t kFineRows = 96;
constexpr int kBlockRows = 96;
#else
#if defined(__AVX512BF16__)
constexpr int32_t kPairs = kPairsInOrder;
#else
constexpr int32_t kPairs = kNoPairs;
#endif
constexpr int32_t kFineRows = 16;
constexpr int kBlockRows = 48;
#endif
constexpr int kUnitPanels = 2;

struct DeltaSpan {
  const Delta *begin, *end;
};

// The deltas that may act on rows lo .. hi. Segments are mostly disjoint, so these are few of `count`.
TF_INLINE DeltaSpan deltas_at(const Delta* deltas, int count, int lo, int hi) {
  const Delta *begin = deltas, *end = deltas + count;
  for (const Delta* above = end; begin < above;) {
    const Delta* middle = begin + (above - begin) / 2;
    if (middle->max_hi > lo) above = middle;
    else begin = middle + 1;
  }
  for (const Delta* below = begin; below < end;) {
    const Delta* middle = below + (end - below) / 2;
    if (middle->min_lo < hi) below = middle + 1;
    else end = middle;
  }
  return {begin, end};
}

// y = rows r .. r + rows of x times the panels at `panel`.
TF_INLINE void multiply_rows(const LinearCall* c, int r, int rows, int panels, const uint8_t* panel, float* y,
                             int64_t y_stride) {
  if (is_scaled(c->w.format)) return scaled_product<kBlockRows>(c, r, rows, panels, panel, y, y_stride);
#if defined(TRUFFULA_TILES)
  if (tiled(c)) return tile_product(c, r, rows, panels, panel, y, y_stride);
#endif
  const uint8_t* quantised = c->quantised_x ? c->quantised_x + r * c->quantised_stride : nullptr;
  const float* x = c->x.data + r * c->x.stride;
  if (is_quantised(c->w.format))
    quant_product_of(&c->w, rows, panels, quantised, c->quantised_stride, panel, y, y_stride);
#if defined(__AVX512BF16__) && !defined(TRUFFULA_TILES)
  else if (c->w.format == kBF16 && quantised)
    pair_product<true>(rows, panels, quantised, c->quantised_stride, panel, c->w.panel_bytes, y, y_stride);
#endif
  else if (c->in_blocks)
    product_of<kStreamBlocks>(c->w.format, rows, panels, x, c->x.stride, panel, c->w.panel_bytes, c->w.inputs, y, y_stride);
  else
    product_of<kStream>(c->w.format, rows, panels, x, c->x.stride, panel, c->w.panel_bytes, c->w.inputs, y, y_stride);
}

// The rows and panels that a delta and a tile have in common.
struct DeltaPart {
  int row, rows;           // of the product
  int panel, at, panels;   // the first one in the delta's run and in the tile; adjacent ones in both
};

// Whether a delta acts in a tile of rows r .. r + rows and panels first .. first + panels.
TF_INLINE bool part_of(const Delta* delta, int r, int rows, int first, int panels, DeltaPart* part) {
  const int lo = delta->lo > r ? delta->lo : r, hi = delta->hi < r + rows ? delta->hi : r + rows;
  // It acts on adjacent panels, or, with gates and ups, on every second one.
  const int last = delta->first + (delta->b.panels - 1) * delta->step;
  if (lo >= hi || last < first || delta->first >= first + panels) return false;
  part->row = lo, part->rows = hi - lo;
  if (delta->step == 1) {
    const int from = delta->first > first ? delta->first : first;
    part->panel = from - delta->first, part->at = from - first;
    part->panels = (last < first + panels - 1 ? last : first + panels - 1) - from + 1;
  } else {
    part->panel = (first - delta->first + 1) / 2, part->panels = 1;
    part->at = delta->first + 2 * part->panel - first;
  }
  return true;
}

// 1 in lanes lo .. hi of a panel, 0 in the others.
static V lanes_between(int lo, int hi) {
  alignas(64) static const float kOnes[3 * kLanes] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,
                                                      1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
  lo = lo < 0 ? 0 : lo > kLanes ? kLanes : lo;
  hi = hi < 0 ? 0 : hi > kLanes ? kLanes : hi;
  return load(kOnes + kLanes - lo) * load(kOnes + 2 * kLanes - hi);
}

TF_INLINE V lanes_of(const Delta* delta, int panel) {
  return lanes_between(delta->lane - kLanes * panel, delta->end - kLanes * panel);
}

// c in the lanes of a delta in its panel number `panel`.
TF_INLINE V column_of(const Delta* delta, int panel) {
  return delta->column ? load(delta->column + kLanes * panel) : lanes_of(delta, panel);
}

// Calls f(index of an id, its lane in the tile) for the columns of a delta in a part of a tile.
template <class F>
TF_INLINE void for_each_column(const Delta* delta, const DeltaPart* part, F f) {
  const int32_t from = kLanes * part->panel, to = from + kLanes * part->panels;
  int lo = 0;
  for (int hi = delta->num_ids; lo < hi;) {
    const int middle = lo + (hi - lo) / 2;
    if (delta->ids[middle] < from) lo = middle + 1;
    else hi = middle;
  }
  for (; lo < delta->num_ids && delta->ids[lo] < to; ++lo) f(lo, kLanes * part->at + delta->ids[lo] - from);
}

// Multiplies the base product in a tile by what the deltas leave of it: 1 + the sum of weight (c - 1) where they scale
// it, and - weight c where they replace it. With a weight of 1 it is c or 0 exactly.
static void scale_base(DeltaSpan span, int r, int rows, int first, int panels, float* y, int64_t y_stride) {
  alignas(64) float factors[kBlockRows * kUnitPanels * kLanes];
  bool any = false;
  DeltaPart part;
  for (const Delta* delta = span.begin; delta < span.end; ++delta) {
    if (delta->role == kAdds || !part_of(delta, r, rows, first, panels, &part)) continue;
    if (!any)
      for (int i = 0; i < rows * kUnitPanels; ++i) store(factors + i * kLanes, set1(1.0f));
    any = true;
    float* to = factors + (part.row - r) * kUnitPanels * kLanes;
    if (delta->role == kOwnColumns) {
      for_each_column(delta, &part, [&](int i, int lane) {
        const float by = delta->weight * (delta->column ? delta->column[delta->ids[i]] : 1.0f);
        for (int row = 0; row < part.rows; ++row) to[row * kUnitPanels * kLanes + lane] -= by;
      });
      continue;
    }
    for (int p = 0; p < part.panels; ++p) {
      const V weight = set1(delta->weight), column = weight * column_of(delta, part.panel + p);
      const bool scales = delta->role == kScales || delta->role == kScalesAndAdds;
      const V less = scales ? weight * lanes_of(delta, part.panel + p) : column;
      const V more = scales ? column : zero();
      for (int row = 0; row < part.rows; ++row) {
        float* factor = to + (row * kUnitPanels + part.at + p) * kLanes;
        store(factor, load(factor) - less + more);
      }
    }
  }
  if (!any) return;
  for (int row = 0; row < rows; ++row)
    for (int p = 0; p < panels; ++p) {
      float* value = y + row * y_stride + kLanes * p;
      store(value, load(value) * load(factors + (row * kUnitPanels + p) * kLanes));
    }
}

// Whether deltas replace the whole base product of a tile, which then is not needed.
static bool replaced(DeltaSpan span, int r, int rows, int first, int panels) {
  int next = r;
  DeltaPart part;
  for (const Delta* delta = span.begin; delta < span.end; ++delta) {
    if (delta->role == kAdds || !part_of(delta, r, rows, first, panels, &part)) continue;
    const bool whole = delta->role == kOwnProduct && delta->weight == 1.0f && !delta->column && part.panels == panels &&
                       delta->lane <= kLanes * part.panel && delta->end >= kLanes * (part.panel + part.panels);
    if (!whole || part.row != next) return false;
    next += part.rows;
  }
  return next == r + rows;
}

// What the base product in a delta's panel is multiplied by where the delta scales it.
TF_INLINE V scale_of(const Delta* delta, int panel) {
  const V weight = set1(delta->weight);
  return fma(weight, column_of(delta, panel), set1(1.0f) - weight * lanes_of(delta, panel));
}

// Prefetches what the next tile reads of a vector.
TF_INLINE void prefetch_next(const float* vector, const DeltaPart* part, const Delta* delta) {
  if (vector && part->panel + part->panels < delta->b.panels)
    prefetch((const uint8_t*)(vector + kLanes * (part->panel + part->panels)), 4 * kLanes * part->panels);
}

// Adds h B^T to y in a part of a tile, with all that its delta has beside.
static void add_product(const Delta* delta, const DeltaPart* part, int scales, const float* h, float* y, int64_t y_stride) {
  const int64_t bytes = delta->b.panel_bytes;
  const uint8_t* panel = delta->b.data + part->panel * bytes;
  if (part->panel + part->panels < delta->b.panels) prefetch(panel + part->panels * bytes, part->panels * bytes);
  prefetch_next(delta->column, part, delta);
  prefetch_next(delta->bias, part, delta);
  alignas(64) float made[kBlockRows * kUnitPanels * kLanes];
  const int64_t stride = kUnitPanels * kLanes;
  if (delta->column)
    product_of<kScatteredColumns>(delta->b.format, part->rows, part->panels, h, delta->h_stride, panel, bytes, delta->b.inputs, made, stride);
  else
    product_of<kAddScatteredColumns>(delta->b.format, part->rows, part->panels, h, delta->h_stride, panel, bytes, delta->b.inputs, y, y_stride);
  if (!delta->column && !delta->bias) return;
  for (int p = 0; p < part->panels; ++p) {
    const V factor = scales ? scale_of(delta, part->panel + p) : set1(1.0f), column = column_of(delta, part->panel + p);
    const V bias = delta->bias ? load(delta->bias + kLanes * (part->panel + p)) : zero();
    for (int row = 0; row < part->rows; ++row) {
      float* value = y + row * y_stride + kLanes * p;
      V sum = load(value);
      if (delta->column) sum = fma(column, load(made + row * stride + kLanes * p), sum * factor);
      if (delta->bias) sum = fma(bias, set1(delta->weight), sum);
      store(value, sum);
    }
  }
}

// Applies deltas to y, which holds the base product of rows r .. r + rows and panels first .. first + panels.
// `disjoint`: no row has two that scale or replace it, so that each does that by itself, without a tile of factors.
static void apply_deltas(DeltaSpan span, int32_t disjoint, int r, int rows, int first, int panels, float* y, int64_t y_stride) {
  alignas(64) float made[kBlockRows * kUnitPanels * kLanes];
  if (!disjoint) scale_base(span, r, rows, first, panels, y, y_stride);
  DeltaPart part;
  for (const Delta* delta = span.begin; delta < span.end; ++delta) {
    if ((delta->role == kScales && !disjoint) || !part_of(delta, r, rows, first, panels, &part)) continue;
    float* to = y + (part.row - r) * y_stride + kLanes * part.at;
    const float* h = delta->h + (part.row - delta->lo) * delta->h_stride;
    if (delta->role == kAdds || delta->role == kScalesAndAdds) {
      add_product(delta, &part, delta->role == kScalesAndAdds && disjoint, h, to, y_stride);
      continue;
    }
    if (delta->role == kScales) {
      prefetch_next(delta->column, &part, delta);
      for (int p = 0; p < part.panels; ++p) {
        const V factor = scale_of(delta, part.panel + p);
        for (int row = 0; row < part.rows; ++row) {
          float* value = to + row * y_stride + kLanes * p;
          store(value, load(value) * factor);
        }
      }
      continue;
    }
    if (delta->role == kOwnColumns) {
      const float left = disjoint ? 1.0f - delta->weight : 1.0f;
      for_each_column(delta, &part, [&](int i, int lane) {
        const float by = delta->column ? delta->column[delta->ids[i]] : 1.0f;
        for (int row = 0; row < part.rows; ++row) {
          float* value = to - kLanes * part.at + row * y_stride + lane;
          *value = left * *value + by * h[row * delta->h_stride + i];
        }
      });
      continue;
    }
    const float* from = made;
    int64_t stride = kUnitPanels * kLanes;
    if (delta->role == kOwnProduct) {
      const uint8_t* panel = delta->b.data + part.panel * delta->b.panel_bytes;
      multiply_rows(delta->own, part.row - delta->lo, part.rows, part.panels, panel, made, stride);
    } else {
      from = h + kLanes * part.panel, stride = delta->h_stride;
    }
    for (int p = 0; p < part.panels; ++p) {
      const V by = set1(delta->weight) * column_of(delta, part.panel + p);
      const V left = disjoint ? set1(1.0f) - by : set1(1.0f);
      for (int row = 0; row < part.rows; ++row) {
        float* value = to + row * y_stride + kLanes * p;
        store(value, fma(by, load(from + row * stride + kLanes * p), load(value) * left));
      }
    }
  }
}

// Applies the epilogue to columns of one row, in the order of program.Epilogue, and stores them.
TF_INLINE void finish(const LinearCall* c, const float* y, const float* up, int panel, int row, int column, int count) {
  V a = load(y);
  if (c->bias) a = a + load(c->bias + (int64_t)kLanes * panel);
  if (c->clip >= 0.0f) a = vmin(set1(c->clip), vmax(set1(-c->clip), a));  // in this order a NaN stays one
  if (up && c->glu_limit >= 0.0f) a = vmin(set1(c->glu_limit), a);
  a = activated(a, c->activation);
  if (up) {
    V b = load(up);
    if (c->bias) b = b + load(c->bias + (int64_t)kLanes * (panel + 1));
    if (c->clip >= 0.0f) b = vmin(set1(c->clip), vmax(set1(-c->clip), b));
    if (c->glu_limit >= 0.0f) b = vmin(set1(c->glu_limit), vmax(set1(-c->glu_limit), b));
    if (c->glu_offset != 0.0f) b = b + set1(c->glu_offset);
    a = a * b;
  }
  if (c->scale != 1.0f) a = a * set1(c->scale);
  if (c->residual.data) a = a + load_n(c->residual.data + row * c->residual.stride + column, count);
  if (c->softcap != 0.0f) a = softcapped(a, c->softcap);
  store_n(c->out.data + row * c->out.stride + column, rounded(a, c->round_out), count);
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
      const DeltaSpan span = deltas_at(c->deltas, c->num_deltas, r, r + rows);
      if (replaced(span, r, rows, first, panels)) memset(y, 0, sizeof y);
      else multiply_rows(c, r, rows, panels, panel, y, y_stride);
      if (span.begin != span.end) apply_deltas(span, c->disjoint, r, rows, first, panels, y, y_stride);
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

// Each row is summed in four quarters of k, (0 + 1) + (2 + 3): for a single row one chain of dependent sums would be
// slow, and every row must be summed in the same order.
template <int FORMAT, class LINES>
static void shrink_rows(const ShrinkCall* c, const uint8_t* data, LINES lines, float* h, int32_t row_lo, int32_t row_hi) {
  const int64_t quarter = c->a.inputs / 8 * 2;  // even: no pair is split; the last quarter is the longest
  const V scale = set1(c->scale);
  for (int32_t r = row_lo; r < row_hi; ++r) {
    const float* x = c->x.data + r * c->x.stride;
    V part[4][1][1];
    for (int q = 0; q < 4; ++q) part[q][0][0] = zero();
    for (int64_t k = 0; k < quarter; k += 2)
      for (int q = 0; q < 4; ++q) {
        const int64_t at = k + q * quarter;
        V& sum = part[q][0][0];
        if constexpr (FORMAT == kF32) {
          sum = fma(floats_of(data + lines.bytes * at, lines), set1(x[at]), sum);
          sum = fma(floats_of(data + lines.bytes * (at + 1), lines), set1(x[at + 1]), sum);
        } else {
          sum = fma(odd_in<FORMAT>(data + lines.bytes / 2 * at, lines), set1(x[at + 1]), sum);
          sum = fma(even_in<FORMAT>(data + lines.bytes / 2 * at, lines), set1(x[at]), sum);
        }
      }
    multiply<1, 1, FORMAT, false>(part[3], x, 0, data, 0, 4 * quarter, c->a.inputs, lines);
    const V sum = (part[0][0][0] + part[1][0][0]) + (part[2][0][0] + part[3][0][0]);
    store(h + r * c->h.stride, sum * scale);
  }
}

// Four rows share the loads of A. Quarter by quarter, so that the sums are those of a single row.
template <int FORMAT, class LINES>
static void shrink_tiles(const ShrinkCall* c, const uint8_t* data, LINES lines, float* h) {
  constexpr int MR = 4;
  const int64_t quarter = c->a.inputs / 8 * 2;
  const V scale = set1(c->scale);
  int32_t r = 0;
  for (; r + MR <= c->rows; r += MR) {
    const float* x = c->x.data + r * c->x.stride;
    V sum[4][MR][1];
    for (int q = 0; q < 4; ++q) {
      for (int i = 0; i < MR; ++i) sum[q][i][0] = zero();
      multiply<MR, 1, FORMAT, true>(sum[q], x, c->x.stride, data, 0, q * quarter, q < 3 ? (q + 1) * quarter : c->a.inputs,
                                    lines, PrefetchDistance{2048, 0});
    }
    for (int i = 0; i < MR; ++i)
      store(h + (r + i) * c->h.stride, ((sum[0][i][0] + sum[1][i][0]) + (sum[2][i][0] + sum[3][i][0])) * scale);
  }
  if (r < c->rows) shrink_rows<FORMAT>(c, data, lines, h, r, c->rows);
}

static void shrink(const ShrinkCall* c, int32_t panel_lo, int32_t panel_hi) {
  for (int32_t panel = panel_lo; panel < panel_hi; ++panel) {
    const uint8_t* data = c->a.data + panel * c->a.panel_bytes;
    float* h = c->h.data + (int64_t)kLanes * panel;
    const int32_t lanes = c->outputs - kLanes * panel;
    const auto run = [&](auto lines) {
      if (c->a.format == kF32) shrink_tiles<kF32>(c, data, lines, h);
      else if (c->a.format == kF16) shrink_tiles<kF16>(c, data, lines, h);
      else shrink_tiles<kBF16>(c, data, lines, h);
    };
    if (lanes < kLanes) run(narrow(lanes));
    else run(Full{});
  }
}

}  // namespace
}  // namespace truffula

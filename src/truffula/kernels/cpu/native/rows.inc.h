// Ops that compute each row alone: norm, pointwise, rope, embed.
#pragma once

#include "linear.inc.h"
#include "quant.inc.h"
#include "vec.h"

namespace truffula {
namespace {

static void norm(const NormCall* c, int32_t row_lo, int32_t row_hi) {
  const int width = c->width / c->groups;
  const float count = (float)width;
  for (int32_t t = row_lo; t < row_hi; ++t)
    for (int g = 0; g < c->groups; ++g) {
      const float* x = c->x.data + t * c->x.stride + g * width;
      float* out = c->out.data + t * c->out.stride + g * width;
      const float* gate = c->gate.data ? c->gate.data + t * c->gate.stride + g * width : nullptr;
      const float* weight = c->weight ? c->weight + g * c->group_step : nullptr;
      const float* bias = c->bias ? c->bias + g * c->group_step : nullptr;
      const float* plus = c->plus.data ? c->plus.data + t * c->plus.stride + g * width : nullptr;
      V mean = zero();
      if (c->layer_norm) {
        V sum = zero();
        for (int i = 0; i < width; i += kLanes) sum = sum + load_n(x + i, width - i);
        mean = set1(sum_of(sum) / count);
      }
      V squares = zero();
      for (int i = 0; i < width; i += kLanes) {
        V a = load_n(x + i, width - i) - mean;
        if (c->layer_norm && width - i < kLanes) {  // lanes after the last column must not count as -mean
          float lanes[kLanes];
          store(lanes, a);
          a = load_n(lanes, width - i);
        }
        squares = fma(a, a, squares);
      }
      const V by = set1(1.0f / sqrtf(sum_of(squares) / count + c->eps));
      for (int i = 0; i < width; i += kLanes) {
        const int n = width - i;
        V a = (load_n(x + i, n) - mean) * by;
        if (c->cast_first) a = rounded(a, c->round_out);
        if (weight) a = a * load_n(weight + i, n);
        if (bias) a = a + load_n(bias + i, n);
        if (gate) {
          if (c->cast_first) a = rounded(a, c->round_out);
          a = a * activated(load_n(gate + i, n), c->gate_activation);
        }
        a = rounded(a, c->round_out);
        if (plus) a = rounded(load_n(plus + i, n) + a, c->round_out);
        store_n(out + i, a, n);
      }
    }
}

// xIELU (Huang and Schlag 2024): alpha_p x^2 + beta x above zero, alpha_n (e^min(x, eps) - 1 - x) + beta x below.
static float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }
static V xielu(V x, const float* numbers) {
  const V beta = set1(numbers[2]) * x;
  const V above = fma(set1(softplus(numbers[0])) * x, x, beta);
  const V below = fma(vexp(vmin(x, set1(numbers[3]))) - set1(1.0f) - x, set1(numbers[2] + softplus(numbers[1])), beta);
  return where_negative(zero() - x, above, below);
}

// y of columns i to i + n, where each is for `share` columns.
static V shared_columns(const float* y, int32_t share, int32_t i, int32_t n) {
  const int32_t last = (n < kLanes ? n : kLanes) - 1;
  if (i / share == (i + last) / share) return set1(y[i / share]);
  float lanes[kLanes] = {};
  for (int32_t j = 0; j <= last; ++j) lanes[j] = y[(i + j) / share];
  return load_n(lanes, kLanes);
}

static void pointwise(const PointwiseCall* c, int32_t row_lo, int32_t row_hi) {
  for (int32_t t = row_lo; t < row_hi; ++t) {
    float param = c->params ? c->params[0] : 0.0f;
    if (c->kind == kPositionScale)
      param = 1.0f + param * logf(1.0f + floorf(((float)c->positions[t] + c->params[2]) / c->params[1]));
    for (int i = 0; i < c->width; i += kLanes) {
      const int n = c->width - i;
      V a = load_n(c->x.data + t * c->x.stride + i, n);
      switch (c->kind) {
        case kAct:
          a = activated(a, c->activation);
          break;
        case kAdd:
          a = a + load_n(c->y.data + t * c->y.stride + i, n);
          break;
        case kScale:
        case kPositionScale:
          a = a * set1(param);
          break;
        case kXielu:
          a = xielu(a, c->params);
          break;
        case kClip:
          a = vmin(set1(param), vmax(set1(-param), a));
          break;
        case kSoftcap:
          a = softcapped(a, param);
          break;
        default: {
          const float* y = c->y.data + t * c->y.stride;
          const V b = c->share == 1 ? load_n(y + i, n) : shared_columns(y, c->share, i, n);
          a = a * (c->kind != kMul ? vsigmoid(b) : c->activation ? activated(b, c->activation) : b);
        }
      }
      store_n(c->out.data + t * c->out.stride + i, rounded(a, c->round_out), n);
    }
  }
}

// (a, b) of a pair becomes (a cos - b sin, b cos + a sin).
static void rope(const RopeCall* c, int32_t row_lo, int32_t row_hi) {
  const int pairs = c->dims / 2;
  for (int32_t t = row_lo; t < row_hi; ++t) {
    const float* cosine = c->rows.data + t * c->rows.stride;
    const float* sine = cosine + pairs;
    for (int h = 0; h < c->heads; ++h) {
      float* x = c->x.data + t * c->x.stride + (int64_t)h * c->head_dim + c->start;
      if (!c->interleaved) {
        for (int i = 0; i < pairs; i += kLanes) {
          const int n = pairs - i;
          const V a = load_n(x + i, n), b = load_n(x + pairs + i, n);
          const V co = load_n(cosine + i, n), si = load_n(sine + i, n);
          store_n(x + i, rounded(a * co - b * si, c->round_out), n);
          store_n(x + pairs + i, rounded(b * co + a * si, c->round_out), n);
        }
        continue;
      }
      for (int i = 0; i < pairs; ++i) {
        float* pair = x + 2 * i;
        const float a = pair[0] * cosine[i] - pair[1] * sine[i], b = pair[1] * cosine[i] + pair[0] * sine[i];
        pair[0] = c->round_out ? to_float(to_bf16(a)) : a;
        pair[1] = c->round_out ? to_float(to_bf16(b)) : b;
      }
    }
  }
}

// Adds the deltas of adapters to rows of a table.
static void add_embed_deltas(const EmbedCall* c, int32_t row_lo, int32_t row_hi) {
  alignas(64) float y[kBlockRows * kUnitPanels * kLanes];
  const int64_t y_stride = kUnitPanels * kLanes;
  const int width = c->table.width, all = (width + kLanes - 1) / kLanes;
  for (int r = row_lo; r < row_hi; r += kBlockRows) {
    const int rows = row_hi - r < kBlockRows ? row_hi - r : kBlockRows;
    const DeltaSpan span = deltas_at(c->deltas, c->num_deltas, r, r + rows);
    if (span.begin == span.end) continue;
    for (int first = 0; first < all; first += kUnitPanels) {
      const int panels = all - first < kUnitPanels ? all - first : kUnitPanels;
      for (int i = 0; i < rows; ++i)
        for (int p = 0; p < panels; ++p) {
          const int column = kLanes * (first + p);
          store(y + i * y_stride + kLanes * p, load_n(c->out.data + (r + i) * c->out.stride + column, width - column));
        }
      apply_deltas(span, c->disjoint, r, rows, first, panels, y, y_stride);
      for (int i = 0; i < rows; ++i)
        for (int p = 0; p < panels; ++p) {
          const int column = kLanes * (first + p);
          store_n(c->out.data + (r + i) * c->out.stride + column, load(y + i * y_stride + kLanes * p), width - column);
        }
    }
  }
}

static void embed(const EmbedCall* c, const int32_t* ids, int32_t row_lo, int32_t row_hi) {
  const Table* table = &c->table;
  const int width = table->width;
  for (int32_t t = row_lo; t < row_hi; ++t) {
    float* out = c->out.data + t * c->out.stride;
    const int64_t id = ids[t];
    if (id >= table->rows) {
      memset(out, 0, (size_t)width * sizeof(float));
    } else if (table->panel_bytes == 0) {
      const int64_t at = id * width;
      for (int i = 0; i < width; ++i)
        out[i] = table->format == kF32 ? ((const float*)table->data)[at + i]
                                       : to_float(((const uint16_t*)table->data)[at + i]);
    } else {  // a table that is the head too: lane id % 16 of its panel
      const uint8_t* panel = table->data + id / kLanes * table->panel_bytes;
      const int64_t lane = id % kLanes;
      if (is_quantised(table->format)) {
        unpack_lane(panel, table->format, width, lane, out);
        for (int i = 0; i < width; i += kLanes) store(out + i, rounded(load(out + i), c->round_out));
      } else {
        for (int i = 0; i < width; ++i)
          out[i] = table->format == kF32 ? ((const float*)panel)[i * kLanes + lane]
                                         : to_float(((const uint16_t*)panel)[i / 2 * 2 * kLanes + 2 * lane + i % 2]);
      }
    }
  }
  if (c->num_deltas) add_embed_deltas(c, row_lo, row_hi);
  // A table that is kept in float32 may still feed rows of bfloat16.
  if (!c->scaled && !c->add.data && !c->num_deltas && !(c->round_out && table->format == kF32)) return;
  for (int32_t t = row_lo; t < row_hi; ++t) {
    float* out = c->out.data + t * c->out.stride;
    for (int i = 0; i < width; i += kLanes) {
      const int n = width - i;
      V a = load_n(out + i, n);
      if (c->scaled && ids[t] < table->rows) a = a * set1(c->scale);
      if (c->add.data) a = a + load_n(c->add.data + t * c->add.stride + i, n);
      store_n(out + i, rounded(a, c->round_out), n);
    }
  }
}

}  // namespace
}  // namespace truffula

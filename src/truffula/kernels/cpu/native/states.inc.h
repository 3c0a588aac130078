// Ops that read and write sequence states.
#pragma once

#include <math.h>
#include <string.h>

#include "rows.inc.h"

namespace truffula {
namespace {

// Row number `row` of a span's inputs; rows below 0 are in the state that the span begins with.
static const float* conv_input(const ConvCall* c, const StateSpan* span, const float* before, int row) {
  return row < 0 ? before + (int64_t)(c->taps - 1 + row) * c->width : c->x.data + (span->lo + row) * c->x.stride;
}

static void conv(const ConvCall* c, const StateSpan* spans, int32_t num_spans, int32_t column_lo, int32_t column_hi) {
  const float* inputs[kMaxTaps];
  const int history = c->taps - 1;
  for (int z = 0; z < num_spans; ++z) {
    const StateSpan* span = spans + z;
    const float* before = c->states.data + span->in * c->states.stride;
    const int count = span->hi - span->lo;
    for (int t = 0; t < count; ++t) {
      for (int k = 0; k < c->taps; ++k) inputs[k] = conv_input(c, span, before, t - history + k);
      float* out = c->out.data + (span->lo + t) * c->out.stride;
      for (int i = column_lo; i < column_hi; i += kLanes) {
        const int n = column_hi - i;
        V sum = zero();
        for (int k = 0; k < c->taps; ++k)
          sum = fma(load_n(inputs[k] + i, n), load_n(c->weight + (int64_t)k * c->width + i, n), sum);
        if (c->bias) sum = sum + load_n(c->bias + i, n);
        if (c->activation) sum = activated(sum, c->activation);
        store_n(out + i, rounded(sum, c->round_out), n);
      }
    }
    // Row k of the new state is never before row k of the old one, so the two may be the same.
    float* after = c->states.data + span->out * c->states.stride;
    for (int k = 0; k < history; ++k)
      memmove(after + (int64_t)k * c->width + column_lo, conv_input(c, span, before, count - history + k) + column_lo,
              (size_t)(column_hi - column_lo) * sizeof(float));
  }
}

static void mamba2(const Mamba2Call* c, const StateSpan* span, int32_t head) {
  const int width = c->head_dim, size = c->state_size, group = head / (c->heads / c->groups);
  const int64_t place = (int64_t)head * width * size;
  const float* before = c->states.data + span->in * c->states.stride + place;
  float* state = c->states.data + span->out * c->states.stride + place;
  for (int t = span->lo; t < span->hi; ++t, before = state) {
    const float dt = softplus(c->dt.data[t * c->dt.stride + head] + c->dt_bias[head]);
    const float step = dt < c->dt_low ? c->dt_low : dt > c->dt_high ? c->dt_high : dt;
    V decay = c->rates == 1 ? set1(expf(c->rate[head] * step)) : zero();
    const float* x = c->x.data + t * c->x.stride + (int64_t)head * width;
    const float* b = c->b.data + t * c->b.stride + (int64_t)group * size;
    const float* q = c->c.data + t * c->c.stride + (int64_t)group * size;
    float* out = c->out.data + t * c->out.stride + (int64_t)head * width;
    for (int p = 0; p < width; ++p) {
      const V input = set1(step * x[p]);
      const float* from = before + (int64_t)p * size;
      float* to = state + (int64_t)p * size;
      V sum = zero();
      for (int i = 0; i < size; i += kLanes) {
        const int n = size - i;
        if (c->rates > 1) decay = vexp(load_n(c->rate + (int64_t)head * size + i, n) * set1(step));
        const V h = fma(input, load_n(b + i, n), decay * load_n(from + i, n));
        sum = fma(h, load_n(q + i, n), sum);
        store_n(to + i, h, n);
      }
      const float y = sum_of(sum) + c->skip[head] * x[p];
      out[p] = c->round_out ? to_float(to_bf16(y)) : y;
    }
  }
}

}  // namespace
}  // namespace truffula

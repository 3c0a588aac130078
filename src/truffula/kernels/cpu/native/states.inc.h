// Ops that read and write sequence states.
#pragma once

#include <string.h>

#include "vec.h"

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

}  // namespace
}  // namespace truffula

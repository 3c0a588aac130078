// The gated delta rule, token by token. The columns of a state are independent of each other, so a block of them stays
// in the first-level cache while all tokens of a span update it: four operations per number of the state and token,
// about as many as the form in chunks needs, and the result does not depend on how a prompt is cut into steps.
#pragma once

#include "vec.h"

namespace truffula {
namespace {

// What all columns of a head's state need of up to kDeltaTokens tokens: rows of dim_k floats, padded.
struct DeltaTokens {
  float *decay, *key, *query, *decayed_key;  // exp(g), k, scale * q, exp(g) * k
  float* beta;
  int stride;
};

static DeltaTokens delta_tokens(float* scratch, int dim_k) {
  const int stride = (dim_k + kLanes - 1) / kLanes * kLanes, size = kDeltaTokens * stride;
  return {scratch, scratch + size, scratch + 2 * size, scratch + 3 * size, scratch + 4 * size, stride};
}

// x / |x| * scale.
static void delta_unit(const float* x, int width, float eps, float scale, float* to) {
  V squares = zero();
  for (int i = 0; i < width; i += kLanes) {
    const V a = load_n(x + i, width - i);
    squares = fma(a, a, squares);
  }
  const V by = set1(scale / sqrtf(sum_of(squares) + eps));
  for (int i = 0; i < width; i += kLanes) store(to + i, load_n(x + i, width - i) * by);
}

static void delta_prepare(const GatedDeltaCall* c, int head, int t, int count, const DeltaTokens& to) {
  const int key_head = head / (c->heads / c->key_heads), width = c->dim_k;
  const V rate = set1(c->rate[head]);
  for (int i = 0; i < count; ++i, ++t) {
    float *decay = to.decay + i * to.stride, *key = to.key + i * to.stride;
    delta_unit(c->q.data + t * c->q.stride + (int64_t)key_head * width, width, c->eps, c->scale,
               to.query + i * to.stride);
    delta_unit(c->k.data + t * c->k.stride + (int64_t)key_head * width, width, c->eps, 1.0f, key);
    const float* g = c->decay.data + t * c->decay.stride + (c->per_channel ? (int64_t)head * width : head);
    const float* bias = c->dt_bias + (c->per_channel ? (int64_t)head * width : head);
    V by = vexp(rate * vsoftplus(set1(g[0] + bias[0])));
    for (int j = 0; j < width; j += kLanes) {
      if (c->per_channel) by = vexp(rate * vsoftplus(load_n(g + j, width - j) + load_n(bias + j, width - j)));
      store(decay + j, by);
      store(to.decayed_key + i * to.stride + j, by * load(key + j));
    }
    store(to.beta + i * kLanes, set1(c->beta_scale) * vsigmoid(set1(c->beta.data[t * c->beta.stride + head])));
  }
}

// `count` tokens of one block, `width` columns wide (kWhole: all of kDeltaColumns). `v` and `out` are its first row.
template <bool kWhole>
static void delta_block(const GatedDeltaCall* c, const DeltaTokens& tokens, int count, const float* v, float* out,
                        const float* from, float* state, int width) {
  const int first = kWhole || width > kLanes ? kLanes : width, second = kWhole ? kLanes : width < kLanes ? 0 : width - kLanes;
  const int dim_k = c->dim_k;
  V read0 = zero(), read1 = zero();  // what the decayed state has for the token's key
  for (int i = 0; i < dim_k; ++i) {
    const V key = set1(tokens.decayed_key[i]);
    read0 = fma(key, load_n(from + i * width, first), read0);
    read1 = fma(key, load_n(from + i * width + kLanes, second), read1);
  }
  for (int t = 0; t < count; ++t, v += c->v.stride, out += c->out.stride, from = state) {
    const V beta = load(tokens.beta + t * kLanes);
    const V delta0 = (load_n(v, first) - read0) * beta, delta1 = (load_n(v + kLanes, second) - read1) * beta;
    const float *decay = tokens.decay + t * tokens.stride, *key = tokens.key + t * tokens.stride;
    const float* query = tokens.query + t * tokens.stride;
    // The pass that updates the state reads it for the next token, too; after the last one that is not used.
    const float* next = tokens.decayed_key + (t + 1 < count ? t + 1 : t) * tokens.stride;
    V out0 = zero(), out1 = zero();
    read0 = read1 = zero();
    for (int i = 0; i < dim_k; ++i) {
      const V by = set1(decay[i]), k = set1(key[i]), q = set1(query[i]), n = set1(next[i]);
      const V s0 = fma(k, delta0, by * load_n(from + i * width, first));
      const V s1 = fma(k, delta1, by * load_n(from + i * width + kLanes, second));
      store_n(state + i * width, s0, first);
      store_n(state + i * width + kLanes, s1, second);
      out0 = fma(q, s0, out0), out1 = fma(q, s1, out1);
      read0 = fma(n, s0, read0), read1 = fma(n, s1, read1);
    }
    store_n(out, rounded(out0, c->round_out), first);
    store_n(out + kLanes, rounded(out1, c->round_out), second);
  }
}

static void gated_delta(const GatedDeltaCall* c, const StateSpan* span, int32_t head, int32_t block_lo, int32_t block_hi,
                        float* scratch) {
  const float* before = c->states.data + span->in * c->states.stride;
  float* after = c->states.data + span->out * c->states.stride;
  const DeltaTokens tokens = delta_tokens(scratch, c->dim_k);
  const int64_t state = (int64_t)head * c->dim_k * c->dim_v, column = (int64_t)head * c->dim_v;
  for (int t = span->lo; t < span->hi; t += kDeltaTokens) {
    const int count = span->hi - t < kDeltaTokens ? span->hi - t : kDeltaTokens;
    delta_prepare(c, head, t, count, tokens);
    const float* from = t == span->lo ? before : after;
    for (int b = block_lo; b < block_hi; ++b) {
      const int first = b * kDeltaColumns, width = c->dim_v - first < kDeltaColumns ? c->dim_v - first : kDeltaColumns;
      const int64_t at = state + (int64_t)first * c->dim_k;
      (width == kDeltaColumns ? delta_block<true> : delta_block<false>)(
          c, tokens, count, c->v.data + t * c->v.stride + column + first,
          c->out.data + t * c->out.stride + column + first, from + at, after + at, width);
    }
  }
}

}  // namespace
}  // namespace truffula

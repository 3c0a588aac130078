// Ops with experts: the choice of each row's experts, and products with their matrices. Rows are grouped by expert, and
// a thread multiplies its columns of every expert that has rows; matrices of other experts are not read.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "chunks.h"
#include "executable.h"
#include "numbers.h"

namespace truffula {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// The first of the largest of `count` values that are not `taken`. With NaN alone, the first that is not taken.
int32_t largest(const float* values, const uint8_t* taken, int32_t count) {
  int32_t best = kAbsent;
  for (int32_t i = 0; i < count; ++i)
    if (!taken[i] && (best == kAbsent || values[i] > values[best])) best = i;
  return best;
}

void softmax(const float* x, const uint8_t* left_out, int32_t count, float* out) {
  float most = kMinusInfinity, sum = 0.0f;
  for (int32_t i = 0; i < count; ++i)
    if (!left_out[i]) most = std::max(most, x[i]);
  for (int32_t i = 0; i < count; ++i) sum += out[i] = left_out[i] ? 0.0f : std::exp(x[i] - most);
  for (int32_t i = 0; i < count; ++i) out[i] /= sum;
}

// Takes the experts of all but the best groups.
void take_groups(const RouteOp& op, const float* values, RouteScratch& choice) {
  const int32_t each = op.logits.width / op.groups;
  float* best = choice.group_scores.data();
  uint8_t* kept = choice.left_out.data();
  for (int32_t g = 0; g < op.groups; ++g) {
    float first = kMinusInfinity, second = kMinusInfinity;
    for (int32_t i = g * each; i < (g + 1) * each; ++i) {
      second = std::max(second, std::min(first, values[i]));
      first = std::max(first, values[i]);
    }
    best[g] = op.group_score == kTopTwo ? first + second : first;
  }
  std::fill_n(kept, op.groups, uint8_t{0});
  for (int32_t i = 0; i < op.topk_groups; ++i) kept[largest(best, kept, op.groups)] = 1;
  for (int32_t g = 0; g < op.groups; ++g)
    if (!kept[g]) std::fill_n(choice.taken.begin() + g * each, each, uint8_t{1});
}

// One row of a Route op without a sparse mixer.
void choose(const RouteOp& op, const float* logits, const float* correction, const float* expert_scale,
            RouteScratch& choice, float* out) {
  const int32_t count = op.logits.width;
  float* scores = choice.scores.data();
  std::fill(choice.taken.begin(), choice.taken.end(), uint8_t{0});
  if (op.score == kSoftmax) softmax(logits, choice.taken.data(), count, scores);
  else
    for (int32_t i = 0; i < count; ++i) scores[i] = 1.0f / (1.0f + std::exp(-logits[i]));
  const float* preference = logits;
  if (correction) {
    for (int32_t i = 0; i < count; ++i) choice.preference[static_cast<size_t>(i)] = scores[i] + correction[i];
    preference = choice.preference.data();
  }
  if (op.groups > 1) take_groups(op, correction ? preference : scores, choice);
  float norm = 0.0f;
  for (int32_t j = 0; j < op.k; ++j) {
    const int32_t expert = largest(preference, choice.taken.data(), count);
    choice.taken[static_cast<size_t>(expert)] = 1;
    out[j] = static_cast<float>(expert);
    out[op.k + j] = scores[expert];
    norm += op.norm == 1.0f ? std::fabs(scores[expert]) : std::pow(std::fabs(scores[expert]), op.norm);
  }
  if (op.norm != 0.0f) {
    const float by = std::max((op.norm == 1.0f ? norm : std::pow(norm, 1.0f / op.norm)) + op.plus, op.floor);
    for (int32_t j = 0; j < op.k; ++j) out[op.k + j] /= by;
  }
  for (int32_t j = 0; j < op.k; ++j) out[op.k + j] *= op.scale;
  if (expert_scale)
    for (int32_t j = 0; j < op.k; ++j) out[op.k + j] *= expert_scale[static_cast<int32_t>(out[j])];
}

// See program.Route: each weight is a softmax over the experts that are left and near the best of them.
void mix_sparsely(const RouteOp& op, const float* logits, RouteScratch& choice, float* out) {
  const int32_t count = op.logits.width;
  std::fill(choice.taken.begin(), choice.taken.end(), uint8_t{0});
  for (int32_t j = 0; j < op.k; ++j) {
    const int32_t expert = largest(logits, choice.taken.data(), count);
    const float most = logits[expert];
    for (int32_t i = 0; i < count; ++i) {
      const bool far = (most - logits[i]) / std::max(std::fabs(logits[i]), most) > 2.0f * op.jitter;
      choice.left_out[static_cast<size_t>(i)] = choice.taken[static_cast<size_t>(i)] || far;
    }
    softmax(logits, choice.left_out.data(), count, choice.scores.data());
    out[j] = static_cast<float>(expert);
    out[op.k + j] = choice.scores[static_cast<size_t>(expert)];
    choice.taken[static_cast<size_t>(expert)] = 1;
  }
}

}  // namespace

// Room for one row's choice in each thread.
void Executable::reserve_routes(const RouteOp& op) {
  const auto experts = static_cast<size_t>(op.logits.width);
  for (ThreadState& state : thread_states_)
    if (RouteScratch& room = state.route; room.scores.size() < experts) {
      room.scores.resize(experts), room.preference.resize(experts), room.group_scores.resize(experts);
      room.taken.resize(experts), room.left_out.resize(experts);
    }
}

void Executable::run_op(const RouteOp& op, const Stage& stage, int32_t chunk, ThreadState& state) {
  const auto mine = span_of(counts_.T, chunk, chunks_of(stage));
  const Rows logits = rows(op.logits), out = rows(op.out);
  const auto numbers = [&](int32_t id) { return id == kAbsent ? nullptr : weight(id).memory.floats(); };
  const float *correction = numbers(op.correction), *expert_scale = numbers(op.expert_scale);
  for (int32_t t = mine.lo; t < mine.hi; ++t) {
    const float* from = logits.data + t * logits.stride;
    float* to = out.data + t * out.stride;
    if (op.score == kSparsemixer) mix_sparsely(op, from, state.route, to);
    else choose(op, from, correction, expert_scale, state.route, to);
  }
}

// Room for the largest step.
void Executable::reserve_experts(const ExpertLinearOp& op) {
  const Weight& w = weight(op.weight);
  const auto pairs = static_cast<size_t>(capacity_.max_tokens) * static_cast<size_t>(op.k());
  expert_pairs_.reserve(std::max(expert_pairs_.capacity(), pairs));
  expert_starts_.reserve(static_cast<size_t>(w.experts) + 1);
  used_experts_.reserve(static_cast<size_t>(w.experts));
  const auto grow = [](auto& vector, int64_t count) {
    if (static_cast<int64_t>(vector.size()) < count) vector.resize(static_cast<size_t>(count));
  };
  for (ThreadState& state : thread_states_) {
    grow(state.expert_x, kExpertRows * w.inputs);
    grow(state.expert_y, kExpertRows * expert_columns(w.order.panels(), team_.size()));
    grow(state.expert_quantised, padded_rows(kExpertRows) * w.quantised_stride());
  }
}

// The first stage groups the rows, in its first chunk, and converts x; the second multiplies.
int32_t Executable::expert_chunks(const ExpertLinearOp& op, const Stage& stage) const {
  const int32_t team = team_.size();
  if (stage.number == 0) return 1 + (converts_x(op.weight, op.x) ? row_chunks(counts_.T, team) : 0);
  const int32_t units = (weight(op.weight).packed().panels + 1) / 2;
  return std::min(units, counts_.T < kFineRows ? team : 4 * team);
}

// Sorts the pairs of row and place by expert. A number that names no expert has no product.
void Executable::group_by_expert(const ExpertLinearOp& op) {
  const int32_t experts = static_cast<int32_t>(weight(op.weight).experts), k = op.k();
  const Rows routes = rows(op.routes);
  expert_starts_.assign(static_cast<size_t>(experts) + 1, 0);
  const auto expert_at = [&](int32_t t, int32_t j) {
    const float number = routes.data[t * routes.stride + j];
    return number >= 0.0f && number < static_cast<float>(experts) ? static_cast<int32_t>(number) : kAbsent;
  };
  int32_t total = 0;
  for (int32_t t = 0; t < counts_.T; ++t)
    for (int32_t j = 0; j < k; ++j)
      if (const int32_t expert = expert_at(t, j); expert != kAbsent) ++expert_starts_[static_cast<size_t>(expert) + 1], ++total;
  used_experts_.clear();
  for (int32_t expert = 0; expert < experts; ++expert) {
    if (expert_starts_[static_cast<size_t>(expert) + 1]) used_experts_.push_back(expert);
    expert_starts_[static_cast<size_t>(expert) + 1] += expert_starts_[static_cast<size_t>(expert)];
  }
  expert_pairs_.resize(static_cast<size_t>(total));
  for (int32_t t = counts_.T - 1; t >= 0; --t)  // from the end: each start moves down to that of its expert
    for (int32_t j = k - 1; j >= 0; --j)
      if (const int32_t expert = expert_at(t, j); expert != kAbsent)
        expert_pairs_[static_cast<size_t>(--expert_starts_[static_cast<size_t>(expert) + 1])] = t * k + j;
  // Now entry e + 1 is where e begins: shift them, so that entry e is.
  std::copy(expert_starts_.begin() + 1, expert_starts_.end(), expert_starts_.begin());
  expert_starts_.back() = total;
}

void Executable::quantise(const ExpertLinearOp& op, int32_t chunk, int32_t chunks) {
  const Weight& w = weight(op.weight);
  const int64_t each = x_rows(op), stride = w.quantised_stride();
  const auto mine = span_of(counts_.T, chunk, chunks);
  for (int64_t j = 0; j < each; ++j) {
    Rows x = rows(op.x);
    x.data += j * w.inputs;
    const QuantiseCall call{x, quantised_x_.data() + j * stride, each * stride, w.format, static_cast<int32_t>(w.inputs)};
    kernels_->quantise(&call, mine.lo, mine.hi);
  }
}

void Executable::run_op(const ExpertLinearOp& op, const Stage& stage, int32_t chunk, ThreadState& state) {
  const int32_t chunks = expert_chunks(op, stage);
  if (stage.number == 0) return chunk == 0 ? group_by_expert(op) : quantise(op, chunk - 1, chunks - 1);
  const auto units = span_of((weight(op.weight).packed().panels + 1) / 2, chunk, chunks);
  if (op.combine == kNoSum) {
    for (int32_t expert : used_experts_) multiply_expert(op, stage.op, expert, units.lo, units.hi, state);
    return;
  }
  const int32_t unit = op.glu ? kLanes : 2 * kLanes, lo = units.lo * unit, hi = std::min(op.out.width, units.hi * unit);
  const Rows out = rows(op.out), residual = rows(op.residual);
  for (int32_t t = 0; t < counts_.T; ++t) {
    float* to = out.data + t * out.stride;
    if (!residual.data) std::fill(to + lo, to + hi, 0.0f);
    else if (residual.data != out.data)
      std::copy(residual.data + t * residual.stride + lo, residual.data + t * residual.stride + hi, to + lo);
  }
  for (int32_t expert : used_experts_) multiply_expert(op, stage.op, expert, units.lo, units.hi, state);
  if (!rounded(op.out)) return;
  for (int32_t t = 0; t < counts_.T; ++t)
    for (int32_t c = lo; c < hi; ++c) {
      float& value = out.data[t * out.stride + c];
      value = from_bf16(to_bf16(value));
    }
}

// Multiplies an expert's rows, a block at a time, with units of two panels of its matrix, and writes the results to
// their places or adds them to their rows.
void Executable::multiply_expert(const ExpertLinearOp& op, size_t index, int32_t expert, int32_t unit_lo, int32_t unit_hi,
                                 ThreadState& state) {
  const Weight& w = weight(op.weight);
  const bool converts = converts_x(op.weight, op.x);
  const int32_t k = op.k(), each = x_rows(op), width = op.glu ? static_cast<int32_t>(w.order.half) : static_cast<int32_t>(w.outputs);
  const int32_t unit = op.glu ? kLanes : 2 * kLanes, lo = unit_lo * unit, count = std::min(width, unit_hi * unit) - lo;
  const int64_t stride = w.quantised_stride(), y_stride = expert_columns(w.order.panels(), team_.size());
  const Rows x = rows(op.x), out = rows(op.out), routes = rows(op.routes);
  LinearCall call{};
  call.w = w.packed(expert);
  call.w.data += 2 * unit_lo * call.w.panel_bytes;
  call.w.panels = std::min(call.w.panels, 2 * unit_hi) - 2 * unit_lo;
  call.x = {state.expert_x.data(), w.inputs};
  call.out = {state.expert_y.data(), y_stride};
  call.quantised_x = converts ? state.expert_quantised.data() : nullptr;
  call.quantised_stride = stride;
  call.bias = op.bias == kAbsent ? nullptr : op.packed_bias.data() + (expert * w.order.panels() + 2 * unit_lo) * kLanes;
  call.out_width = count;
  call.activation = op.activation;
  call.glu = op.glu;
  call.in_blocks = !rounded(op.x);
  call.round_out = op.combine == kNoSum && rounded(op.out);
  call.clip = op.clip;
  call.scale = op.scale;
  call.glu_limit = op.glu_limit;
  call.glu_offset = op.glu_offset;
  const int32_t end = expert_starts_[static_cast<size_t>(expert) + 1];
  for (int32_t from = expert_starts_[static_cast<size_t>(expert)]; from < end; from += kExpertRows) {
    const int32_t* pairs = expert_pairs_.data() + from;
    call.rows = std::min(kExpertRows, end - from);
    const bool adapted = active_of_op_[index].from != active_of_op_[index].to;
    for (int32_t r = 0; r < call.rows; ++r) {
      const int64_t t = pairs[r] / k, row = each == 1 ? t : pairs[r], j = each == 1 ? 0 : pairs[r] % k;
      if (converts) std::memcpy(state.expert_quantised.data() + r * stride, quantised_x_.data() + row * stride, static_cast<size_t>(stride));
      if (!converts || adapted)
        std::memcpy(state.expert_x.data() + r * w.inputs, x.data + t * x.stride + j * w.inputs, static_cast<size_t>(w.inputs) * sizeof(float));
    }
    call.num_deltas = adapted ? expert_deltas(index, expert, pairs, call, k, 2 * unit_lo, state) : 0;
    call.deltas = state.deltas.data();
    call.disjoint = active_of_op_[index].disjoint;
    kernels_->linear(&call, 0, unit_hi - unit_lo);
    for (int32_t r = 0; r < call.rows; ++r) {
      const int64_t t = pairs[r] / k, j = pairs[r] % k;
      const float* y = state.expert_y.data() + r * y_stride;
      float* to = out.data + t * out.stride + lo;
      if (op.combine == kNoSum) {
        std::memcpy(to + j * width, y, static_cast<size_t>(count) * sizeof(float));
      } else {
        const float by = op.combine == kWeightedSum ? routes.data[t * routes.stride + k + j] : 1.0f;
        for (int32_t c = 0; c < count; ++c) to[c] += by * y[c];
      }
    }
  }
}

// Lists in `state.deltas` the adapters of a block of an expert's rows (`pairs`, ascending), whose product is `base`, and
// computes their columns of h. Returns how many there are. Every chunk of columns computes them anew: they are small
// beside its product.
int32_t Executable::expert_deltas(size_t index, int32_t expert, const int32_t* pairs, const LinearCall& base, int32_t k,
                                  int32_t panel_lo, ThreadState& state) const {
  state.deltas.clear();
  state.own.clear();
  state.deltas_op = SIZE_MAX;
  const auto [from, to, disjoint] = active_of_op_[index];
  const int32_t* end = pairs + base.rows;
  float* h = state.expert_h.data();
  for (int32_t i = from; i < to; ++i) {
    const ActiveAdapter& active = active_adapters_[static_cast<size_t>(i)];
    const int32_t found = active.op->of_expert[static_cast<size_t>(expert)];
    const auto lo = static_cast<int32_t>(std::lower_bound(pairs, end, active.lo * k) - pairs);
    const auto hi = static_cast<int32_t>(std::lower_bound(pairs, end, active.hi * k) - pairs);
    if (found == kAbsent || lo >= hi) continue;
    const AdapterOp& op = active.adapter->ops[static_cast<size_t>(found)];
    shrink(op, {base.x.data + lo * base.x.stride, base.x.stride}, h, active.weight, hi - lo, base.w.format);
    append_deltas(op, active.weight, h, lo, hi, panel_lo, base, state);
    h += (hi - lo) * op.h_width;
  }
  const auto made = static_cast<int32_t>(state.deltas.size());
  set_bounds(state.deltas.data(), made);
  return made;
}

}  // namespace truffula

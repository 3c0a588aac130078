// Adapters in a step: which act where, what they compute of an op's input, and what they do to its product.
#include <algorithm>
#include <cstring>

#include "executable.h"

namespace truffula {
namespace {

constexpr int32_t kShrinkRows = 64;  // rows of one adapter in a shrink task

// Tasks in which an adapter computes its columns of h for `rows` rows.
int32_t shrink_tasks(const AdapterOp& op, int32_t rows) {
  return op.h_width == 0 || !op.of_expert.empty() ? 0 : (rows + kShrinkRows - 1) / kShrinkRows;
}

}  // namespace

// Whether each table has a row for a token behind the smallest one: its own, or one of an adapter of step row `row`.
bool Executable::has_row(int32_t token, int32_t row, const StepCounts& counts) const {
  const auto owns = [&](size_t index, const EmbedOp& op) {
    if (token < weight(op.table).outputs) return true;
    for (int32_t g = 0; g < counts.G; ++g) {
      const int32_t* seg = in_.seg + 3 * g;
      const Adapter& adapter = *adapters_[static_cast<size_t>(seg[2])];
      if (row < seg[0] || row >= seg[1] || adapter.op_of[index] == kAbsent) continue;
      for (const AdapterGather& part : adapter.ops[static_cast<size_t>(adapter.op_of[index])].gathers)
        if (part.ids && std::binary_search(part.ids, part.ids + part.num_ids, token)) return true;
    }
    return false;
  };
  for (size_t index = 0; index < ops_.size(); ++index)
    if (const auto* embed = std::get_if<EmbedOp>(&ops_[index]); embed && embed->source == kFromToken && !owns(index, *embed)) return false;
  return true;
}

// Lists the adapters that act at each op and where their columns of h go in h_, which all ops share.
void Executable::plan_adapters() {
  active_adapters_.clear();
  int64_t most = 0, most_of_experts = 0, widest = 0;
  size_t most_deltas = 0;
  for (size_t index = 0; index < ops_.size(); ++index) {
    const auto from = static_cast<int32_t>(active_adapters_.size());
    const bool logits = has_logit_rows(out_of(ops_[index])), takes = takes_adapters(ops_[index]);
    int64_t at = 0, of_experts = 0;
    int32_t chunk = 0, end = 0;
    bool disjoint = true;
    size_t deltas = 0;
    for (int32_t g = 0; takes && g < counts_.G; ++g) {
      const int32_t* seg = in_.seg + 3 * g;
      const int32_t lo = logits ? in_.seg_r[2 * g] : seg[0], hi = logits ? in_.seg_r[2 * g + 1] : seg[1];
      const Adapter& adapter = *adapters_[static_cast<size_t>(seg[2])];
      const int32_t found = adapter.op_of[index];
      if (found == kAbsent || lo >= hi) continue;
      const AdapterOp& op = adapter.ops[static_cast<size_t>(found)];
      active_adapters_.push_back({&adapter, &op, lo, hi, chunk, in_.seg_weight[g], at});
      if (op.of_expert.empty()) at += (hi - lo) * op.h_width;
      else of_experts += op.h_width;  // computed where they are used
      widest = std::max(widest, op.h_width);
      disjoint &= op.disjoint && lo >= end;
      end = std::max(end, hi);
      chunk += shrink_tasks(op, hi - lo);
      deltas += op.num_deltas;
    }
    active_of_op_[index] = {from, static_cast<int32_t>(active_adapters_.size()), disjoint};
    most = std::max(most, at);
    most_of_experts = std::max(most_of_experts, of_experts);
    most_deltas = std::max(most_deltas, deltas);
  }
  // Converted rows are read in groups, beyond the last one too.
  const auto floats = static_cast<size_t>(most ? most + kXRows * widest : 0);
  if (h_.size() < floats) {
    std::vector<float>().swap(h_);  // freed first: the old values are not needed
    h_.resize(floats);
  }
  for (ThreadState& state : thread_states_) {
    state.deltas.reserve(most_deltas);
    state.own.reserve(most_deltas);  // pointers into it stay
    if (const auto room = static_cast<size_t>(most_of_experts ? kExpertRows * most_of_experts + kXRows * widest : 0); state.expert_h.size() < room)
      state.expert_h.resize(room);
    state.deltas_op = SIZE_MAX;
  }
}

// The number of shrink tasks at an op.
int32_t Executable::num_shrink_tasks(size_t index) const {
  const auto [from, to, disjoint] = active_of_op_[index];
  if (from == to) return 0;
  const ActiveAdapter& last = active_adapters_[static_cast<size_t>(to) - 1];
  return last.first_task + shrink_tasks(*last.op, last.hi - last.lo);
}

// Computes the columns of h for the rows of one task.
void Executable::run_shrink_task(const Stage& stage, int32_t number) {
  const size_t index = stage.op;
  const auto [from, to, disjoint] = active_of_op_[index];
  const auto behind = std::upper_bound(active_adapters_.begin() + from, active_adapters_.begin() + to, number,
                                       [](int32_t wanted, const ActiveAdapter& active) { return wanted < active.first_task; });
  const ActiveAdapter& active = *(behind - 1);
  const int32_t lo = active.lo + (number - active.first_task) * kShrinkRows, count = std::min(kShrinkRows, active.hi - lo);
  if (const auto* latent = std::get_if<MlaOp>(&ops_[index])) return shrink_heads(*latent, active, lo, count, stage.number != 0);
  float* h = h_.data() + active.h_start + (lo - active.lo) * active.op->h_width;
  if (const auto* embed = std::get_if<EmbedOp>(&ops_[index])) return gather(*embed, active, lo, count, h);
  const auto& linear = std::get<LinearOp>(ops_[index]);
  const Rows x = rows(linear.x);
  shrink(*active.op, {x.data + lo * x.stride, x.stride}, h, active.weight, count, weight(linear.weight).format);
}

// h of `count` rows of x, for a product with a matrix of `format`.
void Executable::shrink(const AdapterOp& op, const Rows& x, float* h, float weight, int32_t count, int32_t format) const {
  const int64_t stride = op.h_width;
  for (const AdapterShrink& part : op.shrinks) {
    const ShrinkCall call{x, {h + part.h_start, stride}, part.a, part.scale * weight, count, part.rank};
    kernels_->shrink(&call, 0, part.a.panels);
  }
  for (const AdapterInput& part : op.inputs) {
    for (int32_t r = 0; r < count; ++r)
      for (int32_t i = 0; i < part.inputs; ++i) h[r * stride + part.h_start + i] = x.data[r * x.stride + i] * part.factor[i];
    if (part.converted == kAbsent) continue;
    const QuantiseCall call{{h + part.h_start, stride}, reinterpret_cast<uint8_t*>(h + part.converted),
                            stride * static_cast<int64_t>(sizeof(float)), format, part.inputs};
    kernels_->quantise(&call, 0, count);
  }
}

// h of rows lo .. lo + count of an embedding: rows of A, and of the adapter's own table.
void Executable::gather(const EmbedOp& op, const ActiveAdapter& active, int32_t lo, int32_t count, float* h) const {
  const int64_t stride = active.op->h_width;
  const int32_t* tokens = in_.token_ids + lo;
  EmbedCall call{{}, {nullptr, stride}, {}, 1.0f, false, false, nullptr, 0, true};
  for (const AdapterShrink& part : active.op->shrinks) {
    call.table = {part.a.data, 0, part.a.format, part.rank, part.a.inputs};
    call.out.data = h + part.h_start;
    call.scaled = true;
    call.scale = part.scale * active.weight;
    kernels_->embed(&call, tokens, 0, count);
  }
  call.scaled = false;
  for (const AdapterGather& part : active.op->gathers)
    for (int32_t r = 0; r < count; ++r) {
      const int32_t* end = part.ids + part.num_ids;
      const int32_t* found = part.ids ? std::lower_bound(part.ids, end, tokens[r]) : nullptr;
      const bool own = !part.ids || (found != end && *found == tokens[r]);
      const auto row = part.ids && own ? static_cast<int32_t>(found - part.ids) : tokens[r];
      call.table = own ? part.table : weight(op.table).table();
      call.round_out = own ? false : rounded(op.out);
      call.out.data = h + part.h_start + r * stride;
      kernels_->embed(&call, &row, 0, 1);
    }
}

// Appends what an adapter does to rows lo .. hi of the product `base`, of which panel `panel_lo` is the first.
void Executable::append_deltas(const AdapterOp& op, const float& weight, const float* h, int32_t lo, int32_t hi, int32_t panel_lo,
                               const LinearCall& base, ThreadState& state) const {
  for (const AdapterExpand& expand : op.expands) {
    Delta made{};
    made.h = expand.h_start == kAbsent ? &weight : h + expand.h_start;
    made.h_stride = expand.h_start == kAbsent ? 0 : op.h_width;
    made.b = expand.b;
    made.lo = lo, made.hi = hi, made.first = expand.first - panel_lo, made.step = expand.step;
    made.role = expand.role, made.weight = weight, made.lane = expand.lane, made.end = expand.end;
    made.column = expand.column, made.bias = expand.bias, made.ids = expand.ids, made.num_ids = expand.num_ids;
    if (expand.role == kOwnProduct) {
      const LinearCall own = own_product(op, expand, h, lo, hi, base);
      if (joins(state, made, own)) continue;
      made.own = &state.own.emplace_back(own);
      made.h = nullptr, made.h_stride = 0;
    }
    state.deltas.push_back(made);
  }
}

// Whether a product continues that of the segment before, of which it then becomes a part: the same matrix, and rows of x
// behind the other's. So the rows of many adapters that scale inputs are multiplied together.
bool Executable::joins(ThreadState& state, const Delta& made, const LinearCall& own) {
  constexpr ptrdiff_t kBack = 16;
  for (auto last = state.deltas.rbegin(); last != state.deltas.rend() && last - state.deltas.rbegin() < kBack; ++last) {
    if (last->role != kOwnProduct || last->b.data != made.b.data) continue;
    LinearCall& before = state.own[static_cast<size_t>(last->own - state.own.data())];
    const bool same = last->hi == made.lo && last->weight == made.weight && !last->column && !made.column && before.x.stride == own.x.stride &&
                      before.x.data + before.rows * own.x.stride == own.x.data && (before.quantised_x == nullptr) == (own.quantised_x == nullptr);
    if (!same) return false;
    last->hi = made.hi;
    before.rows += own.rows;
    return true;
  }
  return false;
}

// A product of rows lo .. hi of x, scaled or not, with a matrix of the adapter's or the base's.
LinearCall Executable::own_product(const AdapterOp& op, const AdapterExpand& expand, const float* h, int32_t lo, int32_t hi,
                                   const LinearCall& base) {
  LinearCall own = base;
  own.w = expand.b;
  own.w.panel_bytes = panel_bytes(expand.b.format, expand.b.inputs);
  own.rows = hi - lo;
  own.quantised_x = nullptr;
  if (expand.h_start != kAbsent) {
    own.x = {const_cast<float*>(h) + expand.h_start, op.h_width};
    own.in_blocks = true;
    if (expand.converted != kAbsent) {
      own.quantised_x = reinterpret_cast<const uint8_t*>(h + expand.converted);
      own.quantised_stride = op.h_width * static_cast<int64_t>(sizeof(float));
    }
    return own;
  }
  own.x.data += lo * base.x.stride;
  if (base.quantised_x && base.w.format == kBF16 && expand.b.format == kBF16) own.quantised_x = base.quantised_x + lo * base.quantised_stride;
  return own;
}

// The deltas of an op in the order of the segments; built once per thread, op and step.
const std::vector<Delta>& Executable::deltas_of(size_t index, const LinearCall& base, ThreadState& state) const {
  if (state.deltas_op == index) return state.deltas;
  state.deltas_op = index;
  state.deltas.clear();
  state.own.clear();
  const auto [from, to, disjoint] = active_of_op_[index];
  for (int32_t i = from; i < to; ++i) {
    const ActiveAdapter& active = active_adapters_[static_cast<size_t>(i)];
    append_deltas(*active.op, active.weight, h_.data() + active.h_start, active.lo, active.hi, 0, base, state);
  }
  set_bounds(state.deltas.data(), static_cast<int32_t>(state.deltas.size()));
  return state.deltas;
}

// The vectors of a norm for rows lo .. hi, which no segment that acts on it divides; `made` has room for both.
void Executable::norm_vectors(size_t index, int32_t lo, int64_t width, NormCall& call, float* made) const {
  const auto [from, to, disjoint] = active_of_op_[index];
  float left = 1.0f;
  float *w = made, *b = made + width;
  bool acts = false, biased = call.bias != nullptr;
  std::fill_n(w, width, 0.0f);
  if (biased) std::copy_n(call.bias, width, b);
  else std::fill_n(b, width, 0.0f);
  for (int32_t i = from; i < to; ++i) {
    const ActiveAdapter& active = active_adapters_[static_cast<size_t>(i)];
    if (lo < active.lo || lo >= active.hi) continue;
    acts = true;
    if (const float* own = active.op->norm_weight) {
      left -= active.weight;
      for (int64_t c = 0; c < width; ++c) w[c] += active.weight * own[c];
    }
    if (const float* own = active.op->norm_bias) {
      biased = true;
      for (int64_t c = 0; c < width; ++c) b[c] += active.weight * own[c];
    }
  }
  if (!acts) return;
  for (int64_t c = 0; c < width; ++c) w[c] += left * call.weight[c];
  call.weight = w;
  call.bias = biased ? b : nullptr;
}

}  // namespace truffula

#include "executable.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "dispatch.h"

namespace truffula {
namespace {

constexpr int64_t kPackRows = 8 * kLanes;  // rows of a matrix that one chunk packs

[[noreturn]] void refuse(const std::string& why) { throw std::invalid_argument(why); }

void require(bool holds, const char* why) {
  if (!holds) refuse(why);
}

// Calls f(ref, name, optional) for each Ref of an op.
template <class F>
void for_each_ref(const Op& op, F f) {
  const auto visit = [&]<class T, class... Note>(const char* name, const T& value, Note&&...) {
    if constexpr (std::is_same_v<T, Ref>) f(value, name, sizeof...(Note) == 1);
  };
  std::visit([&](const auto& o) { o.fields(o, visit); }, op);
}

}  // namespace

Executable::Executable(const std::string& isa, int threads, const Capacity& capacity, int32_t kv_format, int32_t groups,
                       bool debug)
    : kernels_(find_table(isa)),
      team_(threads),
      capacity_(capacity),
      kv_format_(kv_format),
      groups_(groups),
      max_distance_(static_cast<size_t>(std::clamp(groups, 0, 64))),
      debug_(debug),
      thread_states_(static_cast<size_t>(threads)) {
  check_capacity(capacity);
  require(kv_format == kF32 || kv_format == kBF16, "kv_format: unknown");
  require(groups >= 0 && groups <= 64, "groups: not between 0 and 64");
  for (ThreadState& state : thread_states_) state.sample.loops = kernels_->sampling;
}

// Load

void Executable::add_buffer(const Buffer& buffer) {
  require(!sealed_, "the program is sealed");
  require(buffer.offset >= 0 && buffer.stride > 0 && buffer.stride <= kMaxColumns, "buffer: bad offset or stride");
  buffers_.push_back(buffer);
}

int32_t Executable::add_vector(const float* values, int64_t count) {
  require(!sealed_, "the program is sealed");
  require(count > 0, "a vector has numbers");
  Weight made;
  made.memory = Memory(static_cast<size_t>(count) * sizeof(float));
  made.outputs = count;
  std::memcpy(made.memory.data(), values, static_cast<size_t>(count) * sizeof(float));
  weights_.push_back(std::move(made));
  return static_cast<int32_t>(weights_.size()) - 1;
}

int32_t Executable::add_matrix(int64_t outputs, int64_t inputs, int32_t format, bool panels, int64_t half,
                               int64_t experts) {
  require(!sealed_, "the program is sealed");
  require(outputs > 0 && inputs > 0 && half >= 0 && half < outputs, "matrix: bad shape");
  require(outputs <= kMaxWidth && inputs <= kMaxWidth, "matrix: too large");
  require(experts >= 1 && experts <= kMaxExperts && (panels || experts == 1), "matrix: bad number of experts");
  require(format >= kF32 && format < kFormatCount, "matrix: no such format");
  require(format <= kBF16 || (panels && inputs % kBlock == 0), "matrix: quantised ones have panels of whole blocks");
  require(half == 0 || (panels && half * 2 == outputs), "matrix: gates and ups are halves");
  Weight made;
  made.outputs = outputs;
  made.inputs = inputs;
  made.format = format;
  made.panels = panels;
  made.order = {outputs, half};
  made.experts = experts;
  made.memory = Memory(static_cast<size_t>(experts * matrix_bytes(format, inputs, panels, made.order)) + 64);
  weights_.push_back(std::move(made));
  return static_cast<int32_t>(weights_.size()) - 1;
}

int32_t Executable::add_latent_matrix(const LatentOrder& order, int64_t inputs, int32_t format) {
  require(!sealed_, "the program is sealed");
  for (int64_t number : {static_cast<int64_t>(order.heads), static_cast<int64_t>(order.keys), static_cast<int64_t>(order.values), inputs})
    require(number > 0 && number <= (1 << 20), "matrix: bad shape");
  require(order.outputs() <= kMaxWidth, "matrix: too large");
  require(format == kF32 || format == kBF16, "matrix: its format is float32 or bfloat16");
  Weight made;
  made.outputs = order.outputs();
  made.inputs = inputs;
  made.format = format;
  made.latent = order;
  made.memory = Memory(static_cast<size_t>(order.bytes(format, inputs)) + 64);
  weights_.push_back(std::move(made));
  return static_cast<int32_t>(weights_.size()) - 1;
}

Rounding Executable::fill_matrix(int32_t id, const Source& source, int64_t rows, int64_t first, int64_t expert) {
  const Weight& to = weight(id);
  require(expert >= 0 && expert < to.experts, "matrix: no such expert");
  const int64_t inputs = is_scaled(to.format) ? groups_of(to.format, to.inputs) * group_inputs(to.format) : to.inputs;
  require(to.inputs > 0 && source.inputs == inputs && rows > 0 && first >= 0 && rows <= to.outputs &&
              first <= to.outputs - rows, "matrix: bad part");
  require(to.format > kBF16 ? packs_as(source.type, to.format) : stored_block_bytes(source.type) == 0,
          "matrix: its format does not hold such blocks");
  struct Job {
    const Weight* to;
    const Source* source;
    int64_t rows, first;
    uint8_t* data;
    std::vector<Rounding> rounding;  // per thread
  } job{&to, &source, rows, first, to.data(expert), std::vector<Rounding>(static_cast<size_t>(team_.size()))};
  // Chunks begin with a panel, so that no two write to the same one.
  const int64_t before = first % kLanes, chunks = (before + rows + kPackRows - 1) / kPackRows;
  team_.run_chunks(static_cast<int32_t>(chunks),
      [](void* context, int32_t, int32_t chunk, int thread) {
        Job& j = *static_cast<Job*>(context);
        const int64_t lo = std::max<int64_t>(0, chunk * kPackRows - j.first % kLanes);
        const int64_t hi = std::min(j.rows, (chunk + 1) * kPackRows - j.first % kLanes);
        if (lo >= hi) return;
        const Weight& w = *j.to;
        if (is_quantised(w.format))
          pack_quantised(*j.source, lo, hi, j.data, w.format, j.first, w.order, j.rounding[static_cast<size_t>(thread)]);
        else if (is_scaled(w.format)) pack_scaled(*j.source, w.inputs, lo, hi, j.data, w.format, j.first, w.order);
        else if (w.latent.heads) pack_latent(*j.source, lo, hi, j.data, w.format, j.first, w.latent);
        else if (w.panels) pack_rows(*j.source, lo, hi, j.data, w.format, j.first, w.order);
        else copy_rows(*j.source, lo, hi, j.data, w.format, j.first);
      },
      &job);
  Rounding all;
  for (const Rounding& one : job.rounding) {
    all.squares += one.squares;
    all.lost += one.lost;
    all.overflow |= one.overflow;
  }
  require(!all.overflow, "matrix: numbers beyond the range of Q8_0's float16 scales");
  return all;
}

const Weight& Executable::weight(int32_t id) const {
  require(id >= 0 && static_cast<size_t>(id) < weights_.size(), "no such weight");
  return weights_[static_cast<size_t>(id)];
}

void Executable::check_op(const Op& op) const {
  for_each_ref(op, [&](const Ref& ref, const char* what, bool optional) { check_columns(ref, what, optional); });
  std::visit([&](const auto& o) { check(o); }, op);
}

// A bias in the order of the panels' lanes, zero in unused ones; of each expert one after the other.
std::vector<float> Executable::packed_bias(int32_t bias, int32_t matrix) const {
  std::vector<float> made;
  if (bias == kAbsent) return made;
  const Weight& of = weight(matrix);
  const int64_t lanes = of.order.panels() * kLanes;
  made.assign(static_cast<size_t>(of.experts * lanes), 0.0f);
  const float* values = weight(bias).memory.floats();
  for (int64_t expert = 0; expert < of.experts; ++expert)
    for (int64_t output = 0; output < of.outputs; ++output) {
      const int64_t at = of.order.panel_of(output) * kLanes + of.order.lane_of(output);
      made[static_cast<size_t>(expert * lanes + at)] = values[expert * of.outputs + output];
    }
  return made;
}

void Executable::add(Op op) {
  require(!sealed_, "the program is sealed");
  check_op(op);
  if (auto* linear = std::get_if<LinearOp>(&op)) linear->packed_bias = packed_bias(linear->bias, linear->weight);
  if (const auto* route = std::get_if<RouteOp>(&op)) reserve_routes(*route);
  if (auto* experts = std::get_if<ExpertLinearOp>(&op)) {
    experts->packed_bias = packed_bias(experts->bias, experts->weight);
    reserve_experts(*experts);
  }
  if (auto* attention = std::get_if<AttentionOp>(&op)) add_attention(*attention);
  if (auto* latent = std::get_if<MlaOp>(&op)) add_latent(*latent);
  if (const auto* norm = std::get_if<NormOp>(&op); norm && norm->weight != kAbsent)
    for (ThreadState& state : thread_states_)
      state.norm_vectors.resize(std::max(state.norm_vectors.size(), static_cast<size_t>(2 * weight(norm->weight).outputs)));
  if (const auto* delta = std::get_if<GatedDeltaOp>(&op))
    for (ThreadState& state : thread_states_)
      state.delta.resize(std::max(state.delta.size(), static_cast<size_t>(delta_scratch(delta->dim_k))));
  ops_.push_back(std::move(op));
}

void Executable::add_attention(AttentionOp& op) {
  op.window = std::clamp<int64_t>(op.window, 0, INT32_MAX);
  const std::array<int64_t, 2> bytes = kv_block_bytes(op, kv_format_, capacity_.block_size);
  for (size_t i = 0; i < 2; ++i) {
    const int32_t id = op.planes[i];
    if (op.k.buffer != kAbsent) {
      add_plane(id, op.group, bytes[i]);
      continue;
    }
    const bool written = id >= 0 && static_cast<size_t>(id) < planes_.size();
    require(written && planes_[static_cast<size_t>(id)].block_bytes == bytes[i] && planes_[static_cast<size_t>(id)].group == op.group,
            "attention: no op before writes this plane");
  }
  int32_t& distance = max_distance_[static_cast<size_t>(op.group)];
  distance = std::max(distance, op.window > 0 ? static_cast<int32_t>(op.window) - 1 : INT32_MAX);
  add_plan(op.heads / op.kv_heads, op.kv_heads * partial_floats(1, op.dim_v), attention_scratch_of(op, capacity_.block_size));
}

void Executable::add_plane(int32_t id, int32_t group, int64_t block_bytes) {
  require(id >= 0 && id < (1 << 20), "attention: planes");
  if (static_cast<size_t>(id) >= planes_.size()) planes_.resize(static_cast<size_t>(id) + 1);
  Plane& plane = planes_[static_cast<size_t>(id)];
  require(plane.block_bytes == 0, "attention: one op writes a plane");
  plane.block_bytes = block_bytes;
  plane.group = group;
  plane.memory = Memory(static_cast<size_t>(block_bytes) * static_cast<size_t>(capacity_.num_blocks));
}

// What a step needs for attention with that many query heads per KV head.
void Executable::add_plan(int32_t queries_per_kv, int64_t partial_row_floats, int64_t scratch_floats) {
  if (std::none_of(attention_plans_.begin(), attention_plans_.end(),
                   [&](const AttentionPlan& plan) { return plan.queries_per_kv == queries_per_kv; }))
    attention_plans_.push_back({queries_per_kv, {}});
  partial_row_floats_ = std::max(partial_row_floats_, partial_row_floats);
  for (ThreadState& state : thread_states_)
    if (static_cast<int64_t>(state.attention.size()) < scratch_floats) state.attention.resize(static_cast<size_t>(scratch_floats));
}

void Executable::add_state(int64_t width) {
  require(!sealed_, "the program is sealed");
  require(width >= 1 && width <= kMaxWidth, "state: bad width");
  require(capacity_.num_states > 0, "state: the capacity has no state rows");
  const int64_t bytes = state_row_bytes(width);
  states_.push_back({Memory(static_cast<size_t>(bytes * capacity_.num_states)), width, bytes / 4});
}

void Executable::seal(const StepArrays& arrays, int64_t arena_floats, int32_t logits_buffer, int64_t vocab, int64_t planned_width) {
  require(!sealed_, "the program is sealed");
  require(planned_width >= 0 && planned_width <= kMaxWidth, "planned_width: too large");
  require(arena_floats >= 0 && arena_floats <= int64_t{1} << 44, "arena: too large");
  for (const Buffer& buffer : buffers_) {
    const int64_t rows = buffer.logit_rows ? capacity_.max_logit_rows : capacity_.max_tokens;
    require(buffer.offset <= arena_floats - rows * buffer.stride, "a buffer lies outside the arena");
  }
  require(logits_buffer >= 0 && static_cast<size_t>(logits_buffer) < buffers_.size(), "no such buffer of logits");
  require(buffers_[static_cast<size_t>(logits_buffer)].logit_rows, "logits: their buffer has a row per token");
  require(vocab >= 1 && vocab <= buffers_[static_cast<size_t>(logits_buffer)].stride, "vocab: logits are not that wide");
  logits_ = logits_buffer;
  planned_width_ = planned_width;
  sampler_.emplace(vocab, capacity_.max_seqs);
  in_ = arrays;
  arena_ = Memory(static_cast<size_t>(arena_floats + kLanes) * sizeof(float));
  int64_t quantised = 0;
  for (const Op& op : ops_)
    if (const auto* linear = std::get_if<LinearOp>(&op); linear && converts_x(linear->weight, linear->x)) {
      const bool logits = buffers_[static_cast<size_t>(linear->out.buffer)].logit_rows;
      quantised = std::max(quantised, padded_rows(logits ? capacity_.max_logit_rows : capacity_.max_tokens) *
                                          weight(linear->weight).quantised_stride());
    } else if (const auto* experts = std::get_if<ExpertLinearOp>(&op); experts && converts_x(experts->weight, experts->x)) {
      const Weight& w = weight(experts->weight);
      quantised = std::max(quantised, padded_rows(static_cast<int64_t>(capacity_.max_tokens) * x_rows(*experts)) * w.quantised_stride());
    }
  if (quantised) quantised_x_ = Memory(static_cast<size_t>(quantised));
  int64_t absorbed = 0;
  for (const Op& op : ops_)
    if (const auto* latent = std::get_if<MlaOp>(&op))
      absorbed = std::max(absorbed, static_cast<int64_t>(capacity_.max_tokens) * latent->heads * latent->width());
  if (absorbed) absorbed_ = Memory(static_cast<size_t>(absorbed) * sizeof(float));
  active_of_op_.resize(ops_.size());
  if (debug_) taps_.resize(ops_.size());
  for (size_t index = 0; index < ops_.size(); ++index) {
    for (int32_t number = 0; number < stages_of(ops_[index]); ++number) stages_.push_back({static_cast<uint32_t>(index), number});
    if (debug_) stages_.push_back({static_cast<uint32_t>(index), kTapStage});
  }
  token_rows_ = position_rows_ = INT32_MAX;
  for (const Op& op : ops_)
    if (const auto* embed = std::get_if<EmbedOp>(&op)) {
      const auto rows = static_cast<int32_t>(weight(embed->table).outputs);
      if (embed->source == kFromToken) token_rows_ = std::min(token_rows_, rows);
      else position_rows_ = std::min(position_rows_, rows - embed->offset);
    }
  sealed_ = true;
}

void Executable::write_kv(int32_t op, const int32_t* slots, size_t count, std::span<const float> keys, std::span<const float> values) {
  require(op >= 0 && static_cast<size_t>(op) < ops_.size(), "write_kv: no such op");
  const auto* attention = std::get_if<AttentionOp>(&ops_[static_cast<size_t>(op)]);
  require(attention && attention->k.buffer != kAbsent, "write_kv: the op writes no keys");
  const int64_t capacity = static_cast<int64_t>(capacity_.num_blocks) * capacity_.block_size;
  for (size_t i = 0; i < count; ++i)
    require(slots[i] >= capacity_.block_size && slots[i] < capacity, "write_kv: no such slot, or one of the scratch block");
  const int64_t key_width = int64_t{attention->kv_heads} * attention->dim_k, value_width = int64_t{attention->kv_heads} * attention->dim_v;
  const auto rows = static_cast<int64_t>(count);
  require(std::ssize(keys) == rows * key_width && std::ssize(values) == rows * value_width, "write_kv: rows of another width");
  AttentionCall call = call_of(*attention);
  call.k = {const_cast<float*>(keys.data()), key_width};  // only read: a row is copied to its slot
  call.v = {const_cast<float*>(values.data()), value_width};
  kernels_->write_kv(&call, slots, 0, static_cast<int32_t>(count));
}

void Executable::release_kv(int32_t group, const int32_t* blocks, size_t count) {
  require(group >= 0 && group < groups_, "release_kv: no such group");
  for (size_t i = 0; i < count; ++i)
    require(blocks[i] > (i ? blocks[i - 1] : 0) && blocks[i] < capacity_.num_blocks, "release_kv: blocks do not ascend");
  for (size_t first = 0, stop; first < count; first = stop) {
    for (stop = first + 1; stop < count && blocks[stop] == blocks[stop - 1] + 1;) ++stop;
    for (Plane& plane : planes_)
      if (plane.group == group)
        plane.memory.release(static_cast<size_t>(blocks[first] * plane.block_bytes),
                             static_cast<size_t>((blocks[stop - 1] + 1) * plane.block_bytes));
  }
}

void Executable::release_states(const int32_t* state_rows, size_t count) {
  for (size_t i = 0; i < count; ++i)
    require(state_rows[i] > (i ? state_rows[i - 1] : 0) && state_rows[i] < capacity_.num_states, "release_states: rows do not ascend");
  for (size_t first = 0, stop; first < count; first = stop) {
    for (stop = first + 1; stop < count && state_rows[stop] == state_rows[stop - 1] + 1;) ++stop;
    for (State& state : states_) {
      const int64_t bytes = state.stride * 4;
      state.memory.release(static_cast<size_t>(state_rows[first] * bytes), static_cast<size_t>((state_rows[stop - 1] + 1) * bytes));
    }
  }
}

// Checks of a step's inputs: an index out of range is an error here, never a read out of bounds.

void Executable::check_inputs(const StepCounts& c) const {
  const Capacity& cap = capacity_;
  require(sealed_, "the program is not sealed");
  require(c.T >= 1 && c.T <= cap.max_tokens && c.N >= 1 && c.N <= cap.max_seqs, "step: T or N outside the capacity");
  require(c.R >= 0 && c.R <= cap.max_logit_rows && c.G >= 0 && c.G <= cap.max_segments, "step: R or G outside the capacity");
  for (int32_t g = 0; g < c.G; ++g) {
    const int32_t *seg = in_.seg + 3 * g, *seg_r = in_.seg_r + 2 * g;
    require(seg[0] >= 0 && seg[0] <= seg[1] && seg[1] <= c.T, "seg: rows outside the step");
    require(seg_r[0] >= 0 && seg_r[0] <= seg_r[1] && seg_r[1] <= c.R, "seg_r: rows outside the step");
    if (seg[2] < 0 || static_cast<size_t>(seg[2]) >= adapters_.size() || !adapters_[static_cast<size_t>(seg[2])])
      refuse("segment " + std::to_string(g) + " names adapter slot " + std::to_string(seg[2]) + ", which is empty");
  }
  for (int32_t t = 0; t < c.T; ++t) {
    require(in_.token_ids[t] >= 0 && (in_.token_ids[t] < token_rows_ || has_row(in_.token_ids[t], t, c)), "token_ids: outside the table");
    require(in_.position[t] >= 0 && in_.position[t] < position_rows_, "position: outside the table");
    for (int32_t g = 0; g < groups_; ++g) {
      const int64_t slot = in_.slot_mapping[static_cast<int64_t>(g) * cap.max_tokens + t];
      require(slot >= 0 && slot < static_cast<int64_t>(cap.num_blocks) * cap.block_size, "slot_mapping: no such slot");
    }
  }
  require(in_.q_start[0] == 0 && in_.q_start[c.N] == c.T, "q_start: does not cover the rows");
  for (int32_t n = 0; n < c.N; ++n) {
    require(in_.q_start[n + 1] >= in_.q_start[n], "q_start: does not ascend");
    const int32_t count = in_.q_start[n + 1] - in_.q_start[n];
    require(in_.kv_len[n] >= count, "kv_len: fewer keys than rows");
    if (groups_ == 0) continue;
    const int64_t blocks = (in_.kv_len[n] + static_cast<int64_t>(cap.block_size) - 1) / cap.block_size;
    require(blocks <= cap.max_blocks_per_seq, "kv_len: beyond the block table");
    for (int32_t g = 0; g < groups_; ++g) {
      const int32_t* table = in_.block_tables + (static_cast<int64_t>(g) * cap.max_seqs + n) * cap.max_blocks_per_seq;
      // Blocks behind the group's window may have been freed.
      const int32_t first = std::max(0, in_.kv_len[n] - count - max_distance_[static_cast<size_t>(g)]) / cap.block_size;
      for (int64_t b = first; b < blocks; ++b) require(table[b] >= 0 && table[b] < cap.num_blocks, "block_tables: no such block");
    }
  }
  if (!states_.empty()) check_spans(c);
  for (int32_t r = 0; r < c.R; ++r)
    require(in_.logit_rows[r] >= 0 && in_.logit_rows[r] < c.T, "logit_rows: outside the step");
}

// After the check of q_start.
void Executable::check_spans(const StepCounts& c) const {
  require(c.Z >= 1 && c.Z <= capacity_.max_spans(), "step: Z outside the capacity");
  require(in_.span_start[0] == 0 && in_.span_start[c.Z] == c.T, "span_start: does not cover the rows");
  for (int32_t z = 0, n = 0; z < c.Z; ++z) {
    require(in_.span_start[z + 1] > in_.span_start[z], "span_start: does not ascend");
    while (in_.q_start[n + 1] <= in_.span_start[z]) ++n;
    require(in_.span_start[z + 1] <= in_.q_start[n + 1], "span_start: a span has rows of two sequences");
    require(in_.state_in[z] >= 0 && in_.state_in[z] < capacity_.num_states, "state_in: no such row");
    require(in_.state_out[z] >= 1 && in_.state_out[z] < capacity_.num_states, "state_out: no such row");
  }
}

// Taps

void Executable::keep_tap(size_t index) {
  const Ref& ref = out_of(ops_[index]);
  const int32_t count = rows_of(ref);
  std::vector<float>& kept = taps_[index];
  kept.resize(static_cast<size_t>(count) * static_cast<size_t>(ref.width));
  const Rows from = rows(ref);
  for (int32_t r = 0; r < count; ++r)
    std::memcpy(kept.data() + static_cast<int64_t>(r) * ref.width, from.data + r * from.stride,
                static_cast<size_t>(ref.width) * sizeof(float));
}

std::vector<float> Executable::tap(int32_t op) const {
  require(debug_, "tap() needs load(debug=True)");
  require(op >= 0 && static_cast<size_t>(op) < taps_.size(), "no such tap");
  require(counts_.T > 0, "that op has not run");
  return taps_[static_cast<size_t>(op)];
}

int32_t Executable::tap_width(int32_t op) const { return out_of(ops_.at(static_cast<size_t>(op))).width; }

std::array<double, std::variant_size_v<Op>> Executable::take_seconds() {
  timed_ = true;
  std::array<double, std::variant_size_v<Op>> total{};
  for (ThreadState& state : thread_states_)
    for (size_t kind = 0; kind < total.size(); ++kind) total[kind] += std::exchange(state.seconds[kind], 0.0);
  return total;
}

}  // namespace truffula

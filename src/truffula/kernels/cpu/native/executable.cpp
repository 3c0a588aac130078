#include "executable.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "dispatch.h"

namespace truffula {
namespace {

constexpr int64_t kPackRows = 8 * kLanes;  // of a matrix that one chunk packs

[[noreturn]] void refuse(const std::string& why) { throw std::invalid_argument(why); }

void require(bool holds, const char* why) {
  if (!holds) refuse(why);
}

// The next `bytes` of an adapter's memory, on a line of their own.
uint8_t* take(Adapter& adapter, int64_t bytes) {
  require(adapter.used + bytes <= static_cast<int64_t>(adapter.memory.size()), "adapter: larger than it was said to be");
  uint8_t* taken = adapter.memory.data() + adapter.used;
  adapter.used += bytes;  // panels are whole lines
  return taken;
}

// One matrix of an adapter to be packed: what pack_rows takes.
struct PackPart {
  const Source* source;
  int64_t row_lo, row_hi;
  uint8_t* to;
  int32_t format;
  int64_t first;
  PanelOrder order;
};

// The team packs, in chunks of whole panels: streams wait for it between two steps.
void pack_parts(Team& team, const std::vector<PackPart>& parts) {
  std::vector<PackPart> chunks;
  for (const PackPart& part : parts)
    for (int64_t lo = part.row_lo; lo < part.row_hi;) {
      const int64_t hi = std::min(part.row_hi, (part.first + lo) / kPackRows * kPackRows + kPackRows - part.first);
      chunks.push_back(part);
      chunks.back().row_lo = lo;
      chunks.back().row_hi = hi;
      lo = hi;
    }
  team.run_chunks(static_cast<int32_t>(chunks.size()),
      [](void* context, int32_t, int32_t chunk, int) {
        const PackPart& p = (*static_cast<const std::vector<PackPart>*>(context))[static_cast<size_t>(chunk)];
        pack_rows(*p.source, p.row_lo, p.row_hi, p.to, p.format, p.first, p.order);
      },
      &chunks);
}

// Calls f(ref, name, optional) for every Ref of an op.
template <class F>
void for_refs(const Op& op, F f) {
  const auto visit = [&]<class T, class... Note>(const char* name, const T& value, Note&&...) {
    if constexpr (std::is_same_v<T, Ref>) f(value, name, sizeof...(Note) == 1);
  };
  std::visit([&](const auto& o) { o.fields(o, visit); }, op);
}

const Ref& out_of(const Op& op) {
  return std::visit(
      [](const auto& o) -> const Ref& {
        if constexpr (requires { o.out; }) return o.out;
        else return o.x;
      },
      op);
}

}  // namespace

Executable::Executable(const std::string& isa, int threads, const Capacity& capacity, int32_t kv_format, int32_t groups,
                       bool debug)
    : kernels_(find_table(isa)),
      team_(threads),
      capacity_(capacity),
      kv_format_(kv_format),
      groups_(groups),
      reach_(static_cast<size_t>(std::clamp(groups, 0, 64))),
      debug_(debug),
      locals_(static_cast<size_t>(threads)) {
  check_capacity(capacity);
  require(kv_format == kF32 || kv_format == kBF16, "kv_format: unknown");
  require(groups >= 0 && groups <= 64, "groups: not between 0 and 64");
  for (Local& local : locals_) local.sample.loops = kernels_->sampling;
}

// Load

void Executable::add_buffer(const Buffer& buffer) {
  require(!sealed_, "the program is sealed");
  require(buffer.offset >= 0 && buffer.stride > 0 && buffer.stride <= kMostColumns, "buffer: bad offset or stride");
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

int32_t Executable::add_matrix(int64_t outputs, int64_t inputs, int32_t format, bool panels, int64_t half) {
  require(!sealed_, "the program is sealed");
  require(outputs > 0 && inputs > 0 && half >= 0 && half < outputs, "matrix: bad shape");
  require(outputs <= kMostWidth && inputs <= kMostWidth, "matrix: too large");
  require(format >= kF32 && format <= kQ5_0, "matrix: no such format");
  require(!is_quantised(format) || (panels && inputs % kBlock == 0), "matrix: quantised ones have panels of whole blocks");
  require(half == 0 || (panels && half * 2 == outputs), "matrix: gates and ups are halves");
  Weight made;
  made.outputs = outputs;
  made.inputs = inputs;
  made.format = format;
  made.panels = panels;
  made.order = {outputs, half};
  const int64_t bytes = panels ? made.order.panels() * panel_bytes(format, inputs)
                               : outputs * inputs * (format == kF32 ? 4 : 2);
  made.memory = Memory(static_cast<size_t>(bytes) + 64);
  weights_.push_back(std::move(made));
  return static_cast<int32_t>(weights_.size()) - 1;
}

Rounding Executable::fill_matrix(int32_t id, const Source& source, int64_t rows, int64_t first) {
  const Weight& to = weight(id);
  require(to.inputs > 0 && source.inputs == to.inputs && rows > 0 && first >= 0 && rows <= to.outputs &&
              first <= to.outputs - rows, "matrix: bad part");
  require(is_quantised(to.format) ? packs_as(source.type, to.format) : stored_block_bytes(source.type) == 0,
          "matrix: its format does not hold such blocks");
  struct Job {
    const Weight* to;
    const Source* source;
    int64_t rows, first;
    std::vector<Rounding> rounding;  // per thread
  } job{&to, &source, rows, first, std::vector<Rounding>(static_cast<size_t>(team_.size()))};
  // Cut where panels begin, so that no two chunks write to one.
  const int64_t before = first % kLanes, chunks = (before + rows + kPackRows - 1) / kPackRows;
  team_.run_chunks(static_cast<int32_t>(chunks),
      [](void* context, int32_t, int32_t chunk, int thread) {
        Job& j = *static_cast<Job*>(context);
        const int64_t lo = std::max<int64_t>(0, chunk * kPackRows - j.first % kLanes);
        const int64_t hi = std::min(j.rows, (chunk + 1) * kPackRows - j.first % kLanes);
        if (lo >= hi) return;
        const Weight& w = *j.to;
        if (is_quantised(w.format))
          pack_quantised(*j.source, lo, hi, w.memory.data(), w.format, j.first, w.order, j.rounding[static_cast<size_t>(thread)]);
        else if (w.panels) pack_rows(*j.source, lo, hi, w.memory.data(), w.format, j.first, w.order);
        else copy_rows(*j.source, lo, hi, w.memory.data(), w.format, j.first);
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
  for_refs(op, [&](const Ref& ref, const char* what, bool optional) { check_columns(ref, what, optional); });
  std::visit([&](const auto& o) { check(o); }, op);
}

void Executable::add(Op op) {
  require(!sealed_, "the program is sealed");
  check_op(op);
  if (const auto* attention = std::get_if<AttentionOp>(&op)) {
    const int64_t lanes = (capacity_.block_size + kLanes - 1) / kLanes;
    const int64_t value_width = (attention->dim_v + kLanes - 1) / kLanes * kLanes * (kv_format_ == kF32 ? 4 : 2);
    const int64_t bytes[2] = {attention->kv_heads * lanes * panel_bytes(kv_format_, attention->dim_k),
                              attention->kv_heads * capacity_.block_size * value_width};
    const int32_t ids[2] = {attention->key_plane, attention->value_plane};
    for (int i = 0; i < 2; ++i) {
      require(ids[i] >= 0 && ids[i] < (1 << 20), "attention: planes");
      if (static_cast<size_t>(ids[i]) >= planes_.size()) planes_.resize(static_cast<size_t>(ids[i]) + 1);
      Plane& plane = planes_[static_cast<size_t>(ids[i])];
      require(plane.block_bytes == 0, "attention: a plane serves one op");
      plane.block_bytes = bytes[i];
      plane.group = attention->group;
      plane.memory = Memory(static_cast<size_t>(bytes[i]) * static_cast<size_t>(capacity_.num_blocks));
    }
    int32_t& reach = reach_[static_cast<size_t>(attention->group)];
    reach = std::max(reach, attention->window > 0 ? attention->window - 1 : INT32_MAX);
    const int32_t share = attention->heads / attention->kv_heads;
    if (std::none_of(shares_.begin(), shares_.end(), [&](const Share& s) { return s.heads == share; }))
      shares_.push_back({share, {}});
    partial_row_floats_ = std::max(partial_row_floats_, attention->kv_heads * partial_floats(1, attention->dim_v));
    const int64_t rows = std::max(share, kQueryRows);
    const int64_t floats = attention_scratch(rows, capacity_.block_size, attention->dim_k, attention->dim_v);
    for (Local& local : locals_)
      if (static_cast<int64_t>(local.attention.size()) < floats) local.attention.resize(static_cast<size_t>(floats));
  }
  ops_.push_back(std::move(op));
}

void Executable::seal(const StepArrays& arrays, int64_t arena_floats, int32_t logits_buffer, int64_t vocab) {
  require(!sealed_, "the program is sealed");
  require(arena_floats >= 0 && arena_floats <= int64_t{1} << 44, "arena: too large");
  for (const Buffer& buffer : buffers_) {
    const int64_t rows = buffer.logit_rows ? capacity_.max_logit_rows : capacity_.max_tokens;
    require(buffer.offset <= arena_floats - rows * buffer.stride, "a buffer lies outside the arena");
  }
  require(logits_buffer >= 0 && static_cast<size_t>(logits_buffer) < buffers_.size(), "no such buffer of logits");
  require(buffers_[static_cast<size_t>(logits_buffer)].logit_rows, "logits: their buffer has a row per token");
  require(vocab >= 1 && vocab <= buffers_[static_cast<size_t>(logits_buffer)].stride, "vocab: logits are not that wide");
  logits_ = logits_buffer;
  sampler_.emplace(vocab, capacity_.max_seqs);
  in_ = arrays;
  arena_ = Memory(static_cast<size_t>(arena_floats + kLanes) * sizeof(float));
  int64_t quantised = 0;
  for (const Op& op : ops_)
    if (const auto* linear = std::get_if<LinearOp>(&op); linear && converts_x(*linear)) {
      const bool logits = buffers_[static_cast<size_t>(linear->out.buffer)].logit_rows;
      quantised = std::max(quantised, padded_rows(logits ? capacity_.max_logit_rows : capacity_.max_tokens) *
                                          weight(linear->weight).quantised_stride());
    }
  if (quantised) quantised_x_ = Memory(static_cast<size_t>(quantised));
  actives_of_.resize(ops_.size());
  if (debug_) taps_.resize(ops_.size());
  for (size_t index = 0; index < ops_.size(); ++index) {
    const int32_t count = std::holds_alternative<AttentionOp>(ops_[index]) ? 3 : std::holds_alternative<LinearOp>(ops_[index]) ? 2 : 1;
    for (int32_t number = 0; number < count; ++number) stages_.push_back({static_cast<uint32_t>(index), number});
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

// Checks of what a step is given: a wrong number is an error here and never a read outside.

void Executable::check_inputs(const StepCounts& c) const {
  const Capacity& cap = capacity_;
  require(sealed_, "the program is not sealed");
  require(c.T >= 1 && c.T <= cap.max_tokens && c.N >= 1 && c.N <= cap.max_seqs, "step: T or N outside the capacity");
  require(c.R >= 0 && c.R <= cap.max_logit_rows && c.G >= 0 && c.G <= cap.max_segments, "step: R or G outside the capacity");
  for (int32_t t = 0; t < c.T; ++t) {
    require(in_.token_ids[t] >= 0 && in_.token_ids[t] < token_rows_, "token_ids: outside the table");
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
      const int32_t first = std::max(0, in_.kv_len[n] - count - reach_[static_cast<size_t>(g)]) / cap.block_size;
      for (int64_t b = first; b < blocks; ++b) require(table[b] >= 0 && table[b] < cap.num_blocks, "block_tables: no such block");
    }
  }
  for (int32_t g = 0; g < c.G; ++g) {
    const int32_t *seg = in_.seg + 3 * g, *seg_r = in_.seg_r + 2 * g;
    require(seg[0] >= 0 && seg[0] <= seg[1] && seg[1] <= c.T, "seg: rows outside the step");
    require(seg_r[0] >= 0 && seg_r[0] <= seg_r[1] && seg_r[1] <= c.R, "seg_r: rows outside the step");
    if (seg[2] < 0 || static_cast<size_t>(seg[2]) >= adapters_.size() || !adapters_[static_cast<size_t>(seg[2])])
      refuse("segment " + std::to_string(g) + " names adapter slot " + std::to_string(seg[2]) + ", which is empty");
  }
  for (int32_t r = 0; r < c.R; ++r)
    require(in_.logit_rows[r] >= 0 && in_.logit_rows[r] < c.T, "logit_rows: outside the step");
}

// Adapters

int32_t Executable::add_adapter(int64_t bytes) {
  require(sealed_, "the program is not sealed");
  require(bytes >= 0, "an adapter has a size");
  auto made = std::make_unique<Adapter>();
  made->memory = Memory(static_cast<size_t>(bytes));
  made->op_of.assign(ops_.size(), kNothing);
  if (free_slots_.empty()) {
    adapters_.push_back(std::move(made));
    return static_cast<int32_t>(adapters_.size()) - 1;
  }
  const int32_t slot = free_slots_.back();
  free_slots_.pop_back();
  adapters_[static_cast<size_t>(slot)] = std::move(made);
  return slot;
}

void Executable::add_adapter_op(int32_t slot, int32_t index, const std::vector<Source>& a,
                                const std::vector<int64_t>& ranks, const std::vector<float>& scales,
                                const std::vector<int32_t>& expand_of, const std::vector<Source>& b,
                                const std::vector<int64_t>& outputs, const std::vector<int64_t>& first_output) {
  require(slot >= 0 && static_cast<size_t>(slot) < adapters_.size() && adapters_[static_cast<size_t>(slot)], "no such slot");
  require(index >= 0 && static_cast<size_t>(index) < ops_.size(), "no such op");
  const auto* op = std::get_if<LinearOp>(&ops_[static_cast<size_t>(index)]);
  require(op != nullptr, "adapters act on products only");
  const Weight& w = weight(op->weight);
  Adapter& adapter = *adapters_[static_cast<size_t>(slot)];
  require(adapter.op_of[static_cast<size_t>(index)] == kNothing, "adapter: this op has its matrices");
  AdapterOp made;
  int64_t panels = 0;
  bool exact_in_bf16 = true;
  std::vector<int64_t> at;
  for (size_t i = 0; i < a.size(); ++i) {
    require(a[i].inputs == w.inputs && ranks[i] > 0 && ranks[i] <= kMostWidth, "adapter: A has another width");
    at.push_back(panels);
    panels += (ranks[i] + kLanes - 1) / kLanes;
    exact_in_bf16 &= a[i].type == Stored::kBfloat16;
  }
  const int32_t format = exact_in_bf16 ? kBF16 : kF32;
  uint8_t* to = take(adapter, panels * panel_bytes(format, w.inputs));
  made.column_scale.assign(static_cast<size_t>(panels * kLanes), 0.0f);
  std::vector<PackPart> parts;
  for (size_t i = 0; i < a.size(); ++i) {
    parts.push_back({&a[i], 0, ranks[i], to + at[i] * panel_bytes(format, w.inputs), format, 0, {ranks[i], 0}});
    std::fill_n(made.column_scale.begin() + at[i] * kLanes, ranks[i], scales[i]);
  }
  made.a = {to, panel_bytes(format, w.inputs), format, static_cast<int32_t>(panels), static_cast<int32_t>(w.inputs)};
  for (size_t i = 0; i < b.size(); ++i) {
    const auto from = static_cast<size_t>(expand_of[i]);
    require(from < a.size() && b[i].inputs == ranks[from], "adapter: B has another rank");
    require(first_output[i] >= 0 && outputs[i] <= w.outputs && first_output[i] <= w.outputs - outputs[i],
            "adapter: B has too many rows");
    const int32_t b_format = b[i].type == Stored::kBfloat16 ? kBF16 : kF32;
    // A slice that covers gates and ups is two, whose panels alternate.
    const int64_t end = first_output[i] + outputs[i], half = w.order.half;
    const int64_t cut = half ? std::clamp(half, first_output[i], end) : end;
    for (const auto& [lo, hi, base] : {std::array<int64_t, 3>{first_output[i], cut, 0}, std::array<int64_t, 3>{cut, end, half}}) {
      if (lo >= hi) continue;
      const int64_t shift = (lo - base) % kLanes;
      const PanelOrder order{shift + hi - lo, 0};
      uint8_t* packed = take(adapter, order.panels() * panel_bytes(b_format, ranks[from]));
      const int64_t skip = lo - first_output[i];
      parts.push_back({&b[i], skip, skip + hi - lo, packed, b_format, shift - skip, order});
      const int64_t first = half ? 2 * ((lo - base) / kLanes) + (base ? 1 : 0) : lo / kLanes;
      made.expands.push_back({{packed, panel_bytes(b_format, ranks[from]), b_format,
                               static_cast<int32_t>(order.panels()), static_cast<int32_t>(ranks[from])},
                              static_cast<int32_t>(at[from] * kLanes), static_cast<int32_t>(first), half ? 2 : 1});
    }
  }
  pack_parts(team_, parts);
  adapter.op_of[static_cast<size_t>(index)] = static_cast<int32_t>(adapter.ops.size());
  adapter.ops.push_back(std::move(made));
}

void Executable::drop_adapter(int32_t slot) {
  require(slot >= 0 && static_cast<size_t>(slot) < adapters_.size() && adapters_[static_cast<size_t>(slot)],
          "adapter slot is not in use");
  adapters_[static_cast<size_t>(slot)].reset();
  free_slots_.push_back(slot);
  // An adapter of great rank pays for its share of it, and takes that along. What the memory plan counts stays.
  const auto planned = static_cast<size_t>(kPlannedRank) * std::max(capacity_.max_tokens, capacity_.max_logit_rows);
  if (h_.size() > planned) std::vector<float>().swap(h_);
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
  require(op >= 0 && static_cast<size_t>(op) < taps_.size(), "no such tap");
  require(counts_.T > 0, "that op has not run");
  return taps_[static_cast<size_t>(op)];
}

int32_t Executable::tap_width(int32_t op) const { return out_of(ops_.at(static_cast<size_t>(op))).width; }

std::array<double, std::variant_size_v<Op>> Executable::take_seconds() {
  timed_ = true;
  std::array<double, std::variant_size_v<Op>> total{};
  for (Local& local : locals_)
    for (size_t kind = 0; kind < total.size(); ++kind) total[kind] += std::exchange(local.seconds[kind], 0.0);
  return total;
}

}  // namespace truffula

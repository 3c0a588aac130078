// Adapters: added without a copy, and applied in a step. Every number of an image is checked before it becomes a
// pointer.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "executable.h"

namespace truffula {
namespace {

constexpr int32_t kShrinkRows = 64;  // rows of one adapter in a shrink task

void require(bool holds, const char* why) {
  if (!holds) throw std::invalid_argument(why);
}

int64_t panels_of(int64_t outputs) { return (outputs + kLanes - 1) / kLanes; }

// Tasks in which an adapter computes its products with A for `rows` rows.
int32_t shrink_tasks(int32_t rows) { return (rows + kShrinkRows - 1) / kShrinkRows; }

}  // namespace

// The format of a tensor by its dtype's number in DTYPES of kernels/adapters.py.
int32_t format_of(const TensorColumns& tensor) {
  require(tensor.dtype == 0 || tensor.dtype == 2, "adapter: panels are float32 or bfloat16");
  return tensor.dtype == 0 ? kF32 : kBF16;
}

// A tensor of `expected` bytes in the image.
const uint8_t* bytes_at(const TensorColumns& tensor, int64_t expected, const uint8_t* data, int64_t bytes) {
  require(tensor.bytes == expected && expected <= bytes && tensor.offset >= 0 && tensor.offset % 64 == 0 &&
              tensor.offset <= bytes - expected, "adapter: a tensor lies outside its image");
  return data + tensor.offset;
}

// The weight of an op that takes adapters.
const Weight& Executable::adapted_weight(const Op& op) const {
  if (const auto* embed = std::get_if<EmbedOp>(&op)) return weight(embed->table);
  if (const auto* experts = std::get_if<ExpertLinearOp>(&op)) return weight(experts->weight);
  if (const auto* latent = std::get_if<MlaOp>(&op)) return weight(latent->kv_b);
  return weight(std::get<LinearOp>(op).weight);
}

void Executable::add_site(int32_t site, int32_t index, int64_t first, int64_t outputs, int64_t expert) {
  require(!sealed_, "the program is sealed");
  require(site >= 0 && site < (1 << 20) && index >= 0 && static_cast<size_t>(index) < ops_.size(), "site: no such op");
  const Op& op = ops_[static_cast<size_t>(index)];
  require(takes_adapters(op), "site: the op takes no adapters");
  const auto* embed = std::get_if<EmbedOp>(&op);
  const bool latent = std::holds_alternative<MlaOp>(op);
  const Weight& w = adapted_weight(op);
  const int64_t width = embed ? w.inputs : w.outputs;
  require(expert >= 0 && expert < w.experts, "site: no such expert");
  require(first >= 0 && outputs > 0 && outputs <= width && first <= width - outputs, "site: outside its op");
  require(!embed || (outputs == width && embed->source == kFromToken), "site: a table has one, by token");
  require(!latent || outputs == width, "site: a latent op has one");
  if (static_cast<size_t>(site) >= places_.size()) places_.resize(static_cast<size_t>(site) + 1);
  require(places_[static_cast<size_t>(site)].op == kAbsent, "site: given twice");
  places_[static_cast<size_t>(site)] = {index, first, outputs, expert};
}

int32_t Executable::add_adapter(const int64_t* table, int64_t parts, const uint8_t* data, int64_t bytes) {
  require(sealed_, "the program is not sealed");
  require(reinterpret_cast<uintptr_t>(data) % 64 == 0, "adapter: its image is not aligned to 64 bytes");
  auto made = std::make_unique<Adapter>();
  made->op_of.assign(ops_.size(), kAbsent);
  for (int64_t i = 0; i < parts; ++i) {
    PartRow row;
    std::memcpy(&row, table + i * kPartColumns, sizeof row);
    add_part(*made, row, data, bytes);
  }
  if (free_slots_.empty()) {
    adapters_.push_back(std::move(made));
    return static_cast<int32_t>(adapters_.size()) - 1;
  }
  const int32_t slot = free_slots_.back();
  free_slots_.pop_back();
  adapters_[static_cast<size_t>(slot)] = std::move(made);
  return slot;
}

// The adapter's entry for a place, which is made at its first part.
AdapterOp& Executable::op_of_part(Adapter& adapter, const AdapterPlace& place, int64_t experts, bool by_expert) {
  const auto entry = [&](int32_t& found) {
    if (found == kAbsent) {
      found = static_cast<int32_t>(adapter.ops.size());
      adapter.ops.emplace_back();
    }
    return static_cast<size_t>(found);
  };
  const size_t whole = entry(adapter.op_of[static_cast<size_t>(place.op)]);
  if (!by_expert) return adapter.ops[whole];
  if (adapter.ops[whole].of_expert.empty()) adapter.ops[whole].of_expert.assign(static_cast<size_t>(experts), kAbsent);
  int32_t found = adapter.ops[whole].of_expert[static_cast<size_t>(place.expert)];
  const size_t own = entry(found);  // may move the entries
  adapter.ops[whole].of_expert[static_cast<size_t>(place.expert)] = found;
  return adapter.ops[own];
}

void Executable::add_part(Adapter& adapter, const PartRow& row, const uint8_t* data, int64_t bytes) const {
  require(row.kind == 0, "adapter: a part that no kernel serves");
  require(row.site >= 0 && row.site < static_cast<int64_t>(places_.size()) &&
              places_[static_cast<size_t>(row.site)].op != kAbsent, "adapter: no op serves a site of it");
  require(std::isfinite(static_cast<float>(row.scale)), "adapter: a scale is not finite");
  const AdapterPlace& place = places_[static_cast<size_t>(row.site)];
  const Op& at = ops_[static_cast<size_t>(place.op)];
  const auto* embed = std::get_if<EmbedOp>(&at);
  const Weight& w = adapted_weight(at);
  const int64_t rank = row.a.shape[0], inputs = embed ? w.outputs : w.inputs;
  require(rank > 0 && rank <= kMaxWidth && row.a.shape[1] == inputs && row.a.shape[2] == 0, "adapter: A has another width");
  require(row.b.shape[0] == place.outputs && row.b.shape[1] == rank && row.b.shape[2] == 0, "adapter: B has another shape");

  AdapterOp& op = op_of_part(adapter, place, w.experts, std::holds_alternative<ExpertLinearOp>(at));
  if (const auto* latent = std::get_if<MlaOp>(&at)) return add_latent_part(op, *latent, row, data, bytes);
  const int32_t format = format_of(row.a), b_format = format_of(row.b);
  const int64_t panels = panels_of(rank), line = embed ? rank * (format == kF32 ? 4 : 2) : panel_bytes(format, inputs);
  const uint8_t* a = bytes_at(row.a, (embed ? inputs : panels) * line, data, bytes);
  const auto scale = static_cast<float>(row.scale);
  // Slices of a fused module share one A: x A^T is computed once.
  auto shrink = std::find_if(op.shrinks.begin(), op.shrinks.end(), [&](const AdapterShrink& s) {
    return s.a.data == a && s.scale == scale && s.rank == rank && s.a.format == format;
  });
  if (shrink == op.shrinks.end()) {
    require(op.h_width + panels * kLanes <= kMaxWidth, "adapter: its ranks are too large");
    op.shrinks.push_back({{a, line, format, static_cast<int32_t>(panels), static_cast<int32_t>(inputs)}, scale,
                          static_cast<int32_t>(op.h_width), static_cast<int32_t>(rank)});
    op.h_width += panels * kLanes;
    shrink = op.shrinks.end() - 1;
  }

  // A slice over gates and ups is two runs of panels, which alternate. A slice may begin inside a panel.
  const int64_t end = place.first + place.outputs, half = embed ? 0 : w.order.half;
  const int64_t cut = half ? std::clamp(half, place.first, end) : end, b_line = panel_bytes(b_format, rank);
  const std::array<int64_t, 3> spans[] = {{place.first, cut, 0}, {cut, end, half}};
  int64_t b_panels = 0;
  for (const auto& [lo, hi, base] : spans)
    if (lo < hi) b_panels += panels_of((lo - base) % kLanes + hi - lo);
  const uint8_t* b = bytes_at(row.b, b_panels * b_line, data, bytes);
  for (const auto& [lo, hi, base] : spans) {
    if (lo >= hi) continue;
    const int64_t in_run = panels_of((lo - base) % kLanes + hi - lo);
    const int64_t first = half ? 2 * ((lo - base) / kLanes) + (base ? 1 : 0) : lo / kLanes;
    op.expands.push_back({{b, b_line, b_format, static_cast<int32_t>(in_run), static_cast<int32_t>(rank)},
                          shrink->h_start, static_cast<int32_t>(first), half ? 2 : 1});
    b += in_run * b_line;
  }
}

void Executable::drop_adapter(int32_t slot) {
  if (slot < 0 || static_cast<size_t>(slot) >= adapters_.size() || !adapters_[static_cast<size_t>(slot)])
    throw std::invalid_argument("adapter slot " + std::to_string(slot) + " is not in use");
  adapters_[static_cast<size_t>(slot)].reset();
  free_slots_.push_back(slot);
  // Memory beyond the planned rank was charged to the adapters that need it: release it. It is allocated again for
  // others.
  const auto planned = static_cast<size_t>(kPlannedRank) * std::max(capacity_.max_tokens, capacity_.max_logit_rows);
  if (h_.size() > planned) std::vector<float>().swap(h_);
}

// A step

// Lists the adapters that act at each op and where their products with A go in h_, which all ops share.
void Executable::plan_adapters() {
  active_adapters_.clear();
  int64_t most = 0;
  size_t most_expands = 0;
  int64_t most_of_experts = 0;
  for (size_t index = 0; index < ops_.size(); ++index) {
    const auto from = static_cast<int32_t>(active_adapters_.size());
    const bool logits = has_logit_rows(out_of(ops_[index])), takes = takes_adapters(ops_[index]);
    int64_t at = 0;
    int32_t chunk = 0;
    size_t expands = 0;
    int64_t of_experts = 0;
    for (int32_t g = 0; takes && g < counts_.G; ++g) {
      const int32_t* seg = in_.seg + 3 * g;
      const int32_t lo = logits ? in_.seg_r[2 * g] : seg[0], hi = logits ? in_.seg_r[2 * g + 1] : seg[1];
      const Adapter& adapter = *adapters_[static_cast<size_t>(seg[2])];
      const int32_t found = adapter.op_of[index];
      if (found == kAbsent || lo >= hi) continue;
      const AdapterOp& op = adapter.ops[static_cast<size_t>(found)];
      active_adapters_.push_back({&adapter, &op, lo, hi, chunk, in_.seg_weight[g], at});
      if (!op.of_expert.empty()) {  // its products with A are computed where they are used
        int64_t widest = 0;
        size_t most_of_one = 0;
        for (const int32_t one : op.of_expert)
          if (one != kAbsent) {
            widest = std::max(widest, adapter.ops[static_cast<size_t>(one)].h_width);
            most_of_one = std::max(most_of_one, adapter.ops[static_cast<size_t>(one)].expands.size());
          }
        of_experts += widest;
        expands += most_of_one;
        continue;
      }
      at += (hi - lo) * op.h_width;
      chunk += shrink_tasks(hi - lo);
      expands += op.expands.size() + op.latents.size();
    }
    most_of_experts = std::max(most_of_experts, of_experts);
    active_of_op_[index] = {from, static_cast<int32_t>(active_adapters_.size())};
    most = std::max(most, at);
    most_expands = std::max(most_expands, expands);
  }
  if (static_cast<int64_t>(h_.size()) < most) {
    std::vector<float>().swap(h_);  // freed first: the old values are not needed
    h_.resize(static_cast<size_t>(most));
  }
  for (ThreadState& state : thread_states_) {
    state.deltas.reserve(most_expands);
    if (const auto floats = static_cast<size_t>(kExpertRows * most_of_experts); state.expert_h.size() < floats) state.expert_h.resize(floats);
    state.deltas_op = SIZE_MAX;
  }
}

// The number of shrink tasks at an op.
int32_t Executable::num_shrink_tasks(size_t index) const {
  const auto [from, to] = active_of_op_[index];
  if (from == to) return 0;
  const ActiveAdapter& last = active_adapters_[static_cast<size_t>(to) - 1];
  return last.first_task + shrink_tasks(last.hi - last.lo);
}

// Computes h = scale * x A^T for the rows of one task.
void Executable::run_shrink_task(const Stage& stage, int32_t number) {
  const size_t index = stage.op;
  const auto [from, to] = active_of_op_[index];
  const auto behind = std::upper_bound(active_adapters_.begin() + from, active_adapters_.begin() + to, number,
                                       [](int32_t wanted, const ActiveAdapter& active) { return wanted < active.first_task; });
  const ActiveAdapter& active = *(behind - 1);
  const int32_t lo = active.lo + (number - active.first_task) * kShrinkRows, count = std::min(kShrinkRows, active.hi - lo);
  if (const auto* latent = std::get_if<MlaOp>(&ops_[index])) return shrink_heads(*latent, active, lo, count, stage.number != 0);
  const int64_t stride = active.op->h_width;
  float* h = h_.data() + active.h_start + (lo - active.lo) * stride;
  const auto* linear = std::get_if<LinearOp>(&ops_[index]);
  const Rows x = linear ? rows(linear->x) : Rows{nullptr, 0};
  for (const AdapterShrink& part : active.op->shrinks) {
    const float scale = part.scale * active.weight;
    if (linear) {
      const ShrinkCall call{{x.data + lo * x.stride, x.stride}, {h + part.h_start, stride}, part.a, scale, count};
      kernels_->shrink(&call, 0, part.a.panels);
      continue;
    }
    const EmbedCall call{{part.a.data, 0, part.a.format, part.rank}, {h + part.h_start, stride}, {}, scale, true, false,
                         nullptr, 0};
    kernels_->embed(&call, in_.token_ids + lo, 0, count);
  }
}

// The deltas of an op in the order of the segments; built once per thread, op and step.
const std::vector<Delta>& Executable::deltas_of(size_t index, ThreadState& state) const {
  if (state.deltas_op == index) return state.deltas;
  state.deltas_op = index;
  state.deltas.clear();
  const auto [from, to] = active_of_op_[index];
  for (int32_t i = from; i < to; ++i) {
    const ActiveAdapter& active = active_adapters_[static_cast<size_t>(i)];
    for (const AdapterExpand& expand : active.op->expands)
      state.deltas.push_back({h_.data() + active.h_start + expand.h_start, active.op->h_width, expand.b, active.lo, active.hi,
                              expand.first, expand.step, 0, 0});
  }
  set_bounds(state.deltas.data(), static_cast<int32_t>(state.deltas.size()));
  return state.deltas;
}

}  // namespace truffula

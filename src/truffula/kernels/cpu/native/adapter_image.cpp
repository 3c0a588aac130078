// Adapters are added without a copy, from images packed as kernels/cpu/pack.py says. Every number of an image is checked
// before it becomes a pointer.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>

#include "executable.h"

namespace truffula {
namespace {

void require(bool holds, const char* why) {
  if (!holds) throw std::invalid_argument(why);
}

int64_t panels_of(int64_t outputs) { return (outputs + kLanes - 1) / kLanes; }

bool has_shape(const TensorColumns& tensor, std::array<int64_t, 3> shape) {
  return std::equal(shape.begin(), shape.end(), tensor.shape);
}

// Columns of a site that lie in adjacent panels or, with gates and ups, in every second one: lanes lane .. end from the
// first lane of panel `first`.
struct Run {
  int32_t first, step, lane, end, panels;
};

// The one or two runs of a site: a slice over gates and ups has two, whose panels alternate. A site may begin inside a
// panel.
struct Runs {
  std::array<Run, 2> run;
  int32_t count = 0, panels = 0;

  Runs(const AdapterPlace& place, int64_t half) {
    const int64_t end = place.first + place.outputs, cut = half ? std::clamp(half, place.first, end) : end;
    const std::array<int64_t, 3> spans[] = {{place.first, cut, 0}, {cut, end, half}};
    for (const auto& [lo, hi, base] : spans) {
      if (lo >= hi) continue;
      const int64_t lane = (lo - base) % kLanes, first = half ? 2 * ((lo - base) / kLanes) + (base ? 1 : 0) : lo / kLanes;
      const auto in_run = static_cast<int32_t>(panels_of(lane + hi - lo));
      run[static_cast<size_t>(count++)] = {static_cast<int32_t>(first), half ? 2 : 1, static_cast<int32_t>(lane),
                                           static_cast<int32_t>(lane + hi - lo), in_run};
      panels += in_run;
    }
  }
};

// Joins what scales a site's product, and what is added to it, to its first product with B: one pass over its columns
// instead of three.
void join_expands(std::vector<AdapterExpand>& expands) {
  const auto same = [](const AdapterExpand& a, const AdapterExpand& b) {
    return a.first == b.first && a.step == b.step && a.lane == b.lane && a.end == b.end;
  };
  std::vector<bool> joined(expands.size());
  for (size_t i = 0; i < expands.size(); ++i) {
    AdapterExpand& product = expands[i];
    if (product.role != kAdds || product.h_start == kAbsent) continue;
    for (size_t j = 0; j < expands.size(); ++j) {
      const AdapterExpand& other = expands[j];
      if (i == j || joined[j] || !same(product, other)) continue;
      if (other.role == kScales && product.role == kAdds) product.role = kScalesAndAdds, joined[j] = true;
      else if (other.role == kAdds && other.h_start == kAbsent && !product.bias)
        product.bias = reinterpret_cast<const float*>(other.b.data), joined[j] = true;
    }
  }
  size_t next = 0;
  std::erase_if(expands, [&](const AdapterExpand&) { return joined[next++]; });
}

// Adds an expand for each run of a site. `b` is a matrix in consecutive panels, `column` likewise; either may be null.
void add_expands(AdapterOp& op, const Runs& runs, int32_t role, Packed b, const float* column, int32_t h_start, int32_t converted = kAbsent) {
  for (int32_t i = 0; i < runs.count; ++i) {
    const Run& run = runs.run[static_cast<size_t>(i)];
    b.panels = run.panels;
    AdapterExpand made;
    made.b = b, made.role = role, made.first = run.first, made.step = run.step, made.lane = run.lane, made.end = run.end;
    made.h_start = h_start, made.converted = converted, made.column = column;
    op.expands.push_back(made);
    if (b.data) b.data += run.panels * b.panel_bytes;
    if (column) column += run.panels * kLanes;
  }
}

}  // namespace

// What is known of a site before its other parts are read.
struct SiteParts {
  const float* column = nullptr;
  int32_t scaled = kAbsent, converted = kAbsent;
  bool replaced = false;
};

// The format of a tensor by its dtype's number in DTYPES of kernels/adapters.py. `factor`: of A, B or rows of the head.
int32_t format_of(const TensorColumns& tensor, bool factor) {
  require(tensor.dtype == 0 || tensor.dtype == 2 || (factor && tensor.dtype == 1), "adapter: panels of another dtype");
  return tensor.dtype == 0 ? kF32 : tensor.dtype == 1 ? kF16 : kBF16;
}

const uint8_t* bytes_at(const TensorColumns& tensor, int64_t expected, const ImageData& image) {
  require(tensor.bytes == expected && expected <= image.bytes && tensor.offset >= 0 && tensor.offset % 64 == 0 &&
              tensor.offset <= image.bytes - expected, "adapter: a tensor lies outside its image");
  return image.data + tensor.offset;
}

const float* floats_at(const TensorColumns& tensor, int64_t shape, int64_t count, const ImageData& image) {
  require(format_of(tensor) == kF32 && has_shape(tensor, {shape, 0, 0}), "adapter: a vector has another width");
  return reinterpret_cast<const float*>(bytes_at(tensor, count * 4, image));
}

// Ids in ascending order, below `end`.
static const int32_t* ids_at(const TensorColumns& tensor, int64_t end, const ImageData& image) {
  const int64_t count = tensor.shape[0];
  require(tensor.dtype == 3 && count > 0 && count <= kMaxColumns && has_shape(tensor, {count, 0, 0}), "adapter: ids");
  const auto* ids = reinterpret_cast<const int32_t*>(bytes_at(tensor, count * 4, image));
  for (int64_t i = 0; i < count; ++i)
    require(ids[i] > (i ? ids[i - 1] : -1) && ids[i] < end, "adapter: ids do not ascend, or one is too large");
  return ids;
}

// Reserves columns of h.
static int32_t h_columns(AdapterOp& op, int64_t count) {
  require(op.h_width + count <= kMaxWidth, "adapter: its ranks are too large");
  op.h_width += count;
  return static_cast<int32_t>(op.h_width - count);
}

// The weight of an op that takes adapters.
const Weight& Executable::adapted_weight(const Op& op) const {
  if (const auto* embed = std::get_if<EmbedOp>(&op)) return weight(embed->table);
  if (const auto* norm = std::get_if<NormOp>(&op)) return weight(norm->weight);
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
  const bool whole = std::holds_alternative<MlaOp>(op) || std::holds_alternative<NormOp>(op);
  const Weight& w = adapted_weight(op);
  const int64_t width = embed ? w.inputs : w.outputs;
  require(expert >= 0 && expert < w.experts, "site: no such expert");
  require(first >= 0 && outputs > 0 && outputs <= width && first <= width - outputs, "site: outside its op");
  require(!embed || (outputs == width && embed->source == kFromToken), "site: a table has one, by token");
  require(!whole || outputs == width, "site: a norm or a latent op has one");
  if (static_cast<size_t>(site) >= places_.size()) places_.resize(static_cast<size_t>(site) + 1);
  require(places_[static_cast<size_t>(site)].op == kAbsent, "site: given twice");
  places_[static_cast<size_t>(site)] = {index, first, outputs, expert};
}

// Scales come first: they are known when other parts of their site are added, and a base product is scaled before
// it is replaced. The last pass gives products of scaled x to the sites that have no matrix of their own.
std::unique_ptr<Adapter> Executable::make_adapter(const int64_t* table, int64_t parts, const ImageData& image) const {
  require(sealed_, "the program is not sealed");
  require(reinterpret_cast<uintptr_t>(image.data) % 64 == 0, "adapter: its image is not aligned to 64 bytes");
  auto made = std::make_unique<Adapter>();
  made->op_of.assign(ops_.size(), kAbsent);
  std::unordered_map<int64_t, SiteParts> sites;
  for (const bool scales : {true, false})
    for (int64_t i = 0; i < parts; ++i) {
      PartRow row;
      std::memcpy(&row, table + i * kPartColumns, sizeof row);
      if ((row.kind == kColumnScale || row.kind == kInputScale) == scales) add_part(*made, row, image, sites[row.site]);
    }
  for (const auto& [site, found] : sites)
    if (found.scaled != kAbsent && !found.replaced) multiply_scaled(*made, places_[static_cast<size_t>(site)], found);
  for (AdapterOp& op : made->ops) {
    join_expands(op.expands);
    // What scales or replaces a product comes before what is added to it.
    std::stable_sort(op.expands.begin(), op.expands.end(), [](const auto& a, const auto& b) { return a.role != kAdds && b.role == kAdds; });
    for (const AdapterExpand& expand : op.expands) op.disjoint &= expand.role < kOwnProduct || !expand.column;
    const LatentVectors& of = op.of_latent;
    op.num_deltas = op.expands.size() + op.latents.size() + (of.keys ? 1 : 0) + (of.bias ? 1 : 0);  // of values or keys
  }
  for (AdapterOp& op : made->ops)
    for (const int32_t one : op.of_expert)
      if (one != kAbsent) {
        op.h_width = std::max(op.h_width, made->ops[static_cast<size_t>(one)].h_width);
        op.num_deltas = std::max(op.num_deltas, made->ops[static_cast<size_t>(one)].num_deltas);
        op.disjoint &= made->ops[static_cast<size_t>(one)].disjoint;
      }
  return made;
}

int64_t Executable::adapter_width(const int64_t* table, int64_t parts, const ImageData& image) const {
  int64_t widest = 0;
  for (const AdapterOp& op : make_adapter(table, parts, image)->ops) widest = std::max(widest, op.h_width);
  return widest;
}

int32_t Executable::add_adapter(const int64_t* table, int64_t parts, const ImageData& image) {
  std::unique_ptr<Adapter> made = make_adapter(table, parts, image);
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
AdapterOp& Executable::op_of_part(Adapter& adapter, const AdapterPlace& place) const {
  const auto entry = [&](int32_t& found) {
    if (found == kAbsent) {
      found = static_cast<int32_t>(adapter.ops.size());
      adapter.ops.emplace_back();
    }
    return static_cast<size_t>(found);
  };
  const size_t whole = entry(adapter.op_of[static_cast<size_t>(place.op)]);
  const auto* experts = std::get_if<ExpertLinearOp>(&ops_[static_cast<size_t>(place.op)]);
  if (!experts) return adapter.ops[whole];
  if (adapter.ops[whole].of_expert.empty())
    adapter.ops[whole].of_expert.assign(static_cast<size_t>(weight(experts->weight).experts), kAbsent);
  int32_t found = adapter.ops[whole].of_expert[static_cast<size_t>(place.expert)];
  const size_t own = entry(found);  // may move the entries
  adapter.ops[whole].of_expert[static_cast<size_t>(place.expert)] = found;
  return adapter.ops[own];
}

void Executable::add_part(Adapter& adapter, const PartRow& row, const ImageData& image, SiteParts& site) const {
  require(row.site >= 0 && row.site < static_cast<int64_t>(places_.size()) &&
              places_[static_cast<size_t>(row.site)].op != kAbsent, "adapter: no op serves a site of it");
  require(row.kind >= kLowRank && row.kind <= kRows && std::isfinite(static_cast<float>(row.scale)), "adapter: a kind or a scale");
  const AdapterPlace& place = places_[static_cast<size_t>(row.site)];
  const Op& at = ops_[static_cast<size_t>(place.op)];
  AdapterOp& op = op_of_part(adapter, place);
  if (const auto* latent = std::get_if<MlaOp>(&at)) return add_latent_part(op, *latent, row, image);
  const Weight& w = adapted_weight(at);
  if (std::holds_alternative<NormOp>(at)) {
    require(row.kind == kBias || row.kind == kReplace, "adapter: a norm has a weight and a bias");
    (row.kind == kBias ? op.norm_bias : op.norm_weight) = floats_at(row.a, w.outputs, w.outputs, image);
    return;
  }
  const bool gathers = std::holds_alternative<EmbedOp>(at);
  const Runs runs(place, gathers ? 0 : w.order.half);
  switch (row.kind) {
    case kLowRank:
      return add_low_rank(op, place, row, image, site);
    case kInputScale: {
      require(!gathers, "adapter: a table has no inputs to scale");
      const float* factor = floats_at(row.a, w.inputs, w.inputs, image);
      site.scaled = h_columns(op, scaled_x_floats(w.format, w.inputs));
      if (is_quantised(w.format)) site.converted = site.scaled + static_cast<int32_t>(scaled_row_floats(w.inputs));
      op.inputs.push_back({factor, static_cast<int32_t>(w.inputs), site.scaled, site.converted});
      return;
    }
    case kReplace:
      site.replaced = true;
      return gathers ? add_gather(op, place, row, image, site) : add_matrix_part(op, place, row, image, site);
    case kRows:
      return gathers ? add_gather(op, place, row, image, site) : add_columns(op, place, row, image, site);
    default: {  // a vector in panels of one input
      const float* values = floats_at(row.a, place.outputs, runs.panels * kLanes, image);
      if (row.kind == kColumnScale) {
        site.column = values;
        return add_expands(op, runs, kScales, {nullptr, 0, kF32, 0, 1}, values, kAbsent);
      }
      return add_expands(op, runs, kAdds, {reinterpret_cast<const uint8_t*>(values), column_bytes(kF32, 1), kF32, 0, 1}, nullptr, kAbsent);
    }
  }
}

void Executable::add_low_rank(AdapterOp& op, const AdapterPlace& place, const PartRow& row, const ImageData& image, const SiteParts& site) const {
  const Op& at = ops_[static_cast<size_t>(place.op)];
  const bool gathers = std::holds_alternative<EmbedOp>(at);
  const Weight& w = adapted_weight(at);
  const int64_t rank = row.a.shape[0], inputs = gathers ? w.outputs : w.inputs, panels = panels_of(rank);
  require(rank > 0 && rank <= kMaxWidth && has_shape(row.a, {rank, inputs, 0}), "adapter: A has another width");
  require(has_shape(row.b, {place.outputs, rank, 0}), "adapter: B has another shape");
  const int32_t format = format_of(row.a, !gathers), b_format = format_of(row.b, true);
  const int64_t line = gathers ? rank * (format == kF32 ? 4 : 2) : panel_bytes(format, inputs);
  const uint8_t* a = bytes_at(row.a, gathers ? inputs * line : rows_bytes(format, inputs, rank), image);
  const auto scale = static_cast<float>(row.scale);
  // Slices of a fused module share one A: x A^T is computed once.
  auto shrink = std::find_if(op.shrinks.begin(), op.shrinks.end(), [&](const AdapterShrink& s) {
    return s.a.data == a && s.scale == scale && s.rank == rank && s.a.format == format;
  });
  if (shrink == op.shrinks.end()) {
    const int32_t h_start = h_columns(op, panels * kLanes);
    op.shrinks.push_back({{a, line, format, static_cast<int32_t>(panels), static_cast<int32_t>(inputs)}, scale, h_start,
                          static_cast<int32_t>(rank)});
    shrink = op.shrinks.end() - 1;
  }
  const Runs runs(place, gathers ? 0 : w.order.half);
  const int64_t b_panel = column_bytes(b_format, rank);
  const uint8_t* b = bytes_at(row.b, runs.panels * b_panel, image);
  add_expands(op, runs, kAdds, {b, b_panel, b_format, 0, static_cast<int32_t>(rank)}, site.column, shrink->h_start);
}

// A matrix instead of the base's.
void Executable::add_matrix_part(AdapterOp& op, const AdapterPlace& place, const PartRow& row, const ImageData& image, const SiteParts& site) const {
  const Weight& w = adapted_weight(ops_[static_cast<size_t>(place.op)]);
  const Runs runs(place, w.order.half);
  const int32_t format = format_of(row.a);
  require(has_shape(row.a, {place.outputs, w.inputs, 0}), "adapter: a matrix has another shape");
  const int64_t bytes = panel_bytes(format, w.inputs);
  const uint8_t* data = bytes_at(row.a, runs.panels * bytes, image);
  add_expands(op, runs, kOwnProduct, {data, bytes, format, 0, static_cast<int32_t>(w.inputs)}, site.column, site.scaled);
}

// The base's matrix, for x that is scaled. Its panels of gates and ups alternate.
void Executable::multiply_scaled(Adapter& adapter, const AdapterPlace& place, const SiteParts& site) const {
  const Weight& w = adapted_weight(ops_[static_cast<size_t>(place.op)]);
  const Runs runs(place, w.order.half);
  AdapterOp& op = op_of_part(adapter, place);
  const Packed whole = w.packed(place.expert);
  const float* column = site.column;
  for (int32_t i = 0; i < runs.count; ++i) {
    const Run& run = runs.run[static_cast<size_t>(i)];
    AdapterExpand made;
    made.b = whole, made.role = kOwnProduct, made.first = run.first, made.step = run.step, made.lane = run.lane, made.end = run.end;
    made.b.data += run.first * whole.panel_bytes;
    made.b.panel_bytes *= run.step;
    made.b.panels = run.panels;
    made.h_start = site.scaled, made.converted = site.converted, made.column = column;
    op.expands.push_back(made);
    if (column) column += run.panels * kLanes;
  }
}

// Rows of a table: all of them, or those of some ids, which may lie behind the base's.
void Executable::add_gather(AdapterOp& op, const AdapterPlace& place, const PartRow& row, const ImageData& image, const SiteParts& site) const {
  const Weight& w = adapted_weight(ops_[static_cast<size_t>(place.op)]);
  const int64_t width = w.inputs;
  const bool all = row.kind == kReplace;
  const TensorColumns& values = all ? row.a : row.b;
  const int64_t rows = values.shape[0];
  const int32_t* ids = all ? nullptr : ids_at(row.a, kMaxIds, image);
  require(rows == (all ? w.outputs : row.a.shape[0]) && has_shape(values, {rows, width, 0}), "adapter: a table has another shape");
  const int32_t format = format_of(values);
  const uint8_t* data = bytes_at(values, rows * width * (format == kF32 ? 4 : 2), image);
  const int32_t h_start = h_columns(op, scaled_row_floats(width));
  op.gathers.push_back({{data, 0, format, static_cast<int32_t>(width), static_cast<int32_t>(rows)}, ids, static_cast<int32_t>(rows), h_start});
  add_expands(op, Runs(place, 0), kOwnValues, {nullptr, 0, kF32, 0, 1}, site.column, h_start);
}

// Some columns of logits, as products with rows of the adapter's.
void Executable::add_columns(AdapterOp& op, const AdapterPlace& place, const PartRow& row, const ImageData& image, const SiteParts& site) const {
  const Weight& w = adapted_weight(ops_[static_cast<size_t>(place.op)]);
  require(w.order.half == 0 && place.first == 0 && place.outputs == w.outputs && w.experts == 1, "adapter: columns of a site that is not a whole product");
  const int32_t* ids = ids_at(row.a, place.outputs, image);
  const int64_t count = row.a.shape[0], panels = panels_of(count);
  require(has_shape(row.b, {count, w.inputs, 0}), "adapter: rows have another width");
  const int32_t format = format_of(row.b, true);
  const uint8_t* data = bytes_at(row.b, rows_bytes(format, w.inputs, count), image);
  const int32_t h_start = h_columns(op, panels * kLanes);
  op.shrinks.push_back({{data, panel_bytes(format, w.inputs), format, static_cast<int32_t>(panels), static_cast<int32_t>(w.inputs)},
                        1.0f, h_start, static_cast<int32_t>(count)});
  add_expands(op, Runs(place, 0), kOwnColumns, {nullptr, 0, kF32, 0, 1}, site.column, h_start);
  op.expands.back().ids = ids, op.expands.back().num_ids = static_cast<int32_t>(count);
}

void Executable::drop_adapter(int32_t slot) {
  if (slot < 0 || static_cast<size_t>(slot) >= adapters_.size() || !adapters_[static_cast<size_t>(slot)])
    throw std::invalid_argument("adapter slot " + std::to_string(slot) + " is not in use");
  adapters_[static_cast<size_t>(slot)].reset();
  free_slots_.push_back(slot);
  // Memory beyond the planned width was charged to the adapters that need it: release it. It is allocated again for
  // others.
  const auto planned = static_cast<size_t>(planned_width_) * static_cast<size_t>(std::max(capacity_.max_tokens, capacity_.max_logit_rows));
  if (h_.size() > planned) std::vector<float>().swap(h_);
}

}  // namespace truffula

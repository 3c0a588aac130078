// Multi-head latent attention in the absorbed form. Queries are multiplied by the keys' matrix, so that they are as wide
// as a cached row; the mixed latents are multiplied by the values' matrix. Nothing is computed per cached token but
// scores and sums, and adapters on the matrix act on queries and mixed latents.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "chunks.h"
#include "executable.h"

namespace truffula {
namespace {

void require(bool holds, const char* why) {
  if (!holds) throw std::invalid_argument(why);
}

// The stages of an op. Products with B_k and with A share memory for their results, and so do queries and mixed latents.
enum : int32_t { kWriteAndShrink, kAbsorb, kAttend, kMerge, kShrinkMixed, kMultiply };

int32_t units_of(const Packed& head) { return (head.panels + 1) / 2; }

}  // namespace

void Executable::add_latent(const MlaOp& op) {
  add_plane(op.plane, op.group, latent_block_bytes(op.width(), kv_format_, capacity_.block_size));
  max_distance_[static_cast<size_t>(op.group)] = INT32_MAX;
  add_plan(op.heads, partial_floats(1, op.rank), latent_scratch_of(op.heads, op.width(), op.rank, capacity_.block_size));
}

void Executable::check(const MlaOp& op) const {
  require(!has_logit_rows(op.out), "mla: out has a row per token");
  require_same_rows(op.out, {&op.q, &op.latent});
  for (int32_t number : {op.heads, op.nope, op.rope, op.dim_v, op.rank})
    require(number > 0 && number <= kMaxColumns, "mla: a count or a width");
  const int64_t heads = op.heads;
  require(op.q.width == heads * (op.nope + op.rope) && op.latent.width == op.rank + op.rope &&
              op.out.width == heads * op.dim_v, "mla: width");
  require(heads * op.width() <= kMaxWidth, "mla: its queries are too wide");
  const Weight& w = weight(op.kv_b);
  require(w.latent.heads == op.heads && w.latent.keys == op.nope && w.latent.values == op.dim_v && w.inputs == op.rank,
          "mla: kv_b");
  require(op.group >= 0 && op.group < groups_, "mla: group");
  require_disjoint(op.out, {&op.q, &op.latent}, "mla: q or latent lies where out is written");
}

// Units of two panels of the heads' keys or values.
int64_t Executable::latent_units(const MlaOp& op, bool values) const {
  const Weight& w = weight(op.kv_b);
  return static_cast<int64_t>(op.heads) * units_of(values ? w.latent_values(0) : w.latent_keys(0));
}

int32_t Executable::chunks_of(const MlaOp& op, const Stage& stage) {
  const int32_t team = team_.size();
  switch (stage.number) {
    case kWriteAndShrink:
      return row_chunks(counts_.T, team) + chunks_for(num_shrink_tasks(stage.op));
    case kShrinkMixed:
      return chunks_for(num_shrink_tasks(stage.op));
    case kAttend:
    case kMerge:
      return attention_chunks(op.heads, 1, stage.number == kMerge);
    default:
      return static_cast<int32_t>(std::min<int64_t>(latent_units(op, stage.number == kMultiply),
                                                    counts_.T < kFineRows ? team : 8 * team));
  }
}

AttentionCall Executable::call_of(const MlaOp& op) const {
  const Plane& plane = planes_[static_cast<size_t>(op.plane)];
  const Rows absorbed{absorbed_.floats(), static_cast<int64_t>(op.heads) * op.width()};
  AttentionCall call{};
  call.cache = {nullptr, plane.memory.data(), 0, plane.block_bytes, kv_format_, capacity_.block_size, 1, op.width(), op.rank, true};
  call.q = call.out = absorbed;
  call.k = rows(op.latent);
  call.heads = op.heads;
  call.scale = op.scale;
  return call;
}

void Executable::run_op(const MlaOp& op, const Stage& stage, int32_t chunk, ThreadState& state) {
  const int32_t writing = row_chunks(counts_.T, team_.size());
  switch (stage.number) {
    case kWriteAndShrink: {
      if (chunk >= writing) return shrink_chunk(stage, chunk - writing);
      const AttentionCall call = call_of(op);
      const auto mine = span_of(counts_.T, chunk, writing);
      return kernels_->write_kv(&call, in_.slot_mapping + static_cast<int64_t>(op.group) * capacity_.max_tokens, mine.lo, mine.hi);
    }
    case kShrinkMixed:
      return shrink_chunk(stage, chunk);
    case kAttend:
    case kMerge:
      return attend_chunk(call_of(op), op.group, stage.number == kMerge, chunk, state);
    default:
      return multiply_heads(op, stage, chunk, state);
  }
}

// Some units of the heads' products: of queries with the keys' matrix, whose rotated part is copied, or of the mixed
// latents with the values' matrix.
void Executable::multiply_heads(const MlaOp& op, const Stage& stage, int32_t chunk, ThreadState& state) {
  const bool values = stage.number == kMultiply;
  const Weight& w = weight(op.kv_b);
  const Rows q = rows(op.q), out = rows(op.out), absorbed = call_of(op).q;
  const int32_t per_head = units_of(values ? w.latent_values(0) : w.latent_keys(0));
  const auto mine = span_of(latent_units(op, values), chunk, chunks_of(op, stage));
  for (int64_t unit = mine.lo, next; unit < mine.hi; unit = next) {
    const auto head = static_cast<int32_t>(unit / per_head);
    next = std::min<int64_t>(mine.hi, static_cast<int64_t>(head + 1) * per_head);
    const Rows latents{absorbed.data + static_cast<int64_t>(head) * op.width(), absorbed.stride};
    const Rows queries{q.data + static_cast<int64_t>(head) * (op.nope + op.rope), q.stride};
    const std::vector<Delta>& deltas = head_deltas(stage.op, head, values, state);
    LinearCall call{};
    call.x = values ? latents : queries;
    call.out = values ? Rows{out.data + static_cast<int64_t>(head) * op.dim_v, out.stride} : latents;
    call.w = values ? w.latent_values(head) : w.latent_keys(head);
    call.deltas = deltas.data();
    call.num_deltas = static_cast<int32_t>(deltas.size());
    call.disjoint = active_of_op_[stage.op].disjoint;
    call.rows = counts_.T;
    call.out_width = values ? op.dim_v : op.rank;
    call.in_blocks = values || !rounded(op.q);
    call.round_out = values && rounded(op.out);
    call.clip = -1.0f;
    call.scale = 1.0f;
    const auto lo = static_cast<int32_t>(unit - static_cast<int64_t>(head) * per_head);
    kernels_->linear(&call, lo, lo + static_cast<int32_t>(next - unit));
    if (!values && lo == 0)
      for (int32_t t = 0; t < counts_.T; ++t)
        std::memcpy(latents.data + t * latents.stride + op.rank, queries.data + t * queries.stride + op.nope,
                    static_cast<size_t>(op.rope) * sizeof(float));
  }
}

// The deltas of one head, in the order of the segments.
const std::vector<Delta>& Executable::head_deltas(size_t index, int32_t head, bool values, ThreadState& state) const {
  const auto& op = std::get<MlaOp>(ops_[index]);
  state.deltas_op = SIZE_MAX;
  state.deltas.clear();
  state.own.clear();
  const auto [from, to, disjoint] = active_of_op_[index];
  for (int32_t i = from; i < to; ++i) {
    const ActiveAdapter& active = active_adapters_[static_cast<size_t>(i)];
    const LatentVectors& of = active.op->of_latent;
    const int64_t stride = active.op->h_width, lanes = LatentOrder::panels_of(op.dim_v) * kLanes;
    const auto add = [&](int32_t role, const float* h, int64_t h_stride, const Packed& b, const float* column) -> Delta& {
      return state.deltas.emplace_back(Delta{h, h_stride, b, active.lo, active.hi, 0, 1, 0, 0, role, active.weight, 0,
                                             values ? op.dim_v : op.rank, column, nullptr, nullptr, nullptr, 0});
    };
    const float* column = values && of.values ? of.values + head * lanes : nullptr;
    const Packed vector{nullptr, column_bytes(kF32, 1), kF32, static_cast<int32_t>(lanes / kLanes), 1};
    if (column) add(kScales, nullptr, 0, vector, column);
    if (!values && of.keys) {
      LinearCall& own = state.own.emplace_back();
      own.w = weight(op.kv_b).latent_keys(head);
      own.x = {const_cast<float*>(h_.data()) + active.h_start + of.h_start + static_cast<int64_t>(head) * op.nope, stride};
      own.rows = active.hi - active.lo;
      own.in_blocks = true;
      add(kOwnProduct, nullptr, 0, own.w, nullptr).own = &own;
    }
    for (const AdapterLatent& part : active.op->latents) {
      const float* h = h_.data() + active.h_start + part.h_start + static_cast<int64_t>(head) * part.value_a.panels * kLanes;
      Packed b = values ? part.value_b : part.key_a;
      if (values) b.data += static_cast<int64_t>(head) * b.panels * b.panel_bytes;
      add(kAdds, h, stride, b, column);
    }
    if (values && of.bias) {
      Packed b = vector;
      b.data = reinterpret_cast<const uint8_t*>(of.bias + head * lanes);
      add(kAdds, &active.weight, 0, b, nullptr);
    }
  }
  set_bounds(state.deltas.data(), static_cast<int32_t>(state.deltas.size()));
  return state.deltas;
}

// The products of rows lo .. lo + count of an adapter that need no more than a head: of queries with B_k, or of mixed
// latents with A. Where it scales the rows of keys, queries are multiplied by that first.
void Executable::shrink_heads(const MlaOp& op, const ActiveAdapter& active, int32_t lo, int32_t count, bool values) {
  Rows x = values ? call_of(op).q : rows(op.q);
  x.data += lo * x.stride;
  const int64_t stride = active.op->h_width;
  int64_t head_width = values ? op.width() : op.nope + op.rope;
  float* h = h_.data() + active.h_start + (lo - active.lo) * stride;
  const LatentVectors& of = active.op->of_latent;
  if (!values && of.keys) {
    float* scaled = h + of.h_start;
    for (int32_t r = 0; r < count; ++r)
      for (int32_t head = 0; head < op.heads; ++head)
        for (int32_t i = 0; i < op.nope; ++i)
          scaled[r * stride + head * op.nope + i] = x.data[r * x.stride + head * head_width + i] * of.keys[head * op.nope + i];
    x = {scaled, stride};
    head_width = op.nope;
  }
  for (const AdapterLatent& part : active.op->latents)
    for (int32_t head = 0; head < op.heads; ++head) {
      Packed a = values ? part.value_a : part.key_b;
      if (!values) a.data += head * rows_bytes(a.format, a.inputs, part.rank);
      float* to = h + part.h_start + static_cast<int64_t>(head) * part.value_a.panels * kLanes;
      const ShrinkCall call{{x.data + head * head_width, x.stride}, {to, stride}, a, part.scale * active.weight, count, part.rank};
      kernels_->shrink(&call, 0, a.panels);
    }
}

// Adds an adapter's part at a latent op (kernels/cpu/pack.py). LowRank: A in panels and transposed, B_k transposed and B_v
// per head. ColumnScale: of all heads' keys, then panels of each head's values. Bias: the latter.
void Executable::add_latent_part(AdapterOp& op, const MlaOp& at, const PartRow& row, const ImageData& image) const {
  require(row.kind == kLowRank || row.kind == kColumnScale || row.kind == kBias, "adapter: a latent op has no such part");
  const int64_t outputs = weight(at.kv_b).outputs;
  if (row.kind != kLowRank) {
    const int64_t keys = row.kind == kColumnScale ? scaled_row_floats(static_cast<int64_t>(at.heads) * at.nope) : 0;
    const int64_t values = at.heads * LatentOrder::panels_of(at.dim_v) * kLanes;
    const float* vectors = floats_at(row.a, outputs, keys + values, image);
    if (row.kind == kBias) {
      op.of_latent.bias = vectors;
      return;
    }
    require(op.h_width + keys <= kMaxWidth && !op.of_latent.keys, "adapter: too wide, or scaled twice");
    op.of_latent = {vectors, vectors + keys, op.of_latent.bias, static_cast<int32_t>(op.h_width)};
    op.h_width += keys;
    return;
  }
  const auto rank = static_cast<int32_t>(std::clamp<int64_t>(row.a.shape[0], 0, kMaxWidth));
  require(rank > 0 && row.a.shape[0] == rank && row.a.shape[1] == at.rank && row.a.shape[2] == 0, "adapter: A has another width");
  require(row.b.shape[0] == outputs && row.b.shape[1] == rank && row.b.shape[2] == 0, "adapter: B has another shape");
  const int32_t format = format_of(row.a, true), b_format = format_of(row.b, true);
  const auto packed = [](int64_t bytes, int32_t kind, int64_t outputs, int64_t inputs) -> Packed {
    return {nullptr, bytes, kind, static_cast<int32_t>(LatentOrder::panels_of(outputs)), static_cast<int32_t>(inputs)};
  };
  AdapterLatent part{};
  part.scale = static_cast<float>(row.scale);
  part.h_start = static_cast<int32_t>(op.h_width);
  part.rank = rank;
  part.value_a = packed(panel_bytes(format, at.rank), format, rank, at.rank);
  part.key_a = packed(column_bytes(format, rank), format, at.rank, rank);
  part.key_b = packed(panel_bytes(b_format, at.nope), b_format, rank, at.nope);
  part.value_b = packed(column_bytes(b_format, rank), b_format, at.dim_v, rank);
  const int64_t width = static_cast<int64_t>(at.heads) * part.value_a.panels * kLanes;
  require(op.h_width + width <= kMaxWidth, "adapter: its ranks are too large");
  op.h_width += width;
  const int64_t of_a = rows_bytes(format, at.rank, rank), of_keys = at.heads * rows_bytes(b_format, at.nope, rank);
  const uint8_t* a = bytes_at(row.a, of_a + part.key_a.panels * part.key_a.panel_bytes, image);
  const uint8_t* b = bytes_at(row.b, of_keys + at.heads * part.value_b.panels * part.value_b.panel_bytes, image);
  part.value_a.data = a;
  part.key_a.data = a + of_a;
  part.key_b.data = b;
  part.value_b.data = b + of_keys;
  op.latents.push_back(part);
}

}  // namespace truffula

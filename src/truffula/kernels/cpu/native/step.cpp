// How a step runs: the ops one after another on every thread, each thread its part, a barrier behind each.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "denormals.h"
#include "executable.h"

namespace truffula {
namespace {

// Rows lo .. hi of `count` that are `thread`'s.
struct Span {
  int32_t lo, hi;
};

Span share_of(int32_t count, int thread, int threads) {
  const int64_t n = count;
  return {static_cast<int32_t>(n * thread / threads), static_cast<int32_t>(n * (thread + 1) / threads)};
}

// From so many rows on chunks are claimed instead of dealt out, so that a slower core doesn't hold the other up; below,
// one long stretch of weights per thread reads faster.
constexpr int32_t kClaimRows = 16;
constexpr int32_t kShrinkRows = 64;

}  // namespace

Rows Executable::rows(const Ref& ref) const {
  if (ref.buffer == kNothing) return {nullptr, 0};
  const Buffer& buffer = buffers_[static_cast<size_t>(ref.buffer)];
  return {arena_.floats() + buffer.offset + ref.start, buffer.stride};
}

int32_t Executable::rows_of(const Ref& ref) const {
  return buffers_[static_cast<size_t>(ref.buffer)].logit_rows ? counts_.R : counts_.T;
}

void Executable::run(const StepCounts& counts) {
  check_inputs(counts);
  counts_ = counts;
  prepare();
  team_.run([](void* self, int thread) { static_cast<Executable*>(self)->execute(thread); }, this);
}

// What all threads share in this step. The only place of a step that may allocate, and only until it has seen the
// largest step.
void Executable::prepare() {
  for (size_t i = 0; i < 2 * ops_.size(); ++i) claims_[i].next.store(0, std::memory_order_relaxed);
  for (Share& share : shares_) share.items = items_for(share.heads);
  int64_t most = 0;
  size_t expands = 0;
  for (int32_t g = 0; g < counts_.G; ++g) {
    const int32_t *seg = in_.seg + 3 * g, *seg_r = in_.seg_r + 2 * g;
    int64_t panels = 0;
    size_t most_expands = 0;
    for (const AdapterOp& op : adapters_[static_cast<size_t>(seg[2])]->ops) {
      panels = std::max<int64_t>(panels, op.a.panels);
      most_expands = std::max(most_expands, op.expands.size());
    }
    most += std::max(seg[1] - seg[0], seg_r[1] - seg_r[0]) * panels * kLanes;
    expands += most_expands;
  }
  if (static_cast<int64_t>(h_.size()) < most) h_.resize(static_cast<size_t>(most));
  for (std::vector<Delta>& deltas : deltas_) deltas.reserve(expands);
}

std::vector<Executable::Item> Executable::items_for(int32_t share) const {
  std::vector<Item> items;
  const int32_t tokens = std::max(1, kQueryRows / share);
  for (int32_t n = 0; n < counts_.N; ++n) {
    const int32_t lo = in_.q_start[n], hi = in_.q_start[n + 1];
    for (int32_t t = lo; t < hi; t += tokens)
      items.push_back({n, t, std::min(tokens, hi - t), in_.kv_len[n] - (hi - t)});
  }
  // The longest first: the last to be claimed should be short.
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.position > b.position; });
  return items;
}

void Executable::execute(int thread) {
  const FlushDenormals flush;
  using Clock = std::chrono::steady_clock;
  Clock::time_point before = thread == 0 ? Clock::now() : Clock::time_point();
  for (size_t index = 0; index < ops_.size(); ++index) {
    std::visit([&](const auto& op) { run_op(op, index, thread); }, ops_[index]);
    team_.barrier();
    if (thread == 0) {
      const Clock::time_point now = Clock::now();
      seconds_[ops_[index].index()] += std::chrono::duration<double>(now - before).count();
      before = now;
    }
    if (debug_) {
      if (thread == 0) keep_tap(index);
      team_.barrier();
    }
  }
}

void Executable::run_op(const EmbedOp& op, size_t, int thread) {
  const Span mine = share_of(rows_of(op.out), thread, team_.size());
  const EmbedCall call{weight(op.table).table(), rows(op.out), rows(op.add), op.scale, op.scaled, rounded(op.out)};
  if (op.source == EmbedSource::kToken) return kernels_->embed(&call, in_.token_ids, mine.lo, mine.hi);
  for (int32_t t = mine.lo; t < mine.hi; ++t) {
    const int32_t row = in_.position[t] + op.offset;
    EmbedCall one = call;
    one.out.data += t * call.out.stride;
    if (one.add.data) one.add.data += t * call.add.stride;
    kernels_->embed(&one, &row, 0, 1);
  }
}

void Executable::run_op(const NormOp& op, size_t, int thread) {
  const auto vector = [&](int32_t id) { return id == kNothing ? nullptr : weight(id).memory.floats(); };
  const NormCall call{rows(op.x),    rows(op.out), rows(op.plus),  vector(op.weight), vector(op.bias),  op.x.width,
                      op.groups,     op.layer_norm, op.cast_first, rounded(op.out),   op.eps};
  const Span mine = share_of(rows_of(op.out), thread, team_.size());
  kernels_->norm(&call, mine.lo, mine.hi);
}

// h of every segment whose adapter acts here, then what expands read of it into this thread's `deltas_`. False when no
// adapter acts: known to all threads alike, without a barrier.
bool Executable::shrink_all(const LinearOp& op, size_t index, int thread) {
  std::vector<Delta>& deltas = deltas_[static_cast<size_t>(thread)];
  deltas.clear();
  const bool logits = buffers_[static_cast<size_t>(op.out.buffer)].logit_rows;
  const Rows x = rows(op.x);
  std::atomic<int32_t>& next = claims_[2 * index].next;
  int32_t wanted = counts_.G ? next.fetch_add(1, std::memory_order_relaxed) : 0, item = 0;
  int64_t at = 0;
  bool any = false;
  for (int32_t g = 0; g < counts_.G; ++g) {
    const int32_t* seg = in_.seg + 3 * g;
    const int32_t lo = logits ? in_.seg_r[2 * g] : seg[0], hi = logits ? in_.seg_r[2 * g + 1] : seg[1];
    const Adapter& adapter = *adapters_[static_cast<size_t>(seg[2])];
    const int32_t found = adapter.op_of[index];
    if (found == kNothing || lo >= hi) continue;
    any = true;
    const AdapterOp& acting = adapter.ops[static_cast<size_t>(found)];
    const int64_t stride = static_cast<int64_t>(acting.a.panels) * kLanes;
    float* h = h_.data() + at;
    at += (hi - lo) * stride;
    for (int32_t r = lo; r < hi; r += kShrinkRows)
      for (int32_t panel = 0; panel < acting.a.panels; ++panel, ++item) {
        if (item != wanted) continue;
        const ShrinkCall call{{x.data + r * x.stride, x.stride},
                              {h + (r - lo) * stride, stride},
                              acting.a,
                              acting.column_scale.data(),
                              in_.seg_weight[g],
                              std::min(kShrinkRows, hi - r)};
        kernels_->shrink(&call, panel, panel + 1);
        wanted = next.fetch_add(1, std::memory_order_relaxed);
      }
    for (const AdapterExpand& expand : acting.expands)
      deltas.push_back({h + expand.h_start, stride, expand.b, lo, hi, expand.first, expand.step});
  }
  return any;
}

void Executable::run_op(const LinearOp& op, size_t index, int thread) {
  if (shrink_all(op, index, thread)) team_.barrier();
  const std::vector<Delta>& deltas = deltas_[static_cast<size_t>(thread)];
  LinearCall call{};
  call.x = rows(op.x);
  call.out = rows(op.out);
  call.residual = rows(op.residual);
  call.w = weight(op.weight).packed();
  call.bias = op.bias.empty() ? nullptr : op.bias.data();
  call.deltas = deltas.data();
  call.num_deltas = static_cast<int32_t>(deltas.size());
  call.rows = rows_of(op.out);
  call.out_width = op.out.width;
  call.activation = op.activation;
  call.glu = op.glu;
  call.round_out = rounded(op.out);
  call.clip = op.clip;
  call.scale = op.scale;
  call.softcap = op.softcap;
  if (call.rows == 0) return;
  const int32_t units = (call.w.panels + 1) / 2;
  if (call.rows < kClaimRows) {
    const Span mine = share_of(units, thread, team_.size());
    return kernels_->linear(&call, mine.lo, mine.hi);
  }
  const int32_t chunk = std::max(1, units / (8 * team_.size()));
  std::atomic<int32_t>& next = claims_[2 * index + 1].next;
  for (int32_t lo; (lo = next.fetch_add(chunk, std::memory_order_relaxed)) < units;)
    kernels_->linear(&call, lo, std::min(lo + chunk, units));
}

void Executable::run_op(const PointwiseOp& op, size_t, int thread) {
  const PointwiseCall call{rows(op.x), rows(op.y), rows(op.out), op.kind, op.activation, op.x.width,
                           rounded(op.out), op.param};
  const Span mine = share_of(rows_of(op.out), thread, team_.size());
  kernels_->pointwise(&call, mine.lo, mine.hi);
}

void Executable::run_op(const RopeRowsOp& op, size_t, int thread) {
  const Span mine = share_of(rows_of(op.out), thread, team_.size());
  const Rows out = rows(op.out);
  const size_t pairs = op.inv_freq.size();
  for (int32_t t = mine.lo; t < mine.hi; ++t) {
    float* row = out.data + t * out.stride;
    const auto position = static_cast<float>(in_.rope_pos[t]);
    for (size_t i = 0; i < pairs; ++i) {
      const float angle = position * op.inv_freq[i];
      row[i] = std::cos(angle) * op.factor;
      row[pairs + i] = std::sin(angle) * op.factor;
    }
  }
}

void Executable::run_op(const RopeOp& op, size_t, int thread) {
  const RopeCall call{rows(op.x), rows(op.rows), op.heads, op.head_dim, op.start, op.dims, op.interleaved,
                      rounded(op.x)};
  const Span mine = share_of(rows_of(op.x), thread, team_.size());
  kernels_->rope(&call, mine.lo, mine.hi);
}

AttentionCall Executable::call_of(const AttentionOp& op) const {
  const Plane& keys = planes_[static_cast<size_t>(op.key_plane)];
  const Plane& values = planes_[static_cast<size_t>(op.value_plane)];
  AttentionCall call{};
  call.cache = {keys.memory.data(), values.memory.data(), keys.block_bytes, values.block_bytes, kv_format_,
                capacity_.block_size, op.kv_heads, op.dim_k, op.dim_v};
  call.q = rows(op.q);
  call.k = rows(op.k);
  call.v = rows(op.v);
  call.out = rows(op.out);
  call.sinks = op.sinks == kNothing ? nullptr : weight(op.sinks).memory.floats();
  call.heads = op.heads;
  call.window = op.window;
  call.round_out = rounded(op.out);
  call.scale = op.scale;
  call.softcap = op.softcap;
  return call;
}

void Executable::run_op(const AttentionOp& op, size_t index, int thread) {
  const AttentionCall call = call_of(op);
  const Span mine = share_of(counts_.T, thread, team_.size());
  kernels_->write_kv(&call, in_.slot_mapping + static_cast<int64_t>(op.group) * capacity_.max_tokens, mine.lo, mine.hi);
  team_.barrier();
  const int32_t share = op.heads / op.kv_heads;
  const auto found = std::find_if(shares_.begin(), shares_.end(), [&](const Share& s) { return s.heads == share; });
  const std::vector<Item>& items = found->items;
  const auto total = static_cast<int32_t>(items.size()) * op.kv_heads;
  std::atomic<int32_t>& next = claims_[2 * index].next;
  float* scratch = attention_scratch_[static_cast<size_t>(thread)].data();
  for (int32_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < total;) {
    const Item& item = items[static_cast<size_t>(i / op.kv_heads)];
    const int32_t* table = in_.block_tables + (static_cast<int64_t>(op.group) * capacity_.max_seqs + item.sequence) *
                                                  capacity_.max_blocks_per_seq;
    const AttentionItem one{table, item.t, item.count, item.position, i % op.kv_heads};
    kernels_->attend(&call, &one, scratch);
  }
}

void Executable::run_op(const TakeRowsOp& op, size_t, int thread) {
  const Span mine = share_of(counts_.R, thread, team_.size());
  const Rows x = rows(op.x), out = rows(op.out);
  for (int32_t r = mine.lo; r < mine.hi; ++r)
    std::memcpy(out.data + r * out.stride, x.data + in_.logit_rows[r] * x.stride,
                static_cast<size_t>(op.x.width) * sizeof(float));
}

}  // namespace truffula

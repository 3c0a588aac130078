// Runs a step: the stages of the ops in order, each divided into chunks that the threads claim.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "denormals.h"
#include "chunks.h"
#include "executable.h"

namespace truffula {
namespace {

// The keys of a sequence with at most this many rows in a step are split into partitions, for several threads.
constexpr int32_t kSplitTokens = 4;

}  // namespace

Rows Executable::rows(const Ref& ref) const {
  if (ref.buffer == kAbsent) return {nullptr, 0};
  const Buffer& buffer = buffers_[static_cast<size_t>(ref.buffer)];
  return {arena_.floats() + buffer.offset + ref.start, buffer.stride};
}

int32_t Executable::rows_of(const Ref& ref) const {
  return buffers_[static_cast<size_t>(ref.buffer)].logit_rows ? counts_.R : counts_.T;
}

const Executable::AttentionPlan& Executable::plan_of(int32_t queries_per_kv) const {
  return *std::find_if(attention_plans_.begin(), attention_plans_.end(), [&](const AttentionPlan& plan) { return plan.queries_per_kv == queries_per_kv; });
}

void Executable::run(const StepCounts& counts) {
  check_inputs(counts);
  counts_ = counts;
  prepare();
  team_.run([](void* self, int32_t phase, int32_t chunk, int thread) {
    static_cast<Executable*>(self)->work(phase, chunk, thread);
  }, this);
}

Sampler& Executable::sampler() {
  if (!sampler_) throw std::invalid_argument("the program is not sealed");
  return *sampler_;
}

int32_t Executable::begin_sample(const SampleArgs& args) {
  sampler().begin(counts_.R, args);
  for (ThreadState& state : thread_states_) state.sample.reserve(sampler_->vocab());
  return sampler_->width(counts_.R, args);
}

void Executable::sample(const SampleArgs& args, const SampleOut& out) {
  struct Job {
    Executable* self;
    const SampleArgs* args;
    const SampleOut* out;
  } job{this, &args, &out};
  team_.run_chunks(chunks_for(counts_.R), [](void* context, int32_t, int32_t chunk, int thread) {
    const Job& j = *static_cast<const Job*>(context);
    const int32_t count = j.self->counts_.R;
    const auto mine = span_of(count, chunk, chunks_for(count));
    SampleScratch& scratch = j.self->thread_states_[static_cast<size_t>(thread)].sample;
    for (int32_t row = mine.lo; row < mine.hi; ++row)
      j.self->sampler_->sample(j.self->logits_row(row), row, *j.args, *j.out, scratch);
  }, &job);
}

// Plans the step's tiles, tasks and chunks. Only this part of a step allocates, when the step needs more than any
// before it (or since an adapter with a rank above the planned one was dropped).
void Executable::prepare() {
  plan_adapters();
  if (!states_.empty()) plan_spans();
  for (AttentionPlan& plan : attention_plans_) {
    plan_attention(plan);
    const auto floats = static_cast<size_t>(plan.partial_rows * partial_row_floats_);
    if (partials_.size() < floats) partials_.resize(floats);
  }
  team_.resize(static_cast<int32_t>(stages_.size()));
  for (size_t phase = 0; phase < stages_.size(); ++phase)
    team_.set(static_cast<int32_t>(phase), chunks_of(stages_[phase]));
}

void Executable::plan_spans() {
  spans_.clear();
  spans_of_sequence_.clear();
  for (int32_t n = 0, z = 0; n < counts_.N; ++n) {
    const int32_t first = z;
    for (; z < counts_.Z && in_.span_start[z] < in_.q_start[n + 1]; ++z)
      spans_.push_back({in_.span_start[z], in_.span_start[z + 1], in_.state_in[z], in_.state_out[z]});
    spans_of_sequence_.push_back({first, z});
  }
}

States Executable::states_of(int32_t id) const {
  const State& state = states_[static_cast<size_t>(id)];
  return {state.memory.floats(), state.stride};
}

// Groups query rows that read the same keys. With few rows over a long context each partition of the keys is a tile of
// its own, so that all threads have work; the order of a row's sums is the same either way.
void Executable::plan_attention(AttentionPlan& plan) const {
  std::vector<QueryTile>& tiles = plan.tiles;
  tiles.clear();
  plan.partial_rows = 0;
  const int32_t tokens = std::max(1, kQueryRows / plan.queries_per_kv);
  const int32_t keys = partition_blocks(capacity_.block_size) * capacity_.block_size;
  for (int32_t n = 0; n < counts_.N; ++n) {
    const int32_t lo = in_.q_start[n], hi = in_.q_start[n + 1];
    for (int32_t t = lo; t < hi; t += tokens) {
      const QueryTile whole{n, t, std::min(tokens, hi - t), in_.kv_len[n] - (hi - t)};
      const int32_t parts = (whole.position + whole.count + keys - 1) / keys;
      if (parts == 1 || hi - lo > kSplitTokens) {
        tiles.push_back(whole);
        continue;
      }
      for (int32_t part = 0; part < parts; ++part) {
        tiles.push_back(whole);
        tiles.back().partition = part;
        tiles.back().result_row = plan.partial_rows;
        tiles.back().first_partition = part == 0;
        plan.partial_rows += whole.count * plan.queries_per_kv;
      }
    }
  }
  // The longest first, so that the last to be claimed are short. Ties are ordered explicitly, as a stable sort
  // allocates.
  const auto length = [](const QueryTile& tile) { return tile.partition == kAbsent ? tile.position : 0; };
  std::sort(tiles.begin(), tiles.end(), [&](const QueryTile& a, const QueryTile& b) {
    return length(a) != length(b) ? length(a) > length(b) : a.t != b.t ? a.t < b.t : a.partition < b.partition;
  });
}

int32_t Executable::chunks_of(const Stage& stage) {
  if (stage.number == kTapStage) return 1;
  const int32_t team = team_.size();
  const Op& op = ops_[stage.op];
  if (const auto* linear = std::get_if<LinearOp>(&op)) {
    if (stage.number == 0) return quantise_chunks(*linear) + chunks_for(num_shrink_tasks(stage.op));
    const int32_t count = rows_of(linear->out), units = (weight(linear->weight).packed().panels + 1) / 2;
    // Products that are bound by arithmetic have small chunks, so that a slow core delays the others less. Those bound
    // by memory have one per thread, as long runs of weights are read faster.
    const int32_t fine = converts_x(linear->weight, linear->x) ? kernels_->fine_rows : kFineRows;
    return count == 0 ? 0 : std::min(units, count < fine ? team : 8 * team);
  }
  if (const auto* attention = std::get_if<AttentionOp>(&op)) {
    if (stage.number == 0) return attention->k.buffer == kAbsent ? 0 : row_chunks(counts_.T, team);
    return attention_chunks(attention->heads / attention->kv_heads, attention->kv_heads, stage.number == 2);
  }
  if (const auto* latent = std::get_if<MlaOp>(&op)) return chunks_of(*latent, stage);
  if (const auto* experts = std::get_if<ExpertLinearOp>(&op)) return expert_chunks(*experts, stage);
  if (std::holds_alternative<EmbedOp>(op) && stage.number == 0) return chunks_for(num_shrink_tasks(stage.op));
  if (const auto* delta = std::get_if<GatedDeltaOp>(&op)) {
    const int64_t units = static_cast<int64_t>(counts_.N) * delta->heads * delta_blocks(delta->dim_v);
    return static_cast<int32_t>(std::min<int64_t>(units, 8 * team));
  }
  if (const auto* conv = std::get_if<CausalConvOp>(&op)) {
    const int32_t panels = (conv->x.width + kLanes - 1) / kLanes;
    return std::min(panels, counts_.T < kFineRows ? team : 4 * team);
  }
  if (const auto* mamba2 = std::get_if<Mamba2Op>(&op))
    return static_cast<int32_t>(std::min<int64_t>(static_cast<int64_t>(counts_.N) * mamba2->heads, 4 * team));
  if (const auto* take = std::get_if<TakeRowsOp>(&op)) return row_chunks(rows_of(take->out), team);
  if (const auto* rope = std::get_if<RopeOp>(&op)) return row_chunks(rows_of(rope->x), team);
  return row_chunks(counts_.T, team);
}

int32_t Executable::attention_chunks(int32_t queries_per_kv, int32_t kv_heads, bool merge) const {
  const AttentionPlan& plan = plan_of(queries_per_kv);
  return merge && plan.partial_rows == 0 ? 0 : chunks_for(static_cast<int64_t>(plan.tiles.size()) * kv_heads);
}

void Executable::work(int32_t phase, int32_t chunk, int thread) {
  const FlushDenormals flush;
  const Stage& stage = stages_[static_cast<size_t>(phase)];
  if (stage.number == kTapStage) return keep_tap(stage.op);
  ThreadState& state = thread_states_[static_cast<size_t>(thread)];
  const auto run = [&] { std::visit([&](const auto& op) { run_op(op, stage, chunk, state); }, ops_[stage.op]); };
  if (!timed_) return run();
  const auto before = std::chrono::steady_clock::now();
  run();
  state.seconds[ops_[stage.op].index()] += std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count();
}

// Runs the shrink tasks of one chunk of an op's first stage.
void Executable::shrink_chunk(const Stage& stage, int32_t chunk) {
  const int32_t shrinks = num_shrink_tasks(stage.op);
  const auto mine = span_of(shrinks, chunk, chunks_for(shrinks));
  for (int32_t number = mine.lo; number < mine.hi; ++number) run_shrink_task(stage, number);
}

void Executable::run_op(const EmbedOp& op, const Stage& stage, int32_t chunk, ThreadState& state) {
  if (stage.number == 0) return shrink_chunk(stage, chunk);
  const auto mine = span_of(rows_of(op.out), chunk, chunks_of(stage));
  const std::vector<Delta>& deltas = deltas_of(stage.op, {}, state);
  const EmbedCall call{weight(op.table).table(), rows(op.out), rows(op.add), op.scale, op.scale != 1.0f,
                       rounded(op.out), deltas.data(), static_cast<int32_t>(deltas.size()), active_of_op_[stage.op].disjoint};
  if (op.source == kFromToken) return kernels_->embed(&call, in_.token_ids, mine.lo, mine.hi);
  for (int32_t t = mine.lo; t < mine.hi; ++t) {
    const int32_t row = in_.position[t] + op.offset;
    EmbedCall one = call;
    one.out.data += t * call.out.stride;
    if (one.add.data) one.add.data += t * call.add.stride;
    kernels_->embed(&one, &row, 0, 1);
  }
}

void Executable::run_op(const NormOp& op, const Stage& stage, int32_t chunk, ThreadState& state) {
  const auto vector = [&](int32_t id) { return id == kAbsent ? nullptr : weight(id).memory.floats(); };
  const int32_t owner = op.weight == kAbsent ? op.bias : op.weight, width = op.x.width / op.groups;
  const int32_t group_step = owner != kAbsent && weight(owner).outputs > width ? width : 0;
  const NormCall call{rows(op.x),    rows(op.out), rows(op.gate), rows(op.plus), vector(op.weight), vector(op.bias),  op.x.width,
                      op.groups,     group_step,  op.kind == kLayerNorm, op.cast == kCastFirst, op.gate_activation,
                      rounded(op.out), op.eps};
  const auto mine = span_of(rows_of(op.out), chunk, chunks_of(stage));
  const auto [from, to, disjoint] = active_of_op_[stage.op];
  if (from == to) return kernels_->norm(&call, mine.lo, mine.hi);
  for (int32_t lo = mine.lo, hi; lo < mine.hi; lo = hi) {
    hi = mine.hi;  // or where the next segment begins or ends
    for (int32_t i = from; i < to; ++i)
      for (const int32_t edge : {active_adapters_[static_cast<size_t>(i)].lo, active_adapters_[static_cast<size_t>(i)].hi})
        if (edge > lo) hi = std::min(hi, edge);
    NormCall some = call;
    norm_vectors(stage.op, lo, weight(op.weight).outputs, some, state.norm_vectors.data());
    kernels_->norm(&some, lo, hi);
  }
}

// Whether a product reads x converted: to 8 bits for a quantised weight, or to bfloat16 pairs where x holds bfloat16
// values and the table multiplies them.
bool Executable::converts_x(int32_t id, const Ref& x) const {
  const int32_t format = weight(id).format;
  return is_quantised(format) || (format == kBF16 && kernels_->pairs && rounded(x));
}

// Chunks of the first stage that convert x; its other chunks are shrink tasks.
int32_t Executable::quantise_chunks(const LinearOp& op) const {
  return converts_x(op.weight, op.x) ? row_chunks(rows_of(op.out), team_.size()) : 0;
}

void Executable::quantise(const LinearOp& op, int32_t chunk) {
  const Weight& w = weight(op.weight);
  const QuantiseCall call{rows(op.x), quantised_x_.data(), w.quantised_stride(), w.format, op.x.width};
  const auto mine = span_of(rows_of(op.out), chunk, quantise_chunks(op));
  kernels_->quantise(&call, mine.lo, mine.hi);
}

void Executable::run_op(const LinearOp& op, const Stage& stage, int32_t chunk, ThreadState& state) {
  if (stage.number == 0) {
    const int32_t quantising = quantise_chunks(op);
    return chunk < quantising ? quantise(op, chunk) : shrink_chunk(stage, chunk - quantising);
  }
  LinearCall call{};
  call.x = rows(op.x);
  call.out = rows(op.out);
  call.residual = rows(op.residual);
  call.w = weight(op.weight).packed();
  call.quantised_x = converts_x(op.weight, op.x) ? quantised_x_.data() : nullptr;
  call.quantised_stride = weight(op.weight).quantised_stride();
  call.bias = op.bias == kAbsent ? nullptr : op.packed_bias.data();
  call.rows = rows_of(op.out);
  call.out_width = op.out.width;
  call.activation = op.activation;
  call.glu = op.glu;
  call.in_blocks = !rounded(op.x);
  call.round_out = rounded(op.out);
  call.clip = op.clip;
  call.scale = op.scale;
  call.softcap = op.softcap;
  call.glu_limit = op.glu_limit;
  call.glu_offset = op.glu_offset;
  const std::vector<Delta>& deltas = deltas_of(stage.op, call, state);
  call.deltas = deltas.data();
  call.disjoint = active_of_op_[stage.op].disjoint;
  call.num_deltas = static_cast<int32_t>(deltas.size());
  const auto mine = span_of((call.w.panels + 1) / 2, chunk, chunks_of(stage));
  kernels_->linear(&call, mine.lo, mine.hi);
}

void Executable::run_op(const PointwiseOp& op, const Stage& stage, int32_t chunk, ThreadState&) {
  const float* params = op.weight != kAbsent ? weight(op.weight).memory.floats() : op.params.data();
  const PointwiseCall call{rows(op.x), rows(op.y), rows(op.out), op.kind, op.activation, op.x.width,
                           rounded(op.out), params, in_.position, op.y.width > 0 ? op.x.width / op.y.width : 1};
  const auto mine = span_of(rows_of(op.out), chunk, chunks_of(stage));
  kernels_->pointwise(&call, mine.lo, mine.hi);
}

void Executable::run_op(const RopeRowsOp& op, const Stage& stage, int32_t chunk, ThreadState&) {
  const auto mine = span_of(rows_of(op.out), chunk, chunks_of(stage));
  const Rows out = rows(op.out);
  const size_t pairs = op.inv_freq.size();
  for (int32_t t = mine.lo; t < mine.hi; ++t) {
    float* row = out.data + t * out.stride;
    const auto position = static_cast<float>(in_.rope_pos[t]);
    const int64_t length = std::max<int64_t>(in_.rope_length[t], static_cast<int64_t>(in_.rope_pos[t]) + 1);
    const bool is_long = op.border > 0 && length > op.border;
    const std::vector<float>& freq = is_long && !op.long_freq.empty() ? op.long_freq : op.inv_freq;
    // The base grows with the length: each frequency falls by a power of this.
    const double grown = is_long && op.long_freq.empty() ? op.growth * static_cast<double>(length) / op.border - (op.growth - 1.0) : 1.0;
    for (size_t i = 0; i < pairs; ++i) {
      float inv_freq = freq[i];
      if (grown != 1.0) inv_freq = static_cast<float>(inv_freq * std::pow(grown, -static_cast<double>(i) / static_cast<double>(pairs - 1)));
      const float angle = position * inv_freq;
      row[i] = std::cos(angle) * op.factor;
      row[pairs + i] = std::sin(angle) * op.factor;
    }
  }
}

void Executable::run_op(const RopeOp& op, const Stage& stage, int32_t chunk, ThreadState&) {
  const RopeCall call{rows(op.x), rows(op.rows), op.heads, op.head_dim, op.start, op.dims, op.layout == kInterleaved,
                      rounded(op.x)};
  const auto mine = span_of(rows_of(op.x), chunk, chunks_of(stage));
  kernels_->rope(&call, mine.lo, mine.hi);
}

AttentionCall Executable::call_of(const AttentionOp& op) const {
  const Plane& keys = planes_[static_cast<size_t>(op.planes[0])];
  const Plane& values = planes_[static_cast<size_t>(op.planes[1])];
  AttentionCall call{};
  call.cache = {keys.memory.data(), values.memory.data(), keys.block_bytes, values.block_bytes, kv_format_,
                capacity_.block_size, op.kv_heads, op.dim_k, op.dim_v, false};
  call.q = rows(op.q);
  call.k = rows(op.k);
  call.v = rows(op.v);
  call.out = rows(op.out);
  call.sinks = op.sinks == kAbsent ? nullptr : weight(op.sinks).memory.floats();
  call.alibi = op.alibi.empty() ? nullptr : op.alibi.data();
  call.alibi_rounded = op.alibi_rounded;
  call.heads = op.heads;
  call.window = static_cast<int32_t>(op.window);
  call.chunked = op.chunked;
  call.round_out = rounded(op.out);
  call.scale = op.scale;
  call.softcap = op.softcap;
  return call;
}

void Executable::run_op(const AttentionOp& op, const Stage& stage, int32_t chunk, ThreadState& state) {
  const AttentionCall call = call_of(op);
  if (stage.number > 0) return attend_chunk(call, op.group, stage.number == 2, chunk, state);
  const auto mine = span_of(counts_.T, chunk, chunks_of(stage));
  kernels_->write_kv(&call, in_.slot_mapping + static_cast<int64_t>(op.group) * capacity_.max_tokens, mine.lo, mine.hi);
}

// Runs one chunk of the tiles of attention, or of merging their partitions.
void Executable::attend_chunk(const AttentionCall& call, int32_t group, bool merge, int32_t chunk, ThreadState& state) {
  const int32_t kv_heads = call.cache.kv_heads;
  const auto pairs = static_cast<int64_t>(plan_of(call.heads / kv_heads).tiles.size()) * kv_heads;
  const auto mine = span_of(pairs, chunk, chunks_for(pairs));
  for (int64_t pair = mine.lo; pair < mine.hi; ++pair) attend(call, group, merge, pair, state);
}

// Attention of one tile and KV head: all its keys, or one partition of them, or (`merge`) the results of all
// partitions.
void Executable::attend(const AttentionCall& call, int32_t group, bool merge, int64_t pair, ThreadState& state) {
  const AttentionPlan& plan = plan_of(call.heads / call.cache.kv_heads);
  const QueryTile& tile = plan.tiles[static_cast<size_t>(pair / call.cache.kv_heads)];
  const auto kv_head = static_cast<int32_t>(pair % call.cache.kv_heads);
  const bool split = tile.partition != kAbsent;
  // Partitions that lie wholly before the window are neither computed nor merged.
  const int32_t keys = partition_blocks(capacity_.block_size) * capacity_.block_size;
  const int32_t first = first_visible(call.window, call.chunked, tile.position) / keys;
  if (merge ? !split || !tile.first_partition : split && tile.partition < first) return;
  const int32_t* table = in_.block_tables + (static_cast<int64_t>(group) * capacity_.max_seqs + tile.sequence) *
                                                capacity_.max_blocks_per_seq;
  AttentionItem made{table, tile.t, tile.count, tile.position, kv_head, nullptr, merge ? first : tile.partition};
  if (split) {
    const int64_t row = tile.result_row + (made.part - tile.partition) * static_cast<int64_t>(tile.count) * plan.queries_per_kv;
    made.parts = partials_.data() + (kv_head * plan.partial_rows + row) * partial_floats(1, call.cache.dim_v);
  }
  (merge ? kernels_->merge_parts : kernels_->attend)(&call, &made, state.attention.data());
}

// A unit is a block of columns of the state of one sequence and head: all its spans, in their order. Units of one head
// that are in one chunk share what they need of its keys.
void Executable::run_op(const GatedDeltaOp& op, const Stage& stage, int32_t chunk, ThreadState& state) {
  const GatedDeltaCall call{rows(op.q), rows(op.k), rows(op.v), rows(op.decay), rows(op.beta), rows(op.out),
                            weight(op.rate).memory.floats(), weight(op.dt_bias).memory.floats(), states_of(op.state),
                            op.heads, op.key_heads, op.dim_k, op.dim_v, op.decay.width != op.heads, rounded(op.out),
                            op.scale, op.eps, op.beta_scale};
  const int64_t blocks = delta_blocks(op.dim_v);
  const auto mine = span_of(static_cast<int64_t>(counts_.N) * op.heads * blocks, chunk, chunks_of(stage));
  for (int64_t unit = mine.lo, next; unit < mine.hi; unit = next) {
    const int64_t head = unit / blocks, block = unit % blocks;
    next = std::min(mine.hi, (head + 1) * blocks);
    const auto [first, last] = spans_of_sequence_[static_cast<size_t>(head / op.heads)];
    for (int32_t z = first; z < last; ++z)
      kernels_->gated_delta(&call, &spans_[static_cast<size_t>(z)], static_cast<int32_t>(head % op.heads),
                            static_cast<int32_t>(block), static_cast<int32_t>(block + next - unit), state.delta.data());
  }
}

void Executable::run_op(const CausalConvOp& op, const Stage& stage, int32_t chunk, ThreadState&) {
  const Weight& w = weight(op.weight);
  const ConvCall call{rows(op.x), rows(op.out), w.memory.floats(), op.bias == kAbsent ? nullptr : weight(op.bias).memory.floats(),
                      states_of(op.state), op.x.width, static_cast<int32_t>(w.outputs / op.x.width), op.activation, rounded(op.out)};
  const auto mine = span_of((op.x.width + kLanes - 1) / kLanes, chunk, chunks_of(stage));
  kernels_->conv(&call, spans_.data(), static_cast<int32_t>(spans_.size()), mine.lo * kLanes, std::min(mine.hi * kLanes, op.x.width));
}

// A unit is one head of one sequence: all its spans, in their order.
void Executable::run_op(const Mamba2Op& op, const Stage& stage, int32_t chunk, ThreadState&) {
  const auto vector = [&](int32_t id) { return weight(id).memory.floats(); };
  const Mamba2Call call{rows(op.x), rows(op.b), rows(op.c), rows(op.dt), rows(op.out), vector(op.rate), vector(op.dt_bias),
                        vector(op.skip), states_of(op.state), op.heads, op.head_dim, op.groups, op.state_size,
                        static_cast<int32_t>(weight(op.rate).outputs / op.heads), rounded(op.out), op.dt_limit[0], op.dt_limit[1]};
  const auto mine = span_of(static_cast<int64_t>(counts_.N) * op.heads, chunk, chunks_of(stage));
  for (int64_t unit = mine.lo; unit < mine.hi; ++unit) {
    const auto [first, last] = spans_of_sequence_[static_cast<size_t>(unit / op.heads)];
    for (int32_t z = first; z < last; ++z)
      kernels_->mamba2(&call, &spans_[static_cast<size_t>(z)], static_cast<int32_t>(unit % op.heads));
  }
}

void Executable::run_op(const TakeRowsOp& op, const Stage& stage, int32_t chunk, ThreadState&) {
  const auto mine = span_of(counts_.R, chunk, chunks_of(stage));
  const Rows x = rows(op.x), out = rows(op.out);
  for (int32_t r = mine.lo; r < mine.hi; ++r)
    std::memcpy(out.data + r * out.stride, x.data + in_.logit_rows[r] * x.stride,
                static_cast<size_t>(op.x.width) * sizeof(float));
}

}  // namespace truffula

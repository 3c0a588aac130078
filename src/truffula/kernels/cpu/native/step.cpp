// How a step runs: the stages of the ops one after another, each cut into chunks that the team claims.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "denormals.h"
#include "executable.h"

namespace truffula {
namespace {

// Chunk number `chunk` of `count` things in `chunks`.
template <class Count>
struct Span {
  Count lo, hi;
};

template <class Count>
Span<Count> span_of(Count count, int32_t chunk, int32_t chunks) {
  const int64_t n = count;
  return {static_cast<Count>(n * chunk / chunks), static_cast<Count>(n * (chunk + 1) / chunks)};
}

// One thing a chunk, while the team can count them: in a very large step several.
int32_t chunks_for(int64_t things) { return static_cast<int32_t>(std::min<int64_t>(things, Team::kMostChunks / 2)); }

// Products of fewer rows of floats wait for memory.
constexpr int32_t kFineRows = 16;
constexpr int32_t kShrinkRows = 64;
// A sequence with so few rows in a step has its keys cut into partitions that any thread may work on.
constexpr int32_t kSplitTokens = 4;
constexpr int32_t kLeastRows = 4;  // worth a chunk

int32_t row_chunks(int32_t count, int32_t team) { return std::min((count + kLeastRows - 1) / kLeastRows, 4 * team); }

}  // namespace

Rows Executable::rows(const Ref& ref) const {
  if (ref.buffer == kNothing) return {nullptr, 0};
  const Buffer& buffer = buffers_[static_cast<size_t>(ref.buffer)];
  return {arena_.floats() + buffer.offset + ref.start, buffer.stride};
}

int32_t Executable::rows_of(const Ref& ref) const {
  return buffers_[static_cast<size_t>(ref.buffer)].logit_rows ? counts_.R : counts_.T;
}

const Executable::Share& Executable::share_of(const AttentionOp& op) const {
  return *std::find_if(shares_.begin(), shares_.end(), [&](const Share& s) { return s.heads == op.heads / op.kv_heads; });
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
  for (Local& local : locals_) local.sample.reserve(sampler_->vocab());
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
    SampleScratch& scratch = j.self->locals_[static_cast<size_t>(thread)].sample;
    for (int32_t row = mine.lo; row < mine.hi; ++row)
      j.self->sampler_->sample(j.self->logits_row(row), row, *j.args, *j.out, scratch);
  }, &job);
}

// What the team shares in this step. The only place of a step that may allocate, and only until it has seen the largest
// (since an adapter of great rank left).
void Executable::prepare() {
  plan_adapters();
  for (Share& share : shares_) {
    plan_attention(share);
    const auto floats = static_cast<size_t>(share.partial_rows * partial_row_floats_);
    if (partials_.size() < floats) partials_.resize(floats);
  }
  team_.resize(static_cast<int32_t>(stages_.size()));
  for (size_t phase = 0; phase < stages_.size(); ++phase)
    team_.set(static_cast<int32_t>(phase), chunks_of(stages_[phase]));
}

// Which adapters act at which op, and where their h goes: each op's from the beginning of h_.
void Executable::plan_adapters() {
  actives_.clear();
  int64_t most = 0;
  size_t most_expands = 0;
  for (size_t index = 0; index < ops_.size(); ++index) {
    const auto from = static_cast<int32_t>(actives_.size());
    const auto* linear = std::get_if<LinearOp>(&ops_[index]);
    const bool logits = linear && buffers_[static_cast<size_t>(linear->out.buffer)].logit_rows;
    int64_t at = 0;
    int32_t chunk = 0;
    size_t expands = 0;
    for (int32_t g = 0; linear && g < counts_.G; ++g) {
      const int32_t* seg = in_.seg + 3 * g;
      const int32_t lo = logits ? in_.seg_r[2 * g] : seg[0], hi = logits ? in_.seg_r[2 * g + 1] : seg[1];
      const Adapter& adapter = *adapters_[static_cast<size_t>(seg[2])];
      const int32_t found = adapter.op_of[index];
      if (found == kNothing || lo >= hi) continue;
      const AdapterOp& op = adapter.ops[static_cast<size_t>(found)];
      actives_.push_back({&op, lo, hi, chunk, in_.seg_weight[g], at});
      at += static_cast<int64_t>(hi - lo) * op.a.panels * kLanes;
      chunk += (hi - lo + kShrinkRows - 1) / kShrinkRows;
      expands += op.expands.size();
    }
    actives_of_[index] = {from, static_cast<int32_t>(actives_.size())};
    most = std::max(most, at);
    most_expands = std::max(most_expands, expands);
  }
  if (static_cast<int64_t>(h_.size()) < most) {
    std::vector<float>().swap(h_);  // what was in it is over, and growing it would take up to twice as much
    h_.resize(static_cast<size_t>(most));
  }
  for (Local& local : locals_) {
    local.deltas.reserve(most_expands);
    local.deltas_of = SIZE_MAX;
  }
}

// Query rows in groups that share the keys they read. Few rows over long contexts are cut into partitions, so that all
// threads have work; how a row is summed does not change by that.
void Executable::plan_attention(Share& share) const {
  std::vector<Item>& items = share.items;
  items.clear();
  share.partial_rows = 0;
  const int32_t tokens = std::max(1, kQueryRows / share.heads);
  const int32_t keys = partition_blocks(capacity_.block_size) * capacity_.block_size;
  for (int32_t n = 0; n < counts_.N; ++n) {
    const int32_t lo = in_.q_start[n], hi = in_.q_start[n + 1];
    for (int32_t t = lo; t < hi; t += tokens) {
      const Item whole{n, t, std::min(tokens, hi - t), in_.kv_len[n] - (hi - t)};
      const int32_t parts = (whole.position + whole.count + keys - 1) / keys;
      if (parts == 1 || hi - lo > kSplitTokens) {
        items.push_back(whole);
        continue;
      }
      for (int32_t part = 0; part < parts; ++part) {
        items.push_back(whole);
        items.back().part = part;
        items.back().partial = share.partial_rows;
        items.back().first = part == 0;
        share.partial_rows += whole.count * share.heads;
      }
    }
  }
  // The longest first: the last to be claimed should be short. Equal ones stay in order by their place in the step, for
  // a stable sort would allocate.
  const auto length = [](const Item& item) { return item.part == kNothing ? item.position : 0; };
  std::sort(items.begin(), items.end(), [&](const Item& a, const Item& b) {
    return length(a) != length(b) ? length(a) > length(b) : a.t != b.t ? a.t < b.t : a.part < b.part;
  });
}

int32_t Executable::chunks_of(const Stage& stage) {
  if (stage.number == kTapStage) return 1;
  const int32_t team = team_.size();
  const Op& op = ops_[stage.op];
  if (const auto* linear = std::get_if<LinearOp>(&op)) {
    if (stage.number == 0) {
      const int32_t quantising = quantise_chunks(*linear);
      return quantising + chunks_for(shrinks_of(stage.op));
    }
    const int32_t count = rows_of(linear->out), units = (weight(linear->weight).packed().panels + 1) / 2;
    // Cut finer where products compute, so that a slower core doesn't hold the other up; one long stretch of weights per
    // thread reads faster.
    const int32_t fine = converts_x(*linear) ? kernels_->fine_rows : kFineRows;
    return count == 0 ? 0 : std::min(units, count < fine ? team : 8 * team);
  }
  if (const auto* attention = std::get_if<AttentionOp>(&op)) {
    const Share& share = share_of(*attention);
    if (stage.number == 0) return row_chunks(counts_.T, team);
    if (stage.number == 2 && share.partial_rows == 0) return 0;
    return chunks_for(static_cast<int64_t>(share.items.size()) * attention->kv_heads);
  }
  if (const auto* take = std::get_if<TakeRowsOp>(&op)) return row_chunks(rows_of(take->out), team);
  if (const auto* rope = std::get_if<RopeOp>(&op)) return row_chunks(rows_of(rope->x), team);
  return row_chunks(counts_.T, team);
}

void Executable::work(int32_t phase, int32_t chunk, int thread) {
  const FlushDenormals flush;
  const Stage& stage = stages_[static_cast<size_t>(phase)];
  if (stage.number == kTapStage) return keep_tap(stage.op);
  Local& local = locals_[static_cast<size_t>(thread)];
  const auto run = [&] { std::visit([&](const auto& op) { run_op(op, stage, chunk, local); }, ops_[stage.op]); };
  if (!timed_) return run();
  const auto before = std::chrono::steady_clock::now();
  run();
  local.seconds[ops_[stage.op].index()] += std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count();
}

void Executable::run_op(const EmbedOp& op, const Stage& stage, int32_t chunk, Local&) {
  const auto mine = span_of(rows_of(op.out), chunk, chunks_of(stage));
  const EmbedCall call{weight(op.table).table(), rows(op.out), rows(op.add), op.scale, op.scale != 1.0f,
                       rounded(op.out)};
  if (op.source == kFromToken) return kernels_->embed(&call, in_.token_ids, mine.lo, mine.hi);
  for (int32_t t = mine.lo; t < mine.hi; ++t) {
    const int32_t row = in_.position[t] + op.offset;
    EmbedCall one = call;
    one.out.data += t * call.out.stride;
    if (one.add.data) one.add.data += t * call.add.stride;
    kernels_->embed(&one, &row, 0, 1);
  }
}

void Executable::run_op(const NormOp& op, const Stage& stage, int32_t chunk, Local&) {
  const auto vector = [&](int32_t id) { return id == kNothing ? nullptr : weight(id).memory.floats(); };
  const NormCall call{rows(op.x),    rows(op.out), rows(op.plus),  vector(op.weight), vector(op.bias),  op.x.width,
                      op.groups,     op.kind == kLayerNorm, op.cast == kCastFirst, rounded(op.out), op.eps};
  const auto mine = span_of(rows_of(op.out), chunk, chunks_of(stage));
  kernels_->norm(&call, mine.lo, mine.hi);
}

// Whether products read x in another form than float32: 8 bits for a quantised weight, or bfloat16 where the table
// multiplies that and x holds nothing else.
bool Executable::converts_x(const LinearOp& op) const {
  const int32_t format = weight(op.weight).format;
  return is_quantised(format) || (format == kBF16 && kernels_->pairs && rounded(op.x));
}

// Chunks in which x is converted: beside the adapters', before the product.
int32_t Executable::quantise_chunks(const LinearOp& op) const {
  return converts_x(op) ? row_chunks(rows_of(op.out), team_.size()) : 0;
}

void Executable::quantise(const LinearOp& op, int32_t chunk) {
  const Weight& w = weight(op.weight);
  const QuantiseCall call{rows(op.x), quantised_x_.data(), w.quantised_stride(), w.format, op.x.width};
  const auto mine = span_of(rows_of(op.out), chunk, quantise_chunks(op));
  kernels_->quantise(&call, mine.lo, mine.hi);
}

// Stretches of rows that some adapter acts on at an op.
int32_t Executable::shrinks_of(size_t index) const {
  const auto [from, to] = actives_of_[index];
  if (from == to) return 0;
  const Active& last = actives_[static_cast<size_t>(to) - 1];
  return last.first + (last.hi - last.lo + kShrinkRows - 1) / kShrinkRows;
}

// h of one stretch of rows of one adapter.
void Executable::shrink(const LinearOp& op, size_t index, int32_t number) {
  const auto [from, to] = actives_of_[index];
  const auto behind = std::upper_bound(actives_.begin() + from, actives_.begin() + to, number,
                                       [](int32_t wanted, const Active& active) { return wanted < active.first; });
  const Active& active = *(behind - 1);
  const int32_t lo = active.lo + (number - active.first) * kShrinkRows;
  const int64_t stride = static_cast<int64_t>(active.op->a.panels) * kLanes;
  const Rows x = rows(op.x);
  const ShrinkCall call{{x.data + lo * x.stride, x.stride},
                        {h_.data() + active.h + (lo - active.lo) * stride, stride},
                        active.op->a,
                        active.op->column_scale.data(),
                        active.weight,
                        std::min(kShrinkRows, active.hi - lo)};
  kernels_->shrink(&call, 0, active.op->a.panels);
}

// What the adapters at an op add, in the order of the segments. Put together once per thread, op and step.
const std::vector<Delta>& Executable::deltas_of(size_t index, Local& local) const {
  if (local.deltas_of == index) return local.deltas;
  local.deltas_of = index;
  local.deltas.clear();
  const auto [from, to] = actives_of_[index];
  for (int32_t i = from; i < to; ++i) {
    const Active& active = actives_[static_cast<size_t>(i)];
    const int64_t stride = static_cast<int64_t>(active.op->a.panels) * kLanes;
    for (const AdapterExpand& expand : active.op->expands)
      local.deltas.push_back({h_.data() + active.h + expand.h_start, stride, expand.b, active.lo, active.hi, expand.first,
                              expand.step});
  }
  return local.deltas;
}

void Executable::run_op(const LinearOp& op, const Stage& stage, int32_t chunk, Local& local) {
  if (stage.number == 0) {
    const int32_t quantising = quantise_chunks(op);
    if (chunk < quantising) return quantise(op, chunk);
    const int32_t shrinks = shrinks_of(stage.op);
    const auto mine = span_of(shrinks, chunk - quantising, chunks_for(shrinks));
    for (int32_t number = mine.lo; number < mine.hi; ++number) shrink(op, stage.op, number);
    return;
  }
  const std::vector<Delta>& deltas = deltas_of(stage.op, local);
  LinearCall call{};
  call.x = rows(op.x);
  call.out = rows(op.out);
  call.residual = rows(op.residual);
  call.w = weight(op.weight).packed();
  call.quantised_x = converts_x(op) ? quantised_x_.data() : nullptr;
  call.quantised_stride = weight(op.weight).quantised_stride();
  call.bias = op.bias.empty() ? nullptr : op.bias.data();
  call.deltas = deltas.data();
  call.num_deltas = static_cast<int32_t>(deltas.size());
  call.rows = rows_of(op.out);
  call.out_width = op.out.width;
  call.activation = op.activation;
  call.glu = op.glu;
  call.in_blocks = !rounded(op.x);
  call.round_out = rounded(op.out);
  call.clip = op.clip;
  call.scale = op.scale;
  call.softcap = op.softcap;
  const auto mine = span_of((call.w.panels + 1) / 2, chunk, chunks_of(stage));
  kernels_->linear(&call, mine.lo, mine.hi);
}

void Executable::run_op(const PointwiseOp& op, const Stage& stage, int32_t chunk, Local&) {
  const PointwiseCall call{rows(op.x), rows(op.y), rows(op.out), op.kind, op.activation, op.x.width,
                           rounded(op.out), op.param};
  const auto mine = span_of(rows_of(op.out), chunk, chunks_of(stage));
  kernels_->pointwise(&call, mine.lo, mine.hi);
}

void Executable::run_op(const RopeRowsOp& op, const Stage& stage, int32_t chunk, Local&) {
  const auto mine = span_of(rows_of(op.out), chunk, chunks_of(stage));
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

void Executable::run_op(const RopeOp& op, const Stage& stage, int32_t chunk, Local&) {
  const RopeCall call{rows(op.x), rows(op.rows), op.heads, op.head_dim, op.start, op.dims, op.layout == kInterleaved,
                      rounded(op.x)};
  const auto mine = span_of(rows_of(op.x), chunk, chunks_of(stage));
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

void Executable::run_op(const AttentionOp& op, const Stage& stage, int32_t chunk, Local& local) {
  if (stage.number > 0) {
    const auto pairs = static_cast<int64_t>(share_of(op).items.size()) * op.kv_heads;
    const auto mine = span_of(pairs, chunk, chunks_for(pairs));
    for (int64_t pair = mine.lo; pair < mine.hi; ++pair) attend(op, stage.number == 2, pair, local);
    return;
  }
  const AttentionCall call = call_of(op);
  const auto mine = span_of(counts_.T, chunk, chunks_of(stage));
  kernels_->write_kv(&call, in_.slot_mapping + static_cast<int64_t>(op.group) * capacity_.max_tokens, mine.lo, mine.hi);
}

// One item and kv head; `merge` puts partitions together that were worked on apart.
void Executable::attend(const AttentionOp& op, bool merge, int64_t pair, Local& local) {
  const Share& share = share_of(op);
  const Item& item = share.items[static_cast<size_t>(pair / op.kv_heads)];
  const auto kv_head = static_cast<int32_t>(pair % op.kv_heads);
  const bool split = item.part != kNothing;
  // With a window the partitions wholly before it are nobody's: they are neither worked on nor merged.
  const int32_t keys = partition_blocks(capacity_.block_size) * capacity_.block_size;
  const int32_t first = op.window > 0 ? std::max(0, item.position - op.window + 1) / keys : 0;
  if (merge ? !split || !item.first : split && item.part < first) return;
  const int32_t* table = in_.block_tables + (static_cast<int64_t>(op.group) * capacity_.max_seqs + item.sequence) *
                                                capacity_.max_blocks_per_seq;
  AttentionItem made{table, item.t, item.count, item.position, kv_head, nullptr, merge ? first : item.part};
  if (split) {
    const int64_t row = item.partial + (made.part - item.part) * static_cast<int64_t>(item.count) * share.heads;
    made.parts = partials_.data() + (kv_head * share.partial_rows + row) * partial_floats(1, op.dim_v);
  }
  const AttentionCall call = call_of(op);
  (merge ? kernels_->merge_parts : kernels_->attend)(&call, &made, local.attention.data());
}

void Executable::run_op(const TakeRowsOp& op, const Stage& stage, int32_t chunk, Local&) {
  const auto mine = span_of(counts_.R, chunk, chunks_of(stage));
  const Rows x = rows(op.x), out = rows(op.out);
  for (int32_t r = mine.lo; r < mine.hi; ++r)
    std::memcpy(out.data + r * out.stride, x.data + in_.logit_rows[r] * x.stride,
                static_cast<size_t>(op.x.width) * sizeof(float));
}

}  // namespace truffula

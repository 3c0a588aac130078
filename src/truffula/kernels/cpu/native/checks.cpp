// Checks of an op: its buffers have the rows it needs, its widths agree, and its ids exist. After them no program can
// make a step read or write outside the arena.
#include <stdexcept>

#include "executable.h"

namespace truffula {
namespace {

void require(bool holds, const char* why) {
  if (!holds) throw std::invalid_argument(why);
}

bool absent_or(const Ref& ref, int32_t width) { return ref.buffer == kAbsent || ref.width == width; }

bool is_activation(int32_t kind) { return kind >= kNone && kind <= kSoftplus; }

}  // namespace

bool Executable::has_logit_rows(const Ref& ref) const { return buffers_[static_cast<size_t>(ref.buffer)].logit_rows; }

void Executable::require_same_rows(const Ref& out, std::initializer_list<const Ref*> others) const {
  for (const Ref* ref : others)
    require(ref->buffer == kAbsent || has_logit_rows(*ref) == has_logit_rows(out), "an op's buffers have unequal rows");
}

// Whether two operands share a float of the arena. Compared without sums of offsets, which could overflow.
bool Executable::overlap(const Ref& a, const Ref& b) const {
  if (a.buffer == kAbsent || b.buffer == kAbsent) return false;
  if (a.buffer == b.buffer) return a.start < b.start + b.width && b.start < a.start + a.width;
  const auto floats = [&](const Buffer& of) { return (of.logit_rows ? capacity_.max_logit_rows : capacity_.max_tokens) * of.stride; };
  const Buffer &one = buffers_[static_cast<size_t>(a.buffer)], &two = buffers_[static_cast<size_t>(b.buffer)];
  return one.offset < two.offset ? two.offset - one.offset < floats(one) : one.offset - two.offset < floats(two);
}

// Chunks of an op run concurrently: `out` must not overlap what another chunk still reads.
void Executable::require_disjoint(const Ref& out, std::initializer_list<const Ref*> others, const char* why) const {
  for (const Ref* ref : others) require(!overlap(out, *ref), why);
}

// For ops that read each value just before they write it: `out` may be the same columns, but not overlap partly.
void Executable::require_disjoint_or_equal(const Ref& out, std::initializer_list<const Ref*> others, const char* why) const {
  for (const Ref* ref : others) {
    const bool equal = ref->buffer == out.buffer && ref->start == out.start && ref->width == out.width;
    require(equal || !overlap(out, *ref), why);
  }
}

void Executable::require_vector(int32_t id, int64_t width, const char* why) const {
  require(id == kAbsent || (weight(id).inputs == 0 && weight(id).outputs == width), why);
}

void Executable::check(const EmbedOp& op) const {
  const Weight& table = weight(op.table);
  require(!has_logit_rows(op.out), "embed: out has a row per token");
  require_same_rows(op.out, {&op.add});
  require(table.inputs == op.out.width && absent_or(op.add, op.out.width), "embed: width");
  require(table.order.half == 0 && table.latent.heads == 0, "embed: a table has no gates and no heads");
  require(op.offset >= 0 && op.offset < table.outputs, "embed: offset");
  require_disjoint(op.out, {&op.add}, "embed: add lies where out is written");
}

void Executable::check(const NormOp& op) const {
  require_same_rows(op.out, {&op.x, &op.gate, &op.plus});
  require(op.groups > 0 && op.x.width % op.groups == 0 && op.x.width == op.out.width, "norm: width");
  require(absent_or(op.gate, op.out.width) && absent_or(op.plus, op.out.width), "norm: gate or plus");
  require(is_activation(op.gate_activation), "norm: gate_activation");
  require_disjoint_or_equal(op.out, {&op.x, &op.gate, &op.plus},
                            "norm: x, gate or plus lies partly where out is written");
  const bool shared = op.weight == kAbsent || weight(op.weight).outputs == op.x.width / op.groups;
  for (int32_t id : {op.weight, op.bias}) require_vector(id, shared ? op.x.width / op.groups : op.x.width, "norm: weight");
}

void Executable::check(const LinearOp& op) const {
  const Weight& w = weight(op.weight);
  require_same_rows(op.out, {&op.x, &op.residual});
  require(w.panels && w.inputs == op.x.width && w.experts == 1, "linear: weight");
  require(op.glu == (w.order.half > 0), "linear: gate and up panels");
  require(op.out.width == (op.glu ? w.order.half : w.outputs), "linear: width");
  require(absent_or(op.residual, op.out.width), "linear: residual");
  require_vector(op.bias, w.outputs, "linear: bias");
  require(is_activation(op.activation), "linear: activation");
  require_disjoint(op.out, {&op.x}, "linear: x lies where out is written");
  require_disjoint_or_equal(op.out, {&op.residual}, "linear: residual lies partly where out is written");
}

void Executable::check(const PointwiseOp& op) const {
  const bool two = op.kind == kAdd || op.kind == kSigmoidMul || op.kind == kMul;
  require(op.kind >= kAct && op.kind <= kXielu && is_activation(op.activation), "pointwise: kind");
  const bool stored = op.weight != kAbsent, one = (op.kind == kScale && !stored) || op.kind == kClip || op.kind == kSoftcap;
  require(op.params.size() == (op.kind == kPositionScale ? 3u : one ? 1u : 0u), "pointwise: params");
  require(op.kind == kXielu ? stored : !stored || op.kind == kScale, "pointwise: weight");
  require_vector(op.weight, op.kind == kXielu ? 4 : 1, "pointwise: weight");
  require(op.kind != kPositionScale || !has_logit_rows(op.out), "pointwise: rows without tokens have no position");
  require(two == (op.y.buffer != kAbsent), "pointwise: y");
  require_same_rows(op.out, {&op.x, &op.y});
  const bool shared = two && op.kind != kAdd && op.y.width != op.x.width;
  require(op.x.width == op.out.width && (!shared || (op.y.width > 0 && op.x.width % op.y.width == 0)), "pointwise: width");
  require(shared || absent_or(op.y, op.out.width), "pointwise: width");
  if (shared) require_disjoint(op.out, {&op.y}, "pointwise: y lies where out is written");
  require_disjoint_or_equal(op.out, {&op.x, &op.y}, "pointwise: x or y lies partly where out is written");
}

void Executable::check(const RopeRowsOp& op) const {
  require(!has_logit_rows(op.out), "rope rows: out has a row per token");
  require(op.out.width == static_cast<int64_t>(2 * op.inv_freq.size()), "rope rows: width");
  require(op.long_freq.empty() || op.long_freq.size() == op.inv_freq.size(), "rope rows: long_freq");
  require(op.border >= 0 && (op.border == 0 || !op.long_freq.empty() || (op.growth >= 1.0f && op.inv_freq.size() > 1)), "rope rows: growth");
}

void Executable::check(const RopeOp& op) const {
  require_same_rows(op.x, {&op.rows});
  const int64_t heads = op.heads, end = static_cast<int64_t>(op.start) + op.dims;
  require(op.dims % 2 == 0 && op.dims > 0 && op.start >= 0 && end <= op.head_dim && heads > 0 &&
              op.x.width == heads * op.head_dim && op.rows.width == op.dims, "rope: width");
  require_disjoint(op.x, {&op.rows}, "rope: rows lie where x is written");
}

void Executable::check(const AttentionOp& op) const {
  require(!has_logit_rows(op.out), "attention: out has a row per token");
  require_same_rows(op.out, {&op.q, &op.k, &op.v});
  const int64_t heads = op.heads, kv_heads = op.kv_heads;
  require(heads > 0 && kv_heads > 0 && heads % kv_heads == 0, "attention: heads");
  require(op.dim_k > 0 && op.dim_v > 0 && op.q.width == heads * op.dim_k && op.out.width == heads * op.dim_v, "attention: width");
  require((op.k.buffer == kAbsent) == (op.v.buffer == kAbsent), "attention: k without v");
  require(op.k.buffer == kAbsent || (op.k.width == kv_heads * op.dim_k && op.v.width == kv_heads * op.dim_v), "attention: width");
  require(op.group >= 0 && op.group < groups_, "attention: group");
  require_disjoint(op.out, {&op.q, &op.k, &op.v}, "attention: q, k or v lies where out is written");
  require_vector(op.sinks, heads, "attention: sinks");
  require(op.alibi.empty() || op.alibi.size() == static_cast<size_t>(heads), "attention: alibi");
}

void Executable::check(const GatedDeltaOp& op) const {
  require(!has_logit_rows(op.out), "gated delta: out has a row per token");
  require_same_rows(op.out, {&op.q, &op.k, &op.v, &op.decay, &op.beta});
  const int64_t heads = op.heads, key_heads = op.key_heads;
  require(heads > 0 && key_heads > 0 && heads % key_heads == 0, "gated delta: heads");
  require(op.dim_k > 0 && op.dim_v > 0 && op.q.width == key_heads * op.dim_k && op.k.width == key_heads * op.dim_k &&
              op.v.width == heads * op.dim_v && op.out.width == heads * op.dim_v && op.beta.width == heads &&
              (op.decay.width == heads || op.decay.width == heads * op.dim_k), "gated delta: width");
  require_vector(op.rate, heads, "gated delta: rate");
  require_vector(op.dt_bias, op.decay.width, "gated delta: dt_bias");
  require(op.rate != kAbsent && op.dt_bias != kAbsent, "gated delta: a weight is absent");
  require_state(op.state, heads * op.dim_k * op.dim_v);
  require_disjoint(op.out, {&op.q, &op.k, &op.v, &op.decay, &op.beta}, "gated delta: an input lies where out is written");
}

void Executable::check(const RouteOp& op) const {
  require(!has_logit_rows(op.out), "route: out has a row per token");
  require_same_rows(op.out, {&op.logits});
  const int64_t experts = op.logits.width, groups = op.groups, k = op.k;
  require(groups > 0 && experts % groups == 0 && op.topk_groups > 0 && op.topk_groups <= groups, "route: groups");
  const int64_t each = experts / groups;
  require(groups == 1 || op.group_score == kMaxOfGroup || each >= 2, "route: a group has one expert");
  require(k > 0 && k <= each * op.topk_groups && op.out.width == 2 * k, "route: k");
  require_vector(op.correction, experts, "route: correction");
  require_vector(op.expert_scale, experts, "route: expert_scale");
  require_disjoint(op.out, {&op.logits}, "route: logits lie where out is written");
}

void Executable::check(const ExpertLinearOp& op) const {
  const Weight& w = weight(op.weight);
  require(!has_logit_rows(op.out), "experts: out has a row per token");
  require_same_rows(op.out, {&op.x, &op.routes, &op.residual});
  require(op.routes.width >= 2 && op.routes.width % 2 == 0 && op.routes.width <= 2 * kMaxExperts, "experts: routes");
  const int64_t k = op.k(), width = op.glu ? w.order.half : w.outputs;
  require(capacity_.max_tokens * k <= INT32_MAX, "experts: more than 2^31 pairs of a row and an expert");
  require(w.panels && (op.x.width == w.inputs || op.x.width == k * w.inputs), "experts: weight");
  require(op.glu == (w.order.half > 0), "experts: gate and up panels");
  require(op.out.width == (op.combine == kNoSum ? k * width : width), "experts: width");
  require(absent_or(op.residual, op.out.width) && (op.combine != kNoSum || op.residual.buffer == kAbsent), "experts: residual");
  require_vector(op.bias, w.experts * w.outputs, "experts: bias");
  require(is_activation(op.activation), "experts: activation");
  require_disjoint(op.out, {&op.x, &op.routes}, "experts: x or routes lie where out is written");
  require_disjoint_or_equal(op.out, {&op.residual}, "experts: residual lies partly where out is written");
}

void Executable::require_state(int32_t id, int64_t width) const {
  require(id >= 0 && static_cast<size_t>(id) < states_.size(), "no such state");
  require(states_[static_cast<size_t>(id)].width == width, "a state of another width");
}

void Executable::check(const CausalConvOp& op) const {
  require(!has_logit_rows(op.out), "causal conv: out has a row per token");
  require_same_rows(op.out, {&op.x});
  const Weight& w = weight(op.weight);
  const int64_t width = op.x.width, taps = w.outputs / width;
  require(op.out.width == width && w.inputs == 0 && w.outputs == taps * width, "causal conv: width");
  require(taps >= 2 && taps <= kMaxTaps, "causal conv: not between 2 and 16 taps");
  require_vector(op.bias, width, "causal conv: bias");
  require_state(op.state, (taps - 1) * width);
  require(is_activation(op.activation), "causal conv: activation");
  require_disjoint(op.out, {&op.x}, "causal conv: x lies where out is written");
}

void Executable::check(const Mamba2Op& op) const {
  require(!has_logit_rows(op.out), "mamba2: out has a row per token");
  require_same_rows(op.out, {&op.x, &op.b, &op.c, &op.dt});
  const int64_t heads = op.heads, width = op.head_dim, groups = op.groups, size = op.state_size;
  require(heads > 0 && width > 0 && groups > 0 && size > 0 && heads % groups == 0, "mamba2: heads");
  require(op.x.width == heads * width && op.out.width == op.x.width && op.dt.width == heads &&
              op.b.width == groups * size && op.c.width == groups * size, "mamba2: width");
  require(heads * width <= kMaxColumns && heads * width * size <= kMaxWidth, "mamba2: a state that is too large");
  for (int32_t id : {op.dt_bias, op.skip}) {
    weight(id);  // none may be absent
    require_vector(id, heads, "mamba2: dt_bias or skip");
  }
  require_vector(op.rate, weight(op.rate).outputs == heads ? heads : heads * size, "mamba2: rate");
  require(op.dt_limit[0] >= 0.0f && op.dt_limit[0] < op.dt_limit[1], "mamba2: dt_limit");
  require_state(op.state, heads * width * size);
  require_disjoint(op.out, {&op.x, &op.b, &op.c, &op.dt}, "mamba2: an operand lies where out is written");
}

void Executable::check(const TakeRowsOp& op) const {
  require(!has_logit_rows(op.x) && has_logit_rows(op.out) && op.x.width == op.out.width, "take rows: width or rows");
  require_disjoint(op.out, {&op.x}, "take rows: x lies where out is written");
}

void Executable::check_columns(const Ref& ref, const char* what, bool optional) const {
  if (optional && ref.buffer == kAbsent) return;
  const std::string name(what);
  if (ref.buffer < 0 || static_cast<size_t>(ref.buffer) >= buffers_.size())
    throw std::invalid_argument(name + ": no such buffer");
  const int64_t end = static_cast<int64_t>(ref.start) + ref.width;
  if (ref.start < 0 || ref.width < 1 || end > buffers_[static_cast<size_t>(ref.buffer)].stride)
    throw std::invalid_argument(name + ": columns outside its buffer");
}

// Then every count of a step fits 32 bits and every product of two of them 64.
void check_capacity(const Capacity& c) {
  constexpr int32_t kMax = 1 << 24;
  for (int32_t number : {c.max_tokens, c.max_seqs, c.max_logit_rows, c.num_blocks, c.block_size})
    require(number > 0 && number <= kMax, "capacity: not between 1 and 2^24");
  for (int32_t number : {c.max_segments, c.max_blocks_per_seq})
    require(number >= 0 && number <= kMax, "capacity: not between 0 and 2^24");
  require(c.block_size <= 4096, "capacity: a block has at most 4096 tokens");
  require(c.num_states >= 0 && c.num_states <= kMax && c.num_states != 1, "capacity: num_states is 0, or 2 to 2^24");
  require(static_cast<int64_t>(c.num_blocks) * c.block_size <= INT32_MAX, "capacity: more than 2^31 slots");
}

}  // namespace truffula

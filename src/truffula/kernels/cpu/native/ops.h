// A program as plain data, built once at load.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <iterator>
#include <variant>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "pack.h"

namespace truffula {

constexpr int32_t kAbsent = -1;

// The stage that copies what an op wrote (`tap`).
constexpr int32_t kTapStage = -1;

// The most rows or columns of a matrix and the highest rank; the most columns of a buffer.
constexpr int64_t kMaxWidth = int64_t{1} << 26;
constexpr int64_t kMaxColumns = int64_t{1} << 22;
constexpr int64_t kMaxExperts = int64_t{1} << 16;
constexpr int64_t kMaxIds = int64_t{1} << 24;  // of tokens, an adapter's own included

// Query rows (tokens x heads that share a kv head) in one attention tile.
constexpr int32_t kQueryRows = 24;

// The rank per row and op that the memory plan counts at least for products with A; the budget charges an adapter for
// more.
constexpr int32_t kPlannedRank = 256;

// The formats as Python names them, in the order of their numbers.
constexpr const char* kFormats[] = {"float32", "bfloat16", "q8_0", "q4_0", "q4_1", "q5_0", "fp8_128", "fp8_32", "nf4"};
static_assert(std::size(kFormats) == kFormatCount);

// Columns start .. start + width of a buffer; buffer kAbsent: no operand.
struct Ref {
  int32_t buffer = kAbsent, start = 0, width = 0;
};

// Rows of `stride` floats from `offset` in the arena. `rounded`: it holds bfloat16 values.
struct Buffer {
  int64_t offset = 0, stride = 0;
  bool logit_rows = false, rounded = false;
};

// Bytes of a matrix, in panels or as plain rows.
constexpr int64_t matrix_bytes(int32_t format, int64_t inputs, bool panels, const PanelOrder& order) {
  return panels ? order.panels() * panel_bytes(format, inputs) : order.outputs * inputs * (format == kF32 ? 4 : 2);
}

// Bytes of a row of x as products with a matrix of `format` read it where they convert x.
constexpr int64_t quantised_row_bytes(int32_t format, int64_t inputs) {
  return is_quantised(format) ? inputs / kBlock * kMaxXBlockBytes : pair_row_bytes(inputs);
}

// A weight as loaded: a vector of floats, plain rows (panels 0), or panels; one matrix after the other of `experts`.
struct Weight {
  Memory memory;
  int64_t outputs = 0, inputs = 0;
  int32_t format = kF32;
  bool panels = false;
  PanelOrder order{0, 0};
  LatentOrder latent;  // with heads: a matrix of that kind
  int64_t experts = 1;

  uint8_t* data(int64_t expert) const { return memory.data() + expert * matrix_bytes(format, inputs, panels, order); }
  Packed packed(int64_t expert = 0) const {
    return {data(expert), panel_bytes(format, inputs), format, static_cast<int32_t>(order.panels()),
            static_cast<int32_t>(inputs)};
  }
  // Of a head of a latent matrix: [inputs, keys] or [values, inputs].
  Packed latent_keys(int32_t head) const {
    return {memory.data() + head * latent.key_bytes(format, inputs), panel_bytes(format, latent.keys), format,
            static_cast<int32_t>(LatentOrder::panels_of(inputs)), latent.keys};
  }
  Packed latent_values(int32_t head) const {
    const uint8_t* values = memory.data() + latent.heads * latent.key_bytes(format, inputs);
    return {values + head * latent.value_bytes(format, inputs), panel_bytes(format, inputs), format,
            static_cast<int32_t>(LatentOrder::panels_of(latent.values)), static_cast<int32_t>(inputs)};
  }
  int64_t quantised_stride() const { return quantised_row_bytes(format, inputs); }
  Table table() const {
    return {memory.data(), panels ? panel_bytes(format, inputs) : 0, format, static_cast<int32_t>(inputs), static_cast<int32_t>(outputs)};
  }
};

// Ops as plain data. `fields` names each member as kernels/program.py does. The binding (module.cpp) is generated from
// these names, and a test compares them with the Python classes. For a field with a fixed set of words `fields` gives
// the words, in the order of their numbers.
struct Optional {};
constexpr Optional kOptional;  // marks a Ref that may be absent

enum : int32_t { kFromToken = 0, kFromPosition = 1, kLayerNorm = 1, kCastFirst = 1, kInterleaved = 1 };
constexpr const char* kSources[] = {"token", "position"};
constexpr const char* kNormKinds[] = {"rms", "layer"};
constexpr const char* kCasts[] = {"last", "first"};
constexpr const char* kLayouts[] = {"half", "interleaved"};
constexpr const char* kActivations[] = {"none", "silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu", "sigmoid", "softplus"};
constexpr const char* kPointwiseKinds[] = {"act", "add", "scale", "clip", "softcap", "sigmoid_mul", "mul", "position_scale", "xielu"};

struct EmbedOp {
  int32_t table = 0, source = 0, offset = 0;
  Ref out, add;
  float scale = 1.0f;

  static constexpr const char* kName = "Embed";
  template <class Self, class F>
  static void fields(Self& o, F&& f) {
    f("table", o.table), f("out", o.out), f("source", o.source, kSources), f("offset", o.offset), f("scale", o.scale), f("add", o.add, kOptional);
  }
};

struct NormOp {
  Ref x, out, gate, plus;
  int32_t kind = 0, weight = kAbsent, bias = kAbsent, cast = 0, groups = 1, gate_activation = kNone;
  float eps = 0.0f;

  static constexpr const char* kName = "Norm";
  template <class Self, class F>
  static void fields(Self& o, F&& f) {
    f("x", o.x), f("out", o.out), f("kind", o.kind, kNormKinds), f("eps", o.eps), f("weight", o.weight), f("bias", o.bias);
    f("cast", o.cast, kCasts), f("groups", o.groups), f("gate", o.gate, kOptional);
    f("gate_activation", o.gate_activation, kActivations), f("plus", o.plus, kOptional);
  }
};

struct LinearOp {
  Ref x, out, residual;
  int32_t weight = 0, bias = kAbsent;
  std::vector<float> packed_bias;  // the bias in the order of the panels' lanes; `Executable::add` fills it
  float clip = -1.0f, scale = 1.0f, softcap = 0.0f, glu_limit = -1.0f, glu_offset = 0.0f;
  int32_t activation = kNone;
  bool glu = false;

  static constexpr const char* kName = "Linear";
  template <class Self, class F>
  static void fields(Self& o, F&& f) {
    f("x", o.x), f("weight", o.weight), f("out", o.out), f("bias", o.bias), f("clip", o.clip);
    f("activation", o.activation, kActivations), f("glu", o.glu), f("scale", o.scale), f("residual", o.residual, kOptional);
    f("softcap", o.softcap), f("glu_limit", o.glu_limit), f("glu_offset", o.glu_offset);
  }
};

struct PointwiseOp {
  Ref x, y, out;
  int32_t kind = 0, activation = kNone, weight = kAbsent;
  std::vector<float> params;

  static constexpr const char* kName = "Pointwise";
  template <class Self, class F>
  static void fields(Self& o, F&& f) {
    f("kind", o.kind, kPointwiseKinds), f("x", o.x), f("out", o.out), f("y", o.y, kOptional), f("activation", o.activation, kActivations);
    f("params", o.params), f("weight", o.weight);
  }
};

struct RopeRowsOp {
  std::vector<float> inv_freq, long_freq;
  float factor = 1.0f, growth = 0.0f;
  int32_t border = 0;
  Ref out;

  static constexpr const char* kName = "RopeRows";
  template <class Self, class F>
  static void fields(Self& o, F&& f) {
    f("inv_freq", o.inv_freq), f("factor", o.factor), f("border", o.border), f("long_freq", o.long_freq), f("growth", o.growth), f("out", o.out);
  }
};

struct RopeOp {
  Ref x, rows;
  int32_t heads = 0, head_dim = 0, start = 0, dims = 0, layout = 0;

  static constexpr const char* kName = "Rope";
  template <class Self, class F>
  static void fields(Self& o, F&& f) {
    f("x", o.x), f("rows", o.rows), f("heads", o.heads), f("head_dim", o.head_dim), f("start", o.start), f("dims", o.dims);
    f("layout", o.layout, kLayouts);
  }
};

struct AttentionOp {
  Ref q, k, v, out;
  int32_t group = 0, heads = 0, kv_heads = 0, dim_k = 0, dim_v = 0;
  std::array<int32_t, 2> planes{};  // of keys, of values
  int64_t window = 0;               // 0: none; positions are int32, so larger ones hide no key
  float scale = 1.0f, softcap = 0.0f;
  int32_t sinks = kAbsent;
  std::vector<float> alibi;
  bool alibi_rounded = false;
  bool chunked = false;

  static constexpr const char* kName = "Attention";
  template <class Self, class F>
  static void fields(Self& o, F&& f) {
    f("q", o.q), f("k", o.k, kOptional), f("v", o.v, kOptional), f("out", o.out), f("group", o.group), f("planes", o.planes);
    f("heads", o.heads), f("kv_heads", o.kv_heads), f("dim_k", o.dim_k), f("dim_v", o.dim_v), f("scale", o.scale);
    f("window", o.window), f("softcap", o.softcap), f("sinks", o.sinks);
    f("alibi", o.alibi), f("alibi_rounded", o.alibi_rounded);
    f("chunked", o.chunked);
  }
};

struct MlaOp {
  Ref q, latent, out;
  int32_t kv_b = 0, group = 0, plane = 0, heads = 0, nope = 0, rope = 0, dim_v = 0, rank = 0;
  float scale = 1.0f;

  static constexpr const char* kName = "Mla";
  template <class Self, class F>
  static void fields(Self& o, F&& f) {
    f("q", o.q), f("latent", o.latent), f("out", o.out), f("kv_b", o.kv_b), f("group", o.group), f("plane", o.plane);
    f("heads", o.heads), f("nope", o.nope), f("rope", o.rope), f("dim_v", o.dim_v), f("rank", o.rank), f("scale", o.scale);
  }

  int32_t width() const { return rank + rope; }  // of a latent row, and of a head's query in that space
};

struct GatedDeltaOp {
  Ref q, k, v, decay, beta, out;
  int32_t state = 0, rate = 0, dt_bias = 0, heads = 0, key_heads = 0, dim_k = 0, dim_v = 0;
  float scale = 1.0f, eps = 0.0f, beta_scale = 1.0f;

  static constexpr const char* kName = "GatedDelta";
  template <class Self, class F>
  static void fields(Self& o, F&& f) {
    f("q", o.q), f("k", o.k), f("v", o.v), f("decay", o.decay), f("beta", o.beta), f("out", o.out), f("state", o.state);
    f("rate", o.rate), f("dt_bias", o.dt_bias), f("heads", o.heads), f("key_heads", o.key_heads), f("dim_k", o.dim_k);
    f("dim_v", o.dim_v), f("scale", o.scale), f("eps", o.eps), f("beta_scale", o.beta_scale);
  }
};

enum : int32_t { kSoftmax = 0, kSigmoid = 1, kSparsemixer = 2, kMaxOfGroup = 0, kTopTwo = 1 };
constexpr const char* kScores[] = {"softmax", "sigmoid", "sparsemixer"};
constexpr const char* kGroupScores[] = {"max", "top2"};

struct RouteOp {
  Ref logits, out;
  int32_t k = 0, score = 0, correction = kAbsent, expert_scale = kAbsent, groups = 1, topk_groups = 1, group_score = 0;
  float norm = 0.0f, plus = 0.0f, floor = 0.0f, scale = 1.0f, jitter = 0.0f;  // norm 0: weights are not divided

  static constexpr const char* kName = "Route";
  template <class Self, class F>
  static void fields(Self& o, F&& f) {
    f("logits", o.logits), f("out", o.out), f("k", o.k), f("score", o.score, kScores), f("correction", o.correction);
    f("groups", o.groups), f("topk_groups", o.topk_groups), f("group_score", o.group_score, kGroupScores);
    f("norm", o.norm), f("plus", o.plus), f("floor", o.floor), f("scale", o.scale), f("expert_scale", o.expert_scale);
    f("jitter", o.jitter);
  }
};

enum : int32_t { kNoSum = 0, kSum = 1, kWeightedSum = 2 };
constexpr const char* kCombines[] = {"none", "sum", "weighted"};

struct ExpertLinearOp {
  Ref x, routes, out, residual;
  int32_t weight = 0, bias = kAbsent;
  std::vector<float> packed_bias;  // of all experts, each in the order of the panels' lanes
  float clip = -1.0f, scale = 1.0f, glu_limit = -1.0f, glu_offset = 0.0f;
  int32_t activation = kNone, combine = kNoSum;
  bool glu = false;

  static constexpr const char* kName = "ExpertLinear";
  template <class Self, class F>
  static void fields(Self& o, F&& f) {
    f("x", o.x), f("routes", o.routes), f("weight", o.weight), f("out", o.out), f("bias", o.bias), f("clip", o.clip);
    f("activation", o.activation, kActivations), f("glu", o.glu), f("scale", o.scale), f("residual", o.residual, kOptional);
    f("combine", o.combine, kCombines), f("glu_limit", o.glu_limit), f("glu_offset", o.glu_offset);
  }
  int32_t k() const { return routes.width / 2; }
};

struct CausalConvOp {
  Ref x, out;
  int32_t weight = 0, state = 0, bias = kAbsent, activation = kNone;

  static constexpr const char* kName = "CausalConv";
  template <class Self, class F>
  static void fields(Self& o, F&& f) {
    f("x", o.x), f("out", o.out), f("weight", o.weight), f("state", o.state), f("bias", o.bias);
    f("activation", o.activation, kActivations);
  }
};

struct Mamba2Op {
  Ref x, b, c, dt, out;
  int32_t state = 0, rate = 0, dt_bias = 0, skip = 0, heads = 0, head_dim = 0, groups = 0, state_size = 0;
  std::array<float, 2> dt_limit{};

  static constexpr const char* kName = "Mamba2";
  template <class Self, class F>
  static void fields(Self& o, F&& f) {
    f("x", o.x), f("b", o.b), f("c", o.c), f("dt", o.dt), f("out", o.out), f("state", o.state), f("rate", o.rate);
    f("dt_bias", o.dt_bias), f("skip", o.skip), f("heads", o.heads), f("head_dim", o.head_dim), f("groups", o.groups);
    f("state_size", o.state_size), f("dt_limit", o.dt_limit);
  }
};

struct TakeRowsOp {
  Ref x, out;

  static constexpr const char* kName = "TakeRows";
  template <class Self, class F>
  static void fields(Self& o, F&& f) {
    f("x", o.x), f("out", o.out);
  }
};

using Op = std::variant<EmbedOp, NormOp, LinearOp, PointwiseOp, RopeRowsOp, RopeOp, AttentionOp, MlaOp, CausalConvOp,
                        GatedDeltaOp, Mamba2Op, RouteOp, ExpertLinearOp, TakeRowsOp>;

// The columns that an op writes.
inline const Ref& out_of(const Op& op) {
  return std::visit(
      [](const auto& o) -> const Ref& {
        if constexpr (requires { o.out; }) return o.out;
        else return o.x;
      },
      op);
}

// Whether adapters may act at an op: products, tables that rows are gathered from, and norms.
inline bool takes_adapters(const Op& op) {
  return std::holds_alternative<LinearOp>(op) || std::holds_alternative<EmbedOp>(op) || std::holds_alternative<NormOp>(op) ||
         std::holds_alternative<ExpertLinearOp>(op) || std::holds_alternative<MlaOp>(op);
}

// The stages of an op; see `run_op`.
inline int32_t stages_of(const Op& op) {
  if (std::holds_alternative<MlaOp>(op)) return 6;
  if (std::holds_alternative<AttentionOp>(op)) return 3;
  return takes_adapters(op) && !std::holds_alternative<NormOp>(op) ? 2 : 1;
}

// Rows of one expert that are multiplied at a time.
constexpr int32_t kExpertRows = 96;

// Floats of a thread's results for one block of an expert's rows: of the columns of its largest chunk.
constexpr int64_t expert_columns(int64_t panels, int64_t threads) { return ((panels + 1) / 2 + threads - 1) / threads * 2 * kLanes; }

// Bytes of scratch that an op with experts needs per thread.
constexpr int64_t expert_scratch_bytes(int64_t inputs, int64_t panels, int64_t x_row_bytes, int64_t threads) {
  return kExpertRows * 4 * (inputs + expert_columns(panels, threads)) + padded_rows(kExpertRows) * x_row_bytes;
}

// Bytes of one block of an attention op's keys, and of its values.
constexpr std::array<int64_t, 2> kv_block_bytes(const AttentionOp& op, int32_t format, int32_t block_size) {
  const int64_t lanes = (block_size + kLanes - 1) / kLanes, value_width = (op.dim_v + kLanes - 1) / kLanes * kLanes;
  return {op.kv_heads * lanes * panel_bytes(format, op.dim_k),
          op.kv_heads * block_size * value_width * (format == kF32 ? 4 : 2)};
}

// Floats of scratch that an attention op needs per thread.
constexpr int64_t attention_scratch_of(const AttentionOp& op, int32_t block_size) {
  return attention_scratch(std::max(op.heads / op.kv_heads, kQueryRows), block_size, op.dim_k, op.dim_v);
}

constexpr int64_t latent_block_bytes(int64_t width, int32_t format, int32_t block_size) {
  return block_size * ((width + kLanes - 1) / kLanes * kLanes) * (format == kF32 ? 4 : 2);
}

constexpr int64_t latent_scratch_of(int32_t heads, int64_t width, int64_t rank, int32_t block_size) {
  return attention_scratch(std::max(heads, kQueryRows), block_size, width, rank) + latent_panel_floats(block_size, width);
}

// The cached keys or values of one layer, or its latents.
struct Plane {
  Memory memory;
  int64_t block_bytes = 0;
  int32_t group = 0;
};

// The state of one layer, in float32: a row of `width` numbers per state row, each on cache lines of its own.
struct State {
  Memory memory;
  int64_t width = 0, stride = 0;
};

// Bytes of one row of a state.
constexpr int64_t state_row_bytes(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes * 4; }

// Where a site acts: output columns first .. first + outputs of op number `op`, or of one of its experts.
struct AdapterPlace {
  int32_t op = kAbsent;
  int64_t first = 0, outputs = 0, expert = 0;
};

// Floats of a row of x that an adapter has scaled, and of that row as products with a matrix of `format` read it.
constexpr int64_t scaled_row_floats(int64_t inputs) { return (inputs + kLanes - 1) / kLanes * kLanes; }
constexpr int64_t scaled_x_floats(int32_t format, int64_t inputs) {
  return scaled_row_floats(inputs) + (is_quantised(format) ? scaled_row_floats(quantised_row_bytes(format, inputs) / 4 + 1) : 0);
}

// What an adapter computes of each row before an op's product, in `h_width` columns of h. A shrink: scale * x A^T (the
// rank is padded to whole panels). At an embedding x A^T is a row of A, which is stored as rows [V, rank].
struct AdapterShrink {
  Packed a;
  float scale;
  int32_t h_start, rank;
};

// x times `factor`, and at `converted` that row as products with a quantised matrix read it.
struct AdapterInput {
  const float* factor;
  int32_t inputs, h_start, converted;
};

// At an embedding, rows of its own: of all tokens or, with `ids` (ascending), of these; other tokens keep the base's.
struct AdapterGather {
  Table table;
  const int32_t* ids;
  int32_t num_ids, h_start;
};

// What then becomes a Delta: see there. h begins at column `h_start`; kAbsent: with kAdds it is the segment's weight,
// with kOwnProduct x is not scaled, or scaled for a matrix whose converted rows begin at `converted`.
struct AdapterExpand {
  Packed b{};
  int32_t role = kAdds, first = 0, step = 1, lane = 0, end = 0;
  int32_t h_start = kAbsent, converted = kAbsent;
  const float *column = nullptr, *bias = nullptr;
  const int32_t* ids = nullptr;
  int32_t num_ids = 0;
};

// At a latent op: with the queries' part for keys, u = scale * q B_k of a head, then u A; with mixed latents x,
// h = scale * x A^T, then h B_v^T of a head. `key_b` and `value_b` are those of head 0. u and h take turns in `rank` padded
// columns per head.
struct AdapterLatent {
  Packed key_b, key_a, value_a, value_b;
  float scale;
  int32_t h_start, rank;
};

// Likewise c of the rows of all heads' keys [heads, keys], with which queries are multiplied into h, and in panels of
// each head's values; and what is added to values. May be null.
struct LatentVectors {
  const float *keys = nullptr, *values = nullptr, *bias = nullptr;
  int32_t h_start = kAbsent;
};

struct AdapterOp {
  std::vector<AdapterShrink> shrinks;
  std::vector<AdapterInput> inputs;
  std::vector<AdapterGather> gathers;
  std::vector<AdapterExpand> expands;
  std::vector<AdapterLatent> latents;
  LatentVectors of_latent;
  const float *norm_weight = nullptr, *norm_bias = nullptr;  // of a norm; may be null
  int64_t h_width = 0;
  std::vector<int32_t> of_expert;  // at an op with experts: per expert an index into `Adapter::ops`, or kAbsent
  // The deltas that it makes, at most; at an op with experts, of one of them, and then `h_width` too is that of the widest.
  size_t num_deltas = 0;
  bool disjoint = true;  // no column of its output is both scaled and replaced
};

// Pointers into an image that the caller keeps mapped.
struct Adapter {
  std::vector<int32_t> op_of;  // per op of the program: an index into `ops`, or kAbsent
  std::vector<AdapterOp> ops;
};

// One row of an image's table: a part and its tensors (the columns of kernels/adapters.py).
struct TensorColumns {
  int64_t dtype, offset, bytes, shape[3];
};

enum : int64_t { kLowRank = 0, kColumnScale = 1, kInputScale = 2, kBias = 3, kReplace = 4, kRows = 5 };  // KINDS there

struct PartRow {
  int64_t site, kind;
  double scale;
  TensorColumns a, b;
};
constexpr int64_t kPartColumns = 15;
static_assert(sizeof(PartRow) == kPartColumns * sizeof(int64_t));

// The bytes of an image's tensors.
struct ImageData {
  const uint8_t* data;
  int64_t bytes;
};

// adapter_image.cpp: the format of a tensor of an image; where its bytes are; its float32 numbers, where it has this shape.
// Throw std::invalid_argument.
int32_t format_of(const TensorColumns& tensor, bool factor = false);
const uint8_t* bytes_at(const TensorColumns& tensor, int64_t expected, const ImageData& image);
const float* floats_at(const TensorColumns& tensor, int64_t shape, int64_t count, const ImageData& image);

}  // namespace truffula

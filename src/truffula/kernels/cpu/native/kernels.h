// The kernel table of an instruction set. Plain C structs only: tables are compiled with different instruction sets,
// and the linker must not merge code between them (so no inline functions with external linkage, no std::).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "sampler_loops.h"

namespace truffula {

// Outputs of a panel, tokens of a line of keys, floats of a vector. The same for all, so that the same kernels read
// weights, adapters and cached keys.
constexpr int kLanes = 16;

// Keys of one attention partition. Partitions depend on positions alone and are merged in order.
constexpr int kPartitionKeys = 512;

// Inputs of a quantised block.
constexpr int kBlock = 32;

// How values are stored in lines of 64 bytes. F32: one input of 16 outputs per line. BF16: inputs 2k and 2k + 1 of 16
// outputs, interleaved. Quantised: per block of 32 inputs, lines of 4 inputs of 16 outputs (kQ8_0: 8 lines of bytes;
// kQ4_0 and kQ4_1: 4 lines whose low nibbles are inputs 0 .. 15 and high ones 16 .. 31; kQ5_0: the same and a line of
// fifth bits). After all blocks of a panel: 16 float16 scales per block, followed in kQ4_1 by 16 float16 minimums.
// Scaled: floats of fewer bits, and a float32 scale for each output and group of 128, 64 or 32 inputs. Lines of kFP8
// (e4m3, no NaN) hold 4 inputs of 16 outputs: of outputs 4 j .. 4 j + 3 first inputs 0 and 1, then 2 and 3; the halves of
// a byte are exchanged. Lines of kNF4 hold 8 inputs, the first in the lowest half-byte. After all lines of a panel: 16
// scales per group. kFP4_16 (e2m1) is as kNF4, but each output has four e4m3 scales in place of a float32, for 16 inputs
// each, and the panel ends with two floats per output, by which its scales are multiplied, then divided.
enum Format : int32_t { kF32 = 0, kBF16 = 1, kQ8_0 = 2, kQ4_0 = 3, kQ4_1 = 4, kQ5_0 = 5, kFP8_128 = 6, kFP8_32 = 7,
                        kNF4 = 8, kFP4_16 = 9 };
constexpr int32_t kFormatCount = 10;
// Multiplied as integers, or as floats.
static constexpr bool is_quantised(int32_t format) { return format > kBF16 && format <= kQ5_0; }
static constexpr bool is_scaled(int32_t format) { return format > kQ5_0; }
static constexpr bool has_four_bits(int32_t format) { return format == kNF4 || format == kFP4_16; }  // of scaled formats
// Inputs of a group of a scaled format, of which a row's last may be shorter: a matrix has whole blocks of kBlock.
static constexpr int64_t group_inputs(int32_t format) {
  return format == kFP8_128 ? 128 : has_four_bits(format) ? 64 : kBlock;
}
static constexpr int64_t groups_of(int32_t format, int64_t inputs) {
  return (inputs + group_inputs(format) - 1) / group_inputs(format);
}
// Whether products read x as bfloat16 pairs, where it holds such values and the table multiplies them.
static constexpr bool reads_pairs(int32_t format) { return format == kBF16 || format == kFP8_128 || format == kFP8_32; }
// Bytes of one input of a panel's lines.
static constexpr int64_t scaled_input_bytes(int32_t format) { return has_four_bits(format) ? 8 : 16; }
// Where the scales of a panel's groups begin, and where they end.
static constexpr int64_t scales_at(int32_t format, int64_t inputs) { return scaled_input_bytes(format) * inputs; }
static constexpr int64_t scales_end(int32_t format, int64_t inputs) {
  return scales_at(format, inputs) + 64 * groups_of(format, inputs);
}

// The most bytes of a block of a quantised row of x.
constexpr int64_t kMaxXBlockBytes = 72;

// Bytes of a row of x in bfloat16 pairs: whole blocks, zero after the last input.
static constexpr int64_t pair_row_bytes(int64_t inputs) { return (inputs + kBlock - 1) / kBlock * (2 * kBlock); }

// Products read converted x in groups of this many rows, which may begin at any row: its memory has that many more, with
// any content.
constexpr int32_t kXRows = 16;
static constexpr int64_t padded_rows(int64_t rows) { return (rows + kXRows - 1) / kXRows * kXRows + kXRows; }

enum Activation : int32_t { kNone = 0, kSilu = 1, kGelu = 2, kGeluTanh = 3, kRelu = 4, kRelu2 = 5, kQuickGelu = 6,
                           kSigmoidActivation = 7, kSoftplus = 8 };

enum PointwiseKind : int32_t {
  kAct = 0, kAdd = 1, kScale = 2, kClip = 3, kSoftcap = 4, kSigmoidMul = 5, kMul = 6, kPositionScale = 7, kXielu = 8
};

// float16 in pairs as kBF16 has them: a format of an adapter's A and B, but not of weights.
constexpr int32_t kF16 = -1;

// A matrix [outputs, inputs] in panels of 16 outputs; lines of 64 bytes, k ascending; lanes beyond `outputs` are zero.
struct Packed {
  const uint8_t* data;
  int64_t panel_bytes;
  int32_t format;
  int32_t panels;
  int32_t inputs;
};

// Rows of a buffer: float32, `stride` floats apart. In bfloat16 mode they hold values rounded to bfloat16.
struct Rows {
  float* data;
  int64_t stride;
};

// What a delta does to the base product p in its lanes (kernels/adapters.py has the sum of all; c is `column`, or 1):
// kAdds: + c (h B^T) + weight bias. kScales: + weight (c - 1) p. kScalesAndAdds: both. The others put a product q of their
// own in place of p: + weight c (q - p). kOwnProduct: q is that of `own`, whose panels are those of `b`. kOwnValues: q is
// h. kOwnColumns: q is h / weight, for single columns alone, which `ids` names in ascending order.
enum DeltaRole : int32_t { kAdds = 0, kScales = 1, kScalesAndAdds = 2, kOwnProduct = 3, kOwnValues = 4, kOwnColumns = 5 };

// What an adapter does to rows lo .. hi of a product and, with its panel i, to panel first + i * step: in the lanes
// lane .. end of these panels. `b` is in the form kColumns (pack.h). `h` is [hi - lo, inputs of b] and has the segment's
// weight. `max_hi` is the largest hi up to this delta of a list, `min_lo` the smallest lo from this one on: both ascend,
// so the deltas of given rows are found by bisection.
struct Delta {
  const float* h;
  int64_t h_stride;
  Packed b;
  int32_t lo, hi, first, step;
  int32_t max_hi, min_lo;
  int32_t role;
  float weight;
  int32_t lane, end;
  const float *column, *bias;   // per lane of b's panels; may be null
  const struct LinearCall* own;
  const int32_t* ids;
  int32_t num_ids;
};

// Sets `max_hi` and `min_lo` of a whole list.
static inline void set_bounds(Delta* deltas, int32_t count) {
  int32_t max_hi = 0, min_lo = INT32_MAX;
  for (int32_t i = 0; i < count; ++i) deltas[i].max_hi = max_hi = deltas[i].hi > max_hi ? deltas[i].hi : max_hi;
  for (int32_t i = count - 1; i >= 0; --i) deltas[i].min_lo = min_lo = deltas[i].lo < min_lo ? deltas[i].lo : min_lo;
}

// out = softcap(residual + scale * activation(clip(x W^T + deltas + bias))), see program.Epilogue for the order.
// With `glu` the panels alternate gate, up, gate, up. `residual.data` and `bias` may be null.
struct LinearCall {
  Rows x, out, residual;
  Packed w;
  // x as `quantise` converted it for w's format: padded_rows(rows) rows, `quantised_stride` bytes apart; null: read x.
  const uint8_t* quantised_x;
  int64_t quantised_stride;
  const float* bias;   // in packed order (16 x panels), zero in unused lanes
  const Delta* deltas;
  int32_t num_deltas;
  int32_t disjoint;   // of the deltas, no two scale or replace the product of one row, and none of such has a column
  int32_t rows;
  int32_t out_width;
  int32_t activation;
  int32_t glu;
  int32_t in_blocks;   // x holds float32 values: sums in blocks of kSumInputs, whose rounding errors are smaller
  int32_t round_out;
  float clip;      // below 0: none
  float scale;
  float softcap;   // 0: none
  // With `glu`: gates are at most glu_limit and ups within it (below 0: none); glu_offset is added to the ups.
  float glu_limit, glu_offset;
};

// Converts rows of x to what products with a matrix of `format` read: pairs only in tables with `pairs`.
struct QuantiseCall {
  Rows x;
  uint8_t* to;
  int64_t stride;
  int32_t format, inputs;
};

// h[rows, 16 x a.panels] = scale * (x A^T). A has `outputs` rows, and its last panel has no more lanes than are left.
struct ShrinkCall {
  Rows x, h;
  Packed a;
  float scale;
  int32_t rows, outputs;
};

struct NormCall {
  Rows x, out, gate, plus;   // gate.data and plus.data may be null
  const float* weight;
  const float* bias;
  int32_t width, groups;
  int32_t group_step;   // of weight and bias, in floats: 0 where all groups have the same
  int32_t layer_norm, cast_first, gate_activation, round_out;
  float eps;
};

struct PointwiseCall {
  Rows x, y, out;
  int32_t kind, activation, width, round_out;
  const float* params;        // of kXielu: alpha_p, alpha_n, beta, eps as stored
  const int32_t* positions;   // of token rows
  int32_t share;  // a column of y is for so many columns of x, one after the other
};

struct RopeCall {
  Rows x, rows;
  int32_t heads, head_dim, start, dims, interleaved, round_out;
};

// Rows lo .. hi of one sequence, which begin with the state in state row `in` and leave it in row `out`.
struct StateSpan {
  int32_t lo, hi, in, out;
};

// The state of one layer: row r begins at data + r * stride.
struct States {
  float* data;
  int64_t stride;
};

// Convolves columns; `weight` is [taps, width], a state [taps - 1, width].
struct ConvCall {
  Rows x, out;
  const float* weight;
  const float* bias;   // may be null
  States states;
  int32_t width, taps, activation, round_out;
};
constexpr int32_t kMaxTaps = 16;

// The state space of one head of a span: a state is [head_dim, state_size] per head. `rates` of `rate` are of each head:
// 1, or one for each column of its state.
struct Mamba2Call {
  Rows x, b, c, dt, out;
  const float *rate, *dt_bias, *skip;
  States states;
  int32_t heads, head_dim, groups, state_size, rates, round_out;
  float dt_low, dt_high;
};

// One layer's KV cache. Keys: per block and KV head, lines of 16 tokens. Values: per block and KV head, a row of
// dim_v values per token, padded to a multiple of 16. `latent`: `values` alone, rows of dim_k numbers per token, padded
// likewise. A row is the key of all heads, its first dim_v numbers are their value.
struct KvCache {
  uint8_t* keys;
  uint8_t* values;
  int64_t key_block_bytes, value_block_bytes;
  int32_t format, block_size, kv_heads, dim_k, dim_v, latent;
};

// The first key that a query sees: with a window w (0: none) its last w keys or, if `chunked`, those of its w positions.
static inline int32_t first_visible(int32_t window, int32_t chunked, int32_t position) {
  if (window <= 0) return 0;
  if (chunked) return position / window * window;
  return position - window + 1 > 0 ? position - window + 1 : 0;
}

// A head of `out` is dim_v wide; over latents, dim_k, so that it may overwrite q.
struct AttentionCall {
  KvCache cache;
  Rows q, k, v, out;
  const float* sinks;   // per head; may be null
  const float* alibi;   // per head, the slope of its bias by the key's position; may be null
  int32_t alibi_rounded;   // position and bias are rounded to bfloat16, and the bias is scaled as the scores are
  int32_t heads, window, chunked, round_out;
  float scale, softcap;
};

// Query rows t .. t + count of one sequence, from position `position` on. With `parts`: `attend` computes partition
// number `part` alone and writes its result there; `merge_parts` reads it there, followed by those of the later
// partitions.
struct AttentionItem {
  const int32_t* table;
  int32_t t, count, position, kv_head;
  float* parts;
  int32_t part;
};

// Columns of a state's block. A block of 128 rows and the rows of a token fit the first-level cache.
constexpr int32_t kDeltaColumns = 32;
static constexpr int32_t delta_blocks(int32_t dim_v) { return (dim_v + kDeltaColumns - 1) / kDeltaColumns; }

// Tokens whose decays, keys and queries are computed together.
constexpr int32_t kDeltaTokens = 16;
// Floats of scratch that `gated_delta` needs.
static constexpr int64_t delta_scratch(int64_t dim_k) {
  return kDeltaTokens * (4 * ((dim_k + kLanes - 1) / kLanes * kLanes) + kLanes);
}

// The gated delta rule of one layer (GatedDelta in program.py). `decay` has a column per head or, with `per_channel`,
// dim_k of them.
struct GatedDeltaCall {
  Rows q, k, v, decay, beta, out;
  const float* rate;      // per head, below 0
  const float* dt_bias;   // per column of decay
  States states;          // a head's: dim_k x dim_v, in blocks of kDeltaColumns columns, each a run of its rows
  int32_t heads, key_heads, dim_k, dim_v, per_channel, round_out;
  float scale, eps, beta_scale;
};

// Rows of a table as floats, whatever its layout. A row that it does not have is zeros.
struct Table {
  const uint8_t* data;
  int64_t panel_bytes;   // 0: plain rows
  int32_t format, width, rows;
};

// out = scale * (table row + deltas) + add; rows that the table does not have are not scaled.
struct EmbedCall {
  Table table;
  Rows out, add;   // add.data may be null
  float scale;
  int32_t scaled, round_out;
  const Delta* deltas;
  int32_t num_deltas, disjoint;
};

// Whether products of formats that read pairs read x as bfloat16 pairs where it holds such values, and in which order
// they sum: that of the products without pairs, or that of tiles.
enum Pairs : int32_t { kNoPairs = 0, kPairsInOrder = 1, kPairsByTiles = 2 };

struct Kernels {
  const char* name;
  int32_t pairs;
  int32_t fine_rows;   // products of fewer rows of converted x are bound by memory
  void (*linear)(const LinearCall*, int32_t unit_lo, int32_t unit_hi);   // units of two panels
  void (*quantise)(const QuantiseCall*, int32_t row_lo, int32_t row_hi);
  void (*shrink)(const ShrinkCall*, int32_t panel_lo, int32_t panel_hi);
  void (*norm)(const NormCall*, int32_t row_lo, int32_t row_hi);
  void (*pointwise)(const PointwiseCall*, int32_t row_lo, int32_t row_hi);
  void (*rope)(const RopeCall*, int32_t row_lo, int32_t row_hi);
  // Columns lo .. hi of all spans, in their order; both are multiples of kLanes, but for the last column.
  void (*conv)(const ConvCall*, const StateSpan* spans, int32_t num_spans, int32_t column_lo, int32_t column_hi);
  void (*mamba2)(const Mamba2Call*, const StateSpan* span, int32_t head);
  void (*write_kv)(const AttentionCall*, const int32_t* slots, int32_t row_lo, int32_t row_hi);
  void (*attend)(const AttentionCall*, const AttentionItem*, float* scratch);
  void (*merge_parts)(const AttentionCall*, const AttentionItem*, float* scratch);
  void (*embed)(const EmbedCall*, const int32_t* ids, int32_t row_lo, int32_t row_hi);
  void (*gated_delta)(const GatedDeltaCall*, const StateSpan*, int32_t head, int32_t block_lo, int32_t block_hi,
                      float* scratch);
  const SampleLoops* sampling;
};

static constexpr int32_t partition_blocks(int32_t block_size) {
  return block_size < kPartitionKeys ? kPartitionKeys / block_size : 1;
}

// Floats of one partition's result for `rows` query rows (tokens x heads that share a kv head).
static constexpr int64_t partial_floats(int64_t rows, int64_t dim_v) {
  return rows * ((dim_v + kLanes - 1) / kLanes * kLanes + 2);
}

// Floats of scratch that `attend` needs per thread for `rows` query rows.
static constexpr int64_t attention_scratch(int64_t rows, int32_t block_size, int64_t dim_k, int64_t dim_v) {
  const int64_t lanes = (block_size + kLanes - 1) / kLanes * kLanes;
  return rows * (lanes * partition_blocks(block_size) + dim_k) + 2 * partial_floats(rows, dim_v);
}

// Floats of two adjacent panels of keys, or of those of a block, as `attend` makes them of latents: more scratch.
static constexpr int64_t latent_panel_floats(int32_t block_size, int64_t dim_k) {
  const int64_t lines = (dim_k + kLanes - 1) / kLanes * kLanes;
  return lines * (block_size > 2 * kLanes ? (block_size + kLanes - 1) / kLanes * kLanes : 2 * kLanes);
}

}  // namespace truffula

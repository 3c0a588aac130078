// A loaded program: weights, activations, KV blocks, adapters, and the loop that runs the ops.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "ops.h"
#include "sampler_slots.h"
#include "team.h"

namespace truffula {

struct Capacity {
  int32_t max_tokens, max_seqs, max_logit_rows, max_segments, num_blocks, block_size, max_blocks_per_seq;
  int32_t num_states = 0;  // state rows; row 0 is zeros

  // Spans of a step (SPANS_PER_SEQUENCE of kernels/inputs.py).
  int32_t max_spans() const {
    return num_states == 0 ? 0 : static_cast<int32_t>(std::min<int64_t>(3 * static_cast<int64_t>(max_seqs), max_tokens));
  }
};

// The arrays that vary from step to step, owned by the caller (see kernels/inputs.py for shapes and meaning).
struct StepArrays {
  const int32_t *token_ids, *position, *rope_pos, *rope_length, *slot_mapping, *block_tables, *q_start, *kv_len, *seg, *seg_r;
  const float* seg_weight;
  const int32_t* logit_rows;
  const int32_t *span_start, *state_in, *state_out;
};

struct StepCounts {
  int32_t T = 0, N = 0, R = 0, G = 0, Z = 0;
};

// Throws std::invalid_argument when a number is out of range or products of two of them overflow.
void check_capacity(const Capacity& capacity);

struct SiteParts;  // adapter_image.cpp

// Room for the choice of one row's experts: per expert, and per group of them.
struct RouteScratch {
  std::vector<float> scores, preference, group_scores;
  std::vector<uint8_t> taken, left_out;
};

// Not thread-safe. Built in this order: buffers, weights, states, ops, sites; then `seal`. Every argument is checked: a method
// that throws std::invalid_argument has changed nothing.
class Executable {
 public:
  Executable(const std::string& isa, int threads, const Capacity& capacity, int32_t kv_format, int32_t groups,
             bool debug);

  // Load
  void add_buffer(const Buffer& buffer);
  int32_t add_vector(const float* values, int64_t count);
  int32_t add_matrix(int64_t outputs, int64_t inputs, int32_t format, bool panels, int64_t half, int64_t experts = 1);
  int32_t add_latent_matrix(const LatentOrder& order, int64_t inputs, int32_t format);
  // Fills rows first .. first + rows of an expert's matrix. Returns the error of rounding this part to a quantised format, 0 for other
  // formats.
  Rounding fill_matrix(int32_t weight, const Source& source, int64_t rows, int64_t first, int64_t expert = 0);
  void add_state(int64_t width);
  void add(Op op);
  // `planned_width`: floats per row of a step that the memory plan counts for adapters.
  void seal(const StepArrays& arrays, int64_t arena_floats, int32_t logits_buffer, int64_t vocab, int64_t planned_width);

  // A step
  void run(const StepCounts& counts);
  const float* logits_row(int32_t row) const { return row_of(buffers_[static_cast<size_t>(logits_)], row); }
  int64_t logits_stride() const { return buffers_[static_cast<size_t>(logits_)].stride; }
  int32_t logit_rows() const { return counts_.R; }
  // `begin_sample` checks `args` (at least R rows) and returns the width of `out`; then `sample` draws or scores an id
  // for each row of the last run's logits.
  int32_t begin_sample(const SampleArgs& args);
  void sample(const SampleArgs& args, const SampleOut& out);
  Sampler& sampler();
  std::vector<float> tap(int32_t op) const;
  int32_t tap_width(int32_t op) const;

  // Writes `count` rows of keys and values of attention op number `op` to slots (as in slot_mapping).
  void write_kv(int32_t op, const int32_t* slots, size_t count, std::span<const float> keys, std::span<const float> values);

  // Returns the memory of cached keys and values to the system: of `count` blocks of a group, in ascending order.
  void release_kv(int32_t group, const int32_t* blocks, size_t count);

  // Likewise the memory of state rows.
  void release_states(const int32_t* state_rows, size_t count);

  // Adapters
  // Binds a site to output columns of an op: once per site, before `seal`.
  void add_site(int32_t site, int32_t op, int64_t first, int64_t outputs, int64_t expert = 0);
  // Adds an adapter in panels (kernels/cpu/pack.py) and returns its slot. Not copied: the caller keeps the image in place
  // until `drop_adapter`.
  int32_t add_adapter(const int64_t* table, int64_t parts, const ImageData& image);
  void drop_adapter(int32_t slot);
  // The most floats that a row of a step needs for it at an op.
  int64_t adapter_width(const int64_t* table, int64_t parts, const ImageData& image) const;

  // Seconds of work per kind of op since the last call, summed over the threads. The first call starts the measurement.
  std::array<double, std::variant_size_v<Op>> take_seconds();
  Team& team() { return team_; }
  const Kernels& kernels() const { return *kernels_; }
  size_t num_ops() const { return ops_.size(); }

 private:
  // Query rows t .. t + count of a sequence, with all their keys or one partition of them.
  struct QueryTile {
    int32_t sequence, t, count, position;
    int32_t partition = kAbsent;
    int64_t result_row = 0;       // of a partition: its first row in the partial results
    bool first_partition = true;  // merging all partitions is a task of this tile
  };
  // The query tiles of a step for all attention ops with this many query heads per KV head.
  struct AttentionPlan {
    int32_t queries_per_kv;
    std::vector<QueryTile> tiles;
    int64_t partial_rows = 0;  // rows of partial results, per KV head
  };
  // A part of an op that ends before the next begins. The stages of all ops are the phases of the team's job.
  struct Stage {
    uint32_t op;
    int32_t number;
  };
  // An adapter that acts at an op in this step, on rows lo .. hi.
  struct ActiveAdapter {
    const Adapter* adapter;
    const AdapterOp* op;
    int32_t lo, hi;
    int32_t first_task;  // of its shrink tasks
    float weight;
    int64_t h_start;
  };
  // Those of an op, in active_adapters_. `disjoint`: as LinearCall has it.
  struct ActiveRange {
    int32_t from, to, disjoint;
  };
  // Scratch memory and counters of one thread.
  struct alignas(128) ThreadState {
    std::vector<float> attention, delta;
    RouteScratch route;
    std::vector<Delta> deltas;
    std::vector<LinearCall> own;      // to which deltas point
    std::vector<float> norm_vectors;  // a weight and a bias
    size_t deltas_op = SIZE_MAX;  // the op in this step that `deltas` are of
    // Of a block of an expert's rows: x, x converted, results, and products with A.
    std::vector<float> expert_x, expert_y, expert_h;
    std::vector<uint8_t> expert_quantised;
    SampleScratch sample;
    std::array<double, std::variant_size_v<Op>> seconds{};
  };

  const Weight& weight(int32_t id) const;
  void check_op(const Op& op) const;
  // checks.cpp
  void check_columns(const Ref& ref, const char* what, bool optional) const;
  void check(const EmbedOp&) const;
  void check(const NormOp&) const;
  void check(const LinearOp&) const;
  void check(const PointwiseOp&) const;
  void check(const RopeRowsOp&) const;
  void check(const RopeOp&) const;
  void check(const AttentionOp&) const;
  void check(const MlaOp&) const;
  void check(const GatedDeltaOp&) const;
  void check(const RouteOp&) const;
  void check(const ExpertLinearOp&) const;
  void check(const CausalConvOp&) const;
  void check(const Mamba2Op&) const;
  void check(const TakeRowsOp&) const;
  States states_of(int32_t id) const;
  void plan_spans();
  void check_spans(const StepCounts& counts) const;
  bool has_logit_rows(const Ref& ref) const;
  void require_state(int32_t id, int64_t width) const;
  void require_same_rows(const Ref& out, std::initializer_list<const Ref*> others) const;
  bool overlap(const Ref& a, const Ref& b) const;
  void require_disjoint(const Ref& out, std::initializer_list<const Ref*> others, const char* why) const;
  void require_disjoint_or_equal(const Ref& out, std::initializer_list<const Ref*> others, const char* why) const;
  void require_vector(int32_t id, int64_t width, const char* why) const;
  void check_inputs(const StepCounts& counts) const;
  void prepare();
  void plan_adapters();
  void plan_attention(AttentionPlan& share) const;
  int32_t chunks_of(const Stage& stage);
  void work(int32_t phase, int32_t chunk, int thread);
  int32_t rows_of(const Ref& ref) const;
  float* row_of(const Buffer& buffer, int32_t row) const { return arena_.floats() + buffer.offset + row * buffer.stride; }
  Rows rows(const Ref& ref) const;
  bool rounded(const Ref& ref) const { return buffers_[static_cast<size_t>(ref.buffer)].rounded; }
  const AttentionPlan& plan_of(int32_t queries_per_kv) const;
  void add_attention(AttentionOp& op);
  void add_latent(const MlaOp& op);
  void add_plane(int32_t id, int32_t group, int64_t block_bytes);
  void add_plan(int32_t queries_per_kv, int64_t partial_row_floats, int64_t scratch_floats);
  void keep_tap(size_t op);

  // Each runs one chunk of a stage.
  void run_op(const EmbedOp&, const Stage&, int32_t chunk, ThreadState&);
  void run_op(const NormOp&, const Stage&, int32_t chunk, ThreadState&);
  void run_op(const LinearOp&, const Stage&, int32_t chunk, ThreadState&);
  void run_op(const PointwiseOp&, const Stage&, int32_t chunk, ThreadState&);
  void run_op(const RopeRowsOp&, const Stage&, int32_t chunk, ThreadState&);
  void run_op(const RopeOp&, const Stage&, int32_t chunk, ThreadState&);
  void run_op(const AttentionOp&, const Stage&, int32_t chunk, ThreadState&);
  void run_op(const MlaOp&, const Stage&, int32_t chunk, ThreadState&);
  void run_op(const GatedDeltaOp&, const Stage&, int32_t chunk, ThreadState&);
  void run_op(const RouteOp&, const Stage&, int32_t chunk, ThreadState&);
  void run_op(const ExpertLinearOp&, const Stage&, int32_t chunk, ThreadState&);
  void run_op(const CausalConvOp&, const Stage&, int32_t chunk, ThreadState&);
  void run_op(const Mamba2Op&, const Stage&, int32_t chunk, ThreadState&);
  void run_op(const TakeRowsOp&, const Stage&, int32_t chunk, ThreadState&);
  bool converts_x(int32_t weight, const Ref& x) const;
  std::vector<float> packed_bias(int32_t bias, int32_t matrix) const;
  // experts.cpp
  int32_t x_rows(const ExpertLinearOp& op) const { return op.x.width == weight(op.weight).inputs ? 1 : op.k(); }
  void reserve_routes(const RouteOp& op);
  void reserve_experts(const ExpertLinearOp& op);
  int32_t expert_chunks(const ExpertLinearOp& op, const Stage& stage) const;
  void group_by_expert(const ExpertLinearOp& op);
  void quantise(const ExpertLinearOp& op, int32_t chunk, int32_t chunks);
  void multiply_expert(const ExpertLinearOp& op, size_t index, int32_t expert, int32_t unit_lo, int32_t unit_hi, ThreadState&);
  int32_t expert_deltas(size_t index, int32_t expert, const int32_t* pairs, const LinearCall& base, int32_t k, int32_t panel_lo, ThreadState&) const;
  int32_t quantise_chunks(const LinearOp&) const;
  void quantise(const LinearOp&, int32_t chunk);
  const Weight& adapted_weight(const Op& op) const;
  // adapter_image.cpp
  std::unique_ptr<Adapter> make_adapter(const int64_t* table, int64_t parts, const ImageData& image) const;
  AdapterOp& op_of_part(Adapter& adapter, const AdapterPlace& place) const;
  void add_part(Adapter& adapter, const PartRow& row, const ImageData& image, SiteParts& site) const;
  void add_low_rank(AdapterOp&, const AdapterPlace&, const PartRow&, const ImageData&, const SiteParts&) const;
  void add_matrix_part(AdapterOp&, const AdapterPlace&, const PartRow&, const ImageData&, const SiteParts&) const;
  void add_gather(AdapterOp&, const AdapterPlace&, const PartRow&, const ImageData&, const SiteParts&) const;
  void add_columns(AdapterOp&, const AdapterPlace&, const PartRow&, const ImageData&, const SiteParts&) const;
  void multiply_scaled(Adapter& adapter, const AdapterPlace& place, const SiteParts& site) const;
  // adapters.cpp
  bool has_row(int32_t token, int32_t row, const StepCounts& counts) const;
  int32_t num_shrink_tasks(size_t op) const;
  void shrink(const AdapterOp& op, const Rows& x, float* h, float weight, int32_t count, int32_t format) const;
  void gather(const EmbedOp& op, const ActiveAdapter& active, int32_t lo, int32_t count, float* h) const;
  void append_deltas(const AdapterOp& op, const float& weight, const float* h, int32_t lo, int32_t hi, int32_t panel_lo,
                     const LinearCall& base, ThreadState& state) const;
  static LinearCall own_product(const AdapterOp& op, const AdapterExpand& expand, const float* h, int32_t lo, int32_t hi,
                                const LinearCall& base);
  static bool joins(ThreadState& state, const Delta& made, const LinearCall& own);
  void norm_vectors(size_t op, int32_t lo, int64_t width, NormCall& call, float* made) const;
  void run_shrink_task(const Stage&, int32_t number);
  void shrink_chunk(const Stage&, int32_t chunk);
  const std::vector<Delta>& deltas_of(size_t op, const LinearCall& base, ThreadState&) const;
  void attend_chunk(const AttentionCall&, int32_t group, bool merge, int32_t chunk, ThreadState&);
  void attend(const AttentionCall&, int32_t group, bool merge, int64_t pair, ThreadState&);
  AttentionCall call_of(const AttentionOp& op) const;
  int32_t attention_chunks(int32_t queries_per_kv, int32_t kv_heads, bool merge) const;
  // latent.cpp
  AttentionCall call_of(const MlaOp& op) const;
  int32_t chunks_of(const MlaOp& op, const Stage& stage);
  int64_t latent_units(const MlaOp& op, bool values) const;
  void multiply_heads(const MlaOp&, const Stage&, int32_t chunk, ThreadState&);
  const std::vector<Delta>& head_deltas(size_t op, int32_t head, bool values, ThreadState&) const;
  void add_latent_part(AdapterOp& op, const MlaOp& at, const PartRow& row, const ImageData& image) const;
  void shrink_heads(const MlaOp& op, const ActiveAdapter& active, int32_t lo, int32_t count, bool values);

  const Kernels* kernels_;
  Team team_;
  const Capacity capacity_;
  const int32_t kv_format_, groups_;
  std::vector<int32_t> max_distance_;  // per KV group, from a query's position to the earliest key that its ops read
  const bool debug_;
  bool sealed_ = false;
  std::vector<Buffer> buffers_;
  std::vector<Weight> weights_;
  std::vector<Op> ops_;
  std::vector<Plane> planes_;
  std::vector<State> states_;
  std::vector<StateSpan> spans_;                               // of this step
  std::vector<std::array<int32_t, 2>> spans_of_sequence_;  // per sequence: its range in spans_
  std::vector<AdapterPlace> places_;  // per site
  std::vector<std::unique_ptr<Adapter>> adapters_;
  std::vector<int32_t> free_slots_;
  Memory arena_;
  Memory quantised_x_;  // of the current product
  Memory absorbed_;     // of the current latent op: per token and head its query, then the mixed latents
  StepArrays in_{};
  StepCounts counts_;
  std::optional<Sampler> sampler_;  // set by `seal`
  int32_t logits_ = 0, token_rows_ = 0, position_rows_ = 0;
  int64_t planned_width_ = 0;
  std::vector<AttentionPlan> attention_plans_;
  std::vector<ThreadState> thread_states_;  // per thread
  std::vector<Stage> stages_;
  std::vector<ActiveAdapter> active_adapters_;
  std::vector<ActiveRange> active_of_op_;  // per op
  // Of the current op with experts: its pairs of row and place (t * k + place) by expert, ascending; where each expert's
  // begin; and the experts that have any.
  std::vector<int32_t> expert_pairs_, expert_starts_, used_experts_;
  std::vector<float> h_, partials_;
  int64_t partial_row_floats_ = 0;  // the most of any attention op
  bool timed_ = false;
  std::vector<std::vector<float>> taps_;
};

}  // namespace truffula

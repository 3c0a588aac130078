// A loaded program: weights, activations, cached keys and values, adapters, and the loop that runs the ops.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
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
};

// Ranks of the adapters at one op that the memory plan counts for every row (PLANNED_RANK of formats.py).
constexpr int32_t kPlannedRank = 256;

// The arrays that vary from step to step, owned by the caller (see kernels/inputs.py for shapes and meaning).
struct StepArrays {
  const int32_t *token_ids, *position, *rope_pos, *slot_mapping, *block_tables, *q_start, *kv_len, *seg, *seg_r;
  const float* seg_weight;
  const int32_t* logit_rows;
};

struct StepCounts {
  int32_t T = 0, N = 0, R = 0, G = 0;
};

// Throws std::invalid_argument unless a step of this size can be counted.
void check_capacity(const Capacity& capacity);

// One owner. Made in this order: buffers, weights, ops; then `seal`. Every number that comes from outside is checked
// where it enters: what fails throws std::invalid_argument and leaves nothing half done.
class Executable {
 public:
  Executable(const std::string& isa, int threads, const Capacity& capacity, int32_t kv_format, int32_t groups,
             bool debug);

  // Load
  void add_buffer(const Buffer& buffer);
  int32_t add_vector(const float* values, int64_t count);
  int32_t add_matrix(int64_t outputs, int64_t inputs, int32_t format, bool panels, int64_t half);
  // The rounding is that of this part: nothing is lost where `source` is not brought to a quantised format.
  Rounding fill_matrix(int32_t weight, const Source& source, int64_t rows, int64_t first);
  void add(Op op);
  void seal(const StepArrays& arrays, int64_t arena_floats, int32_t logits_buffer, int64_t vocab);

  // A step
  void run(const StepCounts& counts);
  const float* logits_row(int32_t row) const { return row_of(buffers_[static_cast<size_t>(logits_)], row); }
  int64_t logits_stride() const { return buffers_[static_cast<size_t>(logits_)].stride; }
  int32_t logit_rows() const { return counts_.R; }
  // Chooses or scores an id for each row of the last run's logits. `args` and `out` hold at least R rows.
  // `begin_sample` goes before: it throws when `args` are wrong, and gives the width that `out` has.
  int32_t begin_sample(const SampleArgs& args);
  void sample(const SampleArgs& args, const SampleOut& out);
  Sampler& sampler();
  std::vector<float> tap(int32_t op) const;
  int32_t tap_width(int32_t op) const;

  // Adapters
  int32_t add_adapter(int64_t bytes);  // all that its ops will hold
  void add_adapter_op(int32_t slot, int32_t op, const std::vector<Source>& a, const std::vector<int64_t>& ranks,
                      const std::vector<float>& scales, const std::vector<int32_t>& expand_of,
                      const std::vector<Source>& b, const std::vector<int64_t>& outputs,
                      const std::vector<int64_t>& first_output);
  void drop_adapter(int32_t slot);

  // Per kind of op, seconds of work since the last call, of all threads together. The first call begins to measure.
  std::array<double, std::variant_size_v<Op>> take_seconds();
  Team& team() { return team_; }
  const Kernels& kernels() const { return *kernels_; }
  size_t num_ops() const { return ops_.size(); }

 private:
  struct Item {
    int32_t sequence, t, count, position;
    int32_t part = kNothing;   // a single partition of it, or all
    int64_t partial = 0;       // where its result goes, in rows of partial results
    bool first = true;         // of its partitions
  };
  struct Share {  // attention items for ops whose kv heads each serve so many heads
    int32_t heads;
    std::vector<Item> items;
    int64_t partial_rows = 0;  // of all items that are single partitions, per kv head
  };
  // One stage of an op: what the team goes through in order.
  struct Stage {
    uint32_t op;
    int32_t number;
  };
  // An adapter that acts at one op in this step: rows lo .. hi, and where its h lies.
  struct Active {
    const AdapterOp* op;
    int32_t lo, hi, first;  // rows; the first of its stretches
    float weight;
    int64_t h;
  };
  // What one thread has of its own.
  struct alignas(128) Local {
    std::vector<float> attention;
    std::vector<Delta> deltas;
    size_t deltas_of = SIZE_MAX;  // the op they were put together for in this step
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
  void check(const TakeRowsOp&) const;
  bool of_logits(const Ref& ref) const;
  void same_rows(const Ref& out, std::initializer_list<const Ref*> others) const;
  bool overlap(const Ref& a, const Ref& b) const;
  void apart(const Ref& out, std::initializer_list<const Ref*> others, const char* why) const;
  void apart_or_equal(const Ref& out, std::initializer_list<const Ref*> others, const char* why) const;
  const float* vector_of(int32_t id, int64_t width, const char* why) const;
  void check_inputs(const StepCounts& counts) const;
  void prepare();
  void plan_adapters();
  void plan_attention(Share& share) const;
  int32_t chunks_of(const Stage& stage);
  void work(int32_t phase, int32_t chunk, int thread);
  int32_t rows_of(const Ref& ref) const;
  float* row_of(const Buffer& buffer, int32_t row) const { return arena_.floats() + buffer.offset + row * buffer.stride; }
  Rows rows(const Ref& ref) const;
  bool rounded(const Ref& ref) const { return buffers_[static_cast<size_t>(ref.buffer)].rounded; }
  const Share& share_of(const AttentionOp& op) const;
  void keep_tap(size_t op);

  // One chunk of a stage.
  void run_op(const EmbedOp&, const Stage&, int32_t chunk, Local&);
  void run_op(const NormOp&, const Stage&, int32_t chunk, Local&);
  void run_op(const LinearOp&, const Stage&, int32_t chunk, Local&);
  void run_op(const PointwiseOp&, const Stage&, int32_t chunk, Local&);
  void run_op(const RopeRowsOp&, const Stage&, int32_t chunk, Local&);
  void run_op(const RopeOp&, const Stage&, int32_t chunk, Local&);
  void run_op(const AttentionOp&, const Stage&, int32_t chunk, Local&);
  void run_op(const TakeRowsOp&, const Stage&, int32_t chunk, Local&);
  bool converts_x(const LinearOp& op) const;
  int32_t quantise_chunks(const LinearOp&) const;
  void quantise(const LinearOp&, int32_t chunk);
  int32_t shrinks_of(size_t op) const;
  void shrink(const LinearOp&, size_t op, int32_t number);
  const std::vector<Delta>& deltas_of(size_t op, Local&) const;
  void attend(const AttentionOp&, bool merge, int64_t pair, Local&);
  AttentionCall call_of(const AttentionOp& op) const;

  const Kernels* kernels_;
  Team team_;
  const Capacity capacity_;
  const int32_t kv_format_, groups_;
  std::vector<int32_t> reach_;  // per KV group, how far before its own position a query of one of its ops reads keys
  const bool debug_;
  bool sealed_ = false;
  std::vector<Buffer> buffers_;
  std::vector<Weight> weights_;
  std::vector<Op> ops_;
  std::vector<Plane> planes_;
  std::vector<std::unique_ptr<Adapter>> adapters_;
  std::vector<int32_t> free_slots_;
  Memory arena_;
  Memory quantised_x_;  // of the product at hand
  StepArrays in_{};
  StepCounts counts_;
  std::optional<Sampler> sampler_;  // once sealed
  int32_t logits_ = 0, token_rows_ = 0, position_rows_ = 0;
  std::vector<Share> shares_;
  std::vector<Local> locals_;  // per thread
  std::vector<Stage> stages_;
  std::vector<Active> actives_;
  std::vector<std::array<int32_t, 2>> actives_of_;  // per op: from .. to in actives_
  std::vector<float> h_, partials_;
  int64_t partial_row_floats_ = 0;  // at most, over the attention ops
  bool timed_ = false;
  std::vector<std::vector<float>> taps_;
};

}  // namespace truffula

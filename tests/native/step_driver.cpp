// Runs steps of a small program without Python: prefill, long contexts in partitions, adapters, a quantised product,
// experts, latent attention, sequence states, sampling. Checks that nothing is allocated after the largest step, and by
// worker threads never (they cannot pass an exception on); and that equal steps give equal bits, whatever ran between
// and with any number of threads. Thread sanitizer checks the accesses of the threads.
#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#include "dispatch.h"
#include "executable.h"

namespace {

std::atomic<long> allocations{0}, allocations_of_workers{0};
thread_local bool is_main = false;

void count_one() {
  allocations.fetch_add(1);
  if (!is_main) allocations_of_workers.fetch_add(1);
}

void* counted(std::size_t bytes) {
  count_one();
  return std::malloc(bytes ? bytes : 1);
}

}  // namespace

void* operator new(std::size_t bytes) {
  if (void* made = counted(bytes)) return made;
  throw std::bad_alloc();
}
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept { return counted(bytes); }
void* operator new(std::size_t bytes, std::align_val_t align) {
  count_one();
  const auto to = static_cast<std::size_t>(align);
  if (void* made = std::aligned_alloc(to, (bytes + to - 1) / to * to)) return made;
  throw std::bad_alloc();
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete(void* p, const std::nothrow_t&) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

namespace truffula {
namespace {

constexpr int32_t kTokens = 32, kSeqs = 4, kLogitRows = 8, kBlocks = 192, kSize = 16, kTable = 48, kVocab = 512;
constexpr Capacity kCapacity{kTokens, kSeqs, kLogitRows, 4, kBlocks, kSize, kTable, kSeqs + 1};
// Stacked experts of 64 inputs, of gate and up for 32; latent heads.
constexpr int32_t kExperts = 8, kChosen = 2, kInner = 32;
constexpr LatentOrder kLatent{2, 16, 16};
constexpr int32_t kLatentRank = 24, kRotated = 8;

std::vector<float> random_floats(int64_t count, uint32_t seed) {
  std::vector<float> made(static_cast<size_t>(count));
  for (float& number : made) number = static_cast<float>(static_cast<int32_t>(seed = seed * 1664525u + 1013904223u)) * 0x1p-33f;
  return made;
}

int32_t add_matrix(Executable& e, int64_t outputs, int64_t inputs, int32_t format, bool panels) {
  const int32_t id = e.add_matrix(outputs, inputs, format, panels, 0);
  const std::vector<float> values = random_floats(outputs * inputs, static_cast<uint32_t>(id) + 1);
  e.fill_matrix(id, {values.data(), Stored::kFloat32, inputs}, outputs, 0);
  return id;
}

int32_t add_vector(Executable& e, int64_t count, float by) {
  std::vector<float> values = random_floats(count, 77);
  for (float& number : values) number = by * (0.5f + number);
  return e.add_vector(values.data(), count);
}

// An op that multiplies `x` by a new matrix and, where `add` is set, adds the result to `out`.
LinearOp linear(Executable& e, const Ref& x, const Ref& out, bool add) {
  LinearOp op;
  op.x = x, op.out = out, op.weight = add_matrix(e, out.width, x.width, kBF16, true);
  if (add) op.residual = out;
  return op;
}

constexpr std::array<int64_t, 11> kStrides{64, 64, 128, 16, 64, 96, 64, 64, 64, 64, kVocab};
constexpr bool logit_rows(size_t buffer) { return buffer >= kStrides.size() - 2; }

// Experts: of each row two of eight, with gates and ups, in the first of which adapters act.
void add_experts(Executable& e) {
  const Ref x{0, 0, 64}, logits{5, 0, kExperts}, routes{6, 0, 2 * kChosen}, inner{7, 0, kChosen * kInner};
  const int32_t in = e.add_matrix(2 * kInner, 64, kBF16, true, kInner, kExperts), out = e.add_matrix(64, kInner, kQ8_0, true, 0, kExperts);
  for (int32_t expert = 0; expert < kExperts; ++expert) {
    const std::vector<float> values = random_floats(2 * kInner * 64, static_cast<uint32_t>(expert) + 50);
    e.fill_matrix(in, {values.data(), Stored::kFloat32, 64}, 2 * kInner, 0, expert);
    e.fill_matrix(out, {values.data(), Stored::kFloat32, kInner}, 64, 0, expert);
  }
  e.add(linear(e, x, logits, false));
  RouteOp route;
  route.logits = logits, route.out = routes, route.k = kChosen, route.correction = add_vector(e, kExperts, 0.1f);
  route.groups = 2, route.topk_groups = 1, route.group_score = kTopTwo, route.norm = 1.0f;
  e.add(route);
  ExpertLinearOp experts;
  experts.x = x, experts.routes = routes, experts.out = inner, experts.weight = in, experts.glu = true;
  experts.activation = kSilu;
  e.add(experts);
  experts = {};
  experts.x = inner, experts.routes = routes, experts.out = experts.residual = x, experts.weight = out;
  experts.combine = kWeightedSum;
  e.add(experts);
  route.score = kSparsemixer, route.groups = 1, route.correction = kAbsent, route.jitter = 0.01f;  // not used
  route.out = {6, 2 * kChosen, 2 * kChosen};
  e.add(route);
}

void add_latent(Executable& e) {
  const int32_t kv_b = e.add_latent_matrix(kLatent, kLatentRank, kBF16);
  const std::vector<float> values = random_floats(kLatent.outputs() * kLatentRank, 9);
  e.fill_matrix(kv_b, {values.data(), Stored::kFloat32, kLatentRank}, kLatent.outputs(), 0);
  MlaOp op;
  op.heads = kLatent.heads, op.nope = kLatent.keys, op.rope = kRotated, op.dim_v = kLatent.values, op.rank = kLatentRank;
  op.q = {5, 0, op.heads * (op.nope + op.rope)}, op.latent = {5, op.q.width, op.width()};
  op.out = {6, 0, op.heads * op.dim_v}, op.kv_b = kv_b, op.plane = 2, op.scale = 0.2f;
  e.add(linear(e, {0, 0, 64}, {5, 0, op.q.width + op.width()}, false));
  e.add(op);
  e.add(linear(e, op.out, {0, 0, 64}, true));
}

// A causal convolution, a Mamba-2 scan of its result, and a gated delta rule over that.
void add_states(Executable& e) {
  constexpr int32_t heads = 4, width = 16, size = 8;
  e.add_state(2 * 64);
  e.add_state(heads * width * size);
  e.add_state(heads * size * width);
  CausalConvOp conv;
  conv.x = {0, 0, 64}, conv.out = {6, 0, 64}, conv.weight = add_vector(e, 3 * 64, 1.0f), conv.state = 0, conv.activation = kSilu;
  e.add(conv);
  e.add(linear(e, {0, 0, 64}, {5, 0, 60}, false));
  Mamba2Op scan;
  scan.x = conv.out, scan.b = {5, 0, size}, scan.c = {5, size, size}, scan.dt = {5, 2 * size, heads}, scan.out = {7, 0, 64};
  scan.heads = heads, scan.head_dim = width, scan.groups = 1, scan.state_size = size, scan.state = 1;
  scan.rate = add_vector(e, heads, -1.0f), scan.dt_bias = scan.skip = add_vector(e, heads, 1.0f), scan.dt_limit = {0.0f, 9.0f};
  e.add(scan);
  GatedDeltaOp delta;
  delta.q = {5, 20, 2 * size}, delta.k = {5, 36, 2 * size}, delta.v = scan.out, delta.decay = {5, 52, heads}, delta.beta = {5, 56, heads};
  delta.out = {8, 0, 64}, delta.state = 2, delta.rate = scan.rate, delta.dt_bias = scan.dt_bias, delta.heads = heads;
  delta.key_heads = 2, delta.dim_k = size, delta.dim_v = width, delta.scale = 0.3f, delta.eps = 1e-6f;
  e.add(delta);
  e.add(linear(e, delta.out, {0, 0, 64}, true));
}

// A program with every op. The table and ops 3, 6, 9 (its first two experts, of one with gate and up apart) and 13 take
// adapters.
void add_program(Executable& e) {
  int64_t at = 0;
  for (size_t b = 0; b < kStrides.size(); ++b) {
    e.add_buffer({at, kStrides[b], logit_rows(b), false});
    at += kStrides[b] * (logit_rows(b) ? kLogitRows : kTokens);
  }
  const int32_t table = add_matrix(e, kVocab, 64, kBF16, false), qkv = add_matrix(e, 128, 64, kQ8_0, true);
  const int32_t o = add_matrix(e, 64, 64, kBF16, true), head = add_matrix(e, kVocab, 64, kF32, true);
  RopeRowsOp rope_rows;
  rope_rows.inv_freq.assign(8, 0.01f), rope_rows.out = {3, 0, 16};
  e.add(rope_rows);
  EmbedOp embed;
  embed.table = table, embed.out = {0, 0, 64};
  e.add(embed);
  NormOp norm;
  norm.x = {0, 0, 64}, norm.out = {1, 0, 64}, norm.eps = 1e-5f;
  e.add(norm);
  LinearOp product;
  product.x = {1, 0, 64}, product.out = {2, 0, 128}, product.weight = qkv;
  e.add(product);
  e.add(RopeOp{{2, 0, 96}, {3, 0, 16}, 6, 16, 0, 16, 0});
  AttentionOp attention;
  attention.q = {2, 0, 64}, attention.k = {2, 64, 32}, attention.v = {2, 96, 32}, attention.out = {4, 0, 64};
  attention.heads = 4, attention.kv_heads = 2, attention.dim_k = attention.dim_v = 16, attention.planes = {0, 1};
  attention.scale = 0.25f;
  e.add(attention);
  LinearOp output;
  output.x = {4, 0, 64}, output.out = {0, 0, 64}, output.residual = {0, 0, 64}, output.weight = o;
  e.add(output);
  add_experts(e);
  add_latent(e);
  add_states(e);
  e.add(TakeRowsOp{{0, 0, 64}, {9, 0, 64}});
  LinearOp logits;
  logits.x = {9, 0, 64}, logits.out = {10, 0, kVocab}, logits.weight = head;
  e.add(logits);
}

constexpr int64_t arena_floats() {
  int64_t floats = 0;
  for (size_t b = 0; b < kStrides.size(); ++b) floats += kStrides[b] * (logit_rows(b) ? kLogitRows : kTokens);
  return floats;
}

// The arrays of StepInputs (kernels/inputs.py).
struct Inputs {
  std::array<int32_t, kTokens> token_ids{}, position{}, rope_pos{}, rope_length{}, slots{}, logit_rows{};
  std::array<int32_t, kSeqs * kTable> tables{};
  std::array<int32_t, kSeqs + 1> q_start{};
  std::array<int32_t, kSeqs> kv_len{}, state_in{}, state_out{};
  std::array<int32_t, 12> seg{};
  std::array<int32_t, 8> seg_r{};
  std::array<float, 4> weight{1, 1, 1, 1};
  StepCounts counts;

  StepArrays arrays() const {
    return {token_ids.data(), position.data(), rope_pos.data(), rope_length.data(), slots.data(), tables.data(),
            q_start.data(), kv_len.data(), seg.data(), seg_r.data(), weight.data(), logit_rows.data(), q_start.data(), state_in.data(),
            state_out.data()};  // a span is a whole sequence
  }

  // A step of sequences with `rows` rows after `contexts` keys; the first two have an adapter each.
  void fill(const std::array<int32_t, kSeqs>& rows, const std::array<int32_t, kSeqs>& contexts, int32_t slot) {
    counts = {0, kSeqs, kSeqs, 2, kSeqs};
    for (int32_t n = 0; n < kSeqs; ++n) {
      const auto s = static_cast<size_t>(n);
      q_start[s] = counts.T;
      kv_len[s] = contexts[s] + rows[s];
      state_out[s] = n + 1;  // from zeros, so that equal steps are equal
      for (int32_t b = 0; b < kTable; ++b) tables[s * kTable + static_cast<size_t>(b)] = n * kTable + b;
      for (int32_t i = 0; i < rows[s]; ++i, ++counts.T) {
        const auto t = static_cast<size_t>(counts.T);
        position[t] = rope_pos[t] = contexts[s] + i;
        token_ids[t] = (7 * position[t] + n) % kVocab;
        slots[t] = (n * kTable + position[t] / kSize) * kSize + position[t] % kSize;
      }
      logit_rows[s] = counts.T - 1;
    }
    q_start[kSeqs] = counts.T;
    for (int32_t g = 0; g < 2; ++g) {
      const auto at = static_cast<size_t>(g);
      seg[3 * at] = q_start[at], seg[3 * at + 1] = q_start[at + 1], seg[3 * at + 2] = slot + g;
      seg_r[2 * at] = g, seg_r[2 * at + 1] = g + 1;
    }
  }
};

// Where adapters act: {op, first output, outputs, expert, inputs}.
constexpr std::array<std::array<int64_t, 5>, 7> kSites{{{1, 0, 64, 0, kVocab},
                                                        {3, 0, 128, 0, 64},
                                                        {6, 0, 64, 0, 64},
                                                        {9, 0, kInner, 0, 64},
                                                        {9, kInner, kInner, 0, 64},
                                                        {9, 0, 2 * kInner, 1, 64},
                                                        {13, 0, kLatent.heads * (kLatent.keys + kLatent.values), 0, kLatentRank}}};

// Adds an adapter at the first `sites` of them and at the last, packed as by kernels/cpu/pack.py; `image` owns its bytes.
constexpr int64_t kScaledRank = 20;
int32_t add_adapter(Executable& e, int64_t rank, size_t sites, Memory& image) {
  const int64_t place = 64 * 4 * 64 * 8;  // bytes, for any tensor of these
  image = Memory(static_cast<size_t>(40 * place));
  std::vector<PartRow> rows;
  int64_t at = 0;
  const auto add = [&](int64_t outputs, int64_t inputs, bool table, int64_t latent, Form form) {
    const std::vector<float> values = random_floats(outputs * inputs, static_cast<uint32_t>(at) + 5);
    const PanelOrder order{outputs, 0};
    const int64_t bytes = latent ? latent : table ? outputs * inputs * 4
                          : form == Form::kRows ? rows_bytes(kF32, inputs, outputs) : order.panels() * panel_bytes(kF32, inputs);
    if (latent)  // any numbers, in whatever order
      for (int64_t at_byte = 0; at_byte < bytes; at_byte += 64) std::memcpy(image.data() + at + at_byte, values.data(), 64);
    else if (table) std::memcpy(image.data() + at, values.data(), static_cast<size_t>(bytes));
    else pack_rows({values.data(), Stored::kFloat32, inputs}, 0, outputs, image.data() + at, kF32, 0, order, form);
    const TensorColumns made{0, at, bytes, {outputs, inputs, 0}};
    at += place;
    return made;
  };
  const auto panels = [](int64_t outputs, int64_t inputs) { return LatentOrder::panels_of(outputs) * panel_bytes(kF32, inputs); };
  for (size_t i = 0; i < kSites.size(); ++i) {
    if (i >= sites && i + 1 < kSites.size()) continue;
    const auto& [op, first, outputs, expert, inputs] = kSites[i];
    const bool latent = i + 1 == kSites.size();
    const int64_t a_bytes = latent ? rows_bytes(kF32, inputs, rank) + panels(inputs, rank) : 0;
    const int64_t b_bytes = latent ? kLatent.heads * (rows_bytes(kF32, kLatent.keys, rank) + panels(kLatent.values, rank)) : 0;
    const TensorColumns a = add(rank, inputs, i == 0, a_bytes, Form::kRows);
    const auto site = static_cast<int64_t>(i);
    rows.push_back({site, kLowRank, 0.5, a, add(outputs, rank, false, b_bytes, Form::kColumns)});
    if (rank < kScaledRank) continue;  // this one has all other kinds as well
    const auto vector = [&](int64_t count, int64_t width) {
      TensorColumns made = add(1, count, true, 0, Form::kWhole);
      made.shape[0] = width, made.shape[1] = 0;
      return made;
    };
    const int64_t lanes = latent ? kLatent.heads * LatentOrder::panels_of(kLatent.values) * kLanes : LatentOrder::panels_of(outputs) * kLanes;
    const int64_t keys = latent ? scaled_row_floats(kLatent.heads * kLatent.keys) : 0;
    rows.push_back({site, kColumnScale, 1.0, vector(keys + lanes, outputs), {}});
    rows.push_back({site, kBias, 1.0, vector(lanes, outputs), {}});
    if (latent || i == 0) continue;
    rows.push_back({site, kInputScale, 1.0, vector(inputs, inputs), {}});
    if (i % 2) rows.push_back({site, kReplace, 1.0, add(outputs, inputs, false, 0, Form::kWhole), {}});
  }
  std::vector<int64_t> table(rows.size() * kPartColumns);
  std::memcpy(table.data(), rows.data(), rows.size() * sizeof(PartRow));
  return e.add_adapter(table.data(), static_cast<int64_t>(rows.size()), {image.data(), static_cast<int64_t>(image.size())});
}

// Sequences with different sampling parameters. Every step draws the same token of each again.
struct Sampling {
  std::array<int32_t, kSeqs> row_slot{0, 1, 2, 3}, target{-1, -1, -1, -1}, mask_row{-1, -1, 0, -1};
  std::array<uint32_t, kSeqs> draw{0, 3, 0, 0};
  std::array<uint32_t, kVocab / 32> mask{};
  std::array<int32_t, kSeqs> ids{};
  std::array<float, kSeqs> logprob{};
  std::array<uint8_t, kSeqs> finite{};
  std::array<int32_t, 3 * kSeqs> top_ids{};
  std::array<float, 3 * kSeqs> top_logprobs{};

  explicit Sampling(Executable& e) {
    mask.fill(0xFFFFFFF0u);
    std::array<SequenceSampling, kSeqs> of{};
    of[1].temperature = 0.8f, of[1].top_p = 0.9f, of[1].repetition = 1.1f, of[1].n_logprobs = 3;
    of[2].temperature = 1.0f, of[2].min_p = 0.01f, of[2].top_k = 20, of[2].n_logprobs = 0;
    of[3].temperature = 1.0f, of[3].typical_p = 0.9f, of[3].n_logprobs = 3;
    const std::array<int32_t, 3> seen{3, 9, 9};
    for (int32_t slot = 0; slot < kSeqs; ++slot) {
      of[static_cast<size_t>(slot)].seed = static_cast<uint64_t>(slot) + 1;
      e.sampler().set_sequence(slot, std::make_unique<SequenceState>(of[static_cast<size_t>(slot)], seen, seen, kVocab));
    }
  }

  void run(Executable& e) {
    const SampleArgs args{row_slot.data(), target.data(), draw.data(), mask_row.data(), mask.data(), 1};
    const SampleOut out{ids.data(), logprob.data(), finite.data(), top_ids.data(), top_logprobs.data(), 3};
    if (e.begin_sample(args) != out.width) throw std::logic_error("another width");
    e.sample(args, out);
  }
};

struct Outcome {
  std::array<std::array<float, kVocab>, kSeqs> logits;
  std::array<int32_t, kSeqs> ids;
};

void step(Executable& e, const Inputs& inputs, Sampling& sampling, Outcome& outcome) {
  e.run(inputs.counts);
  sampling.run(e);
  for (int32_t r = 0; r < kSeqs; ++r)
    std::memcpy(outcome.logits[static_cast<size_t>(r)].data(), e.logits_row(r), sizeof outcome.logits[0]);
  outcome.ids = sampling.ids;
}

// Returns the number of allocations in `rounds` steps after two of each kind, or -1 when equal steps differed. `hash`
// is that of the results, which is the same with any number of threads and in all tables with fused products.
long drive(const char* table, int threads, int rounds, uint64_t& hash) {
  Executable e(table, threads, kCapacity, kBF16, 1, false);
  add_program(e);
  Inputs inputs;
  for (size_t i = 0; i < kSites.size(); ++i)
    e.add_site(static_cast<int32_t>(i), static_cast<int32_t>(kSites[i][0]), kSites[i][1], kSites[i][2], kSites[i][3]);
  e.seal(inputs.arrays(), arena_floats(), kStrides.size() - 1, kVocab, kPlannedRank);
  Memory images[2];
  const int32_t slot = add_adapter(e, 8, kSites.size(), images[0]);
  add_adapter(e, 24, 4, images[1]);  // of the first expert its gate alone
  Sampling sampling(e);
  const std::array<int32_t, kSeqs> kinds[][2] = {
      {{1, 1, 1, 1}, {600, 700, 30, 520}}, {{20, 1, 4, 1}, {0, 700, 600, 530}}, {{1, 8, 1, 1}, {17, 0, 640, 700}}};
  std::vector<Outcome> first(3);
  Outcome now;
  long before = 0;
  for (int round = 0; round < rounds + 6; ++round) {
    if (round == 6) before = allocations.load();
    const auto kind = static_cast<size_t>(round % 3);
    inputs.fill(kinds[kind][0], kinds[kind][1], slot);
    step(e, inputs, sampling, round < 6 ? first[kind] : now);
    // From the second step of each kind on, all keys have been written and results must not change.
    if (round >= 6 && std::memcmp(&now, &first[kind], sizeof now) != 0) return -1;
  }
  const long made = allocations.load() - before + allocations_of_workers.load();
  hash = 14695981039346656037u;
  const auto* bytes = reinterpret_cast<const unsigned char*>(first.data());
  for (size_t at = 0; at < first.size() * sizeof first[0]; ++at) hash = (hash ^ bytes[at]) * 1099511628211u;
  return made;
}

}  // namespace
}  // namespace truffula

int main(int count, char** arguments) {
  is_main = true;
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 300;
  const char* table = count > 2 ? arguments[2] : "portable";
  uint64_t hashes[3] = {};
  for (int i = 0; i < 3; ++i) {
    const int threads = 1 << i;
    const long made = truffula::drive(table, threads, rounds, hashes[i]);
    if (made != 0) {
      std::printf(made < 0 ? "%d threads: equal steps gave different bits\n"
                           : "%d threads: %ld allocations in %d steps\n", threads, made, rounds);
      return 1;
    }
  }
  if (hashes[1] != hashes[0] || hashes[2] != hashes[0]) {
    std::puts("the bits depend on the number of threads");
    return 1;
  }
  std::printf("done: %s %016llx\n", table, static_cast<unsigned long long>(hashes[0]));
}

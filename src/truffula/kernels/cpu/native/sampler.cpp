// The sampler's methods:
//
//   scan        one pass over the logits: maxima of blocks of 64, the argmax, and whether all is finite.
//   draw        exp of the scores, summed block by block; the sums give the block of the draw, then its weights the id.
//   top-k       the k-th largest score is at least the k-th largest block maximum: blocks below that are skipped.
//   top-p       a few hundred of the best usually reach the mass; otherwise a quickselect by mass over all.
//   min-p       a threshold.
//   typical-p   top-p with another rank.
#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "philox.h"
#include "sampler_items.h"

namespace truffula {
namespace {

using std::int32_t;
using std::int64_t;
using std::size_t;
using std::uint32_t;

// A double beyond float's range becomes an infinity when cast.
static_assert(std::numeric_limits<float>::is_iec559 && std::numeric_limits<double>::is_iec559);

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kBlock = kSampleBlock;
constexpr int64_t kRun = 8;             // finer maxima, for a k near the number of blocks or above
constexpr int64_t kUsuallyEnough = 256;  // ids that top-p tries first

constexpr int64_t blocks_of(int64_t size) { return (size + kBlock - 1) / kBlock; }

// A row's values (float logits, or double values after penalties and bias), and their scores. Scores ascend with
// values, but distinct values may have equal scores, so ids are ordered by score.
template <class T>
struct View {
  const T* values;
  const T* maxima;  // per block
  int64_t size;
  double best;         // subtracted first, against overflow with a small temperature
  double temperature;  // then divided by

  double score(double value) const { return (value - best) / temperature; }
  double score_of(int32_t id) const { return score(static_cast<double>(values[id])); }
};

// The largest value and its id (the lowest of several). `valid`: all values are finite or -Inf.
struct Peak {
  int32_t id;
  double value;
  bool valid;
};

// ------------------------------------------------------------------------------------------------ all of a vocabulary

int32_t full_maxima(const SampleLoops& loops, const float* x, int64_t blocks, float* out) {
  return loops.maxima_f32(x, blocks, out);
}
int32_t full_maxima(const SampleLoops& loops, const double* x, int64_t blocks, double* out) {
  return loops.maxima_f64(x, blocks, out);
}

template <class T>
Peak scan(const T* values, int64_t size, std::vector<T>& maxima, const SampleLoops& loops) {
  const int64_t full = size / kBlock;
  maxima.resize(static_cast<size_t>(blocks_of(size)));
  bool valid = full_maxima(loops, values, full, maxima.data()) != 0;
  if (full * kBlock < size) {
    T most = -std::numeric_limits<T>::infinity();
    for (int64_t i = full * kBlock; i < size; ++i) {
      most = values[i] > most ? values[i] : most;
      valid = valid && !std::isnan(values[i]);
    }
    maxima.back() = most;
  }
  if (!valid) return {0, 0.0, false};
  const auto block = std::max_element(maxima.begin(), maxima.end());
  const T* place = std::find(values + (block - maxima.begin()) * kBlock, values + size, *block);
  return {static_cast<int32_t>(place - values), *block, *block < std::numeric_limits<T>::infinity()};
}

// Writes the sums of exp(score) of the blocks from `first` on to `sums`, and the weights of the last block to
// `weights`.
template <class T>
void weigh_blocks(const View<T>& view, int64_t first, int64_t blocks, double* weights, double* sums,
                  const SampleLoops& loops) {
  const auto weigh = [&](const T* x, int64_t count, double* out) {
    if constexpr (sizeof(T) == sizeof(float)) loops.weigh_f32(x, count, view.best, view.temperature, weights, out);
    else loops.weigh_f64(x, count, view.best, view.temperature, weights, out);
  };
  const int64_t full = std::min(blocks, view.size / kBlock - first);
  if (full > 0) weigh(view.values + first * kBlock, full, sums);
  if (full < blocks) {
    T padded[kBlock];
    std::fill(padded, padded + kBlock, -std::numeric_limits<T>::infinity());
    std::copy(view.values + (first + full) * kBlock, view.values + view.size, padded);
    weigh(padded, 1, sums + full);
  }
}

// The sum of exp(score) over all ids. `sums` receives the sum of each block.
template <class T>
double total_weight(const View<T>& view, std::vector<double>& sums, const SampleLoops& loops) {
  double weights[kBlock], total = 0.0;
  sums.resize(static_cast<size_t>(blocks_of(view.size)));
  weigh_blocks(view, 0, blocks_of(view.size), weights, sums.data(), loops);
  for (const double sum : sums) total += sum;
  return total;
}

// A score that at least k ids reach: the k-th largest of the maxima of disjoint runs of ids. -inf with fewer than k
// runs.
template <class T>
double reached_by(const View<T>& view, int64_t k, std::vector<double>& pivots) {
  pivots.clear();
  if (k <= blocks_of(view.size)) {
    pivots.assign(view.maxima, view.maxima + blocks_of(view.size));
  } else if (k <= view.size / kRun) {
    for (const T* run = view.values; run + kRun <= view.values + view.size; run += kRun) {
      T most = run[0];
      for (int64_t i = 1; i < kRun; ++i) most = run[i] > most ? run[i] : most;
      pivots.push_back(static_cast<double>(most));
    }
  } else {
    return -kInfinity;
  }
  const auto kth = pivots.begin() + (k - 1);
  std::nth_element(pivots.begin(), kth, pivots.end(), std::greater<>());
  return view.score(*kth);
}

// All ids above -inf whose score reaches `threshold`, ascending.
template <class T>
void gather(const View<T>& view, double threshold, Items& items) {
  items.clear();
  for (int64_t b = 0; b < blocks_of(view.size); ++b) {
    if (!(view.score(static_cast<double>(view.maxima[b])) >= threshold)) continue;
    for (int64_t i = b * kBlock; i < std::min((b + 1) * kBlock, view.size); ++i) {
      const double score = view.score(static_cast<double>(view.values[i]));
      if (score >= threshold && score > -kInfinity) items.push_back({score, 0.0, static_cast<int32_t>(i)});
    }
  }
}

// ------------------------------------------------------------------------------------------------ one row

struct Row {
  const SequenceSampling& sampling;
  const SequenceState& sequence;
  const SampleArgs& args;
  const SampleOut& out;
  SampleScratch& scratch;
  const SampleLoops& loops;
  int64_t index;
  const uint32_t* mask;  // null: every id is allowed

  double temperature() const { return sampling.temperature; }
  bool greedy() const { return sampling.temperature == 0.0f; }
  bool scored() const { return args.target[index] >= 0; }
  int32_t n_logprobs() const { return scored() ? sampling.n_prompt_logprobs : sampling.n_logprobs; }
  bool reported() const { return n_logprobs() >= 0; }
  bool warped() const { return sampling.warped && !scored(); }
  bool few(int64_t vocab) const { return sampling.top_k > 0 && sampling.top_k < vocab; }
  bool bans() const { return args.draw[index] < sampling.min_tokens && !sampling.banned_ids.empty(); }
  bool edited() const {
    return mask != nullptr || bans() || !sampling.bias_ids.empty() || !sequence.seen_ids().empty();
  }
  bool allows(int64_t id) const { return mask == nullptr || ((mask[id / 32] >> (id % 32)) & 1) != 0; }
};

// The fewest best ids whose probabilities reach `top_p` (Holtzman et al. 2020, "The curious case of neural text
// degeneration"), of all, whose weights sum to `total`: wider and wider, since a few hundred nearly always do.
template <class T>
void keep_top_p_of_all(const View<T>& view, const Row& row, double total, double top_p) {
  SampleScratch& s = row.scratch;
  for (const int64_t k : {kUsuallyEnough, view.size / (4 * kRun), view.size}) {
    gather(view, k < view.size ? reached_by(view, std::max(k, int64_t{1}), s.pivots) : -kInfinity, s.items);
    weigh_items(s.items, 0.0, row.loops);
    for (SampleItem& item : s.items) item.weight /= total;
    if (keep_mass(s.items, s.order, top_p)) return;
  }
}

// Applies top-k, top-p, min-p and typical-p, each to the distribution that the one before it left. True if any is set:
// then `scratch.items` are the ids kept, with score and exp(score). `total` is the weight of all ids, needed if top-p
// is the first.
template <class T>
bool truncate(const View<T>& view, const Row& row, double total) {
  SampleScratch& s = row.scratch;
  const int32_t top_k = row.sampling.top_k;
  const double top_p = row.sampling.top_p, min_p = row.sampling.min_p, typical_p = row.sampling.typical_p;
  bool all = true;
  const auto list = [&](double threshold) {
    if (all) gather(view, threshold, s.items);
    all = false;
  };
  if (row.few(view.size)) {
    list(reached_by(view, top_k, s.pivots));
    keep_best(s.items, s.order, top_k);
  }
  if (top_p < 1.0 && all) {
    keep_top_p_of_all(view, row, total, top_p);
    all = false;
  } else if (top_p < 1.0) {
    const double sum = weigh_items(s.items, 0.0, row.loops);
    for (SampleItem& item : s.items) item.weight /= sum;
    keep_mass(s.items, s.order, top_p);
  }
  if (min_p > 0.0) {
    const double threshold = std::min(std::log(min_p), 0.0);  // the best one scores 0
    list(threshold);
    std::erase_if(s.items, [=](const SampleItem& item) { return item.rank < threshold; });
  }
  if (typical_p < 1.0) {
    list(-kInfinity);
    keep_typical(s.items, s.order, typical_p, row.loops);
    for (SampleItem& item : s.items) item.rank = view.score_of(item.id);
  }
  if (!all) weigh_items(s.items, 0.0, row.loops);
  return !all;
}

// Both draws invert the cumulative distribution over ascending ids: they return the first id whose cumulative weight
// exceeds the drawn fraction of the total, so an id of weight 0 is never drawn.
template <class T>
int32_t draw_of_all(const View<T>& view, const Row& row, double goal) {
  const std::vector<double>& sums = row.scratch.sums;
  double weights[kBlock], below = 0.0, unused = 0.0;
  size_t b = 0;
  for (; b + 1 < sums.size() && !(below + sums[b] > goal); ++b) below += sums[b];
  const auto first = static_cast<int64_t>(b);
  weigh_blocks(view, first, 1, weights, &unused, row.loops);
  int64_t last = 0;  // a block's sum is added in another order, and may exceed the goal where this sum does not
  for (int64_t i = 0; i < kBlock && !(below > goal); ++i) {
    below += weights[i];
    last = weights[i] > 0.0 ? i : last;
  }
  return static_cast<int32_t>(first * kBlock + last);
}

// Writes the logprobs of `id` and of the ids in `scratch.order`: score - shift - log_sum.
template <class T>
void write_logprobs(const View<T>& view, double shift, double log_sum, int32_t id, bool kept, const Row& row) {
  const auto logprob = [&](int32_t i) { return static_cast<float>((view.score_of(i) - shift) - log_sum); };
  const SampleOut& out = row.out;
  out.logprob[row.index] = kept ? logprob(id) : -std::numeric_limits<float>::infinity();
  int64_t at = row.index * out.width;
  for (const SampleItem& item : row.scratch.order) {
    if (at == (row.index + 1) * out.width) break;
    out.top_ids[at] = item.id;
    out.top_logprobs[at++] = logprob(item.id);
  }
}

// Reports logprobs over all ids. `ranked` gives the order, as near values may have equal scores in `view`; `total` is
// the weight of `view`.
template <class T>
void report_all(const View<T>& ranked, const View<T>& view, double total, int32_t id, const Row& row) {
  Items& order = row.scratch.order;
  const int64_t count = row.n_logprobs();
  order.clear();
  if (count > 0) gather(ranked, reached_by(ranked, count, row.scratch.pivots), order);
  sort_best(order, count);
  write_logprobs(view, 0.0, std::log(total), id, true, row);
}

// Reports logprobs over the ids in `scratch.items`; the others have probability 0.
template <class T>
void report_items(const View<T>& view, int32_t id, const Row& row) {
  Items& items = row.scratch.items;
  row.scratch.order = items;
  sort_best(row.scratch.order, std::max(row.n_logprobs(), 1));
  const double best = row.scratch.order.front().rank;  // typical-p may drop the one that scores 0
  const auto at = std::lower_bound(items.begin(), items.end(), id,
                                   [](const SampleItem& item, int32_t wanted) { return item.id < wanted; });
  const bool kept = at != items.end() && at->id == id;
  const double log_sum = std::log(weigh_items(items, best, row.loops));
  if (row.n_logprobs() == 0) row.scratch.order.clear();
  write_logprobs(view, best, log_sum, id, kept, row);
}

// Draws or scores, and reports logprobs. `raw` are the logits, `values` the same after penalties, bias and mask.
template <class T>
void draw_and_report(const View<T>& values, const Peak& peak, const View<float>& raw, const Peak& raw_peak,
                       const Row& row) {
  const SequenceSampling& p = row.sampling;
  SampleScratch& s = row.scratch;
  const int64_t r = row.index;
  View<T> view = values;
  view.best = peak.value;
  view.temperature = row.greedy() ? 1.0 : row.temperature();
  int32_t id = row.scored() ? row.args.target[r] : peak.id;
  double total = 0.0;  // the weight of all ids in `view`, computed when needed
  bool truncated = false;
  if (!row.greedy() && !row.scored()) {
    const bool draws_of_all = !(p.min_p > 0.0f) && !(p.typical_p < 1.0f);
    if (!row.few(view.size) && (p.top_p < 1.0f || draws_of_all)) total = total_weight(view, s.sums, row.loops);
    truncated = truncate(view, row, total);
    const double uniform = philox_uniform(p.seed, p.choice, row.args.draw[r]);
    id = truncated ? draw_of_items(s.items, uniform) : draw_of_all(view, row, uniform * total);
  }
  row.out.ids[r] = id;
  if (!row.reported()) return;
  if (row.warped() && truncated) {
    report_items(view, id, row);
  } else if (row.warped()) {
    const double weight = total > 0.0 ? total : total_weight(view, s.sums, row.loops);
    report_all(row.greedy() ? values : view, view, weight, id, row);
  } else {
    View<float> shifted = raw;
    shifted.best = raw_peak.value;
    const bool same = total > 0.0 && !row.edited() && view.temperature == 1.0;
    report_all(raw, shifted, same ? total : total_weight(shifted, s.sums, row.loops), id, row);
  }
}

// Writes the logits after penalties (repetition: Keskar et al. 2019, "CTRL"), bias, bans and mask to `scratch.scores`.
void edit(const float* logits, int64_t vocab, const Row& row) {
  const SequenceSampling& p = row.sampling;
  const double repetition = p.repetition, frequency = p.frequency, presence = p.presence;
  std::vector<double>& scores = row.scratch.scores;
  scores.assign(logits, logits + vocab);
  const std::vector<int32_t>& seen = row.sequence.seen_ids();
  for (size_t i = 0; i < seen.size(); ++i) {
    const double logit = logits[seen[i]], count = row.sequence.seen_counts()[i];
    const double scaled = logit > 0.0 ? logit / repetition : logit * repetition;
    scores[static_cast<size_t>(seen[i])] = scaled - (frequency * count + (count > 0.0 ? presence : 0.0));
  }
  for (size_t i = 0; i < p.bias_ids.size(); ++i)
    scores[static_cast<size_t>(p.bias_ids[i])] += static_cast<double>(p.bias_values[i]);
  if (row.bans())
    for (const int32_t id : p.banned_ids) scores[static_cast<size_t>(id)] = -kInfinity;
  if (row.mask == nullptr) return;
  for (int64_t first = 0; first < vocab; first += 32) {
    const uint32_t banned = ~row.mask[first / 32];
    const int64_t end = std::min<int64_t>(32, vocab - first);
    if (banned == ~uint32_t{0}) {  // nearly every word of a grammar's mask is all or nothing
      std::fill_n(scores.begin() + first, end, -kInfinity);
      continue;
    }
    for (int64_t bit = 0; banned != 0 && bit < end; ++bit)
      if ((banned >> bit) & 1) scores[static_cast<size_t>(first + bit)] = -kInfinity;
  }
}

// The id with the largest logit of those that the mask allows.
int32_t best_allowed(const float* logits, int64_t vocab, const Row& row) {
  int64_t best = -1;
  for (int64_t id = 0; id < vocab; ++id)
    if (row.allows(id) && (best < 0 || logits[id] > logits[best])) best = id;
  return static_cast<int32_t>(best);
}

// Returns `finite`.
bool sample_finite(const float* logits, int64_t vocab, const Row& row) {
  SampleScratch& s = row.scratch;
  const Peak raw_peak = scan(logits, vocab, s.maxima, row.loops);
  if (!raw_peak.valid || raw_peak.value == -kInfinity) return false;
  if (!row.scored() && !(row.temperature() >= 0.0)) return false;  // the code below requires numbers
  const View<float> raw{logits, s.maxima.data(), vocab, 0.0, 1.0};
  if (row.scored() || !row.edited()) {
    draw_and_report(raw, raw_peak, raw, raw_peak, row);
    return true;
  }
  edit(logits, vocab, row);
  Peak peak = scan(s.scores.data(), vocab, s.score_maxima, row.loops);
  if (!peak.valid) return false;
  if (peak.value == -kInfinity) {  // all are banned: keep the id with the largest logit
    peak = {best_allowed(logits, vocab, row), 0.0, true};
    s.scores[static_cast<size_t>(peak.id)] = s.score_maxima[static_cast<size_t>(peak.id / kBlock)] = 0.0;
  }
  draw_and_report(View<double>{s.scores.data(), s.score_maxima.data(), vocab, 0.0, 1.0}, peak, raw, raw_peak, row);
  return true;
}

}  // namespace

void SampleScratch::reserve(int64_t vocab) {
  const auto size = static_cast<size_t>(vocab), blocks = static_cast<size_t>(blocks_of(vocab));
  maxima.reserve(blocks);
  score_maxima.reserve(blocks);
  sums.reserve(blocks);
  pivots.reserve(std::max(blocks, size / kRun));
  scores.reserve(size);
  items.reserve(size);
  order.reserve(size);
}

void sample_row(const float* logits, int64_t vocab, int64_t index, const SequenceState& sequence, const SampleArgs& args,
                const SampleOut& out, SampleScratch& scratch) {
  scratch.reserve(vocab);
  out.ids[index] = 0;
  out.logprob[index] = 0.0f;
  std::fill_n(out.top_ids + index * out.width, out.width, -1);
  std::fill_n(out.top_logprobs + index * out.width, out.width, -std::numeric_limits<float>::infinity());
  const int32_t mask_row = args.target[index] < 0 ? args.mask_row[index] : -1;
  const uint32_t* mask = mask_row < 0 ? nullptr : args.mask + mask_row * args.words;
  const SampleLoops& loops = scratch.loops ? *scratch.loops : kSampleLoops;
  out.finite[index] = sample_finite(logits, vocab, {sequence.sampling, sequence, args, out, scratch, loops, index, mask});
}

}  // namespace truffula

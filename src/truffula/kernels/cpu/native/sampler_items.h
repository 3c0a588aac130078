// Truncation of candidate lists. Included by sampler.cpp only.
//
// Top-k, top-p and typical-p keep the best items in some order (higher rank first, then lower id) up to a last one.
// Only that item is searched for; the list stays sorted by id, as draws need it, and is filtered.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <optional>

#include "sampler.h"
#include "sampler_loops.inc.h"

namespace truffula {
namespace {

using sampling::exp_nonpositive;
using Items = std::vector<SampleItem>;

inline bool better(const SampleItem& a, const SampleItem& b) {
  return a.rank != b.rank ? a.rank > b.rank : a.id < b.id;
}

// Leaves the `count` best of `order`, sorted.
inline void sort_best(Items& order, std::int64_t count) {
  if (count < static_cast<std::int64_t>(order.size())) {
    std::nth_element(order.begin(), order.begin() + count, order.end(), better);
    order.resize(static_cast<std::size_t>(count));
  }
  std::sort(order.begin(), order.end(), better);
}

// Drops the items after `last` in the order of `better`.
inline void cut_after(Items& items, SampleItem last) {
  std::erase_if(items, [last](const SampleItem& item) { return better(last, item); });
}

inline void keep_best(Items& items, Items& order, std::int64_t count) {
  if (count >= static_cast<std::int64_t>(items.size())) return;
  order = items;
  std::nth_element(order.begin(), order.begin() + (count - 1), order.end(), better);
  cut_after(items, order[static_cast<std::size_t>(count - 1)]);
}

// Sets each weight to exp(rank - shift), and returns their sum, ids ascending. In blocks, for the vector loops.
inline double weigh_items(Items& items, double shift, const SampleLoops& loops) {
  double ranks[kSampleBlock], weights[kSampleBlock], sum = 0.0, unused = 0.0;
  for (std::size_t from = 0; from < items.size(); from += kSampleBlock) {
    const std::size_t count = std::min(items.size() - from, static_cast<std::size_t>(kSampleBlock));
    for (std::size_t i = 0; i < kSampleBlock; ++i) ranks[i] = i < count ? items[from + i].rank : shift;
    loops.weigh_f64(ranks, 1, shift, 1.0, weights, &unused);
    for (std::size_t i = 0; i < count; ++i) sum += items[from + i].weight = weights[i];
  }
  return sum;
}

inline const SampleItem& median(const SampleItem& a, const SampleItem& b, const SampleItem& c) {
  if (better(a, b)) return better(b, c) ? b : (better(a, c) ? c : a);
  return better(a, c) ? a : (better(b, c) ? c : b);
}

// The item at which the weights, best first, reach `mass`, by quickselect: only items near it are sorted. nullopt when
// sums in another order might give another item, when no item reaches it, and when the quickselect does not converge.
inline std::optional<SampleItem> select_at_mass(Items& order, double mass) {
  constexpr std::ptrdiff_t kSorted = 512;
  constexpr int kRounds = 64;
  const double slack = static_cast<double>(order.size()) * 0x1p-52;  // bounds the rounding of a sum of so many
  const auto doubtful = [&](double sum) { return std::abs(sum - mass) <= slack; };
  auto lo = order.begin(), hi = order.end();
  double below = 0.0;  // the weight of the items better than [lo, hi)
  for (int round = 0; hi - lo > kSorted; ++round) {
    const SampleItem pivot = median(*lo, *(lo + (hi - lo) / 2), *(hi - 1));
    const auto split = std::partition(lo, hi, [&](const SampleItem& item) { return better(item, pivot); });
    double sum = below;
    for (auto item = lo; item != split; ++item) sum += item->weight;
    if (doubtful(sum) || round == kRounds) return std::nullopt;
    if (sum >= mass) {
      hi = split;
    } else {
      lo = split;
      below = sum;
    }
  }
  std::sort(lo, hi, better);
  for (; lo != hi; ++lo) {
    below += lo->weight;
    if (doubtful(below)) return std::nullopt;
    if (below >= mass) return *lo;
  }
  return std::nullopt;
}

// The same by sorting all items, with the specification's order of sums.
inline std::optional<SampleItem> sort_to_mass(Items& order, double mass) {
  std::sort(order.begin(), order.end(), better);
  double sum = 0.0;
  for (const SampleItem& item : order) {
    sum += item.weight;
    if (sum >= mass) return item;
  }
  return std::nullopt;
}

// Keeps the fewest best items whose weights reach `mass`, at least one. False, without a change, when all do not reach
// it.
inline bool keep_mass(Items& items, Items& order, double mass) {
  constexpr std::size_t kMaxSorted = 2048;
  order = items;
  std::optional<SampleItem> last;
  if (order.size() > kMaxSorted) last = select_at_mass(order, mass);
  if (!last) last = sort_to_mass(order, mass);
  if (last) cut_after(items, *last);
  return last.has_value();
}

// The ids whose surprise is nearest the entropy, until their mass reaches `typical_p` (Meister et al. 2022, "Locally
// typical sampling"). Ranks are scores, the best of which is 0.
inline void keep_typical(Items& items, Items& order, double typical_p, const SampleLoops& loops) {
  const double log_total = std::log(weigh_items(items, 0.0, loops));
  for (SampleItem& item : items) item.rank -= log_total;
  weigh_items(items, 0.0, loops);
  double entropy = 0.0;
  for (const SampleItem& item : items) entropy -= item.weight * item.rank;
  for (SampleItem& item : items) item.rank = -std::abs(item.rank + entropy);
  keep_mass(items, order, typical_p);
}

// The first id, ascending, at which the summed weights exceed `uniform` of their total.
inline std::int32_t draw_of_items(const Items& items, double uniform) {
  double total = 0.0, below = 0.0;
  for (const SampleItem& item : items) total += item.weight;
  for (const SampleItem& item : items) {
    below += item.weight;
    if (below > uniform * total) return item.id;
  }
  return items.back().id;
}

}  // namespace
}  // namespace truffula

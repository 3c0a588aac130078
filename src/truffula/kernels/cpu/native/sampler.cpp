// The sampler. In short:
//
//   scan        one pass over the logits: maxima of blocks of 64, the argmax, and whether all is finite.
//   choose      exp of the scores, summed block by block; the draw finds its block by the sums, then its id inside.
//   top-k       k block maxima reach the k-th largest one, so the k-th largest score does: blocks below it are skipped.
//   top-p       the few hundred best usually reach the mass; else a quickselect by mass over all.
//   min-p       a threshold.
//   typical-p   top-p by another rank (Meister et al. 2022, "Locally typical sampling").
//
// Top-k, top-p and min-p each keep a prefix of the same order (higher score first, then lower id), so their outcome is a
// cut: the last item kept. What is kept stays ordered by id, as the draw wants it, and need not be sorted back.
//
// Loops over the vocabulary are plain loops of fixed trip count over 64 elements, or 16-byte vectors: compilers turn
// both into vector code without being told the machine, and each sum's order is written out, so no flag can change it.
#include "sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>

namespace truffula {
namespace {

using std::int32_t;
using std::int64_t;
using std::size_t;
using std::uint32_t;
using std::uint64_t;
using Items = std::vector<SampleItem>;

// Casting a double beyond float's range gives an infinity only under IEC 559.
static_assert(std::numeric_limits<float>::is_iec559 && std::numeric_limits<double>::is_iec559);

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kBlock = 64;
constexpr int64_t kRun = 8;  // finer maxima, for a k near the number of blocks or above
constexpr int64_t kUsuallyEnough = 256;  // ids that top-p tries before it looks at all of them

// ---------------------------------------------------------------------------------------------------- exp

template <class T>
using Vector [[gnu::vector_size(16)]] = T;
using Doubles = Vector<double>;
using Words = Vector<uint64_t>;

template <class V, class T>
V load(const T* from) {
    V out;
    __builtin_memcpy(&out, from, sizeof(out));
    return out;
}

// exp(x) for x <= 0 (a little above does no harm), within 1 ulp; 0 below -708, where doubles stop being normal: such a
// weight is less than any rounding of a sum that holds a 1. The same for a double and for each lane of a vector.
// Method: Cephes exp.c (Moshier): x = n ln 2 + r, exp(r) = 1 + 2 r P(r^2) / (Q(r^2) - r P(r^2)).
inline Doubles exp_nonpositive(Doubles x) {
    constexpr double kLowest = -708.0;
    constexpr double kToInteger = 0x1.8p52;  // adding it rounds to an integer, held in the low bits of the mantissa
    const Doubles lowest = Doubles{} + kLowest;
    const Doubles clamped = x > lowest ? x : lowest;
    const Doubles shifted = clamped * 1.4426950408889634074 + kToInteger;
    const Doubles n = shifted - kToInteger;
    const Doubles r = (clamped - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
    const Doubles rr = r * r;
    const Doubles p =
        r * ((1.26177193074810590878e-4 * rr + 3.02994407707441961300e-2) * rr + 9.99999999999999999910e-1);
    const Doubles q =
        ((3.00198505138664455042e-6 * rr + 2.52448340349684104192e-3) * rr + 2.27265548208155028766e-1) * rr + 2.0;
    const Doubles power = std::bit_cast<Doubles>((std::bit_cast<Words>(shifted) << 52) + (uint64_t{1023} << 52));
    const Doubles result = (1.0 + 2.0 * (p / (q - p))) * power;
    return std::bit_cast<Doubles>(std::bit_cast<Words>(result) & std::bit_cast<Words>(x > lowest));
}

inline double exp_nonpositive(double x) { return exp_nonpositive(Doubles{x, x})[0]; }

// ---------------------------------------------------------------------------------------------------- one row's values

// A row's values (float logits, or double scores after penalties and bias), and how they become scores. Scores never
// fall where values rise, but distinct values may give one score: what must be ordered is ordered by score.
template <class T>
struct View {
    const T* values;
    const T* maxima;  // per block
    int64_t size;
    double best;         // subtracted first, so that a tiny temperature cannot overflow
    double temperature;  // then divided by

    double score(T value) const { return (static_cast<double>(value) - best) / temperature; }
    double score_of(int32_t id) const { return score(values[id]); }
    int64_t blocks() const { return (size + kBlock - 1) / kBlock; }
};

// The largest of 64 values; `sound` becomes false when one is NaN. Compilers may not vectorise a maximum of floats
// themselves (NaN, signed zeros), hence the vectors: at most 4 chains of maxps.
template <class T>
T block_max(const T* x, bool& sound) {
    constexpr int64_t lanes = 16 / sizeof(T);
    const auto at = [x](int64_t i) { return load<Vector<T>>(x + i); };
    Vector<T> a = at(0), b = at(lanes), c = at(2 * lanes), d = at(3 * lanes);
    auto ordered = (a == a) & (b == b) & (c == c) & (d == d);
    for (int64_t i = 4 * lanes; i < kBlock; i += 4 * lanes) {
        const Vector<T> e = at(i), f = at(i + lanes), g = at(i + 2 * lanes), h = at(i + 3 * lanes);
        ordered &= (e == e) & (f == f) & (g == g) & (h == h);
        a = e > a ? e : a;
        b = f > b ? f : b;
        c = g > c ? g : c;
        d = h > d ? h : d;
    }
    a = b > a ? b : a;
    c = d > c ? d : c;
    a = c > a ? c : a;
    T best = a[0];
    for (int64_t i = 0; i < lanes; ++i) {
        best = a[i] > best ? a[i] : best;
        sound = sound && ordered[i] != 0;
    }
    return best;
}

struct Peak {
    int32_t id;  // of the largest value, the lowest where several are
    double value;
    bool sound;  // no NaN, no +Inf

    bool finite() const { return sound && value > -kInfinity; }
};

template <class T>
Peak scan(const T* values, int64_t size, std::vector<T>& maxima) {
    maxima.resize(static_cast<size_t>((size + kBlock - 1) / kBlock));
    bool sound = true;
    T best = -std::numeric_limits<T>::infinity();
    int64_t found = 0;  // the block
    for (int64_t b = 0; b * kBlock < size; ++b) {
        const T* x = values + b * kBlock;
        T most = -std::numeric_limits<T>::infinity();
        if ((b + 1) * kBlock <= size) {
            most = block_max(x, sound);
        } else {
            for (int64_t i = 0; i < size - b * kBlock; ++i) {
                most = x[i] > most ? x[i] : most;
                sound = sound && x[i] == x[i];
            }
        }
        maxima[static_cast<size_t>(b)] = most;
        found = most > best ? b : found;
        best = most > best ? most : best;
    }
    sound = sound && best < std::numeric_limits<T>::infinity();
    const T* at = values + found * kBlock;
    return {sound ? static_cast<int32_t>(std::find(at, values + size, best) - values) : 0, best, sound};
}

// exp of the scores of the block from `begin`, zeros beyond the row; returns their sum, always in the same order.
template <class T>
double block_weights(const View<T>& view, int64_t begin, double* weights) {
    using Pair [[gnu::vector_size(2 * sizeof(T))]] = T;
    const T* x = view.values + begin;
    const auto each_pair = [&](auto score) {
        Doubles sums[4] = {};
        for (int64_t i = 0; i < kBlock; i += 8) {
            for (int64_t j = 0; j < 4; ++j) {
                const auto value = __builtin_convertvector(load<Pair>(x + i + 2 * j), Doubles);
                const Doubles weight = exp_nonpositive(score(value));
                __builtin_memcpy(weights + i + 2 * j, &weight, sizeof(weight));
                sums[j] += weight;
            }
        }
        const Doubles sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        return sum[0] + sum[1];
    };
    const double best = view.best, temperature = view.temperature;
    T padded[kBlock];
    if (view.size - begin < kBlock) {
        std::fill(std::copy(x, view.values + view.size, padded), padded + kBlock, -std::numeric_limits<T>::infinity());
        x = padded;
    }
    if (temperature == 1.0) return each_pair([=](Doubles value) { return value - best; });  // x / 1.0 is x
    return each_pair([=](Doubles value) { return (value - best) / temperature; });
}

// Sum of exp(score); `sums` gets that of each block.
template <class T>
double total_weight(const View<T>& view, std::vector<double>& sums) {
    sums.resize(static_cast<size_t>(view.blocks()));
    double weights[kBlock];
    double total = 0.0;
    for (int64_t b = 0; b < view.blocks(); ++b) total += sums[static_cast<size_t>(b)] = block_weights(view, b * kBlock, weights);
    return total;
}

// ---------------------------------------------------------------------------------------------------- narrowing down

bool better(const SampleItem& a, const SampleItem& b) { return a.rank != b.rank ? a.rank > b.rank : a.id < b.id; }

// A score that k ids reach: the k-th largest of maxima of disjoint runs of ids. -inf where there are too few runs.
template <class T>
double reached_by(const View<T>& view, int64_t k, std::vector<double>& pivots) {
    pivots.clear();
    if (k <= view.blocks()) {
        pivots.assign(view.maxima, view.maxima + view.blocks());
    } else {
        for (int64_t i = 0; k <= view.size / kRun && i + kRun <= view.size; i += kRun)
            pivots.push_back(static_cast<double>(*std::max_element(view.values + i, view.values + i + kRun)));
    }
    if (k > static_cast<int64_t>(pivots.size())) return -kInfinity;
    const auto kth = pivots.begin() + (k - 1);
    std::nth_element(pivots.begin(), kth, pivots.end(), std::greater<>());
    return (*kth - view.best) / view.temperature;
}

// All ids above -inf whose score reaches `threshold`, ascending.
template <class T>
void gather(const View<T>& view, double threshold, Items& items) {
    items.clear();
    for (int64_t b = 0; b < view.blocks(); ++b) {
        if (!(view.score(view.maxima[b]) >= threshold)) continue;
        for (int64_t i = b * kBlock; i < std::min((b + 1) * kBlock, view.size); ++i) {
            const double score = view.score(view.values[i]);
            if (score >= threshold && score > -kInfinity) items.push_back({score, 0.0, static_cast<int32_t>(i)});
        }
    }
}

// Leaves the `count` best of `order`, sorted.
void sort_best(Items& order, int64_t count) {
    if (count < static_cast<int64_t>(order.size())) {
        std::nth_element(order.begin(), order.begin() + count, order.end(), better);
        order.resize(static_cast<size_t>(count));
    }
    std::sort(order.begin(), order.end(), better);
}

// Drops what is not as good as `last`.
void cut(Items& items, SampleItem last) {
    std::erase_if(items, [last](const SampleItem& item) { return better(last, item); });
}

template <class T>
void keep_top_k(const View<T>& view, int64_t k, SampleScratch& s) {
    gather(view, reached_by(view, k, s.pivots), s.items);
    if (k >= static_cast<int64_t>(s.items.size())) return;
    s.order = s.items;
    std::nth_element(s.order.begin(), s.order.begin() + (k - 1), s.order.end(), better);
    cut(s.items, s.order[static_cast<size_t>(k - 1)]);
}

// The item at which the weights, best first, reach `mass`: found by quickselect, so only its surroundings are sorted.
// nullopt where sums taken in another order might decide otherwise, and where the quickselect goes badly.
std::optional<SampleItem> select_at_mass(Items& order, double mass) {
    constexpr std::ptrdiff_t kSorted = 512;
    const double slack = static_cast<double>(order.size()) * 0x1p-52;
    auto lo = order.begin(), hi = order.end();
    double below = 0.0;  // what is better than [lo, hi)
    const auto doubtful = [&](double sum) { return std::abs(sum - mass) <= slack; };
    for (int round = 0; hi - lo > kSorted; ++round) {
        const SampleItem &a = *lo, &b = *(lo + (hi - lo) / 2), &c = *(hi - 1);
        const SampleItem pivot = better(a, b) ? (better(b, c) ? b : better(a, c) ? c : a)
                                              : (better(a, c) ? a : better(b, c) ? c : b);
        const auto split = std::partition(lo, hi, [&](const SampleItem& item) { return better(item, pivot); });
        double sum = below;
        for (auto item = lo; item != split; ++item) sum += item->weight;
        if (doubtful(sum) || round == 64) return std::nullopt;
        (sum >= mass ? hi : lo) = split;
        below = sum >= mass ? below : sum;
    }
    std::sort(lo, hi, better);
    for (; lo != hi; ++lo) {
        below += lo->weight;
        if (doubtful(below)) return std::nullopt;
        if (below >= mass) return *lo;
    }
    return std::nullopt;
}

// Shrinks `items` to the fewest best whose weights reach `mass`, at least one; false, and nothing done, if none do.
bool keep_mass(Items& items, Items& order, double mass) {
    constexpr size_t kSortedAtOnce = 2048;
    order = items;
    if (order.size() > kSortedAtOnce) {
        if (const auto last = select_at_mass(order, mass)) {
            cut(items, *last);
            return true;
        }
    }
    std::sort(order.begin(), order.end(), better);
    double total = 0.0;
    for (const SampleItem& item : order) {
        total += item.weight;
        if (total >= mass) {
            cut(items, item);
            return true;
        }
    }
    return false;
}

// The fewest best ids whose probabilities reach `top_p` (Holtzman et al. 2020, "The curious case of neural text
// degeneration"). `total` is the weight of all ids; it is not used where top-k has left `items`.
template <class T>
void keep_top_p(const View<T>& view, bool all, double total, double top_p, SampleScratch& s) {
    const auto weigh = [&] {
        for (SampleItem& item : s.items) item.weight = exp_nonpositive(item.rank);
        if (!all) {
            total = 0.0;
            for (const SampleItem& item : s.items) total += item.weight;
        }
        for (SampleItem& item : s.items) item.weight /= total;
    };
    if (all) gather(view, reached_by(view, kUsuallyEnough, s.pivots), s.items);
    weigh();
    if (keep_mass(s.items, s.order, top_p) || !all) return;
    gather(view, -kInfinity, s.items);
    weigh();
    keep_mass(s.items, s.order, top_p);
}

// The ids whose surprise is nearest the entropy, until their mass reaches `typical_p`.
void keep_typical(double typical_p, SampleScratch& s) {
    double total = 0.0, entropy = 0.0;
    for (const SampleItem& item : s.items) total += exp_nonpositive(item.rank);
    const double log_total = std::log(total);
    for (SampleItem& item : s.items) {
        const double log = item.rank - log_total;
        item.weight = exp_nonpositive(log);
        if (item.weight > 0.0) entropy -= item.weight * log;
    }
    for (SampleItem& item : s.items) item.rank = -std::abs((item.rank - log_total) + entropy);
    keep_mass(s.items, s.order, typical_p);
}

// ---------------------------------------------------------------------------------------------------- one row

struct Row {
    const SampleArgs& args;
    const SampleOut& out;
    SampleScratch& scratch;
    int64_t index;

    double temperature() const { return args.temperature[index]; }
    int32_t target() const { return args.target[index]; }
    int32_t n_logprobs() const { return args.n_logprobs[index]; }
    bool warped() const { return args.warped[index] != 0; }
    bool edited() const {
        const bool penalised =
            args.repetition[index] != 1.0f || args.frequency[index] != 0.0f || args.presence[index] != 0.0f;
        return args.bias_start[index] != args.bias_start[index + 1] ||
               (penalised && args.seen_start[index] != args.seen_start[index + 1]);
    }
};

// Whether anything was taken away: then the ids left are in `scratch.items`. `total`: see keep_top_p.
template <class T>
bool narrow(const View<T>& view, const Row& row, double total) {
    const auto& [args, out, s, r] = row;
    const bool some = args.top_k[r] > 0 && args.top_k[r] < view.size;
    bool all = !some;
    if (some) keep_top_k(view, args.top_k[r], s);
    if (args.top_p[r] < 1.0f) {
        keep_top_p(view, all, total, args.top_p[r], s);
        all = false;
    }
    if (args.min_p[r] > 0.0f) {
        const double threshold = std::min(0.0, std::log(static_cast<double>(args.min_p[r])));  // the best scores 0
        if (all) gather(view, threshold, s.items);
        std::erase_if(s.items, [threshold](const SampleItem& item) { return item.rank < threshold; });
        all = false;
    }
    if (args.typical_p[r] < 1.0f) {
        if (all) gather(view, -kInfinity, s.items);
        keep_typical(args.typical_p[r], s);
        all = false;
    }
    return !all;
}

// Both draws invert the cumulative distribution, ids ascending: the first id whose cumulative weight exceeds the draw,
// so one of weight 0 is never chosen.
template <class T>
int32_t draw_of_all(const View<T>& view, const std::vector<double>& sums, double goal) {
    double weights[kBlock];
    double below = 0.0;
    int64_t b = 0;
    for (; b + 1 < view.blocks() && !(below + sums[static_cast<size_t>(b)] > goal); ++b) below += sums[static_cast<size_t>(b)];
    block_weights(view, b * kBlock, weights);
    int64_t last = 0;  // the block's sum was taken in another order, and may exceed the draw where this one falls short
    for (int64_t i = 0; i < kBlock; ++i) {
        below += weights[i];
        last = weights[i] > 0.0 ? i : last;
        if (below > goal) break;
    }
    return static_cast<int32_t>(b * kBlock + last);
}

template <class T>
int32_t draw_of_items(const View<T>& view, Items& items, double uniform) {
    double total = 0.0, below = 0.0;
    for (SampleItem& item : items) total += item.weight = exp_nonpositive(view.score_of(item.id));
    for (const SampleItem& item : items) {
        below += item.weight;
        if (below > uniform * total) return item.id;
    }
    return items.back().id;
}

// Writes the logprobs of `id` and of the best in `scratch.order`: score - shift - log_sum.
template <class T>
void write_logprobs(const View<T>& view, double shift, double log_sum, int32_t id, bool id_kept, const Row& row) {
    const auto logprob = [&](int32_t i) { return static_cast<float>((view.score_of(i) - shift) - log_sum); };
    const SampleOut& out = row.out;
    const size_t count = std::min(row.scratch.order.size(), static_cast<size_t>(std::max(out.width, 0)));
    out.logprob[row.index] = id_kept ? logprob(id) : -std::numeric_limits<float>::infinity();
    for (size_t i = 0; i < count; ++i) {
        const size_t at = static_cast<size_t>(row.index) * static_cast<size_t>(out.width) + i;
        out.top_ids[at] = row.scratch.order[i].id;
        out.top_logprobs[at] = logprob(out.top_ids[at]);
    }
}

// Of all ids. `ranked` orders them, `view` shifts what it orders so that the best scores 0; their sum is `total`.
template <class T>
void report_all(const View<T>& ranked, const View<T>& view, double total, int32_t id, const Row& row) {
    Items& order = row.scratch.order;
    order.clear();
    if (row.n_logprobs() > 0) gather(ranked, reached_by(ranked, row.n_logprobs(), row.scratch.pivots), order);
    sort_best(order, row.n_logprobs());
    write_logprobs(view, 0.0, std::log(total), id, true, row);
}

// Of the ids in `scratch.items`; any other one has none.
template <class T>
void report_items(const View<T>& view, int32_t id, const Row& row) {
    Items& items = row.scratch.items;
    double best = -kInfinity, sum = 0.0;
    for (SampleItem& item : items) {
        item.rank = view.score_of(item.id);
        best = std::max(best, item.rank);
    }
    for (const SampleItem& item : items) sum += exp_nonpositive(item.rank - best);
    row.scratch.order = items;
    sort_best(row.scratch.order, row.n_logprobs());
    const bool kept = std::binary_search(items.begin(), items.end(), SampleItem{0.0, 0.0, id},
                                         [](const SampleItem& a, const SampleItem& b) { return a.id < b.id; });
    write_logprobs(view, best, std::log(sum), id, kept, row);
}

// `values`: the logits, with penalties and bias where there are any; `raw`: the logits. Both as they are (shift 0,
// temperature 1), with the value and place of their best.
template <class T>
void choose_and_report(const View<T>& values, const Peak& peak, const View<float>& raw, const Peak& raw_peak,
                       const Row& row) {
    const auto& [args, out, s, r] = row;
    const bool greedy = row.temperature() == 0.0, scored = row.target() >= 0, reported = row.n_logprobs() >= 0;
    const View<T> view{values.values, values.maxima, values.size, peak.value, greedy ? 1.0 : row.temperature()};
    int32_t id = scored ? row.target() : peak.id;
    double total = 0.0;  // of exp of all scores of `view`, once it is needed
    bool narrowed = false;
    if (!greedy && (!scored || (reported && row.warped()))) {
        const bool top_k = args.top_k[r] > 0 && args.top_k[r] < view.size;
        const bool untouched = args.min_p[r] <= 0.0f && args.typical_p[r] >= 1.0f;
        if (!top_k && (args.top_p[r] < 1.0f || untouched)) total = total_weight(view, s.sums);
        narrowed = narrow(view, row, total);
        if (!scored) {
            const double uniform = philox_uniform(args.seed[r], args.choice[r], args.draw[r]);
            id = narrowed ? draw_of_items(view, s.items, uniform) : draw_of_all(view, s.sums, uniform * total);
        }
    }
    out.ids[r] = id;
    if (!reported) return;
    if (row.warped() && narrowed) {
        report_items(view, id, row);
    } else if (row.warped()) {
        report_all(greedy ? values : view, view, total > 0.0 ? total : total_weight(view, s.sums), id, row);
    } else {
        const View<float> shifted{raw.values, raw.maxima, raw.size, raw_peak.value, 1.0};
        const bool same = total > 0.0 && !row.edited() && view.temperature == 1.0;
        report_all(raw, shifted, same ? total : total_weight(shifted, s.sums), id, row);
    }
}

// The row's logits in double with penalties (Keskar et al. 2019, "CTRL", for repetition) and bias, in `scratch.scores`.
void edit(const float* logits, int64_t vocab, const Row& row) {
    const auto& [args, out, s, r] = row;
    const double repetition = args.repetition[r], frequency = args.frequency[r], presence = args.presence[r];
    s.scores.assign(logits, logits + vocab);
    for (int32_t i = args.seen_start[r]; i < args.seen_start[r + 1]; ++i) {
        const double logit = logits[args.seen_ids[i]], count = args.seen_counts[i];
        const double scaled = logit > 0.0 ? logit / repetition : logit * repetition;
        s.scores[static_cast<size_t>(args.seen_ids[i])] = scaled - (frequency * count + (count > 0.0 ? presence : 0.0));
    }
    for (int32_t i = args.bias_start[r]; i < args.bias_start[r + 1]; ++i)
        s.scores[static_cast<size_t>(args.bias_ids[i])] += static_cast<double>(args.bias_values[i]);
}

void clear(const Row& row) {
    const SampleOut& out = row.out;
    out.ids[row.index] = 0;
    out.logprob[row.index] = 0.0f;
    out.finite[row.index] = 0;
    for (int64_t i = row.index * out.width; i < (row.index + 1) * out.width; ++i) {
        out.top_ids[i] = -1;
        out.top_logprobs[i] = -std::numeric_limits<float>::infinity();
    }
}

bool ids_below(const int32_t* ids, const int32_t* start, int64_t rows, int64_t vocab) {
    for (int64_t r = 0; r < rows; ++r)
        if (start[r] < 0 || start[r + 1] < start[r]) return false;
    return std::all_of(ids + (rows ? start[0] : 0), ids + (rows ? start[rows] : 0),
                       [vocab](int32_t id) { return id >= 0 && id < vocab; });
}

}  // namespace

void SampleScratch::reserve(std::int64_t vocab) {
    const auto size = static_cast<size_t>(vocab), blocks = static_cast<size_t>((vocab + kBlock - 1) / kBlock);
    maxima.reserve(blocks);
    score_maxima.reserve(blocks);
    sums.reserve(blocks);
    scores.reserve(size);
    pivots.reserve(size / kRun + 1);
    items.reserve(size);
    order.reserve(size);
}

std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> x, std::array<uint32_t, 2> key) noexcept {
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t{x[0]} * 0xD2511F53u, b = uint64_t{x[2]} * 0xCD9E8D57u;
        x = {static_cast<uint32_t>(b >> 32) ^ x[1] ^ key[0], static_cast<uint32_t>(b),
             static_cast<uint32_t>(a >> 32) ^ x[3] ^ key[1], static_cast<uint32_t>(a)};
        key = {key[0] + 0x9E3779B9u, key[1] + 0xBB67AE85u};
    }
    return x;
}

double philox_uniform(uint64_t seed, uint32_t choice, uint32_t draw) noexcept {
    const auto words = philox4x32({choice, draw, 0, 0}, {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
    return (static_cast<double>(words[0]) + 0.5) * 0x1p-32;
}

bool sample_ids_valid(int64_t rows, int64_t vocab, const SampleArgs& args) noexcept {
    return ids_below(args.seen_ids, args.seen_start, rows, vocab) &&
           ids_below(args.bias_ids, args.bias_start, rows, vocab) &&
           std::all_of(args.target, args.target + rows, [vocab](int32_t id) { return id < vocab; });
}

void sample_row(const float* logits, int64_t vocab, int64_t index, const SampleArgs& args, const SampleOut& out,
                SampleScratch& scratch) {
    const Row row{args, out, scratch, index};
    clear(row);
    const Peak raw_peak = scan(logits, vocab, scratch.maxima);
    if (!raw_peak.finite()) return;
    const View<float> raw{logits, scratch.maxima.data(), vocab, 0.0, 1.0};
    const bool edits_matter = row.target() < 0 || (row.warped() && row.n_logprobs() >= 0);
    if (!edits_matter || !row.edited()) {
        choose_and_report(raw, raw_peak, raw, raw_peak, row);
        out.finite[index] = 1;
        return;
    }
    edit(logits, vocab, row);
    Peak peak = scan(scratch.scores.data(), vocab, scratch.score_maxima);
    if (!peak.sound) return;
    if (peak.value == -kInfinity) {  // all are banned: the most likely one of the model stays
        peak = {raw_peak.id, 0.0, true};
        scratch.scores[static_cast<size_t>(peak.id)] = scratch.score_maxima[static_cast<size_t>(peak.id / kBlock)] = 0.0;
    }
    choose_and_report(View<double>{scratch.scores.data(), scratch.score_maxima.data(), vocab, 0.0, 1.0}, peak, raw, raw_peak,
                      row);
    out.finite[index] = 1;
}

}  // namespace truffula

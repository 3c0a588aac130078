// Attention over paged keys and values. Keys are split into partitions by position alone. Each partition is computed on
// its own (scores, their maximum, weights, their sum, the weighted values), and the results are merged in order, as in
// flash decoding. So a row's result depends on its position and keys, not on the chunk, the batch or the thread.
#pragma once

#include "products.inc.h"
#include "vec.h"

namespace truffula {
namespace {

// std::bool_constant, which tables may not include.
template <bool VALUE>
struct BoolConstant {
  static constexpr bool value = VALUE;
};
TF_INLINE int within(int n, int lo, int hi) { return n < lo ? lo : n > hi ? hi : n; }
TF_INLINE int padded(int n) { return (n + kLanes - 1) / kLanes * kLanes; }

// What all query rows of one call share.
struct View {
  const AttentionCall* c;
  const AttentionItem* item;
  int queries_per_kv, rows, lanes, part_blocks, part_stride, value_width, value_stride, out_head;
  int begin, end;  // keys that some row attends to
  int64_t key_head_bytes, value_head_bytes;
  float* q;             // [rows, dim_k]
  float* scores;        // [rows, part_stride]
  float* part;          // [rows, value_width] values of the current partition
  float* total;         // [rows, value_width] merged so far
  float *top, *sum;     // [rows] of `total`
  float *part_top, *part_sum;
  float* panels;        // of keys, made of latents
};

TF_INLINE int position_of(const View* v, int row) { return v->item->position + row / v->queries_per_kv; }
TF_INLINE int head_of(const View* v, int row) { return v->item->kv_head * v->queries_per_kv + row % v->queries_per_kv; }
TF_INLINE int first_key(const View* v, int position) {
  return first_visible(v->c->window, v->c->chunked, position);
}

// Stores a row of `width` numbers, and zeros up to a multiple of 16.
static void store_row(uint8_t* to, int32_t format, const float* from, int width) {
  for (int d = 0; d < padded(width); ++d) {
    const float number = d < width ? from[d] : 0.0f;
    if (format == kF32) ((float*)to)[d] = number;
    else ((uint16_t*)to)[d] = to_bf16(number);
  }
}

static void write_kv(const AttentionCall* c, const int32_t* slots, int32_t row_lo, int32_t row_hi) {
  const KvCache* kv = &c->cache;
  const int lanes = padded(kv->block_size), value_width = padded(kv->dim_v);
  const int wide = kv->format == kF32 ? 4 : 2;
  if (kv->latent) {
    for (int32_t t = row_lo; t < row_hi; ++t) {
      const int64_t block = slots[t] / kv->block_size, offset = slots[t] % kv->block_size;
      store_row(kv->values + block * kv->value_block_bytes + offset * padded(kv->dim_k) * wide, kv->format,
                c->k.data + t * c->k.stride, kv->dim_k);
    }
    return;
  }
  const int64_t lines = kv->format == kF32 ? kv->dim_k : (kv->dim_k + 1) / 2;
  for (int32_t t = row_lo; t < row_hi; ++t) {
    const int64_t block = slots[t] / kv->block_size, offset = slots[t] % kv->block_size;
    for (int g = 0; g < kv->kv_heads; ++g) {
      const float* k = c->k.data + t * c->k.stride + (int64_t)g * kv->dim_k;
      const float* v = c->v.data + t * c->v.stride + (int64_t)g * kv->dim_v;
      uint8_t* keys = kv->keys + block * kv->key_block_bytes + g * lanes / kLanes * lines * 64 +
                      offset / kLanes * lines * 64;
      const int64_t lane = offset % kLanes;
      if (kv->format == kF32) {
        for (int d = 0; d < kv->dim_k; ++d) ((float*)keys)[d * kLanes + lane] = k[d];
      } else {
        for (int d = 0; d < kv->dim_k; ++d) ((uint16_t*)keys)[d / 2 * 2 * kLanes + 2 * lane + d % 2] = to_bf16(k[d]);
        // The other half of an odd last pair is never multiplied, but must be initialised.
        if (kv->dim_k % 2) ((uint16_t*)keys)[kv->dim_k / 2 * 2 * kLanes + 2 * lane + 1] = 0;
      }
      uint8_t* values = kv->values + block * kv->value_block_bytes +
                        ((int64_t)g * kv->block_size + offset) * value_width * wide;
      store_row(values, kv->format, v, kv->dim_v);
    }
  }
}

#if defined(__AVX512F__)
constexpr bool kTwoBlocks = true;  // with few query rows one block has too few independent sums to hide latency
constexpr int kValueVectors = 4;   // of a value at a time: 6 rows x 4 are 24 sums of 32 registers
#else
constexpr bool kTwoBlocks = false;
constexpr int kValueVectors = 1;
#endif

TF_INLINE const uint8_t* keys_of(const View* v, int block) {
  const KvCache* kv = &v->c->cache;
  return kv->keys + (int64_t)v->item->table[block] * kv->key_block_bytes + v->item->kv_head * v->key_head_bytes;
}
TF_INLINE const uint8_t* values_of(const View* v, int block) {
  const KvCache* kv = &v->c->cache;
  return kv->values + (int64_t)v->item->table[block] * kv->value_block_bytes + v->item->kv_head * v->value_head_bytes;
}

#if defined(__AVX2__)
TF_INLINE __m256 eight_of(const uint8_t* row, int32_t format, int d) {
  if (format == kF32) return _mm256_loadu_ps((const float*)row + d);
  const __m128i halves = _mm_loadu_si128((const __m128i*)((const uint16_t*)row + d));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
// Numbers d .. d + 8 of eight rows, as eight lines.
TF_INLINE void transpose_eight(const uint8_t* const* rows, int32_t format, int d, float* line) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = eight_of(rows[i], format, d);
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0x44);
      a[i + 2 * j + 1] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(line + kLanes * i, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    _mm256_storeu_ps(line + kLanes * (i + 4), _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}
#endif

// The latents of a block as panels of keys: line d holds number d of 16 tokens. Lanes after the block repeat its last.
static void make_panels(const View* v, const uint8_t* block, float* to) {
  const KvCache* kv = &v->c->cache;
  const int64_t row_bytes = v->value_stride * (kv->format == kF32 ? 4 : 2);
  for (int lane = 0; lane < v->lanes; lane += 8) {
    float* lines = to + lane / kLanes * kLanes * (int64_t)v->value_stride + lane % kLanes;
    const uint8_t* rows[8];
    for (int i = 0; i < 8; ++i) rows[i] = block + within(lane + i, 0, kv->block_size - 1) * row_bytes;
#if defined(__AVX2__)
    for (int d = 0; d < v->value_stride; d += 8) transpose_eight(rows, kv->format, d, lines + (int64_t)kLanes * d);
#else
    for (int i = 0; i < 8; ++i)
      for (int d = 0; d < v->value_stride; ++d)
        lines[(int64_t)kLanes * d + i] = kv->format == kF32 ? ((const float*)rows[i])[d] : to_float(((const uint16_t*)rows[i])[d]);
#endif
  }
}

// scores[row, key] = q . k for the blocks lo .. hi of the partition that begins with block `from`.
static void compute_scores(const View* v, int from, int lo, int hi) {
  const KvCache* kv = &v->c->cache;
  const int64_t panel_bytes = v->key_head_bytes / (v->lanes / kLanes);
  for (int block = lo, next; block < hi; block = next) {
    // Two blocks are two panels, whatever the distance between them.
    const int blocks = kTwoBlocks && v->lanes == kLanes && block + 1 < hi ? 2 : 1;
    next = block + blocks;
    float* scores = v->scores + (int64_t)(block - from) * v->lanes;
    // Blocks are scattered in memory: prefetch the next keys, and the values that are needed next.
    if (kv->latent) {
      for (int i = next; i < hi && i < next + blocks; ++i) prefetch(values_of(v, i), v->value_head_bytes);
      for (int i = block; i < next; ++i) make_panels(v, values_of(v, i), v->panels + (i - block) * (int64_t)v->lanes * v->value_stride);
      product_of<kScattered>(kF32, v->rows, blocks * v->lanes / kLanes, v->q, kv->dim_k, (const uint8_t*)v->panels,
                             64 * (int64_t)v->value_stride, kv->dim_k, scores, v->part_stride);
      continue;
    }
    const uint8_t* keys = keys_of(v, block);
    for (int i = next; i < hi && i < next + blocks; ++i) prefetch(keys_of(v, i), v->key_head_bytes);
    for (int i = block; i < next; ++i) prefetch(values_of(v, i), v->value_head_bytes);
    const int64_t apart = blocks == 2 ? keys_of(v, block + 1) - keys : panel_bytes;
    product_of<kScattered>(kv->format, v->rows, blocks * v->lanes / kLanes, v->q, kv->dim_k, keys, apart, kv->dim_k,
                           scores, v->part_stride);
  }
}

alignas(64) constexpr float kLaneNumbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// The bias by position (ALiBi) of 16 keys from `key` on.
TF_INLINE V alibi_bias(const AttentionCall* c, float slope, int key) {
  const V position = rounded(load(kLaneNumbers) + set1((float)key), c->alibi_rounded);
  const V bias = rounded(position * set1(slope), c->alibi_rounded);
  return c->alibi_rounded ? bias * set1(c->scale) : bias;
}

// Turns a row's scores of the keys lo .. hi into weights exp(score - max); the weights of other keys in these blocks
// become zero. Stores the row's maximum and sum.
static void softmax_weights(const View* v, int row, int from, int block_lo, int block_hi, int lo, int hi) {
  const AttentionCall* c = v->c;
  const int size = c->cache.block_size;
  float* scores = v->scores + (int64_t)row * v->part_stride;
  const float slope = c->alibi ? c->alibi[head_of(v, row)] : 0.0f;
  V best = set1(-INFINITY);
  for (int block = block_lo; block < block_hi; ++block)
    for (int lane = 0; lane < v->lanes; lane += kLanes) {
      float* s = scores + (int64_t)(block - from) * v->lanes + lane;
      const int key = block * size + lane;  // of the first lane; lanes from block_size on are no keys
      const int end = size - lane < kLanes ? key + size - lane : key + kLanes;
      V a = load(s) * set1(c->scale);
      if (c->softcap != 0.0f) a = softcapped(a, c->softcap);
      if (c->alibi) a = a + alibi_bias(c, slope, key);
      store(s, a);
      if (key < lo || end > hi || end - key < kLanes) {
        for (int i = 0; i < kLanes; ++i)
          if (key + i < lo || key + i >= hi || key + i >= end) s[i] = -INFINITY;
        a = load(s);
      }
      best = vmax(a, best);  // ignores NaN: it shows in the sum
    }
  const float most = max_of(best);
  V sum = zero();
  const V top = set1(most);
  for (int block = block_lo; block < block_hi; ++block)
    for (int lane = 0; lane < v->lanes; lane += kLanes) {
      float* s = scores + (int64_t)(block - from) * v->lanes + lane;
      const V a = load(s);
      V w = vexp(a - top);
      w = where_negative(a + set1(3.0e38f), zero(), w);  // only masked scores are that low
      store(s, w);
      sum = sum + w;
    }
  v->part_top[row] = most;
  v->part_sum[row] = sum_of(sum);
}

// Adds one key's value to MR rows. Rows that do not attend to the key are skipped: their weight is zero, but the value
// may be infinite, and 0 * inf is NaN.
template <int MR, int ND, bool ALL>
TF_INLINE void add_key(V (&acc)[MR][ND], const View* v, int row, int number, const float* w, const V (&value)[ND]) {
  for (int r = 0; r < MR; ++r) {
    if constexpr (!ALL) {
      const int position = position_of(v, row + r);
      if (number > position || number < first_key(v, position)) continue;
    }
    const V weight = set1(w[r * v->part_stride]);
    for (int d = 0; d < ND; ++d) acc[r][d] = fma(value[d], weight, acc[r][d]);
  }
}

// part[row, d ..] = sum over keys lo .. hi of weight * value, for MR rows and 16 ND columns. All rows attend to most
// keys; at both ends are keys that only some rows attend to.
template <int MR, int ND, int FORMAT>
static void sum_values(const View* v, int row, int from, int lo, int hi, int d) {
  const int size = v->c->cache.block_size;
  const float* weights = v->scores + (int64_t)row * v->part_stride;
  const int all_lo = first_key(v, position_of(v, row + MR - 1)), all_hi = position_of(v, row) + 1;
  V acc[MR][ND];
  for (int r = 0; r < MR; ++r)
    for (int i = 0; i < ND; ++i) acc[r][i] = zero();
  for (int block = lo / size; block * size < hi; ++block) {
    const uint8_t* values = values_of(v, block);
    const int first = block * size;
    const int begin = within(lo, first, first + size), end = within(hi, first, first + size);
    const int some = within(all_lo, begin, end), others = within(all_hi, some, end);
    const float* w = weights + (int64_t)(block - from) * v->lanes - first;
    const auto add = [&](int key, auto all) __attribute__((always_inline)) {
      const int64_t at = (int64_t)(key - first) * v->value_stride + d;
      V value[ND];
      for (int i = 0; i < ND; ++i)
        value[i] = FORMAT == kF32 ? load((const float*)values + at + kLanes * i)
                                  : load_bf16((const uint16_t*)values + at + kLanes * i);
      add_key<MR, ND, decltype(all)::value>(acc, v, row, key, w + key, value);
    };
    int key = begin;
    for (; key < some; ++key) add(key, BoolConstant<false>{});
    for (; key < others; ++key) add(key, BoolConstant<true>{});
    for (; key < end; ++key) add(key, BoolConstant<false>{});
  }
  for (int r = 0; r < MR; ++r)
    for (int i = 0; i < ND; ++i) store(v->part + (int64_t)(row + r) * v->value_width + d + kLanes * i, acc[r][i]);
}

template <int MR, int FORMAT>
static void sum_all_values(const View* v, int row, int from, int lo, int hi) {
  int d = 0;
  for (; d + kLanes * kValueVectors <= v->value_width; d += kLanes * kValueVectors)
    sum_values<MR, kValueVectors, FORMAT>(v, row, from, lo, hi, d);
  if constexpr (kValueVectors > 1)
    for (; d < v->value_width; d += kLanes) sum_values<MR, 1, FORMAT>(v, row, from, lo, hi, d);
}

template <int FORMAT>
static void sum_values_of_rows(const View* v, int from, int lo, int hi) {
  for (int row = 0; row < v->rows; row += 6) switch (v->rows - row) {
      case 1:
        sum_all_values<1, FORMAT>(v, row, from, lo, hi);
        break;
      case 2:
        sum_all_values<2, FORMAT>(v, row, from, lo, hi);
        break;
      case 3:
        sum_all_values<3, FORMAT>(v, row, from, lo, hi);
        break;
      case 4:
        sum_all_values<4, FORMAT>(v, row, from, lo, hi);
        break;
      case 5:
        sum_all_values<5, FORMAT>(v, row, from, lo, hi);
        break;
      default:
        sum_all_values<6, FORMAT>(v, row, from, lo, hi);
    }
}

// Merges the current partition into `total`, as one softmax.
static void merge(const View* v, int row) {
  float* total = v->total + (int64_t)row * v->value_width;
  const float* part = v->part + (int64_t)row * v->value_width;
  if (v->sum[row] == 0.0f) {  // the first
    for (int d = 0; d < v->value_width; d += kLanes) store(total + d, load(part + d));
    v->top[row] = v->part_top[row];
    v->sum[row] = v->part_sum[row];
    return;
  }
  const float top = v->part_top[row] > v->top[row] ? v->part_top[row] : v->top[row];
  float by[kLanes];
  const float below[kLanes] = {v->top[row] - top, v->part_top[row] - top};
  store(by, vexp(load(below)));
  for (int d = 0; d < v->value_width; d += kLanes)
    store(total + d, fma(load(part + d), set1(by[1]), load(total + d) * set1(by[0])));
  v->sum[row] = v->sum[row] * by[0] + v->part_sum[row] * by[1];
  v->top[row] = top;
}

// Divides by the sum of the weights, to which a sink adds without a value, rounds once, and writes the row.
static void write_output(const View* v, int row) {
  const AttentionCall* c = v->c;
  const int head = head_of(v, row);
  float by = 1.0f / v->sum[row];
  if (c->sinks) {
    const float sink = c->sinks[head], top = sink > v->top[row] ? sink : v->top[row];
    float e[kLanes];
    const float below[kLanes] = {v->top[row] - top, sink - top};
    store(e, vexp(load(below)));
    by = e[0] / (v->sum[row] * e[0] + e[1]);
  }
  const int width = c->cache.dim_v;
  float* out = c->out.data + (v->item->t + row / v->queries_per_kv) * c->out.stride + (int64_t)head * v->out_head;
  for (int d = 0; d < width; d += kLanes)
    store_n(out + d, rounded(load(v->total + (int64_t)row * v->value_width + d) * set1(by), c->round_out), width - d);
}

static View view_of(const AttentionCall* c, const AttentionItem* item, float* scratch) {
  const KvCache* kv = &c->cache;
  View v;
  v.c = c;
  v.item = item;
  v.queries_per_kv = c->heads / kv->kv_heads;
  v.rows = item->count * v.queries_per_kv;
  v.lanes = padded(kv->block_size);
  v.part_blocks = partition_blocks(kv->block_size);
  v.part_stride = v.part_blocks * v.lanes;
  v.value_width = padded(kv->dim_v);
  v.value_stride = kv->latent ? padded(kv->dim_k) : v.value_width;
  v.out_head = kv->latent ? kv->dim_k : kv->dim_v;
  v.key_head_bytes = kv->key_block_bytes / kv->kv_heads;
  v.value_head_bytes = kv->value_block_bytes / kv->kv_heads;
  v.scores = scratch;
  v.total = v.scores + (int64_t)v.rows * v.part_stride;
  v.top = v.total + (int64_t)v.rows * v.value_width;
  v.sum = v.top + v.rows;
  v.q = v.sum + v.rows;
  v.part = v.q + (int64_t)v.rows * kv->dim_k;
  v.part_top = v.part + (int64_t)v.rows * v.value_width;
  v.part_sum = v.part_top + v.rows;
  v.panels = v.part_sum + v.rows;
  v.begin = first_key(&v, item->position);
  v.end = item->position + item->count;
  return v;
}

static void gather_queries(const View* v) {
  const int width = v->c->cache.dim_k;
  for (int row = 0; row < v->rows; ++row) {
    const int64_t head = v->item->kv_head * v->queries_per_kv + row % v->queries_per_kv;
    const float* from = v->c->q.data + (v->item->t + row / v->queries_per_kv) * v->c->q.stride + head * width;
    for (int d = 0; d < width; ++d) v->q[(int64_t)row * width + d] = from[d];
  }
}

// The keys that some row attends to in the partition that begins with block `from`.
TF_INLINE int part_lo(const View* v, int from) {
  const int lo = from * v->c->cache.block_size;
  return lo > v->begin ? lo : v->begin;
}
TF_INLINE int part_hi(const View* v, int from) {
  const int hi = (from + v->part_blocks) * v->c->cache.block_size;
  return hi < v->end ? hi : v->end;
}

// Computes one partition: its values go to `part`, its maxima and sums to `part_top` and `part_sum`.
static void attend_part(const View* v, int from) {
  const int size = v->c->cache.block_size, lo = part_lo(v, from), hi = part_hi(v, from);
  const int block_lo = lo / size, block_hi = (hi + size - 1) / size;
  compute_scores(v, from, block_lo, block_hi);
  for (int row = 0; row < v->rows; ++row) {
    const int position = position_of(v, row), first = first_key(v, position);
    softmax_weights(v, row, from, block_lo, block_hi, first > lo ? first : lo, position + 1 < hi ? position + 1 : hi);
  }
  if (v->c->cache.format == kF32) sum_values_of_rows<kF32>(v, from, lo, hi);
  else sum_values_of_rows<kBF16>(v, from, lo, hi);
}

static void begin_total(const View* v) {
  for (int row = 0; row < v->rows; ++row) {
    v->top[row] = -INFINITY;
    v->sum[row] = 0.0f;
  }
}

static void merge_part(const View* v, int from) {
  const int lo = part_lo(v, from), hi = part_hi(v, from);
  for (int row = 0; row < v->rows; ++row) {
    const int position = position_of(v, row);
    if (first_key(v, position) < hi && position >= lo) merge(v, row);
  }
}

static void attend(const AttentionCall* c, const AttentionItem* item, float* scratch) {
  View v = view_of(c, item, scratch);
  gather_queries(&v);
  if (item->parts) {  // a single partition; merge_parts puts the results together
    v.part = item->parts;
    v.part_top = v.part + (int64_t)v.rows * v.value_width;
    v.part_sum = v.part_top + v.rows;
    return attend_part(&v, item->part * v.part_blocks);
  }
  begin_total(&v);
  const int size = c->cache.block_size;
  for (int from = v.begin / size / v.part_blocks * v.part_blocks; from * size < v.end; from += v.part_blocks) {
    attend_part(&v, from);
    merge_part(&v, from);
  }
  for (int row = 0; row < v.rows; ++row) write_output(&v, row);
}

// Merges the partitions from item->part on, computed by single calls, in the order in which `attend` merges them.
static void merge_parts(const AttentionCall* c, const AttentionItem* item, float* scratch) {
  View v = view_of(c, item, scratch);
  begin_total(&v);
  const int64_t floats = partial_floats(v.rows, c->cache.dim_v);
  const int size = c->cache.block_size;
  int at = 0;
  for (int from = item->part * v.part_blocks; from * size < v.end; from += v.part_blocks, ++at) {
    v.part = item->parts + at * floats;
    v.part_top = v.part + (int64_t)v.rows * v.value_width;
    v.part_sum = v.part_top + v.rows;
    merge_part(&v, from);
  }
  for (int row = 0; row < v.rows; ++row) write_output(&v, row);
}

}  // namespace
}  // namespace truffula

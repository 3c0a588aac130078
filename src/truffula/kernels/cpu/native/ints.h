// Vectors of 8-, 16- and 32-bit integers for 16 outputs, for quantised products. All static, like vec.h.
#pragma once

#include "vec.h"

namespace truffula {
namespace {

TF_INLINE float half_to_float(uint16_t half) {  // finite ones
  const uint32_t sign = (uint32_t)(half & 0x8000u) << 16, exponent = (half >> 10) & 31u, rest = half & 0x3ffu;
  float size;
  if (exponent == 0) {
    size = (float)rest * 0x1p-24f;
  } else {
    const uint32_t bits = ((uint32_t)(half & 0x7fffu) << 13) + (112u << 23);
    memcpy(&size, &bits, sizeof size);
  }
  return sign ? -size : size;
}

// 64 bytes of weights, or 16 sums (32-bit), or 32 sums of pairs (16-bit).
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)

struct I {
  __m512i v;
};
TF_INLINE I line_at(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
TF_INLINE void store_line(uint8_t* p, I a) { _mm512_storeu_si512(p, a.v); }
TF_INLINE I all32(int32_t x) { return {_mm512_set1_epi32(x)}; }
TF_INLINE I operator&(I a, I b) { return {_mm512_and_si512(a.v, b.v)}; }
TF_INLINE I operator|(I a, I b) { return {_mm512_or_si512(a.v, b.v)}; }
TF_INLINE I flip_signs(I a) { return {_mm512_xor_si512(a.v, _mm512_set1_epi8((char)0x80))}; }
TF_INLINE I up16(I a, int n) { return {_mm512_slli_epi16(a.v, (unsigned)n)}; }
TF_INLINE I down16(I a, int n) { return {_mm512_srli_epi16(a.v, (unsigned)n)}; }
TF_INLINE I down32(I a, int n) { return {_mm512_srai_epi32(a.v, (unsigned)n)}; }
// Without this barrier gcc turns the chain of sums into a tree, keeps all products live, and spills dozens of
// registers.
TF_INLINE I in_order(I a) {
#if !defined(TRUFFULA_EMULATED_SET)  // there it is two registers
  asm("" : "+v"(a.v));
#endif
  return a;
}
TF_INLINE I add32(I a, I b) { return in_order({_mm512_add_epi32(a.v, b.v)}); }
TF_INLINE I add16(I a, I b) { return in_order({_mm512_add_epi16(a.v, b.v)}); }
TF_INLINE I add8(I a, I b) { return {_mm512_add_epi8(a.v, b.v)}; }
// Each byte of `at` picks one of 16 by its low half, or is zero where its highest bit is set.
TF_INLINE I lookup(const uint8_t* table, I at) {
  return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table)), at.v)};
}
// In each 16 bytes: the lower 8 of a and b, interleaved, or the upper 8.
TF_INLINE I interleave_low(I a, I b) { return {_mm512_unpacklo_epi8(a.v, b.v)}; }
TF_INLINE I interleave_high(I a, I b) { return {_mm512_unpackhi_epi8(a.v, b.v)}; }
TF_INLINE I madd(I a, I b) { return {_mm512_madd_epi16(a.v, b.v)}; }
TF_INLINE I maddubs(I a, I b) { return {_mm512_maddubs_epi16(a.v, b.v)}; }
#if defined(__AVX512VNNI__)
TF_INLINE I dot_bytes(I sums, I w, I x) { return {_mm512_dpbusd_epi32(sums.v, w.v, x.v)}; }
#endif
#if defined(__AVX512BF16__)
// sums + odd of w * odd of x, rounded; + even of w * even of x, rounded. Denormals are zero, whatever MXCSR says.
TF_INLINE V dot_pairs(V sums, I w, I x) { return {_mm512_dpbf16_ps(sums.v, (__m512bh)w.v, (__m512bh)x.v)}; }
#endif
TF_INLINE V floats_of(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
TF_INLINE V load_half(const uint8_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
TF_INLINE I line_at(const uint8_t* line, Narrow n) { return {bits_of(line, n)}; }
// The float16 numbers in the lower, or upper, halves of 32-bit lanes.
TF_INLINE V lower_halves(I a) { return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(a.v))}; }
TF_INLINE V upper_halves(I a) { return lower_halves(I{_mm512_srli_epi32(a.v, 16)}); }
// 32 integers of -127 .. 127 as bytes; their sum.
TF_INLINE int32_t to_bytes(V a, V b, uint8_t* to) {
  const __m512i first = _mm512_cvtps_epi32(a.v), second = _mm512_cvtps_epi32(b.v);
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(first));
  _mm_storeu_si128((__m128i*)(to + kLanes), _mm512_cvtepi32_epi8(second));
  return _mm512_reduce_add_epi32(_mm512_add_epi32(first, second));
}
// The upper halves of 16 floats.
TF_INLINE void store_halves(uint16_t* to, V a) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(a.v), 16)));
}
TF_INLINE V even_of(I pairs) { return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs.v, 16))}; }
TF_INLINE V odd_of(I pairs) {
  return {_mm512_castsi512_ps(_mm512_and_si512(pairs.v, _mm512_set1_epi32((int)0xffff0000u)))};
}
// The entry of 16 floats that the lowest half-byte of each 32-bit number names, after `n` bits are dropped.
TF_INLINE V entries_of(V table, I a, int n) {
  return {_mm512_permutexvar_ps(_mm512_srli_epi32(a.v, (unsigned)n), table.v)};
}
// Whether a byte has none of the bits of `mask`.
TF_INLINE bool any_without(I a, int32_t mask) { return _mm512_testn_epi8_mask(a.v, _mm512_set1_epi32(mask)) != 0; }
constexpr int kQuantRows = 6;    // 6 rows x 2 panels: 12 sums and 12 accumulators of 32 registers
constexpr int kQuantTwo = 6;     // up to so many rows two panels at once

#elif defined(__AVX2__) && defined(__FMA__)

struct I {
  __m256i lo, hi;
};
TF_INLINE I line_at(const uint8_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
TF_INLINE I all32(int32_t x) {
  const __m256i v = _mm256_set1_epi32(x);
  return {v, v};
}
TF_INLINE I operator&(I a, I b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
TF_INLINE I operator|(I a, I b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
TF_INLINE I up16(I a, int n) { return {_mm256_slli_epi16(a.lo, n), _mm256_slli_epi16(a.hi, n)}; }
TF_INLINE I down16(I a, int n) { return {_mm256_srli_epi16(a.lo, n), _mm256_srli_epi16(a.hi, n)}; }
TF_INLINE I down32(I a, int n) { return {_mm256_srai_epi32(a.lo, n), _mm256_srai_epi32(a.hi, n)}; }
// Without this barrier gcc turns the chain of sums into a tree, keeps all products live, and spills dozens of
// registers.
TF_INLINE I in_order(__m256i lo, __m256i hi) {
  asm("" : "+x"(lo), "+x"(hi));
  return {lo, hi};
}
TF_INLINE I add32(I a, I b) { return in_order(_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)); }
TF_INLINE I add16(I a, I b) { return in_order(_mm256_add_epi16(a.lo, b.lo), _mm256_add_epi16(a.hi, b.hi)); }
TF_INLINE I add8(I a, I b) { return {_mm256_add_epi8(a.lo, b.lo), _mm256_add_epi8(a.hi, b.hi)}; }
// Each byte of `at` picks one of 16 by its low half, or is zero where its highest bit is set.
TF_INLINE I lookup(const uint8_t* table, I at) {
  const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
  return {_mm256_shuffle_epi8(t, at.lo), _mm256_shuffle_epi8(t, at.hi)};
}
// In each 16 bytes: the lower 8 of a and b, interleaved, or the upper 8.
TF_INLINE I interleave_low(I a, I b) { return {_mm256_unpacklo_epi8(a.lo, b.lo), _mm256_unpacklo_epi8(a.hi, b.hi)}; }
TF_INLINE I interleave_high(I a, I b) { return {_mm256_unpackhi_epi8(a.lo, b.lo), _mm256_unpackhi_epi8(a.hi, b.hi)}; }
TF_INLINE I madd(I a, I b) { return {_mm256_madd_epi16(a.lo, b.lo), _mm256_madd_epi16(a.hi, b.hi)}; }
TF_INLINE I maddubs(I a, I b) { return {_mm256_maddubs_epi16(a.lo, b.lo), _mm256_maddubs_epi16(a.hi, b.hi)}; }
TF_INLINE V floats_of(I a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
TF_INLINE V load_half(const uint8_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 16)))};
}
TF_INLINE I line_at(const uint8_t* line, Narrow n) { return {half_line(line, 0, n), half_line(line, 1, n)}; }
// The float16 numbers in the lower, or upper, halves of 32-bit lanes.
TF_INLINE __m256 lower_halves(__m256i a) {
  const __m128i pick = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i picked = _mm256_shuffle_epi8(a, _mm256_broadcastsi128_si256(pick));
  return _mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(picked, 8)));
}
TF_INLINE V lower_halves(I a) { return {lower_halves(a.lo), lower_halves(a.hi)}; }
TF_INLINE V upper_halves(I a) { return lower_halves(I{_mm256_srli_epi32(a.lo, 16), _mm256_srli_epi32(a.hi, 16)}); }
TF_INLINE void store_line(uint8_t* p, I a) {
  _mm256_storeu_si256((__m256i*)p, a.lo);
  _mm256_storeu_si256((__m256i*)(p + 32), a.hi);
}
TF_INLINE V even_of(I pairs) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs.lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(pairs.hi, 16))};
}
TF_INLINE V odd_of(I pairs) {
  const __m256i mask = _mm256_set1_epi32((int)0xffff0000u);
  return {_mm256_castsi256_ps(_mm256_and_si256(pairs.lo, mask)), _mm256_castsi256_ps(_mm256_and_si256(pairs.hi, mask))};
}
// The entry of 16 floats that the lowest half-byte of each 32-bit number names, after `n` bits are dropped.
TF_INLINE __m256 entries_of_half(V table, __m256i a) {
  const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(a, 28));  // its sign: the number is 8 or more
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.lo, a), _mm256_permutevar8x32_ps(table.hi, a), upper);
}
TF_INLINE V entries_of(V table, I a, int n) {
  return {entries_of_half(table, _mm256_srli_epi32(a.lo, n)), entries_of_half(table, _mm256_srli_epi32(a.hi, n))};
}
// Whether a byte has none of the bits of `mask`.
TF_INLINE bool any_without(I a, int32_t mask) {
  const I some = a & all32(mask);
  const __m256i least = _mm256_min_epu8(some.lo, some.hi);
  return _mm256_movemask_epi8(_mm256_cmpeq_epi8(least, _mm256_setzero_si256())) != 0;
}
constexpr int kQuantRows = 4;    // 4 rows x 1 panel of two registers: 8 sums and 4 registers of weights of 16
constexpr int kQuantTwo = 1;

#else  // portable

typedef uint8_t ByteQuad __attribute__((vector_size(16)));

struct I {
  IntQuad q[4];
};
TF_INLINE I line_at(const uint8_t* p) {
  I a;
  memcpy(&a, p, sizeof a);
  return a;
}
template <class F>
TF_INLINE I map_int(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}
TF_INLINE I all32(int32_t x) { return map_int([=](int) { return IntQuad{x, x, x, x}; }); }
TF_INLINE I operator&(I a, I b) { return map_int([&](int i) { return a.q[i] & b.q[i]; }); }
TF_INLINE I operator|(I a, I b) { return map_int([&](int i) { return a.q[i] | b.q[i]; }); }
TF_INLINE I flip_signs(I a) { return map_int([&](int i) { return a.q[i] ^ (int32_t)0x80808080u; }); }
// Bits may cross between 16-bit lanes: every caller masks them.
TF_INLINE I up16(I a, int n) { return map_int([&](int i) { return (IntQuad)((BitQuad)a.q[i] << n); }); }
TF_INLINE I down16(I a, int n) { return map_int([&](int i) { return (IntQuad)((BitQuad)a.q[i] >> n); }); }
TF_INLINE I dot_bytes(I sums, I w, I x) {  // unsigned w, signed x
  return map_int([&](int i) {
    IntQuad sum = sums.q[i];
    for (int shift = 0; shift < 32; shift += 8)
      sum += (IntQuad)((BitQuad)w.q[i] >> shift & 0xffu) * ((IntQuad)((BitQuad)x.q[i] << (24 - shift)) >> 24);
    return sum;
  });
}
TF_INLINE V floats_of(I a) { return map([&](int i) { return __builtin_convertvector(a.q[i], Quad); }); }
TF_INLINE V load_half(const uint8_t* p) {
  float x[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    uint16_t half;
    memcpy(&half, p + 2 * i, sizeof half);
    x[i] = half_to_float(half);
  }
  return load(x);
}
TF_INLINE I line_at(const uint8_t* line, Narrow n) {
  I a = all32(0);
  memcpy(&a, line, (size_t)n.bytes);
  return a;
}
// The float16 numbers in the lower, or upper, halves of 32-bit lanes.
TF_INLINE V halves_of(I a, int shift) {
  uint32_t bits[kLanes];
  float x[kLanes];
  memcpy(bits, &a, sizeof bits);
  for (int i = 0; i < kLanes; ++i) x[i] = half_to_float((uint16_t)(bits[i] >> shift));
  return load(x);
}
TF_INLINE V lower_halves(I a) { return halves_of(a, 0); }
TF_INLINE V upper_halves(I a) { return halves_of(a, 16); }
TF_INLINE void store_line(uint8_t* p, I a) { memcpy(p, &a, sizeof a); }
TF_INLINE V even_of(I pairs) { return map([&](int i) { return (Quad)((BitQuad)pairs.q[i] << 16); }); }
TF_INLINE V odd_of(I pairs) { return map([&](int i) { return (Quad)((BitQuad)pairs.q[i] & 0xffff0000u); }); }
// The entry of 16 floats that the lowest half-byte of each 32-bit number names, after `n` bits are dropped.
TF_INLINE V entries_of(V table, I a, int n) {
  float entries[kLanes], found[kLanes];
  uint32_t numbers[kLanes];
  store(entries, table);
  memcpy(numbers, &a, sizeof numbers);
  for (int i = 0; i < kLanes; ++i) found[i] = entries[numbers[i] >> n & 15u];
  return load(found);
}
constexpr int kQuantRows = 2;
constexpr int kQuantTwo = 0;

#endif

TF_INLINE I line_at(const uint8_t* line, Full) { return line_at(line); }

// The even, odd and last inputs in a line of pairs, in bfloat16 or float16.
template <int FORMAT, class LINES>
TF_INLINE V even_in(const uint8_t* line, LINES lines) {
  if constexpr (FORMAT == kF16) return lower_halves(line_at(line, lines));
  else return even_of(line, lines);
}
template <int FORMAT, class LINES>
TF_INLINE V odd_in(const uint8_t* line, LINES lines) {
  if constexpr (FORMAT == kF16) return upper_halves(line_at(line, lines));
  else return odd_of(line, lines);
}
template <int FORMAT, class LINES>
TF_INLINE V last_in(const uint8_t* line, LINES lines) {
  if constexpr (FORMAT == kF16) return lower_halves(line_at(line, lines));
  else return even_of(line, lines);
}
template <int FORMAT>
TF_INLINE V last_in(const uint8_t* line, Columns) {
  if constexpr (FORMAT == kF16) return load_half(line);
  else return load_bf16((const uint16_t*)line);
}

#if !defined(__AVX512F__)
// 32 integers of -127 .. 127 as bytes; their sum.
TF_INLINE int32_t to_bytes(V a, V b, uint8_t* to) {
  float numbers[2 * kLanes];
  store(numbers, a);
  store(numbers + kLanes, b);
  int8_t bytes[2 * kLanes];
  int32_t sum = 0;
  for (int i = 0; i < 2 * kLanes; ++i) bytes[i] = (int8_t)(int32_t)numbers[i];
  for (int i = 0; i < 2 * kLanes; ++i) sum += bytes[i];
  memcpy(to, bytes, sizeof bytes);
  return sum;
}
// The upper halves of 16 floats.
TF_INLINE void store_halves(uint16_t* to, V a) {
  float numbers[kLanes];
  store(numbers, a);
  for (int i = 0; i < kLanes; ++i) to[i] = to_bf16(numbers[i]);
}
#endif

}  // namespace
}  // namespace truffula

// Sixteen floats at once, in the widest form that the including file is compiled for. Everything has internal
// linkage: a file compiled for AVX-512 must never lend its code to one compiled for less.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "kernels.h"

#define TF_INLINE static inline __attribute__((always_inline))

namespace truffula {
namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)

struct V {
  __m512 v;
};
TF_INLINE V zero() { return {_mm512_setzero_ps()}; }
TF_INLINE V set1(float x) { return {_mm512_set1_ps(x)}; }
TF_INLINE V load(const float* p) { return {_mm512_loadu_ps(p)}; }
TF_INLINE void store(float* p, V a) { _mm512_storeu_ps(p, a.v); }
TF_INLINE V load_n(const float* p, int n) {
  return {n >= 16 ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p)};
}
TF_INLINE void store_n(float* p, V a, int n) {
  if (n >= 16) _mm512_storeu_ps(p, a.v);
  else _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), a.v);
}
TF_INLINE V operator+(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
TF_INLINE V operator-(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
TF_INLINE V operator*(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
TF_INLINE V operator/(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
TF_INLINE V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
TF_INLINE V vmax(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
TF_INLINE V vmin(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }
TF_INLINE V even_of(const uint8_t* line) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(line), 16))};
}
TF_INLINE V odd_of(const uint8_t* line) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(line), _mm512_set1_epi32((int)0xffff0000u)))};
}
// The first lanes of a line, which alone are stored; zeros in the others.
struct Narrow {
  __mmask16 mask;
  int64_t bytes;
};
TF_INLINE Narrow narrow(int lanes) { return {(__mmask16)((1u << lanes) - 1), 4 * lanes}; }
TF_INLINE __m512i bits_of(const uint8_t* line, Narrow n) { return _mm512_castps_si512(_mm512_maskz_loadu_ps(n.mask, (const float*)line)); }
TF_INLINE V floats_of(const uint8_t* line, Narrow n) { return {_mm512_maskz_loadu_ps(n.mask, (const float*)line)}; }
TF_INLINE V even_of(const uint8_t* line, Narrow n) { return {_mm512_castsi512_ps(_mm512_slli_epi32(bits_of(line, n), 16))}; }
TF_INLINE V odd_of(const uint8_t* line, Narrow n) {
  return {_mm512_castsi512_ps(_mm512_and_si512(bits_of(line, n), _mm512_set1_epi32((int)0xffff0000u)))};
}
TF_INLINE V load_bf16(const uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
// Nearest, ties to even; a NaN stays one.
TF_INLINE V round_bf16(V a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i cut = _mm512_and_si512(up, _mm512_set1_epi32((int)0xffff0000u));
  const __mmask16 ordered = _mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q);
  return {_mm512_mask_blend_ps(ordered, a.v, _mm512_castsi512_ps(cut))};
}
TF_INLINE V pow2(V n) {  // 2^n of integers -126 .. 127
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
}
TF_INLINE V nearest(V a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
TF_INLINE V vabs(V a) { return {_mm512_abs_ps(a.v)}; }
TF_INLINE V where_negative(V a, V yes, V no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_LT_OQ), no.v, yes.v)};
}
TF_INLINE V where_nan(V a, V yes, V no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), no.v, yes.v)};
}

#elif defined(__AVX2__) && defined(__FMA__)

struct V {
  __m256 lo, hi;
};
TF_INLINE V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
TF_INLINE V set1(float x) {
  const __m256 v = _mm256_set1_ps(x);
  return {v, v};
}
TF_INLINE V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
TF_INLINE void store(float* p, V a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
TF_INLINE __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
TF_INLINE V load_n(const float* p, int n) {
  if (n >= 16) return load(p);
  return {_mm256_maskload_ps(p, first(n)), _mm256_maskload_ps(p + 8, first(n - 8))};
}
TF_INLINE void store_n(float* p, V a, int n) {
  if (n >= 16) return store(p, a);
  _mm256_maskstore_ps(p, first(n), a.lo);
  _mm256_maskstore_ps(p + 8, first(n - 8), a.hi);
}
TF_INLINE V operator+(V a, V b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
TF_INLINE V operator-(V a, V b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
TF_INLINE V operator*(V a, V b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
TF_INLINE V operator/(V a, V b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
TF_INLINE V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
TF_INLINE V vmax(V a, V b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
TF_INLINE V vmin(V a, V b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
TF_INLINE __m256i half_line(const uint8_t* line, int half) {
  return _mm256_loadu_si256((const __m256i*)(line + 32 * half));
}
TF_INLINE V even_of(const uint8_t* line) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(half_line(line, 0), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(half_line(line, 1), 16))};
}
// Shifted down and up again, not masked: a mask would take the one register that a tile of six rows cannot spare.
TF_INLINE V odd_of(const uint8_t* line) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_srli_epi32(half_line(line, 0), 16), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_srli_epi32(half_line(line, 1), 16), 16))};
}
// The first lanes of a line, which alone are stored; zeros in the others.
struct Narrow {
  __m256i lo, hi;
  int64_t bytes;
};
TF_INLINE Narrow narrow(int lanes) { return {first(lanes), first(lanes - 8), 4 * lanes}; }
TF_INLINE __m256i half_line(const uint8_t* line, int half, Narrow n) {
  return _mm256_maskload_epi32((const int*)(line + 32 * half), half ? n.hi : n.lo);
}
TF_INLINE V floats_of(const uint8_t* line, Narrow n) {
  return {_mm256_castsi256_ps(half_line(line, 0, n)), _mm256_castsi256_ps(half_line(line, 1, n))};
}
TF_INLINE V even_of(const uint8_t* line, Narrow n) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(half_line(line, 0, n), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(half_line(line, 1, n), 16))};
}
TF_INLINE V odd_of(const uint8_t* line, Narrow n) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_srli_epi32(half_line(line, 0, n), 16), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_srli_epi32(half_line(line, 1, n), 16), 16))};
}
TF_INLINE __m256 widen(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
TF_INLINE V load_bf16(const uint16_t* p) { return {widen(p), widen(p + 8)}; }
TF_INLINE __m256 round_half(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256 cut = _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32((int)0xffff0000u)));
  return _mm256_blendv_ps(a, cut, _mm256_cmp_ps(a, a, _CMP_ORD_Q));
}
// Nearest, ties to even; a NaN stays one.
TF_INLINE V round_bf16(V a) { return {round_half(a.lo), round_half(a.hi)}; }
TF_INLINE __m256 pow2_half(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
TF_INLINE V pow2(V n) { return {pow2_half(n.lo), pow2_half(n.hi)}; }  // 2^n of integers -126 .. 127
TF_INLINE V nearest(V a) {
  return {_mm256_round_ps(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
TF_INLINE V vabs(V a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
TF_INLINE V where_negative(V a, V yes, V no) {
  const __m256 none = _mm256_setzero_ps();
  return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(a.lo, none, _CMP_LT_OQ)),
          _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(a.hi, none, _CMP_LT_OQ))};
}
TF_INLINE V where_nan(V a, V yes, V no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q)),
          _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q))};
}

#else  // portable: the compiler makes what it can of four-lane arithmetic

typedef float Quad __attribute__((vector_size(16)));
typedef int32_t IntQuad __attribute__((vector_size(16)));
typedef uint32_t BitQuad __attribute__((vector_size(16)));

struct V {
  Quad q[4];
};
TF_INLINE Quad quad(float x) { return Quad{x, x, x, x}; }
template <class F>
TF_INLINE V map(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}
TF_INLINE V zero() { return map([](int) { return quad(0); }); }
TF_INLINE V set1(float x) { return map([=](int) { return quad(x); }); }
TF_INLINE V load(const float* p) {
  V a;
  memcpy(&a, p, sizeof a);
  return a;
}
TF_INLINE void store(float* p, V a) { memcpy(p, &a, sizeof a); }
TF_INLINE V load_n(const float* p, int n) {
  if (n >= 16) return load(p);
  V a = zero();
  if (n > 0) memcpy(&a, p, sizeof(float) * (size_t)n);
  return a;
}
TF_INLINE void store_n(float* p, V a, int n) {
  if (n > 0) memcpy(p, &a, sizeof(float) * (size_t)(n < 16 ? n : 16));
}
TF_INLINE V operator+(V a, V b) { return map([&](int i) { return a.q[i] + b.q[i]; }); }
TF_INLINE V operator-(V a, V b) { return map([&](int i) { return a.q[i] - b.q[i]; }); }
TF_INLINE V operator*(V a, V b) { return map([&](int i) { return a.q[i] * b.q[i]; }); }
TF_INLINE V operator/(V a, V b) { return map([&](int i) { return a.q[i] / b.q[i]; }); }
TF_INLINE V fma(V a, V b, V c) { return map([&](int i) { return a.q[i] * b.q[i] + c.q[i]; }); }
// As the vector instructions do it: the second operand when either is NaN.
TF_INLINE V vmax(V a, V b) { return map([&](int i) { return a.q[i] > b.q[i] ? a.q[i] : b.q[i]; }); }
TF_INLINE V vmin(V a, V b) { return map([&](int i) { return a.q[i] < b.q[i] ? a.q[i] : b.q[i]; }); }
TF_INLINE BitQuad bits_at(const uint8_t* p) {
  BitQuad b;
  memcpy(&b, p, sizeof b);
  return b;
}
TF_INLINE V even_of(const uint8_t* line) { return map([&](int i) { return (Quad)(bits_at(line + 16 * i) << 16); }); }
TF_INLINE V odd_of(const uint8_t* line) {
  return map([&](int i) { return (Quad)(bits_at(line + 16 * i) & 0xffff0000u); });
}
// The first lanes of a line, which alone are stored; zeros in the others.
struct Narrow {
  int64_t bytes;
};
TF_INLINE Narrow narrow(int lanes) { return {4 * lanes}; }
TF_INLINE V floats_of(const uint8_t* line, Narrow n) {
  V a = zero();
  memcpy(&a, line, (size_t)n.bytes);
  return a;
}
TF_INLINE V even_of(const uint8_t* line, Narrow n) {
  const V a = floats_of(line, n);
  return even_of((const uint8_t*)&a);
}
TF_INLINE V odd_of(const uint8_t* line, Narrow n) {
  const V a = floats_of(line, n);
  return odd_of((const uint8_t*)&a);
}
TF_INLINE V load_bf16(const uint16_t* p) {
  return map([&](int i) {
    const BitQuad b = {p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3]};
    return (Quad)(b << 16);
  });
}
// Nearest, ties to even; a NaN stays one.
TF_INLINE V round_bf16(V a) {
  return map([&](int i) {
    const BitQuad b = (BitQuad)a.q[i];
    const Quad cut = (Quad)((b + ((b >> 16) & 1u) + 0x7fffu) & 0xffff0000u);
    return a.q[i] == a.q[i] ? cut : a.q[i];
  });
}
TF_INLINE V pow2(V n) {  // 2^n of integers -126 .. 127
  return map([&](int i) { return (Quad)((__builtin_convertvector(n.q[i], IntQuad) + 127) << 23); });
}
TF_INLINE V nearest(V a) {  // adding 1.5 * 2^23 leaves no room for a fraction; for |a| < 2^22
  return map([&](int i) {
    volatile Quad big = a.q[i] + quad(12582912.0f);
    return (Quad)big - quad(12582912.0f);
  });
}
TF_INLINE V vabs(V a) { return map([&](int i) { return (Quad)((BitQuad)a.q[i] & 0x7fffffffu); }); }
TF_INLINE V where_negative(V a, V yes, V no) {
  return map([&](int i) { return a.q[i] < quad(0) ? yes.q[i] : no.q[i]; });
}
TF_INLINE V where_nan(V a, V yes, V no) {
  return map([&](int i) { return a.q[i] == a.q[i] ? no.q[i] : yes.q[i]; });
}

#endif

// All lanes of a line. In `Columns` the last of an odd number of 16-bit inputs has a line of its own, of half a size.
struct Full {
  static constexpr int64_t bytes = 64;
};
struct Columns : Full {};
TF_INLINE V floats_of(const uint8_t* line, Full) { return load((const float*)line); }
TF_INLINE V even_of(const uint8_t* line, Full) { return even_of(line); }
TF_INLINE V odd_of(const uint8_t* line, Full) { return odd_of(line); }

TF_INLINE V rounded(V a, int32_t round) { return round ? round_bf16(a) : a; }

TF_INLINE float to_float(uint16_t half) {
  const uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
TF_INLINE uint16_t to_bf16(float value) {  // nearest, ties to even; a NaN stays one
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40u);
  return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Lanes are added in one fixed order: halves, then halves of those.
TF_INLINE float sum_of(V a) {
  float x[16];
  store(x, a);
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
}
TF_INLINE float max_of(V a) {  // of numbers, none of them NaN
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(a.v);
#else
  float x[16];
  store(x, a);
  float best = x[0];
  for (int i = 1; i < 16; ++i) best = x[i] > best ? x[i] : best;
  return best;
#endif
}

// e^x: a power of two times a polynomial (Cephes' coefficients); relative error about 1e-7. Below -87.3 it stays at
// the smallest normal number, above 88.7 it is +Inf, NaN stays NaN.
TF_INLINE V vexp(V x) {
  const V bounded = vmin(vmax(x, set1(-87.33f)), set1(88.72f));
  const V n = nearest(bounded * set1(1.44269504088896341f));
  V r = fma(n, set1(-0.693359375f), bounded);
  r = fma(n, set1(2.12194440e-4f), r);
  V p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r) + set1(1.0f);
  // 2^128 does not exist as a float: half of it, twice.
  const V most = vmin(n, set1(127.0f));
  V result = p * pow2(most) * pow2(n - most);
  result = where_negative(set1(88.72f) - x, set1(INFINITY), result);
  return where_nan(x, x, result);
}
TF_INLINE V vsigmoid(V x) { return set1(1.0f) / (set1(1.0f) + vexp(zero() - x)); }
// log(1 + e^x) = max(x, 0) + log(1 + u) with u = e^-|x|, and log(1 + u) = 2 artanh(u / (2 + u)), whose series is exact to
// 2e-8 here.
TF_INLINE V vsoftplus(V x) {
  const V u = vexp(zero() - vabs(x));
  const V z = u / (u + set1(2.0f)), z2 = z * z;
  V p = set1(0.07692307692f);
  p = fma(p, z2, set1(0.09090909091f));
  p = fma(p, z2, set1(0.11111111111f));
  p = fma(p, z2, set1(0.14285714286f));
  p = fma(p, z2, set1(0.2f));
  p = fma(p, z2, set1(0.33333333333f));
  p = fma(p, z2, set1(1.0f));
  return fma(z + z, p, vmax(zero(), x));
}
// An odd function, so computed for |x|: there 1 - 2 / (e^2|x| + 1) loses no bit that float32 holds beside 1.
TF_INLINE V vtanh(V x) {
  const V a = vabs(x);
  const V big = set1(1.0f) - set1(2.0f) / (vexp(a + a) + set1(1.0f));
  const V a2 = a * a;  // small: the series, exact to 1e-7 below 0.3
  V p = fma(a2, set1(-0.05396825396f), set1(0.13333333333f));
  p = fma(p, a2, set1(-0.33333333333f));
  const V small = fma(p * a2, a, a);
  const V size = where_negative(a - set1(0.25f), small, big);
  return where_negative(x, zero() - size, size);
}
// Abramowitz and Stegun 7.1.26: absolute error below 1.5e-7.
TF_INLINE V verf(V x) {
  const V a = vabs(x);
  const V t = set1(1.0f) / fma(a, set1(0.3275911f), set1(1.0f));
  V p = set1(1.061405429f);
  p = fma(p, t, set1(-1.453152027f));
  p = fma(p, t, set1(1.421413741f));
  p = fma(p, t, set1(-0.284496736f));
  p = fma(p, t, set1(0.254829592f));
  const V size = set1(1.0f) - p * t * vexp(zero() - a * a);
  return where_negative(x, zero() - size, size);
}
TF_INLINE V activated(V x, int32_t kind) {
  switch (kind) {
    case kSilu:
      return x * vsigmoid(x);
    case kGelu:
      return set1(0.5f) * x * (set1(1.0f) + verf(x * set1(0.70710678118654752f)));
    case kGeluTanh: {
      const V inner = set1(0.7978845608028654f) * fma(set1(0.044715f) * x * x, x, x);
      return set1(0.5f) * x * (set1(1.0f) + vtanh(inner));
    }
    case kRelu:
      return vmax(zero(), x);
    case kQuickGelu:
      return x * vsigmoid(set1(1.702f) * x);
    case kRelu2: {
      const V y = vmax(zero(), x);
      return y * y;
    }
    case kSoftplus:
      return vsoftplus(x);
    case kSigmoidActivation:
      return vsigmoid(x);
    default:
      return x;
  }
}
TF_INLINE V softcapped(V x, float cap) { return vtanh(x * set1(1.0f / cap)) * set1(cap); }

}  // namespace
}  // namespace truffula

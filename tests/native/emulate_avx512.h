// AVX-512 as functions that a machine with AVX2 can run: what the AVX-512 tables use of it and no more. Included before
// everything else by the build with TRUFFULA_EMULATE, whose tables are there to be tested, not to be fast. Written from
// Intel's intrinsics guide; halves go through AVX2 where its instructions mean the same (maxima of NaN, rounding).
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#pragma GCC diagnostic ignored "-Wpsabi"  // none of these is ever called
#define EMU static inline __attribute__((always_inline, unused))

namespace {

typedef uint16_t EmuWords __attribute__((vector_size(64)));
typedef int32_t EmuInts __attribute__((vector_size(64)));
typedef uint32_t EmuBits __attribute__((vector_size(64)));

struct EmuHalves {
  __m256 lo, hi;
};
struct EmuIntHalves {
  __m256i lo, hi;
};
template <class To, class From>
EMU To emu_as(From from) {
  static_assert(sizeof(To) == sizeof from);
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
#define EMU_FLOATS(name, call)                                                            \
  EMU __m512 emu_##name(__m512 a, __m512 b) {                                             \
    const EmuHalves x = emu_as<EmuHalves>(a), y = emu_as<EmuHalves>(b);                   \
    return emu_as<__m512>(EmuHalves{call(x.lo, y.lo), call(x.hi, y.hi)});                 \
  }
EMU_FLOATS(add_ps, _mm256_add_ps)
EMU_FLOATS(sub_ps, _mm256_sub_ps)
EMU_FLOATS(mul_ps, _mm256_mul_ps)
EMU_FLOATS(div_ps, _mm256_div_ps)
EMU_FLOATS(max_ps, _mm256_max_ps)
EMU_FLOATS(min_ps, _mm256_min_ps)
#define EMU_INTS(name, call)                                                              \
  EMU __m512i emu_##name(__m512i a, __m512i b) {                                          \
    const EmuIntHalves x = emu_as<EmuIntHalves>(a), y = emu_as<EmuIntHalves>(b);          \
    return emu_as<__m512i>(EmuIntHalves{call(x.lo, y.lo), call(x.hi, y.hi)});             \
  }
EMU_INTS(and_si512, _mm256_and_si256)
EMU_INTS(or_si512, _mm256_or_si256)
EMU_INTS(xor_si512, _mm256_xor_si256)
EMU_INTS(add_epi16, _mm256_add_epi16)
EMU_INTS(add_epi32, _mm256_add_epi32)
EMU_INTS(madd_epi16, _mm256_madd_epi16)
EMU_INTS(maddubs_epi16, _mm256_maddubs_epi16)

EMU __m512 emu_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const EmuHalves x = emu_as<EmuHalves>(a), y = emu_as<EmuHalves>(b), z = emu_as<EmuHalves>(c);
  return emu_as<__m512>(EmuHalves{_mm256_fmadd_ps(x.lo, y.lo, z.lo), _mm256_fmadd_ps(x.hi, y.hi, z.hi)});
}
template <int MODE>
EMU __m512 emu_roundscale_ps(__m512 a) {
  const EmuHalves x = emu_as<EmuHalves>(a);
  return emu_as<__m512>(EmuHalves{_mm256_round_ps(x.lo, MODE), _mm256_round_ps(x.hi, MODE)});
}
EMU __m512i emu_cvtps_epi32(__m512 a) {
  const EmuHalves x = emu_as<EmuHalves>(a);
  return emu_as<__m512i>(EmuIntHalves{_mm256_cvtps_epi32(x.lo), _mm256_cvtps_epi32(x.hi)});
}
EMU __m512 emu_cvtepi32_ps(__m512i a) {
  const EmuIntHalves x = emu_as<EmuIntHalves>(a);
  return emu_as<__m512>(EmuHalves{_mm256_cvtepi32_ps(x.lo), _mm256_cvtepi32_ps(x.hi)});
}
EMU __m512i emu_cvtepu16_epi32(__m256i a) {
  return emu_as<__m512i>(EmuIntHalves{_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)),
                                      _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1))});
}
EMU __m512 emu_cvtph_ps(__m256i a) {
  return emu_as<__m512>(
      EmuHalves{_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))});
}
template <int PREDICATE>
EMU __mmask16 emu_cmp_ps_mask(__m512 a, __m512 b) {
  const EmuHalves x = emu_as<EmuHalves>(a), y = emu_as<EmuHalves>(b);
  const int lo = _mm256_movemask_ps(_mm256_cmp_ps(x.lo, y.lo, PREDICATE));
  return (__mmask16)(lo | _mm256_movemask_ps(_mm256_cmp_ps(x.hi, y.hi, PREDICATE)) << 8);
}
EMU EmuInts emu_lanes(__mmask16 k) {  // all ones where the mask has a one
  EmuInts lanes;
  for (int i = 0; i < 16; ++i) lanes[i] = k >> i & 1 ? -1 : 0;
  return lanes;
}
EMU __m512 emu_mask_blend_ps(__mmask16 k, __m512 a, __m512 b) {
  const EmuInts lanes = emu_lanes(k);
  return emu_as<__m512>((emu_as<EmuInts>(a) & ~lanes) | (emu_as<EmuInts>(b) & lanes));
}
// What is masked away is not touched: it may lie where no memory is.
EMU __m512 emu_maskz_loadu_ps(__mmask16 k, const float* p) {
  float x[16];
  for (int i = 0; i < 16; ++i) x[i] = k >> i & 1 ? p[i] : 0.0f;
  __m512 a;
  memcpy(&a, x, sizeof a);
  return a;
}
EMU void emu_mask_storeu_ps(float* p, __mmask16 k, __m512 a) {
  float x[16];
  memcpy(x, &a, sizeof x);
  for (int i = 0; i < 16; ++i)
    if (k >> i & 1) p[i] = x[i];
}
EMU __m512 emu_loadu_ps(const void* p) {
  __m512 a;
  memcpy(&a, p, sizeof a);
  return a;
}
EMU __m512i emu_loadu_si512(const void* p) {
  __m512i a;
  memcpy(&a, p, sizeof a);
  return a;
}
EMU void emu_storeu_ps(void* p, __m512 a) { memcpy(p, &a, sizeof a); }
EMU __m512 emu_set1_ps(float x) { return x - __m512{}; }
EMU __m512i emu_set1_epi32(int x) { return emu_as<__m512i>(x - EmuInts{}); }
EMU __m512i emu_set1_epi8(char x) { return emu_set1_epi32((int)(0x01010101u * (unsigned char)x)); }
EMU __m512i emu_slli_epi32(__m512i a, unsigned n) { return emu_as<__m512i>(emu_as<EmuBits>(a) << n); }
EMU __m512i emu_srli_epi32(__m512i a, unsigned n) { return emu_as<__m512i>(emu_as<EmuBits>(a) >> n); }
EMU __m512i emu_srai_epi32(__m512i a, unsigned n) { return emu_as<__m512i>(emu_as<EmuInts>(a) >> (int)n); }
EMU __m512i emu_slli_epi16(__m512i a, unsigned n) { return emu_as<__m512i>(emu_as<EmuWords>(a) << (uint16_t)n); }
EMU __m512i emu_srli_epi16(__m512i a, unsigned n) { return emu_as<__m512i>(emu_as<EmuWords>(a) >> (uint16_t)n); }
EMU __m512 emu_abs_ps(__m512 a) { return emu_as<__m512>(emu_as<EmuInts>(a) & 0x7fffffff); }

#if TRUFFULA_EMULATED_SET >= 2
EMU __m512i emu_dpbusd_epi32(__m512i sums, __m512i a, __m512i b) {  // unsigned a, signed b
  EmuInts all = emu_as<EmuInts>(sums);
  for (int shift = 0; shift < 32; shift += 8)
    all += (emu_as<EmuInts>(a) >> shift & 0xff) * ((EmuInts)(emu_as<EmuBits>(b) << (24 - shift)) >> 24);
  return emu_as<__m512i>(all);
}
#endif
#if TRUFFULA_EMULATED_SET >= 3
EMU __m512 emu_without_denormals(__m512 a) {
  const EmuInts bits = emu_as<EmuInts>(a), small = (bits & 0x7f800000) == 0;
  return emu_as<__m512>((bits & ~small) | (bits & small & (int)0x80000000u));
}
EMU __m512 emu_odd(__m512i pairs) {
  return emu_without_denormals(emu_as<__m512>(emu_as<EmuBits>(pairs) & 0xffff0000u));
}
EMU __m512 emu_even(__m512i pairs) { return emu_without_denormals(emu_as<__m512>(emu_as<EmuBits>(pairs) << 16)); }
EMU __m512 emu_dpbf16_ps(__m512 sums, __m512i a, __m512i b) {
  const __m512 odd = emu_fmadd_ps(emu_odd(a), emu_odd(b), emu_without_denormals(sums));
  return emu_without_denormals(emu_fmadd_ps(emu_even(a), emu_even(b), emu_without_denormals(odd)));
}
#endif

}  // namespace

#define _mm512_abs_ps emu_abs_ps
#define _mm512_add_epi16 emu_add_epi16
#define _mm512_add_epi32 emu_add_epi32
#define _mm512_add_ps emu_add_ps
#define _mm512_and_si512 emu_and_si512
#define _mm512_castps_si512(a) emu_as<__m512i>(a)
#define _mm512_castsi512_ps(a) emu_as<__m512>(a)
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask(a, b, predicate) emu_cmp_ps_mask<predicate>(a, b)
#define _mm512_cvtepi32_ps emu_cvtepi32_ps
#define _mm512_cvtepu16_epi32 emu_cvtepu16_epi32
#define _mm512_cvtph_ps emu_cvtph_ps
#define _mm512_cvtps_epi32 emu_cvtps_epi32
#define _mm512_div_ps emu_div_ps
#define _mm512_fmadd_ps emu_fmadd_ps
#define _mm512_loadu_ps emu_loadu_ps
#define _mm512_loadu_si512 emu_loadu_si512
#define _mm512_madd_epi16 emu_madd_epi16
#define _mm512_maddubs_epi16 emu_maddubs_epi16
#define _mm512_mask_blend_ps emu_mask_blend_ps
#define _mm512_mask_storeu_ps emu_mask_storeu_ps
#define _mm512_maskz_loadu_ps emu_maskz_loadu_ps
#define _mm512_max_ps emu_max_ps
#define _mm512_min_ps emu_min_ps
#define _mm512_mul_ps emu_mul_ps
#define _mm512_or_si512 emu_or_si512
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps(a, mode) emu_roundscale_ps<mode>(a)
#define _mm512_set1_epi32 emu_set1_epi32
#define _mm512_set1_epi8 emu_set1_epi8
#define _mm512_set1_ps emu_set1_ps
#define _mm512_setzero_ps() emu_set1_ps(0.0f)
#define _mm512_slli_epi16 emu_slli_epi16
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 emu_slli_epi32
#define _mm512_srai_epi32 emu_srai_epi32
#define _mm512_srli_epi16 emu_srli_epi16
#undef _mm512_srli_epi32
#define _mm512_srli_epi32 emu_srli_epi32
#define _mm512_storeu_ps emu_storeu_ps
#define _mm512_sub_ps emu_sub_ps
#define _mm512_xor_si512 emu_xor_si512
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1
#if TRUFFULA_EMULATED_SET >= 2
#define _mm512_dpbusd_epi32 emu_dpbusd_epi32
#define __AVX512VNNI__ 1
#endif
#if TRUFFULA_EMULATED_SET >= 3
#define __m512bh __m512i
#define _mm512_dpbf16_ps emu_dpbf16_ps
#define __AVX512BF16__ 1
#endif
#undef EMU
#undef EMU_FLOATS
#undef EMU_INTS

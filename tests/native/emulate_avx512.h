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

typedef uint8_t EmuBytes __attribute__((vector_size(64)));
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
EMU_INTS(add_epi8, _mm256_add_epi8)
EMU_INTS(shuffle_epi8, _mm256_shuffle_epi8)
EMU_INTS(unpacklo_epi8, _mm256_unpacklo_epi8)
EMU_INTS(unpackhi_epi8, _mm256_unpackhi_epi8)

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
EMU __m512i emu_broadcast_i32x4(__m128i a) {
  const __m256i twice = _mm256_broadcastsi128_si256(a);
  return emu_as<__m512i>(EmuIntHalves{twice, twice});
}
EMU __m512i emu_set1_epi8(char x) { return emu_set1_epi32((int)(0x01010101u * (unsigned char)x)); }
EMU __m512 emu_permutexvar_ps(__m512i at, __m512 a) {
  const EmuBits numbers = emu_as<EmuBits>(at);
  __m512 out = a;
  for (int i = 0; i < 16; ++i) out[i] = a[numbers[i] & 15u];
  return out;
}
EMU __mmask64 emu_testn_epi8_mask(__m512i a, __m512i b) {
  const EmuBytes both = emu_as<EmuBytes>(a) & emu_as<EmuBytes>(b);
  __mmask64 k = 0;
  for (int i = 0; i < 64; ++i) k |= (__mmask64)(both[i] == 0) << i;
  return k;
}
EMU __m512i emu_slli_epi32(__m512i a, unsigned n) { return emu_as<__m512i>(emu_as<EmuBits>(a) << n); }
EMU __m512i emu_srli_epi32(__m512i a, unsigned n) { return emu_as<__m512i>(emu_as<EmuBits>(a) >> n); }
EMU __m512i emu_srai_epi32(__m512i a, unsigned n) { return emu_as<__m512i>(emu_as<EmuInts>(a) >> (int)n); }
EMU __m512i emu_slli_epi16(__m512i a, unsigned n) { return emu_as<__m512i>(emu_as<EmuWords>(a) << (uint16_t)n); }
EMU __m512i emu_srli_epi16(__m512i a, unsigned n) { return emu_as<__m512i>(emu_as<EmuWords>(a) >> (uint16_t)n); }
EMU __m128i emu_cvtepi32_epi8(__m512i a) {
  const EmuInts x = emu_as<EmuInts>(a);
  uint8_t bytes[16];
  for (int i = 0; i < 16; ++i) bytes[i] = (uint8_t)x[i];
  __m128i all;
  memcpy(&all, bytes, sizeof all);
  return all;
}
EMU __m256i emu_cvtepi32_epi16(__m512i a) {
  const EmuInts x = emu_as<EmuInts>(a);
  uint16_t words[16];
  for (int i = 0; i < 16; ++i) words[i] = (uint16_t)x[i];
  __m256i all;
  memcpy(&all, words, sizeof all);
  return all;
}
EMU float emu_reduce_max_ps(__m512 a) {
  float x[16], best;
  memcpy(x, &a, sizeof x);
  best = x[0];
  for (int i = 1; i < 16; ++i) best = x[i] > best ? x[i] : best;
  return best;
}
EMU int32_t emu_reduce_add_epi32(__m512i a) {
  const EmuInts x = emu_as<EmuInts>(a);
  int32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += x[i];
  return sum;
}
EMU void emu_storeu_si512(void* p, __m512i a) { memcpy(p, &a, sizeof a); }
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

#if TRUFFULA_EMULATED_SET >= 4
// Tiles, from Intel's manual (TDPBF16PS, TDPBSSD, TDPBSUD). What it calls an invalid configuration stops the program.
struct EmuTiles {
  uint16_t row_bytes[8];
  uint8_t rows[8];
  uint8_t data[8][16][64];
};
inline thread_local EmuTiles emu_tiles;
EMU void emu_check(bool right) {
  if (!right) __builtin_trap();
}
EMU void emu_tile_loadconfig(const void* from) {
  const uint8_t* config = (const uint8_t*)from;
  emu_check(config[0] == 1 && config[1] == 0);
  for (int i = 2; i < 16; ++i) emu_check(config[i] == 0);
  memset(&emu_tiles, 0, sizeof emu_tiles);
  memcpy(emu_tiles.row_bytes, config + 16, sizeof emu_tiles.row_bytes);
  memcpy(emu_tiles.rows, config + 48, sizeof emu_tiles.rows);
  for (int i = 0; i < 8; ++i) emu_check(emu_tiles.row_bytes[i] <= 64 && emu_tiles.rows[i] <= 16);
}
EMU void emu_tile_release() { memset(&emu_tiles, 0, sizeof emu_tiles); }
EMU void emu_tile_zero(int t) {
  emu_check(emu_tiles.rows[t] > 0);
  memset(emu_tiles.data[t], 0, sizeof emu_tiles.data[t]);
}
EMU void emu_tile_loadd(int t, const void* from, int64_t stride) {
  emu_check(emu_tiles.rows[t] > 0);
  memset(emu_tiles.data[t], 0, sizeof emu_tiles.data[t]);
  for (int r = 0; r < emu_tiles.rows[t]; ++r)
    memcpy(emu_tiles.data[t][r], (const uint8_t*)from + r * stride, emu_tiles.row_bytes[t]);
}
EMU void emu_tile_stored(int t, void* to, int64_t stride) {
  emu_check(emu_tiles.rows[t] > 0);
  for (int r = 0; r < emu_tiles.rows[t]; ++r)
    memcpy((uint8_t*)to + r * stride, emu_tiles.data[t][r], emu_tiles.row_bytes[t]);
}
EMU float emu_float(uint32_t bits) {
  if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
EMU float emu_flushed(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return emu_float(bits);
}
EMU void emu_same_shape(int c, int a, int b) {
  const EmuTiles& t = emu_tiles;
  emu_check(t.rows[c] == t.rows[a] && t.row_bytes[c] == t.row_bytes[b] && t.row_bytes[a] == 4 * t.rows[b]);
}
EMU void emu_tile_dpbf16ps(int c, int a, int b) {
  emu_same_shape(c, a, b);
  for (int m = 0; m < emu_tiles.rows[c]; ++m)
    for (int n = 0; n < emu_tiles.row_bytes[c] / 4; ++n) {
      float sums[2] = {0.0f, 0.0f}, total;
      for (int k = 0; k < emu_tiles.rows[b]; ++k)
        for (int odd = 0; odd < 2; ++odd) {
          uint16_t x, w;
          memcpy(&x, emu_tiles.data[a][m] + 4 * k + 2 * odd, 2);
          memcpy(&w, emu_tiles.data[b][k] + 4 * n + 2 * odd, 2);
          sums[odd] = emu_flushed(__builtin_fmaf(emu_float((uint32_t)x << 16), emu_float((uint32_t)w << 16), sums[odd]));
        }
      memcpy(&total, emu_tiles.data[c][m] + 4 * n, 4);
      total = emu_flushed(emu_flushed(total) + emu_flushed(sums[0] + sums[1]));
      memcpy(emu_tiles.data[c][m] + 4 * n, &total, 4);
    }
}
template <class Weight>
EMU void emu_tile_dot(int c, int a, int b) {
  emu_same_shape(c, a, b);
  for (int m = 0; m < emu_tiles.rows[c]; ++m)
    for (int n = 0; n < emu_tiles.row_bytes[c] / 4; ++n) {
      int32_t total;
      memcpy(&total, emu_tiles.data[c][m] + 4 * n, 4);
      for (int k = 0; k < emu_tiles.rows[b]; ++k)
        for (int i = 0; i < 4; ++i)
          total += (int8_t)emu_tiles.data[a][m][4 * k + i] * (Weight)emu_tiles.data[b][k][4 * n + i];
      memcpy(emu_tiles.data[c][m] + 4 * n, &total, 4);
    }
}
#endif

}  // namespace

#define _mm512_abs_ps emu_abs_ps
#define _mm512_add_epi16 emu_add_epi16
#define _mm512_add_epi32 emu_add_epi32
#define _mm512_add_epi8 emu_add_epi8
#define _mm512_add_ps emu_add_ps
#define _mm512_and_si512 emu_and_si512
#define _mm512_broadcast_i32x4 emu_broadcast_i32x4
#define _mm512_castps_si512(a) emu_as<__m512i>(a)
#define _mm512_castsi512_ps(a) emu_as<__m512>(a)
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask(a, b, predicate) emu_cmp_ps_mask<predicate>(a, b)
#define _mm512_cvtepi32_epi16 emu_cvtepi32_epi16
#define _mm512_cvtepi32_epi8 emu_cvtepi32_epi8
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
#define _mm512_permutexvar_ps emu_permutexvar_ps
#define _mm512_reduce_max_ps emu_reduce_max_ps
#define _mm512_reduce_add_epi32 emu_reduce_add_epi32
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps(a, mode) emu_roundscale_ps<mode>(a)
#define _mm512_set1_epi32 emu_set1_epi32
#define _mm512_set1_epi8 emu_set1_epi8
#define _mm512_set1_ps emu_set1_ps
#define _mm512_setzero_ps() emu_set1_ps(0.0f)
#define _mm512_shuffle_epi8 emu_shuffle_epi8
#define _mm512_slli_epi16 emu_slli_epi16
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 emu_slli_epi32
#define _mm512_srai_epi32 emu_srai_epi32
#define _mm512_srli_epi16 emu_srli_epi16
#undef _mm512_srli_epi32
#define _mm512_srli_epi32 emu_srli_epi32
#define _mm512_storeu_si512 emu_storeu_si512
#define _mm512_storeu_ps emu_storeu_ps
#define _mm512_sub_ps emu_sub_ps
#define _mm512_testn_epi8_mask emu_testn_epi8_mask
#define _mm512_unpackhi_epi8 emu_unpackhi_epi8
#define _mm512_unpacklo_epi8 emu_unpacklo_epi8
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
#if TRUFFULA_EMULATED_SET >= 4
#define _tile_loadconfig emu_tile_loadconfig
#define _tile_release emu_tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#undef _tile_dpbsud
#define _tile_zero emu_tile_zero
#define _tile_loadd emu_tile_loadd
#define _tile_stored emu_tile_stored
#define _tile_dpbf16ps emu_tile_dpbf16ps
#define _tile_dpbssd emu_tile_dot<int8_t>
#define _tile_dpbsud emu_tile_dot<uint8_t>
#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#define __AMX_INT8__ 1
#endif
#undef EMU
#undef EMU_FLOATS
#undef EMU_INTS

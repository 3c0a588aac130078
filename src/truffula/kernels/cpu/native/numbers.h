// Conversions of 16-bit floats, for files compiled without an instruction set (tables use vec.h).
#pragma once

#include <bit>
#include <cstdint>

namespace truffula {

inline float from_bf16(uint16_t half) { return std::bit_cast<float>(static_cast<uint32_t>(half) << 16); }

inline uint16_t to_bf16(float value) {  // to nearest, ties to even; a NaN stays one
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float from_f16(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
  if (rest >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  // In a float's place the exponent is 112 too small; the product corrects it, for denormals too.
  const float size = std::bit_cast<float>(rest << 13) * 0x1p112f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(size));
}

// To nearest, ties to even; values that are too large become infinite.
inline uint16_t to_f16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), sign = bits >> 16 & 0x8000u;
  const float size = std::bit_cast<float>(bits & 0x7fffffffu);
  if (!(size < 65520.0f)) return static_cast<uint16_t>(sign | (size != size ? 0x7e00u : 0x7c00u));
  // Below 2^-14 numbers are multiples of 2^-24: adding a half with that last place rounds to them.
  if (size < 0x1p-14f) return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(size + 0.5f) - std::bit_cast<uint32_t>(0.5f)));
  const uint32_t whole = bits & 0x7fffffffu;
  return static_cast<uint16_t>(sign | ((whole + 0xfffu + (whole >> 13 & 1u) - (112u << 23)) >> 13));
}

}  // namespace truffula

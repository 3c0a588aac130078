// Philox4x32-10: a counter-based generator, so that a draw depends on its key and counter only.
//
// Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", sec. 3.4 and the Random123 library.
#pragma once

#include <array>
#include <cstdint>

namespace truffula {

constexpr std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> x,
                                                  std::array<std::uint32_t, 2> key) noexcept {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{x[0]} * 0xD2511F53u, b = std::uint64_t{x[2]} * 0xCD9E8D57u;
    x = {static_cast<std::uint32_t>(b >> 32) ^ x[1] ^ key[0], static_cast<std::uint32_t>(b),
         static_cast<std::uint32_t>(a >> 32) ^ x[3] ^ key[1], static_cast<std::uint32_t>(a)};
    key = {key[0] + 0x9E3779B9u, key[1] + 0xBB67AE85u};
  }
  return x;
}

// In the open interval (0, 1): word 0 of key `seed`, counter (choice, draw, 0, 0), plus a half. Equals sampling.py's
// uniform bit for bit: 33 bits fit a double.
constexpr double philox_uniform(std::uint64_t seed, std::uint32_t choice, std::uint32_t draw) noexcept {
  const auto low = static_cast<std::uint32_t>(seed), high = static_cast<std::uint32_t>(seed >> 32);
  return (static_cast<double>(philox4x32({choice, draw, 0, 0}, {low, high})[0]) + 0.5) * 0x1p-32;
}

// Random123's known answer for zeros.
static_assert(philox4x32({}, {})[0] == 0x6627E8D5u && philox4x32({}, {})[3] == 0x9B00DBD8u);

}  // namespace truffula

#include "choose.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "denormals.h"
#include "pack.h"

namespace truffula {
namespace {

constexpr int32_t kInputs = 576, kOutputs = 512, kRows = 8, kRounds = 12;
constexpr double kMostSeconds = 0.008;

// Numbers of bfloat16 between 1/8 and 1 in size, of both signs, with all bits of the fraction in use.
uint16_t some_half(uint32_t& state) {
  state = state * 1664525u + 1013904223u;
  return static_cast<uint16_t>(0x3e00u + (state >> 16 & 0x17fu) + (state >> 1 & 0x8000u));
}

struct Trial {
  std::vector<uint16_t> weights;
  std::vector<float> x;
  std::vector<uint8_t> pairs = std::vector<uint8_t>(padded_rows(kRows) * pair_row_bytes(kInputs));

  Trial() : weights(kOutputs * kInputs), x(kRows * kInputs) {
    uint32_t state = 1;
    for (uint16_t& half : weights) half = some_half(state);
    for (float& value : x) {
      const uint32_t bits = static_cast<uint32_t>(some_half(state)) << 16;
      std::memcpy(&value, &bits, sizeof value);
    }
  }

  // Seconds of one product as a step makes it: the conversion of x belongs to it.
  double run(const Kernels& table, int32_t rows, std::vector<float>& out) {
    LinearCall call{};
    call.x = {x.data(), kInputs};
    call.out = {out.data(), kOutputs};
    call.w = {reinterpret_cast<const uint8_t*>(weights.data()), panel_bytes(kBF16, kInputs), kBF16, kOutputs / kLanes,
              kInputs};
    call.rows = rows;
    call.out_width = kOutputs;
    call.clip = -1.0f;
    call.scale = 1.0f;
    const auto before = std::chrono::steady_clock::now();
    if (table.pairs) {
      const QuantiseCall convert{call.x, pairs.data(), 2 * kInputs, kBF16, kInputs};
      table.quantise(&convert, 0, rows);
      call.quantised_x = pairs.data();
      call.quantised_stride = 2 * kInputs;
    }
    table.linear(&call, 0, kOutputs / kLanes / 2);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count();
  }
};

}  // namespace

std::string PairTrial::why(const char* with, const char* without) const {
  char text[200];
  if (!same_bits)
    std::snprintf(text, sizeof text, "%s, not %s: its bfloat16 sums differ in their bits", without, with);
  else
    std::snprintf(text, sizeof text, "%s: tried at start, bfloat16 products of 1 and 8 rows take %.2f and %.2f of the time with %s",
                  take_pairs() ? with : without, pairs[0] / floats[0], pairs[1] / floats[1], with);
  return text;
}

std::vector<const Kernels*> PairTrial::best_first(const Kernels& with, const Kernels& without) const {
  if (take_pairs()) return {&with, &without};
  return {&without, &with};
}

PairTrial try_pairs(const Kernels& pairs, const Kernels& floats) {
  const FlushDenormals flush;
  const auto start = std::chrono::steady_clock::now();
  Trial trial;
  std::vector<float> by_pairs(kRows * kOutputs), by_floats(kRows * kOutputs);
  PairTrial found{{INFINITY, INFINITY}, {INFINITY, INFINITY}, true};
  const int32_t rows[2] = {1, kRows};
  for (int round = 0; round < kRounds; ++round) {
    for (int i = 0; i < 2; ++i) {
      found.pairs[i] = std::min(found.pairs[i], trial.run(pairs, rows[i], by_pairs));
      found.floats[i] = std::min(found.floats[i], trial.run(floats, rows[i], by_floats));
      const size_t bytes = static_cast<size_t>(rows[i]) * kOutputs * sizeof(float);
      found.same_bits = found.same_bits && std::memcmp(by_pairs.data(), by_floats.data(), bytes) == 0;
    }
    if (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > kMostSeconds) break;
  }
  return found;
}

}  // namespace truffula

// Packs quantised and scaled panels: from stored blocks without loss, or from numbers by rounding.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "numbers.h"
#include "pack.h"

namespace truffula {
namespace {

// A block's scales (the second is kQ4_1's minimum) and its numbers in the format's own range: signed bytes for kQ8_0,
// else 0 .. 15 or 0 .. 31.
struct Block {
  uint16_t scales[2];
  int8_t q[kBlock];
};

// Rounds as ggml does (quantize_row_q8_0_ref): values are divided by the unrounded scale, and halves round away from
// zero.
void round_block(const float* x, Block& to, Rounding& rounding) {
  float most = 0.0f;
  for (int k = 0; k < kBlock; ++k) most = std::fmax(most, std::fabs(x[k]));
  const float scale = most / 127.0f, by = scale != 0.0f ? 1.0f / scale : 0.0f;
  to.scales[0] = to_f16(scale);
  rounding.overflow |= (to.scales[0] & 0x7c00u) == 0x7c00u;
  const float stored = from_f16(to.scales[0]);
  float squares = 0.0f, lost = 0.0f;
  for (int k = 0; k < kBlock; ++k) {
    const float q = std::round(x[k] * by);
    to.q[k] = static_cast<int8_t>(std::isfinite(q) ? q : 0.0f);
    const float off = x[k] - static_cast<float>(to.q[k]) * stored;
    squares += x[k] * x[k];
    lost += off * off;
  }
  rounding.squares += squares;
  rounding.lost += lost;
}

float as_is(float x) { return x; }

template <class Number, float (*VALUE)(Number)>
void round_numbers(const void* data, int64_t at, Block& to, Rounding& rounding) {
  const auto* from = static_cast<const Number*>(data) + at;
  float x[kBlock];
  for (int k = 0; k < kBlock; ++k) x[k] = VALUE(from[k]);
  round_block(x, to, rounding);
}

// Stored nibbles: byte i holds inputs i and i + 16. kQ5_0 has the fifth bits before them, kQ4_1 the minimum.
void read_block(Stored type, const uint8_t* from, Block& to) {
  std::memcpy(to.scales, from, 2);
  const uint8_t* rest = from + 2;
  if (type == Stored::kQ8_0) {
    std::memcpy(to.q, rest, kBlock);
    return;
  }
  uint32_t fifth = 0;
  if (type == Stored::kQ4_1) {
    std::memcpy(to.scales + 1, rest, 2);
    rest += 2;
  } else if (type == Stored::kQ5_0) {
    std::memcpy(&fifth, rest, 4);
    rest += 4;
  }
  for (int k = 0; k < 16; ++k) {
    to.q[k] = static_cast<int8_t>((rest[k] & 15) | (fifth >> k & 1u) << 4);
    to.q[k + 16] = static_cast<int8_t>(rest[k] >> 4 | (fifth >> (k + 16) & 1u) << 4);
  }
}

void make_block(const Source& source, int64_t row, int64_t block, Block& to, Rounding& rounding) {
  const int64_t at = row * source.inputs + block * kBlock;
  switch (source.type) {
    case Stored::kFloat32:
      return round_numbers<float, as_is>(source.data, at, to, rounding);
    case Stored::kFloat16:
      return round_numbers<uint16_t, from_f16>(source.data, at, to, rounding);
    case Stored::kBfloat16:
      return round_numbers<uint16_t, from_bf16>(source.data, at, to, rounding);
    default:
      return read_block(source.type, static_cast<const uint8_t*>(source.data) + at / kBlock * stored_block_bytes(source.type), to);
  }
}

// Writes a block as enum Format describes.
void write_block(const Block& from, uint8_t* lines, uint8_t* scales, int32_t format) {
  if (format == kQ8_0) {
    for (int j = 0; j < 8; ++j) std::memcpy(lines + 64 * j, from.q + 4 * j, 4);
  } else {
    uint8_t fifth[4] = {0, 0, 0, 0};
    for (int k = 0; k < 16; ++k) {
      lines[64 * (k / 4) + k % 4] = static_cast<uint8_t>((from.q[k] & 15) | (from.q[k + 16] & 15) << 4);
      fifth[k % 4] = static_cast<uint8_t>(fifth[k % 4] | (from.q[k] >> 4 & 1) << (k / 4) | (from.q[k + 16] >> 4 & 1) << (k / 4 + 4));
    }
    if (format == kQ5_0) std::memcpy(lines + 256, fifth, 4);
  }
  std::memcpy(scales, from.scales, 2);
  if (format == kQ4_1) std::memcpy(scales + 32, from.scales + 1, 2);
}

}  // namespace

bool packs_as(Stored from, int32_t format) {
  switch (from) {
    case Stored::kQ4_0:
      return format == kQ4_0 || format == kQ8_0;
    case Stored::kQ5_0:
      return format == kQ5_0 || format == kQ8_0;
    case Stored::kQ4_1:
      return format == kQ4_1;
    case Stored::kFP8_128:
      return format == kFP8_128;
    case Stored::kFP8_32:
      return format == kFP8_32;
    case Stored::kNF4:
      return format == kNF4;
    case Stored::kFP4_16:
      return format == kFP4_16;
    default:
      return format == kQ8_0;
  }
}

void pack_quantised(const Source& source, int64_t row_lo, int64_t row_hi, uint8_t* to, int32_t format, int64_t first,
                    const PanelOrder& order, Rounding& rounding) {
  const int64_t blocks = source.inputs / kBlock, bytes = panel_bytes(format, source.inputs);
  const int64_t line_bytes = 64 * (format == kQ8_0 ? 8 : format == kQ5_0 ? 5 : 4), scale_bytes = format == kQ4_1 ? 64 : 32;
  // kQ4_0 and kQ5_0 are kQ8_0 with smaller numbers: subtracting the offset makes them signed.
  const int offset = format != kQ8_0 ? 0 : source.type == Stored::kQ4_0 ? 8 : source.type == Stored::kQ5_0 ? 16 : 0;
  for (int64_t row = row_lo; row < row_hi; ++row) {
    uint8_t* panel = to + order.panel_of(first + row) * bytes;
    const int64_t lane = order.lane_of(first + row);
    for (int64_t block = 0; block < blocks; ++block) {
      Block made{};
      make_block(source, row, block, made, rounding);
      for (int k = 0; offset && k < kBlock; ++k) made.q[k] = static_cast<int8_t>(made.q[k] - offset);
      write_block(made, panel + block * line_bytes + 4 * lane, panel + blocks * line_bytes + block * scale_bytes + 2 * lane,
                  format);
    }
  }
}

namespace {

// Exchanges the halves of each byte.
uint64_t swapped(const uint8_t* from) {
  uint64_t bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return (bytes & 0x0f0f0f0f0f0f0f0fu) << 4 | (bytes >> 4 & 0x0f0f0f0f0f0f0f0fu);
}

// Writes `count` inputs of one output to a panel's lines.
void write_lane(const uint8_t* from, int64_t count, uint8_t* lines, int64_t lane, int32_t format) {
  if (has_four_bits(format)) {
    for (int64_t k = 0; k < count; k += 16) {
      uint64_t codes;
      std::memcpy(&codes, from + k / 2, sizeof codes);
      if (format == kNF4) codes = swapped(from + k / 2);
      std::memcpy(lines + 8 * k + 4 * lane, &codes, 4);
      std::memcpy(lines + 8 * k + 64 + 4 * lane, reinterpret_cast<const uint8_t*>(&codes) + 4, 4);
    }
    return;
  }
  uint8_t* at = lines + lane / 4 * 16 + lane % 4 * 2;
  for (int64_t k = 0; k < count; k += 8) {
    const uint64_t codes = swapped(from + k);
    for (int64_t pair = 0; pair < 4; ++pair) {
      const auto two = static_cast<uint16_t>(codes >> 16 * pair);
      std::memcpy(at + 16 * k + pair / 2 * 64 + pair % 2 * 8, &two, sizeof two);
    }
  }
}

}  // namespace

// Up to 16 rows at a time, group by group, so that the lines stay in the L1 cache.
void pack_scaled(const Source& source, int64_t inputs, int64_t row_lo, int64_t row_hi, uint8_t* to, int32_t format,
                 int64_t first, const PanelOrder& order) {
  const int64_t each = group_inputs(format), groups = groups_of(format, inputs), bytes = panel_bytes(format, inputs);
  const int64_t block = stored_block_bytes(source.type), input = scaled_input_bytes(format);
  for (int64_t row = row_lo; row < row_hi;) {
    const int64_t panel = order.panel_of(first + row), lane = order.lane_of(first + row);
    int64_t count = 1;
    while (row + count < row_hi && order.panel_of(first + row + count) == panel) ++count;
    uint8_t* lines = to + panel * bytes;
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t i = 0; i < count; ++i) {
        const uint8_t* from = static_cast<const uint8_t*>(source.data) + ((row + i) * groups + group) * block;
        if (format == kFP4_16) {
          for (int64_t part = 0; part < 2 && group == 0; ++part)
            std::memcpy(lines + scales_end(format, inputs) + 64 * part + 4 * (lane + i), from + 4 * part, sizeof(float));
          from += 2 * sizeof(float);
        }
        std::memcpy(lines + scales_at(format, inputs) + 64 * group + 4 * (lane + i), from, 4);
        write_lane(from + 4, std::min(each, inputs - group * each), lines + input * each * group, lane + i, format);
      }
    row += count;
  }
}

}  // namespace truffula

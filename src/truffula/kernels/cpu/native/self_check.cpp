#include "self_check.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "numbers.h"
#include "pack.h"
#include "tables.h"

namespace truffula {
namespace {

constexpr int32_t kRows = 7, kInputs = 160, kOutputs = 48;
constexpr int32_t kManyRows = 19;  // enough for tiles, wherever a table has them
constexpr double kTolerance = 1e-4;

// Numbers between -1 and 1, the same on every machine.
struct Numbers {
  uint32_t state = 1;
  float next() {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f;
  }
  std::vector<float> many(int64_t count) {
    std::vector<float> made(static_cast<size_t>(count));
    for (float& number : made) number = next();
    return made;
  }
};

Rows rows_of(std::vector<float>& numbers, int64_t stride) { return {numbers.data(), stride}; }

// A matrix of `format` with random numbers, in panels.
struct Matrix {
  std::vector<uint8_t> bytes;
  Packed packed;
};

Matrix matrix_of(int32_t format, Numbers& numbers) {
  const PanelOrder order{kOutputs, 0};
  const int64_t panel = panel_bytes(format, kInputs);
  Matrix made{std::vector<uint8_t>(static_cast<size_t>(order.panels() * panel) + 64), {}};
  made.packed = {made.bytes.data(), panel, format, static_cast<int32_t>(order.panels()), kInputs};
  const std::vector<float> values = numbers.many(int64_t{kOutputs} * kInputs);
  const Source floats{values.data(), Stored::kFloat32, kInputs};
  Rounding rounding;
  if (!is_quantised(format)) {
    pack_rows(floats, 0, kOutputs, made.bytes.data(), format, 0, order);
  } else if (format == kQ8_0) {
    pack_quantised(floats, 0, kOutputs, made.bytes.data(), format, 0, order, rounding);
  } else {
    const Stored type = format == kQ4_0 ? Stored::kQ4_0 : format == kQ4_1 ? Stored::kQ4_1 : Stored::kQ5_0;
    const auto block_bytes = static_cast<size_t>(stored_block_bytes(type));
    std::vector<uint8_t> blocks(block_bytes * kOutputs * kInputs / kBlock);
    for (size_t at = 0; at < blocks.size(); ++at) blocks[at] = static_cast<uint8_t>(static_cast<int>(numbers.next() * 128.0f));
    for (size_t at = 0; at < blocks.size(); at += block_bytes) {
      const uint16_t scales[2] = {to_f16(0.1f * numbers.next()), to_f16(0.1f * numbers.next())};
      std::memcpy(blocks.data() + at, scales, format == kQ4_1 ? 4 : 2);
    }
    pack_quantised({blocks.data(), type, kInputs}, 0, kOutputs, made.bytes.data(), format, 0, order, rounding);
  }
  return made;
}

// Each op once on the numbers it always gets.

std::vector<float> product(const Kernels& table, int32_t format, int32_t rows) {
  Numbers numbers;
  const Matrix w = matrix_of(format, numbers);
  std::vector<float> x = numbers.many(rows * kInputs), residual = numbers.many(rows * kOutputs), out(rows * kOutputs);
  std::vector<uint8_t> small(static_cast<size_t>(padded_rows(rows) * kInputs / kBlock * kMostXBlockBytes));
  const int64_t stride = kInputs / kBlock * kMostXBlockBytes;
  const QuantiseCall quantise{rows_of(x, kInputs), small.data(), stride, format, kInputs};
  // As steps do it: rows that hold bfloat16 numbers are read in pairs by tables that can.
  const bool converts = is_quantised(format) || (format == kBF16 && table.pairs);
  if (format == kBF16)
    for (float& number : x) number = from_bf16(to_bf16(number));
  if (converts) table.quantise(&quantise, 0, rows);
  LinearCall call{};
  call.x = rows_of(x, kInputs);
  call.out = rows_of(out, kOutputs);
  call.residual = rows_of(residual, kOutputs);
  call.w = w.packed;
  call.quantised_x = converts ? small.data() : nullptr;
  call.quantised_stride = stride;
  call.rows = rows;
  call.out_width = kOutputs;
  call.in_blocks = format == kF32;
  call.activation = kSilu;
  call.clip = -1.0f;
  call.scale = 0.5f;
  table.linear(&call, 0, (w.packed.panels + 1) / 2);
  return out;
}

std::vector<float> shrunk(const Kernels& table) {
  Numbers numbers;
  const Matrix a = matrix_of(kBF16, numbers);
  std::vector<float> x = numbers.many(kRows * kInputs), h(kRows * kOutputs);
  const ShrinkCall call{rows_of(x, kInputs), rows_of(h, kOutputs), a.packed, 0.75f, kRows};
  table.shrink(&call, 0, a.packed.panels);
  return h;
}

std::vector<float> normed(const Kernels& table) {
  Numbers numbers;
  std::vector<float> x = numbers.many(kRows * kInputs), out(kRows * kInputs);
  const std::vector<float> weight = numbers.many(kInputs), bias = numbers.many(kInputs);
  const NormCall call{rows_of(x, kInputs), rows_of(out, kInputs), {nullptr, 0}, weight.data(), bias.data(),
                      kInputs - 3, 1, 1, 0, 0, 1e-5f};
  table.norm(&call, 0, kRows);
  return out;
}

std::vector<float> pointwise(const Kernels& table) {
  Numbers numbers;
  std::vector<float> x = numbers.many(kRows * kInputs), y = numbers.many(kRows * kInputs), all;
  for (int32_t kind = kAct; kind <= kSigmoidMul; ++kind)
    for (int32_t activation = kNone; activation <= (kind == kAct ? kRelu2 : kNone); ++activation) {
      std::vector<float> out(kRows * kInputs);
      const PointwiseCall call{rows_of(x, kInputs), rows_of(y, kInputs), rows_of(out, kInputs), kind, activation,
                               kInputs - 3, 0, 0.5f};
      table.pointwise(&call, 0, kRows);
      all.insert(all.end(), out.begin(), out.end());
    }
  return all;
}

std::vector<float> turned(const Kernels& table) {
  Numbers numbers;
  std::vector<float> x = numbers.many(kRows * kInputs), angles = numbers.many(kRows * 24);
  const RopeCall call{rows_of(x, kInputs), rows_of(angles, 24), 3, 32, 4, 24, 0, 0};
  table.rope(&call, 0, kRows);
  return x;
}

std::vector<float> attended(const Kernels& table, int32_t format) {
  constexpr int32_t kTokens = 20, kSize = 16, kDim = 24, kHeads = 2;
  Numbers numbers;
  std::vector<float> q = numbers.many(kTokens * kHeads * kDim), k = numbers.many(kTokens * kDim);
  std::vector<float> v = numbers.many(kTokens * kDim), out(q.size());
  const int64_t key_bytes = panel_bytes(format, kDim), value_bytes = kSize * 32 * (format == kF32 ? 4 : 2);
  std::vector<uint8_t> keys(static_cast<size_t>(2 * key_bytes)), values(static_cast<size_t>(2 * value_bytes));
  AttentionCall call{};
  call.cache = {keys.data(), values.data(), key_bytes, value_bytes, format, kSize, 1, kDim, kDim};
  call.q = rows_of(q, kHeads * kDim);
  call.k = rows_of(k, kDim);
  call.v = rows_of(v, kDim);
  call.out = rows_of(out, kHeads * kDim);
  call.heads = kHeads;
  call.scale = 0.2f;
  int32_t slots[kTokens];
  for (int32_t t = 0; t < kTokens; ++t) slots[t] = t;
  table.write_kv(&call, slots, 0, kTokens);
  const int32_t blocks[2] = {0, 1};
  std::vector<float> scratch(static_cast<size_t>(attention_scratch(kTokens * kHeads, kSize, kDim, kDim)));
  const AttentionItem item{blocks, 0, kTokens, 0, 0, nullptr, 0};
  table.attend(&call, &item, scratch.data());
  return out;
}

std::vector<float> embedded(const Kernels& table) {
  Numbers numbers;
  const Matrix w = matrix_of(kQ8_0, numbers);
  std::vector<float> out(kRows * kInputs);
  const EmbedCall call{{w.packed.data, w.packed.panel_bytes, kQ8_0, kInputs}, rows_of(out, kInputs), {nullptr, 0},
                       3.0f, 1, 0, nullptr, 0};
  const int32_t ids[kRows] = {0, 1, 15, 16, 31, 32, 47};
  table.embed(&call, ids, 0, kRows);
  return out;
}

std::vector<double> weighed(const Kernels& table) {
  Numbers numbers;
  const std::vector<float> x = numbers.many(2 * kSampleBlock);
  std::vector<double> made(kSampleBlock + 2);
  float maxima[2];
  made.push_back(table.sampling->maxima_f32(x.data(), 2, maxima));
  table.sampling->weigh_f32(x.data(), 2, 1.0, 0.7, made.data(), made.data() + kSampleBlock);
  made.insert(made.end(), maxima, maxima + 2);
  return made;
}

bool alike(const std::vector<float>& a, const std::vector<float>& b) {
  double most = 0.0, off = 0.0;
  for (size_t i = 0; i < a.size(); ++i) {
    most = std::max(most, std::abs(static_cast<double>(b[i])));
    if (!std::isfinite(a[i])) return false;
    off = std::max(off, std::abs(static_cast<double>(a[i]) - b[i]));
  }
  return off <= kTolerance * most;
}

}  // namespace

std::string fault_of(const Kernels& table) {
  const Kernels& sure = kPortable;
  const std::pair<int32_t, const char*> formats[] = {{kF32, "float32"}, {kBF16, "bfloat16"}, {kQ8_0, "Q8_0"},
                                                      {kQ4_0, "Q4_0"},   {kQ4_1, "Q4_1"},     {kQ5_0, "Q5_0"}};
  for (const auto& [format, name] : formats)
    for (int32_t rows : {kRows, kManyRows})
      if (!alike(product(table, format, rows), product(sure, format, rows))) return std::string("products with ") + name;
  if (!alike(shrunk(table), shrunk(sure))) return "an adapter's products";
  if (!alike(normed(table), normed(sure))) return "norms";
  if (!alike(pointwise(table), pointwise(sure))) return "activations and sums";
  if (!alike(turned(table), turned(sure))) return "rotary positions";
  for (int32_t format : {kF32, kBF16})
    if (!alike(attended(table, format), attended(sure, format))) return "attention";
  if (!alike(embedded(table), embedded(sure))) return "embeddings";
  if (weighed(table) != weighed(sure)) return "the sampler's weights";
  return "";
}

}  // namespace truffula

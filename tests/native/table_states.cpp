// Ops with sequence states, for table_driver.cpp.
#include <cmath>

#include "table_cases.h"

namespace truffula {
namespace {

// Two spans of a sequence: the first begins with state row 0, the second with what the first left.
struct Spans {
  StateSpan spans[2];
  explicit Spans(int32_t rows) : spans{{0, rows / 2, 0, 1}, {rows / 2, rows, 1, 2}} {}
  const StateSpan* begin() const { return spans + (spans[0].hi == 0); }
  const StateSpan* end() const { return spans + 2; }
};

Case conv_case(int32_t number) {
  Numbers numbers{static_cast<uint32_t>(1100 + number), number % 4 == 3};
  const int32_t width = 1 + number % 37, taps = 2 + number % 4, rows = 1 + number % 7;
  const RowArray x = RowArray::random(numbers, rows, width);
  const Array weight = numbers.floats(taps * width), bias = numbers.floats(width);
  const RowArray states = RowArray::random(numbers, 3, (taps - 1) * width);
  const int32_t activation = number % 2 ? kSilu : kNone, round = numbers.below(2);
  return {numbers.wild, [=](const Kernels& table) {
    const RowArray out(rows, width), kept = states.copy();
    ConvCall call{x.rows(), out.rows(), weight->floats(), number % 3 ? bias->floats() : nullptr, {}, width, taps, activation, round};
    call.states = {kept.rows().data, kept.apart};
    for (const StateSpan& span : Spans(rows)) table.conv(&call, &span, 1, 0, width);
    std::vector<float> all = out.taken();
    const std::vector<float> more = kept.taken();
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }};
}

Case delta_case(int32_t number) {
  Numbers numbers{static_cast<uint32_t>(1300 + number), number % 8 == 7};
  const int32_t key_heads = 1 + number % 2, heads = key_heads * (1 + number % 3), rows = 1 + number % 20;
  const int32_t dim_k = 1 + number % 19, dim_v = 1 + number % 71, decays = heads * (number % 2 ? dim_k : 1);
  const RowArray q = RowArray::random(numbers, rows, key_heads * dim_k), k = RowArray::random(numbers, rows, key_heads * dim_k);
  const RowArray v = RowArray::random(numbers, rows, heads * dim_v), decay = RowArray::random(numbers, rows, decays);
  const RowArray beta = RowArray::random(numbers, rows, heads);
  const RowArray states = RowArray::random(numbers, 3, heads * dim_k * dim_v);
  const Array rate = numbers.floats(heads), bias = numbers.floats(decays);
  for (int32_t head = 0; head < heads; ++head) rate->floats()[head] = -std::abs(rate->floats()[head]);
  const int32_t round = numbers.below(2);
  return {numbers.wild, [=](const Kernels& table) {
    const RowArray out(rows, heads * dim_v), kept = states.copy();
    GatedDeltaCall call{q.rows(), k.rows(), v.rows(), decay.rows(), beta.rows(), out.rows(), rate->floats(), bias->floats(),
                        {}, heads, key_heads, dim_k, dim_v, decays != heads, round, 0.5f, 1e-6f, 1.5f};
    call.states = {kept.rows().data, kept.apart};
    std::vector<float> scratch(static_cast<size_t>(delta_scratch(dim_k)));
    for (const StateSpan& span : Spans(rows))
      for (int32_t head = 0; head < heads; ++head)
        table.gated_delta(&call, &span, head, 0, delta_blocks(dim_v), scratch.data());
    std::vector<float> all = out.taken();
    const std::vector<float> more = kept.taken();
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }};
}

Case mamba_case(int32_t number) {
  Numbers numbers{static_cast<uint32_t>(1500 + number), number % 8 == 7};
  const int32_t groups = 1 + number % 2, heads = groups * (1 + number % 3), rows = 1 + number % 9;
  const int32_t width = 1 + number % 5, size = 1 + number % 37, rates = number % 3 ? 1 : size;
  const RowArray x = RowArray::random(numbers, rows, heads * width), dt = RowArray::random(numbers, rows, heads);
  const RowArray b = RowArray::random(numbers, rows, groups * size), c = RowArray::random(numbers, rows, groups * size);
  const RowArray states = RowArray::random(numbers, 3, heads * width * size);
  const Array rate = numbers.floats(heads * rates), bias = numbers.floats(heads), skip = numbers.floats(heads);
  for (int32_t i = 0; i < heads * rates; ++i) rate->floats()[i] = -std::abs(rate->floats()[i]);
  const int32_t round = numbers.below(2);
  return {numbers.wild, [=](const Kernels& table) {
    const RowArray out(rows, heads * width), kept = states.copy();
    Mamba2Call call{x.rows(), b.rows(), c.rows(), dt.rows(), out.rows(), rate->floats(), bias->floats(), skip->floats(),
                    {}, heads, width, groups, size, rates, round, 0.0f, INFINITY};
    call.states = {kept.rows().data, kept.apart};
    for (const StateSpan& span : Spans(rows))
      for (int32_t head = 0; head < heads; ++head) table.mamba2(&call, &span, head);
    std::vector<float> all = out.taken();
    const std::vector<float> more = kept.taken();
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }};
}

}  // namespace

std::vector<Op> state_ops() {
  return {{"convolutions", 148, false, true, conv_case}, {"gated delta rule", 160, false, true, delta_case},
          {"selective state spaces", 148, false, true, mamba_case}};
}

}  // namespace truffula

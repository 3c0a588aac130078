// Norms, activations, rotations and the sampler's loops, for table_driver.cpp.
#include <cstdio>

#include "table_cases.h"

namespace truffula {
namespace {

constexpr int32_t kSizes[] = {1, 5, 15, 16, 17, 32, 33, 64, 100};

struct Norm {
  RowArray x, gate, plus;
  Array weight, bias;
  NormCall call;
};

Case norm_case(int32_t number) {
  Numbers numbers{static_cast<uint32_t>(100 + number), number % 4 == 3};
  const int32_t groups = 1 + number % 3, width = kSizes[number % 9] * groups, rows = 1 + number % 5;
  const int32_t each = number % 2 ? width : width / groups;  // of all columns, or of a group that shares it
  const auto made = std::make_shared<Norm>(Norm{RowArray::random(numbers, rows, width),
      RowArray::random(numbers, rows, width), RowArray::random(numbers, rows, width), numbers.floats(each), numbers.floats(each), {}});
  NormCall& call = made->call;
  call.x = made->x.rows();
  call.gate = numbers.below(3) ? Rows{nullptr, 0} : made->gate.rows(), call.gate_activation = kSilu;
  call.plus = numbers.below(2) ? made->plus.rows() : Rows{nullptr, 0};
  call.weight = numbers.below(4) ? made->weight->floats() : nullptr;
  call.bias = numbers.below(2) ? made->bias->floats() : nullptr;
  call.width = width, call.groups = groups, call.group_step = number % 2 ? width / groups : 0, call.eps = 1e-5f;
  call.layer_norm = numbers.below(2), call.cast_first = numbers.below(2), call.round_out = numbers.below(2);
  return {numbers.wild, [made, rows, width](const Kernels& table) {
    const RowArray out(rows, width);
    NormCall now = made->call;
    now.out = out.rows();
    table.norm(&now, 0, rows / 2);
    table.norm(&now, rows / 2, rows);
    return out.taken();
  }};
}

struct Pointwise {
  RowArray x, y;
  std::array<float, 4> params;
  std::array<int32_t, 4> positions;
  PointwiseCall call;
};

Case pointwise_case(int32_t number) {
  Numbers numbers{static_cast<uint32_t>(300 + number), number % 3 == 2};
  const int32_t width = kSizes[number % 9], rows = 1 + number % 4, which = number % 17;  // nine activations, then kinds
  const auto made = std::make_shared<Pointwise>(
      Pointwise{RowArray::random(numbers, rows, width), RowArray::random(numbers, rows, width), {0.7f, 0.9f, 0.5f, -1e-6f}, {0, 3, 8, 1 << 20}, {}});
  for (size_t i = 0; i < made->x.memory->size() / 4; ++i)  // activations are interesting up to 12, exp up to 100
    if (made->x.memory->floats()[i] != kMark) made->x.memory->floats()[i] *= number % 2 ? 12.0f : 100.0f;
  made->call = {made->x.rows(), made->y.rows(), {}, which < 9 ? kAct : which - 8, which < 9 ? which : 0, width,
                numbers.below(2), made->params.data(), made->positions.data(), number % 3 == 0 ? 1 : number % 3 == 1 ? 3 : width};
  return {numbers.wild, [made, rows, width](const Kernels& table) {
    const RowArray out(rows, width);
    PointwiseCall now = made->call;
    now.out = out.rows();
    table.pointwise(&now, 0, rows);
    return out.taken();
  }};
}

Case rope_case(int32_t number) {
  Numbers numbers{static_cast<uint32_t>(500 + number), number % 4 == 3};
  const int32_t heads = 1 + number % 3, dims = 2 * kSizes[number % 9], start = number % 2 * 3, rows = 1 + number % 5;
  const int32_t head = dims + start + number % 3;
  const auto x = std::make_shared<RowArray>(RowArray::random(numbers, rows, heads * head));
  const auto angles = std::make_shared<RowArray>(RowArray::random(numbers, rows, dims));
  const int32_t interleaved = numbers.below(2), round = numbers.below(2);
  return {numbers.wild, [=](const Kernels& table) {
    const RowArray to = x->copy();
    const RopeCall call{to.rows(), angles->rows(), heads, head, start, dims, interleaved, round};
    table.rope(&call, 0, rows / 2);
    table.rope(&call, rows / 2, rows);
    return to.taken();
  }};
}

void put(std::vector<float>& all, double number) {  // all its bits
  uint64_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  for (int shift = 0; shift < 64; shift += 16) all.push_back(static_cast<float>(bits >> shift & 0xffff));
}

template <class T>
std::vector<float> sampled(const Array& x, int64_t blocks, double best, double temperature,
                           int32_t (*maxima)(const T*, int64_t, T*),
                           void (*weigh)(const T*, int64_t, double, double, double*, double*)) {
  const auto* numbers = reinterpret_cast<const T*>(x->bytes());
  std::vector<T> most(static_cast<size_t>(blocks));
  std::vector<double> weights(kSampleBlock), sums(static_cast<size_t>(blocks));
  const int32_t sound = maxima(numbers, blocks, most.data());
  weigh(numbers, blocks, best, temperature, weights.data(), sums.data());
  std::vector<float> all{static_cast<float>(sound)};
  if (sound)
    for (T number : most) put(all, number);
  for (double number : weights) put(all, number);
  for (double number : sums) put(all, number);
  return all;
}

Case sampler_case(int32_t number) {
  Numbers numbers{static_cast<uint32_t>(900 + number)};
  const int64_t blocks = 1 + number % 5;
  const bool wide = number % 2;
  const Array x = array_of(blocks * kSampleBlock * (wide ? 8 : 4));
  double best = -INFINITY;
  for (int64_t i = 0; i < blocks * kSampleBlock; ++i) {
    const float value = number % 7 == 6 && i == 77 % (blocks * 64) ? NAN : numbers.next() * (number % 3 ? 8.0f : 500.0f);
    if (value > best) best = value;
    if (wide) reinterpret_cast<double*>(x->bytes())[i] = value * 1.0000000123;
    else x->floats()[i] = value;
  }
  const double temperature = number % 4 ? 0.3 + 0.2 * (number % 4) : 1.0;
  return {false, [=](const Kernels& table) {
    const SampleLoops& loops = *table.sampling;
    return wide ? sampled<double>(x, blocks, best * 1.0000000123, temperature, loops.maxima_f64, loops.weigh_f64)
                : sampled<float>(x, blocks, best, temperature, loops.maxima_f32, loops.weigh_f32);
  }};
}

}  // namespace

std::vector<Op> row_ops() {
  return {{"norms", 216, false, true, norm_case},         {"activations and sums", 468, false, true, pointwise_case},
          {"rotary positions", 108, false, true, rope_case}, {"sampler's loops", 84, true, false, sampler_case}};
}

}  // namespace truffula

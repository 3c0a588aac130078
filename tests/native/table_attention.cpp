// Attention over cached keys and values, whole and in partitions, for table_driver.cpp.
#include <cstdio>

#include "pack.h"
#include "table_cases.h"

namespace truffula {
namespace {

struct Shape {
  int32_t size, heads, kv_heads, dim_k, dim_v, window, context, count;
};

// Decode and prefill; blocks of a lane's tokens, fewer and more; contexts of one partition, two and three.
constexpr Shape kShapes[] = {
    {16, 2, 1, 24, 24, 0, 0, 1},   {16, 4, 2, 64, 64, 0, 37, 1},   {16, 4, 1, 33, 20, 0, 40, 3},  {8, 3, 3, 16, 40, 0, 21, 7},
    {32, 2, 2, 48, 32, 0, 5, 20},  {16, 6, 1, 32, 32, 7, 60, 5},   {4, 2, 1, 10, 10, 0, 19, 2},   {16, 8, 1, 32, 16, 0, 0, 13},
    {16, 2, 1, 24, 24, 0, 530, 1}, {16, 4, 2, 16, 32, 0, 1030, 2}, {32, 3, 1, 20, 17, 600, 900, 3}, {64, 2, 2, 16, 16, 100, 505, 9},
    {16, 1, 1, 32, 128, 0, 40, 1}, {16, 3, 1, 64, 64, 0, 55, 1},   {16, 4, 1, 16, 80, 20, 70, 1}, {16, 5, 1, 32, 96, 0, 33, 2},
    {16, 6, 1, 24, 64, 0, 530, 1}, {16, 3, 1, 64, 128, 9, 600, 3},
};
constexpr int32_t kShapeCount = 18;

struct Attention {
  Shape shape;
  int32_t format, total, blocks;
  RowArray q, k, v;
  Array sinks, keys, values;
  std::vector<int32_t> table, slots;
  AttentionCall call{};

  int64_t key_bytes() const {
    return int64_t{shape.kv_heads} * ((shape.size + kLanes - 1) / kLanes) * panel_bytes(format, shape.dim_k);
  }
  int64_t value_bytes() const {
    return int64_t{shape.kv_heads} * shape.size * ((shape.dim_v + kLanes - 1) / kLanes * kLanes) * (format == kF32 ? 4 : 2);
  }

  Attention(const Shape& chosen, Numbers& numbers)
      : shape(chosen), format(numbers.below(2) ? kBF16 : kF32), total(shape.context + shape.count),
        blocks((total + shape.size - 1) / shape.size), q(RowArray::random(numbers, shape.count, shape.heads * shape.dim_k)),
        k(RowArray::random(numbers, total, shape.kv_heads * shape.dim_k)),
        v(RowArray::random(numbers, total, shape.kv_heads * shape.dim_v)), sinks(numbers.floats(shape.heads)),
        keys(array_of((blocks + 1) * key_bytes())), values(array_of((blocks + 1) * value_bytes())) {
    for (int32_t b = 0; b < blocks; ++b) table.push_back(blocks - b);  // in no order, block 0 nobody's
    for (int32_t t = 0; t < total; ++t)
      slots.push_back(table[static_cast<size_t>(t / shape.size)] * shape.size + t % shape.size);
    call.cache = {keys->bytes(), values->bytes(), key_bytes(), value_bytes(), format, shape.size, shape.kv_heads,
                  shape.dim_k, shape.dim_v};
    call.q = q.rows(), call.k = k.rows(), call.v = v.rows();
    call.sinks = numbers.below(2) ? sinks->floats() : nullptr;
    call.heads = shape.heads, call.window = shape.window, call.round_out = numbers.below(2);
    call.scale = 0.8f, call.softcap = numbers.below(2) ? 0.0f : 3.0f;
  }

  std::vector<float> run(const Kernels& with) const {
    // What earlier sequences left in the blocks may be anything.
    std::memset(keys->bytes(), 0xff, keys->size());
    std::memset(values->bytes(), 0xff, values->size());
    with.write_kv(&call, slots.data(), 0, total / 2);
    with.write_kv(&call, slots.data(), total / 2, total);
    std::vector<float> all = attended(with, false), parts = attended(with, true);
    for (const Array& cached : {keys, values})
      for (size_t i = 0; i < cached->size(); i += 2) 
        all.push_back(static_cast<float>(cached->bytes()[i] << 8 | cached->bytes()[i + 1]) * 0x1p-16f);
    if (std::memcmp(all.data(), parts.data(), parts.size() * sizeof(float)) != 0)
      std::puts("in partitions: other bits"), all.push_back(kMark);
    return all;
  }

  std::vector<float> attended(const Kernels& with, bool in_parts) const {
    const RowArray out(shape.count, shape.heads * shape.dim_v);
    AttentionCall now = call;
    now.out = out.rows();
    const int64_t rows = int64_t{shape.count} * (shape.heads / shape.kv_heads), floats = partial_floats(rows, shape.dim_v);
    const Array scratch = array_of(4 * attention_scratch(rows, shape.size, shape.dim_k, shape.dim_v));
    const int32_t keys_of_part = partition_blocks(shape.size) * shape.size;
    const int32_t begin = shape.window ? std::max(0, shape.context - shape.window + 1) : 0;
    const int32_t first = begin / keys_of_part, last = (total - 1) / keys_of_part;
    const Array parts = array_of(4 * floats * (last - first + 1));
    for (int32_t head = 0; head < shape.kv_heads; ++head) {
      AttentionItem item{table.data(), 0, shape.count, shape.context, head, nullptr, 0};
      for (int32_t p = first; in_parts && p <= last; ++p) {
        item.parts = parts->floats() + (p - first) * floats, item.part = p;
        with.attend(&now, &item, scratch->floats());
      }
      item.parts = in_parts ? parts->floats() : nullptr, item.part = first;
      (in_parts ? with.merge_parts : with.attend)(&now, &item, scratch->floats());
    }
    return out.taken();
  }
};

Case attention_case(int32_t number) {
  Numbers numbers{static_cast<uint32_t>(40 + number)};
  const auto made = std::make_shared<Attention>(kShapes[number % kShapeCount], numbers);
  return {false, [made](const Kernels& table) { return made->run(table); }};
}

}  // namespace

std::vector<Op> attention_ops() { return {{"attention", 5 * kShapeCount, false, true, attention_case}}; }

}  // namespace truffula

// Products with packed matrices, adapters' among them, for table_driver.cpp.
#include <cstdio>

#include "pack.h"
#include "table_cases.h"

namespace truffula {
namespace {

struct Matrix {
  Array bytes;
  Packed packed;
};

// Blocks as files hold them: any bits, behind scales that are small, zero, below float16's normal range, or negative. No
// e4m3 is NaN.
std::vector<uint8_t> blocks_of(Stored type, int64_t outputs, int64_t inputs, Numbers& numbers) {
  const auto each = static_cast<size_t>(stored_block_bytes(type));
  const int64_t size = stored_block_inputs(type);
  std::vector<uint8_t> blocks(each * static_cast<size_t>(outputs * ((inputs + size - 1) / size)));
  for (uint8_t& byte : blocks) byte = static_cast<uint8_t>(numbers.bits());
  Numbers tame{numbers.bits()};
  const bool eight = type == Stored::kFP8_128 || type == Stored::kFP8_32, floats = eight || type == Stored::kNF4;
  for (uint8_t& byte : blocks) byte = static_cast<uint8_t>(byte - (eight && (byte & 0x7f) == 0x7f));
  for (size_t at = 0; at < blocks.size(); at += each) {
    if (floats) {
      const float scale = numbers.wild && tame.below(4) == 0 ? -1.5e-5f : 0.1f * tame.next();
      std::memcpy(blocks.data() + at, &scale, sizeof scale);
      continue;
    }
    uint16_t scales[2] = {to_f16(0.1f * tame.next()), to_f16(0.1f * tame.next())};
    if (numbers.wild && tame.below(4) == 0) scales[0] = static_cast<uint16_t>(tame.below(0x400)), scales[1] = 0x8001;
    std::memcpy(blocks.data() + at, scales, type == Stored::kQ4_1 ? 4 : 2);
  }
  return blocks;
}

Matrix matrix_of(int32_t format, const PanelOrder& order, int64_t inputs, Numbers& numbers, Form form = Form::kWhole) {
  static constexpr Stored kTypes[] = {Stored::kFloat32, Stored::kFloat32, Stored::kQ8_0,
                                      Stored::kQ4_0,    Stored::kQ4_1,    Stored::kQ5_0,
                                      Stored::kFP8_128, Stored::kFP8_32,  Stored::kNF4};
  const int64_t panel = form == Form::kColumns ? column_bytes(format, inputs) : panel_bytes(format, inputs);
  Matrix made{array_of(form == Form::kRows ? rows_bytes(format, inputs, order.outputs) : order.panels() * panel), {}};
  std::memset(made.bytes->bytes(), 0, made.bytes->size());
  made.packed = {made.bytes->bytes(), panel, format, static_cast<int32_t>(order.panels()), static_cast<int32_t>(inputs)};
  if (format == kF16) {  // of finite numbers, as adapters are
    const Array values = numbers.floats(order.outputs * inputs);
    std::vector<uint16_t> halves;
    for (int64_t i = 0; i < order.outputs * inputs; ++i)
      halves.push_back(std::fabs(values->floats()[i]) < 60000.0f ? to_f16(values->floats()[i]) : uint16_t{1});
    pack_rows({halves.data(), Stored::kFloat16, inputs}, 0, order.outputs, made.bytes->bytes(), format, 0, order, form);
    return made;
  }
  const Stored type = kTypes[format];
  if (format > kBF16) {
    const std::vector<uint8_t> blocks = blocks_of(type, order.outputs, inputs, numbers);
    const Source source{blocks.data(), type, inputs};
    Rounding rounding;
    if (is_scaled(format)) pack_scaled(source, inputs, 0, order.outputs, made.bytes->bytes(), format, 0, order);
    else pack_quantised(source, 0, order.outputs, made.bytes->bytes(), format, 0, order, rounding);
  } else {
    const Array values = numbers.floats(order.outputs * inputs);
    pack_rows({values->floats(), type, inputs}, 0, order.outputs, made.bytes->bytes(), format, 0, order, form);
  }
  return made;
}

constexpr int32_t kRowCounts[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 17, 25, 48, 49, 97, 130};
constexpr int32_t kWidths[] = {32, 64, 160, 1120}, kOddWidths[] = {1, 2, 33, 64, 71};

// What adapters do: any rank and role, over some of the rows, panels and lanes.
struct Adapter {
  RowArray h;
  Matrix b;
  Delta delta;
  Array column, bias;
  std::vector<int32_t> ids;
  std::shared_ptr<LinearCall> own = std::make_shared<LinearCall>();

  Adapter(Numbers& numbers, int32_t rows, int32_t panels, bool glu)
      : h(RowArray::random(numbers, 1, 1)), b{nullptr, {}}, delta{}, column(numbers.floats(panels * kLanes)), bias(numbers.floats(panels * kLanes)) {
    const int32_t lo = numbers.below(rows), hi = lo + 1 + numbers.below(rows - lo), rank = 1 + numbers.below(40);
    const int32_t step = glu && numbers.below(2) ? 2 : 1, first = numbers.below(step == 2 ? 2 : panels);
    const int32_t most = (panels - first + step - 1) / step, count = step == 2 ? most : 1 + numbers.below(most);
    h = RowArray::random(numbers, hi - lo, rank);
    const int32_t role = numbers.below(6);
    const int32_t kinds[] = {kF32, kBF16, kF16};
    b = role == kOwnProduct ? matrix_of(kinds[numbers.below(2)], {count * kLanes, 0}, rank, numbers)
                            : matrix_of(kinds[numbers.below(3)], {count * kLanes, 0}, rank, numbers, Form::kColumns);
    const int32_t lane = numbers.below(kLanes), end = (count - 1) * kLanes + 1 + numbers.below(kLanes);
    const bool scaled = role == kScales || role == kScalesAndAdds || numbers.below(2);
    const bool biased = role <= kScalesAndAdds && role != kScales && numbers.below(2);
    delta = {h.memory->floats(), h.apart, b.packed, lo, hi, first, step, 0, 0, role, numbers.below(2) ? 1.0f : -0.5f,
             role == kOwnColumns ? 0 : lane, end, scaled ? column->floats() : nullptr, biased ? bias->floats() : nullptr, nullptr, nullptr, 0};
    if (role == kOwnProduct) {
      own->x = h.rows(), own->w = b.packed, own->rows = hi - lo, own->in_blocks = 1;
      delta.own = own.get();
    } else if (role == kOwnValues) {
      h = RowArray::random(numbers, hi - lo, count * kLanes);
      delta.h = h.memory->floats(), delta.h_stride = h.apart;
    } else if (role == kOwnColumns) {
      for (int32_t id = numbers.below(9); id < count * kLanes && static_cast<int32_t>(ids.size()) < rank; id += 1 + numbers.below(20)) ids.push_back(id);
      delta.num_ids = static_cast<int32_t>(ids.size());
    }
  }
};

struct Product {
  int32_t format, rows, inputs, width;
  bool glu, pairs, bias, residual;
  LinearCall call{};
  PanelOrder order;
  Matrix w;
  RowArray x, plus;
  Array offsets;
  std::vector<Adapter> adapters;
  std::vector<Delta> deltas;

  Product(int32_t kind, int32_t number, Numbers& numbers)
      : format(kind), rows(kRowCounts[number % 19]),
        inputs(kind > kBF16 ? kWidths[number % 4] : kOddWidths[number % 5]), width(1 + numbers.below(70)),
        glu(numbers.below(4) == 0), pairs(numbers.below(4) != 0), bias(numbers.below(2)), residual(numbers.below(2)),
        order{glu ? 2 * width : width, glu ? width : 0}, w(matrix_of(format, order, inputs, numbers)), x(1, 1),
        plus(RowArray::random(numbers, rows, width)), offsets(numbers.floats(order.panels() * kLanes)) {
    numbers.half = reads_pairs(format) && pairs;  // rows of bfloat16 numbers, as a model in bfloat16 has them
    x = RowArray::random(numbers, rows, inputs);
    numbers.half = false;
    const int32_t count = numbers.below(2) * numbers.below(4), panels = static_cast<int32_t>(order.panels());
    for (int32_t i = 0; i < count; ++i) adapters.emplace_back(numbers, rows, panels, glu);
    for (const Adapter& one : adapters) deltas.push_back(one.delta), deltas.back().ids = one.ids.data();
    set_bounds(deltas.data(), static_cast<int32_t>(deltas.size()));
    call.activation = numbers.below(6);
    call.round_out = numbers.below(2);
    call.clip = numbers.below(3) ? -1.0f : 1.5f;
    call.glu_limit = numbers.below(3) ? -1.0f : 1.0f;
    call.glu_offset = static_cast<float>(numbers.below(2));
    call.scale = numbers.below(2) ? 1.0f : 0.37f;
    call.softcap = numbers.below(3) ? 0.0f : 5.0f;
  }

  std::vector<float> run(const Kernels& table) const {
    const RowArray out(rows, width);
    const int64_t stride = is_quantised(format) ? inputs / kBlock * kMaxXBlockBytes : pair_row_bytes(inputs);
    const Array small = array_of(padded_rows(rows) * stride);
    std::memset(small->bytes(), 0xff, small->size());  // NaN, where nothing is written
    LinearCall now = call;
    now.x = x.rows(), now.out = out.rows(), now.residual = residual ? plus.rows() : Rows{nullptr, 0};
    now.w = w.packed;
    now.bias = bias ? offsets->floats() : nullptr;
    now.deltas = deltas.data(), now.num_deltas = static_cast<int32_t>(deltas.size());
    now.rows = rows, now.out_width = width, now.glu = glu;
    if (is_quantised(format) || (reads_pairs(format) && pairs && table.pairs)) {
      const QuantiseCall quantise{now.x, small->bytes(), stride, format, inputs};
      table.quantise(&quantise, 0, rows / 2);
      table.quantise(&quantise, rows / 2, rows);
      now.quantised_x = small->bytes(), now.quantised_stride = stride;
    }
    const int32_t units = (w.packed.panels + 1) / 2;
    table.linear(&now, 0, units / 2);
    table.linear(&now, units / 2, units);
    return out.taken();
  }
};

Case product_case(int32_t format, int32_t number) {
  Numbers numbers{static_cast<uint32_t>(1000 * format + number), number % 3 == 2};
  const auto made = std::make_shared<Product>(format, number, numbers);
  return {numbers.wild, [made](const Kernels& table) { return made->run(table); }};
}

struct Shrink {
  int32_t rows, inputs, outputs;
  RowArray x;
  Matrix a;
};

Case shrink_case(int32_t number) {
  Numbers numbers{static_cast<uint32_t>(7000 + number), number % 3 == 2};
  constexpr int32_t kInputs[] = {1, 7, 8, 33, 64, 96, 131};
  const int32_t rows = 1 + number % 11, inputs = kInputs[number % 7], outputs = (1 + number % 3) * kLanes - number % kLanes;
  const auto made = std::make_shared<Shrink>(Shrink{rows, inputs, outputs, RowArray::random(numbers, rows, inputs),
      matrix_of(number % 3 ? number % 3 == 1 ? kBF16 : kF16 : kF32, {outputs, 0}, inputs, numbers, Form::kRows)});
  return {numbers.wild, [made](const Kernels& table) {
    const int32_t panels = made->a.packed.panels;
    const RowArray h(made->rows, panels * kLanes);
    const ShrinkCall call{made->x.rows(), h.rows(), made->a.packed, 0.75f, made->rows, made->outputs};
    table.shrink(&call, 0, panels / 2);
    table.shrink(&call, panels / 2, panels);
    return h.taken();
  }};
}

struct Lookup {
  Matrix w;
  RowArray add;
  int32_t rows, inputs;
  std::vector<Adapter> adapters;
  std::vector<Delta> deltas;
  EmbedCall call;
};

Case embed_case(int32_t number) {
  Numbers numbers{static_cast<uint32_t>(8000 + number), number % 3 == 2};
  const int32_t format = number % kFormatCount, rows = 1 + number % 9, inputs = kWidths[number % 4];
  const auto made = std::make_shared<Lookup>(Lookup{matrix_of(format, {50, 0}, inputs, numbers),
      RowArray::random(numbers, rows, inputs), rows, inputs, {}, {}, {}});
  for (int32_t i = 0; i < number % 4; ++i)
    made->adapters.emplace_back(numbers, rows, static_cast<int32_t>((inputs + kLanes - 1) / kLanes), false);
  for (const Adapter& one : made->adapters) made->deltas.push_back(one.delta), made->deltas.back().ids = one.ids.data();
  set_bounds(made->deltas.data(), static_cast<int32_t>(made->deltas.size()));
  made->call = {{made->w.packed.data, made->w.packed.panel_bytes, format, inputs, 50}, {}, {}, 3.3f, numbers.below(2),
                numbers.below(2), made->deltas.data(), static_cast<int32_t>(made->deltas.size()), 0};
  if (numbers.below(2)) made->call.add = made->add.rows();
  return {numbers.wild, [made](const Kernels& table) {
    const RowArray out(made->rows, made->inputs);
    EmbedCall call = made->call;
    call.out = out.rows();
    const int32_t ids[] = {0, 70, 15, 16, 31, 1, 47, 32, 5};
    table.embed(&call, ids, 0, made->rows);
    return out.taken();
  }};
}

}  // namespace

std::vector<Op> product_ops() {
  static constexpr const char* kNames[] = {"linear float32", "linear bfloat16", "linear Q8_0",
                                           "linear Q4_0",    "linear Q4_1",     "linear Q5_0",
                                           "linear FP8_128", "linear FP8_32",  "linear NF4"};
  std::vector<Op> ops;
  for (int32_t format = kF32; format < kFormatCount; ++format)
    ops.push_back({kNames[format], 228, false, true, [format](int32_t number) { return product_case(format, number); },
                   reads_pairs(format)});
  ops.push_back({"adapter shrink", 154, false, false, shrink_case});
  ops.push_back({"embed", 72, false, true, embed_case});
  return ops;
}

}  // namespace truffula

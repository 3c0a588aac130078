#include "pack.h"

#include <algorithm>
#include <cstring>

#include "numbers.h"

namespace truffula {
namespace {

template <Stored TYPE>
struct Reader {
  using Number = uint16_t;
  static bool is_packed(int32_t format) { return (TYPE == Stored::kFloat16) == (format == kF16); }  // as panels hold it
  static float value(const Number* p) { return TYPE == Stored::kFloat16 ? from_f16(*p) : from_bf16(*p); }
  static uint16_t half(const Number* p) { return TYPE == Stored::kFloat16 ? to_bf16(from_f16(*p)) : *p; }
};

template <>
struct Reader<Stored::kFloat32> {
  using Number = float;
  static bool is_packed(int32_t) { return false; }
  static float value(const Number* p) { return *p; }
  static uint16_t half(const Number* p) { return to_bf16(*p); }
};

uint16_t bits_at(const void* number) {
  uint16_t bits;
  std::memcpy(&bits, number, sizeof bits);
  return bits;
}

// Packs up to 16 rows into one panel of `width` lanes (in kF16, of float16 numbers), 128 inputs at a time, so that the lines stay in the L1 cache.
template <class R>
void pack_lanes(const typename R::Number* rows, int64_t inputs, int64_t count, uint8_t* panel, int64_t lane,
                int32_t format, int64_t width = kLanes, Form form = Form::kWhole) {
  constexpr int64_t kInputs = 128;
  for (int64_t lo = 0; lo < inputs; lo += kInputs) {
    const int64_t hi = lo + kInputs < inputs ? lo + kInputs : inputs;
    for (int64_t i = 0; i < count; ++i) {
      const auto* row = rows + i * inputs;
      if (format == kF32) {
        float* to = reinterpret_cast<float*>(panel) + lane + i;
        for (int64_t k = lo; k < hi; ++k) to[k * width] = R::value(row + k);
      } else {
        uint16_t* to = reinterpret_cast<uint16_t*>(panel) + 2 * (lane + i);
        int64_t k = lo;
        if (R::is_packed(format))
          for (; k + 1 < hi; k += 2) std::memcpy(to + k * width, row + k, 4);
        for (; k + 1 < hi; k += 2) {
          to[k * width] = R::half(row + k);
          to[k * width + 1] = R::half(row + k + 1);
        }
        if (k == hi) continue;
        const uint16_t last = format == kF16 ? bits_at(row + k) : R::half(row + k);
        if (form == Form::kColumns) {
          to[k * width - lane - i] = last;
        } else {
          to[k * width] = last;
          to[k * width + 1] = 0;
        }
      }
    }
  }
}

// Calls f(a Reader of the stored numbers). Blocks have none: pack_quantised packs them.
template <class F>
void with_reader(Stored type, F f) {
  if (type == Stored::kFloat32) f(Reader<Stored::kFloat32>{});
  else if (type == Stored::kFloat16) f(Reader<Stored::kFloat16>{});
  else if (type == Stored::kBfloat16) f(Reader<Stored::kBfloat16>{});
}

}  // namespace

void pack_rows(const Source& source, int64_t row_lo, int64_t row_hi, uint8_t* to, int32_t format, int64_t first,
               const PanelOrder& order, Form form) {
  const int64_t bytes = form == Form::kColumns ? column_bytes(format, source.inputs) : panel_bytes(format, source.inputs);
  with_reader(source.type, [&]<class R>(R) {
    const auto* data = static_cast<const typename R::Number*>(source.data);
    for (int64_t row = row_lo; row < row_hi;) {
      const int64_t output = first + row, panel = order.panel_of(output), lane = order.lane_of(output);
      const int64_t width = form == Form::kRows ? std::min<int64_t>(kLanes, order.outputs - kLanes * panel) : kLanes;
      int64_t count = 1;
      while (row + count < row_hi && order.panel_of(output + count) == panel) ++count;
      pack_lanes<R>(data + row * source.inputs, source.inputs, count, to + panel * bytes, lane, format, width, form);
      row += count;
    }
  });
}

void pack_latent(const Source& source, int64_t row_lo, int64_t row_hi, uint8_t* to, int32_t format, int64_t first,
                 const LatentOrder& order) {
  const int64_t inputs = source.inputs, per_head = order.keys + order.values;
  const int64_t key_panel = panel_bytes(format, order.keys), value_panel = panel_bytes(format, inputs);
  with_reader(source.type, [&]<class R>(R) {
    const auto* data = static_cast<const typename R::Number*>(source.data);
    for (int64_t row = row_lo; row < row_hi; ++row) {
      const auto* numbers = data + row * inputs;
      const int64_t head = (first + row) / per_head, at = (first + row) % per_head;
      if (at >= order.keys) {
        const int64_t value = at - order.keys;
        uint8_t* panels = to + order.heads * order.key_bytes(format, inputs) + head * order.value_bytes(format, inputs);
        pack_lanes<R>(numbers, inputs, 1, panels + value / kLanes * value_panel, value % kLanes, format);
        continue;
      }
      uint8_t* panels = to + head * order.key_bytes(format, inputs);
      for (int64_t k = 0; k < inputs; ++k) {  // output k of the transposed matrix
        uint8_t* panel = panels + k / kLanes * key_panel;
        if (format == kF32) reinterpret_cast<float*>(panel)[at * kLanes + k % kLanes] = R::value(numbers + k);
        else reinterpret_cast<uint16_t*>(panel)[at / 2 * 2 * kLanes + 2 * (k % kLanes) + at % 2] = R::half(numbers + k);
      }
    }
  });
}

void copy_rows(const Source& source, int64_t row_lo, int64_t row_hi, uint8_t* to, int32_t format, int64_t first) {
  with_reader(source.type, [&]<class R>(R) {
    const auto* from = static_cast<const typename R::Number*>(source.data) + row_lo * source.inputs;
    const int64_t at = (first + row_lo) * source.inputs, count = (row_hi - row_lo) * source.inputs;
    for (int64_t i = 0; i < count; ++i) {
      if (format == kF32) reinterpret_cast<float*>(to)[at + i] = R::value(from + i);
      else reinterpret_cast<uint16_t*>(to)[at + i] = R::half(from + i);
    }
  });
}

}  // namespace truffula

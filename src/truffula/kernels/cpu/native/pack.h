// Packs matrices as files store them into panels of 16 outputs.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace truffula {

// The type of a stored matrix: numbers, GGUF's blocks of 32, or groups of 128 or 32 e4m3 or of 64 NF4 (the first of a
// byte in its high half) behind their float32 scale, of which a row's last is filled with any bytes.
enum class Stored : int32_t { kFloat32, kFloat16, kBfloat16, kQ8_0, kQ4_0, kQ4_1, kQ5_0, kFP8_128, kFP8_32, kNF4 };

// A stored matrix: contiguous rows of `inputs` numbers, or of whole blocks.
struct Source {
  const void* data;
  Stored type;
  int64_t inputs;
};

// The panel and lane of each output. `half` > 0: outputs 0 .. half are gates and the rest ups, whose panels alternate.
struct PanelOrder {
  int64_t outputs;
  int64_t half;

  int64_t panels() const { return half ? 2 * ((half + kLanes - 1) / kLanes) : (outputs + kLanes - 1) / kLanes; }
  int64_t lane_of(int64_t output) const { return (half && output >= half ? output - half : output) % kLanes; }
  int64_t panel_of(int64_t output) const {
    if (!half) return output / kLanes;
    return output < half ? output / kLanes * 2 : (output - half) / kLanes * 2 + 1;
  }
};

// Bytes of a panel of `inputs` lines.
constexpr int64_t panel_bytes(int32_t format, int64_t inputs) {
  if (format <= kBF16 || format == kF16) return 64 * (format == kF32 ? inputs : (inputs + 1) / 2);
  if (is_scaled(format)) return scaled_input_bytes(format) * inputs + 64 * groups_of(format, inputs);
  const int64_t blocks = inputs / kBlock, lines = format == kQ8_0 ? 8 : format == kQ5_0 ? 5 : 4;
  return 64 * (blocks * lines + (format == kQ4_1 ? blocks : (blocks + 1) / 2));
}

// How a matrix lies in panels. kWhole: as weights do. An adapter's takes no more bytes than it has numbers: of kRows (A) the
// last panel has as many lanes as rows are left; of kColumns (B, with its rank as inputs) the last of an odd number of
// 16-bit inputs has half a line.
enum class Form { kWhole, kRows, kColumns };
constexpr int64_t column_bytes(int32_t format, int64_t inputs) { return inputs * (format == kF32 ? 64 : 32); }
constexpr int64_t rows_bytes(int32_t format, int64_t inputs, int64_t rows) { return panel_bytes(format, inputs) / kLanes * rows; }

// A matrix that turns latents into keys and values of heads: per head `keys` rows, then `values` rows. Products with
// keys are taken along their rows, so the panels of a head's keys hold the transposed matrix [inputs, keys]; those of
// its values are as in other matrices. First the keys of all heads, then the values.
struct LatentOrder {
  int32_t heads = 0, keys = 0, values = 0;

  int64_t outputs() const { return static_cast<int64_t>(heads) * (keys + values); }
  static int64_t panels_of(int64_t outputs) { return (outputs + kLanes - 1) / kLanes; }
  int64_t key_bytes(int32_t format, int64_t inputs) const { return panels_of(inputs) * panel_bytes(format, keys); }
  int64_t value_bytes(int32_t format, int64_t inputs) const { return panels_of(values) * panel_bytes(format, inputs); }
  int64_t bytes(int32_t format, int64_t inputs) const {
    return heads * (key_bytes(format, inputs) + value_bytes(format, inputs));
  }
};

// Bytes of a stored block; 0 for numbers.
constexpr int64_t stored_block_bytes(Stored type) {
  switch (type) {
    case Stored::kQ8_0:
      return 34;
    case Stored::kQ4_0:
      return 18;
    case Stored::kQ4_1:
      return 20;
    case Stored::kQ5_0:
      return 22;
    case Stored::kFP8_128:
      return 4 + 128;
    case Stored::kFP8_32:
    case Stored::kNF4:
      return 4 + 32;
    default:
      return 0;
  }
}

// Numbers of a stored block.
constexpr int64_t stored_block_inputs(Stored type) {
  return type == Stored::kFP8_128 ? 128 : type == Stored::kNF4 ? 64 : kBlock;
}

// Packs rows row_lo .. row_hi of `source` as outputs first + row_lo .. of the panels at `to`. Other lanes are not
// written.
void pack_rows(const Source& source, int64_t row_lo, int64_t row_hi, uint8_t* to, int32_t format, int64_t first,
               const PanelOrder& order, Form form = Form::kWhole);

// `pack_rows` into the panels of a latent matrix.
void pack_latent(const Source& source, int64_t row_lo, int64_t row_hi, uint8_t* to, int32_t format, int64_t first,
                 const LatentOrder& order);

// The error of rounding to a quantised format: sums of the squares of the values and of their errors. `overflow`: a
// scale exceeded float16.
struct Rounding {
  double squares = 0.0, lost = 0.0;
  bool overflow = false;
};

// Whether `from` can be packed in a quantised or scaled `format`: numbers in kQ8_0 only; blocks, without loss, in their
// own format, and those of 4 or 5 bits without a minimum in kQ8_0 too.
bool packs_as(Stored from, int32_t format);

// `pack_rows` for a quantised format; inputs are whole blocks.
void pack_quantised(const Source& source, int64_t row_lo, int64_t row_hi, uint8_t* to, int32_t format, int64_t first,
                    const PanelOrder& order, Rounding& rounding);

// `pack_rows` for a scaled format, of `inputs` inputs.
void pack_scaled(const Source& source, int64_t inputs, int64_t row_lo, int64_t row_hi, uint8_t* to, int32_t format,
                 int64_t first, const PanelOrder& order);

// Copies rows row_lo .. row_hi of `source` to rows first + row_lo .. of `to`, without panels.
void copy_rows(const Source& source, int64_t row_lo, int64_t row_hi, uint8_t* to, int32_t format, int64_t first);

}  // namespace truffula

// From matrices as files hold them to panels of 16 outputs.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace truffula {

// Numbers, or GGUF's blocks of 32.
enum class Stored : int32_t { kFloat32, kFloat16, kBfloat16, kQ8_0, kQ4_0, kQ4_1, kQ5_0 };

// A matrix as it is stored: rows of `inputs` numbers (or of whole blocks), one behind the other.
struct Source {
  const void* data;
  Stored type;
  int64_t inputs;
};

// Where outputs go. `half` > 0: outputs 0 .. half are gates and the rest ups, whose panels alternate.
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
  if (!is_quantised(format)) return 64 * (format == kF32 ? inputs : (inputs + 1) / 2);
  const int64_t blocks = inputs / kBlock, lines = format == kQ8_0 ? 8 : format == kQ5_0 ? 5 : 4;
  return 64 * (blocks * lines + (format == kQ4_1 ? blocks : (blocks + 1) / 2));
}

// Bytes of a stored block; 0 for plain numbers.
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
    default:
      return 0;
  }
}

// Rows row_lo .. row_hi of `source` become outputs first .. of the panels at `to`. Lanes nobody fills stay as they are.
void pack_rows(const Source& source, int64_t row_lo, int64_t row_hi, uint8_t* to, int32_t format, int64_t first,
               const PanelOrder& order);

// What rounding to a quantised format did: sums of squares of the numbers and of what they lost. `overflow`: a scale was
// beyond float16.
struct Rounding {
  double squares = 0.0, lost = 0.0;
  bool overflow = false;
};

// Whether the numbers or blocks of `from` can become panels of the quantised `format`: floats only kQ8_0; blocks their
// own, and those without a minimum kQ8_0 as well. Blocks lose nothing.
bool packs_as(Stored from, int32_t format);

// As pack_rows, to a quantised format; inputs are whole blocks.
void pack_quantised(const Source& source, int64_t row_lo, int64_t row_hi, uint8_t* to, int32_t format, int64_t first,
                    const PanelOrder& order, Rounding& rounding);

// Rows row_lo .. row_hi of `source` one behind the other at row `first` of `to`.
void copy_rows(const Source& source, int64_t row_lo, int64_t row_hi, uint8_t* to, int32_t format, int64_t first);

}  // namespace truffula

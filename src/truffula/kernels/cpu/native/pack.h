// From matrices as files hold them to panels of 16 outputs.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace truffula {

enum class Stored : int32_t { kFloat32, kFloat16, kBfloat16 };

// A matrix as it is stored: rows of `inputs` numbers, one behind the other.
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
  return 64 * (format == kF32 ? inputs : (inputs + 1) / 2);
}

// Rows row_lo .. row_hi of `source` become outputs first .. of the panels at `to`. Lanes nobody fills stay as they are.
void pack_rows(const Source& source, int64_t row_lo, int64_t row_hi, uint8_t* to, int32_t format, int64_t first,
               const PanelOrder& order);

// Rows row_lo .. row_hi of `source` one behind the other at row `first` of `to`.
void copy_rows(const Source& source, int64_t row_lo, int64_t row_hi, uint8_t* to, int32_t format, int64_t first);

}  // namespace truffula

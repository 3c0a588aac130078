// Which of two ways to multiply bfloat16 numbers a processor is faster at: known only by trying.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace truffula {

// What was measured: seconds of a product with 1 and with 8 rows, the least of some; whether the bits were equal.
struct PairTrial {
  double pairs[2], floats[2];
  bool same_bits;

  // Only a clear gain, and never at the price of other bits: the choice must not show in any answer.
  bool take_pairs() const { return same_bits && pairs[0] / floats[0] + pairs[1] / floats[1] < 1.95; }
  std::string why(const char* with, const char* without) const;
  // Both tables, the one to take first.
  std::vector<const Kernels*> best_first(const Kernels& with, const Kernels& without) const;
};

// A product of a small matrix by either table, alternating; a few milliseconds. `pairs` is a table that has them.
PairTrial try_pairs(const Kernels& pairs, const Kernels& floats);

}  // namespace truffula

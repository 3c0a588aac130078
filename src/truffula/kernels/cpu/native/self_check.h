// Whether an instruction table works on this machine: a processor, a compiler or an emulator may get one wrong.
#pragma once

#include <string>

#include "kernels.h"

namespace truffula {

// Products of every format, norms, rotations, attention and the like, in their plain forms: adapters, gates, partitions
// and float32 adapters are left to the tests. The first op that `table` works out otherwise than the portable table, by more than 1e-4 of its largest number (what
// fused products and another order of sums make is a thousandth of that); the sampler's loops by any bit. Empty when
// none. Takes less than ten milliseconds.
std::string fault_of(const Kernels& table);

}  // namespace truffula

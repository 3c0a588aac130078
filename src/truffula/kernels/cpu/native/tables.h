// The kernel tables that were compiled, one per instruction set.
#pragma once

#include "kernels.h"

namespace truffula {

extern const Kernels kPortable;
#if defined(TRUFFULA_X86)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAvx512Vnni;
extern const Kernels kAvx512Bf16;
#if defined(TRUFFULA_AMX)
extern const Kernels kAmx;
#endif
#endif

}  // namespace truffula

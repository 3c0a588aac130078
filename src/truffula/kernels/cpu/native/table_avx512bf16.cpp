#include "attention.inc.h"
#include "linear.inc.h"
#include "rows.inc.h"
#include "sampler_loops.inc.h"
#include "tables.h"

namespace truffula {

extern const Kernels kAvx512Bf16{"avx512bf16", kPairs, kFineRows, linear, quantise, shrink, norm, pointwise, rope,
                         write_kv, attend, merge_parts, embed, &kSampleLoops};

}  // namespace truffula

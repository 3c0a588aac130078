#include "attention.inc.h"
#include "linear.inc.h"
#include "rows.inc.h"
#include "sampler_loops.inc.h"
#include "tables.h"

namespace truffula {

extern const Kernels kAvx512Vnni{"avx512vnni", kPairs, kFineRows, linear, quantise, shrink, norm, pointwise, rope,
                         write_kv, attend, merge_parts, embed, &kSampleLoops};

}  // namespace truffula

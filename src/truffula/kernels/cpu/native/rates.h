// What this machine does at most, measured: the limits that `truffula bench kernel` holds kernels against.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace truffula {

// Operations a second of the table's instructions of a kind (see Peak), all threads together; 0 where it has none.
double peak_rate(const Kernels& table, int32_t kind, int threads);

// Bytes a second that the threads read together when they read their shares of `bytes` again and again.
double read_rate(const Kernels& table, int threads, int64_t bytes);

}  // namespace truffula

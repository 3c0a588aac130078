// Finds the kernel tables that this machine can run.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace truffula {

// The tables that this machine can run, the fastest for its kind of processor first, the portable one last.
const std::vector<const Kernels*>& tables();

// The table called `name`; "auto" is the first. Throws std::invalid_argument with the usable names.
const Kernels* find_table(const std::string& name);

}  // namespace truffula

// Which function tables this machine can run.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace truffula {

// Tables that this machine can run, the best first by its processor's kind; the portable one is always there.
const std::vector<const Kernels*>& tables();

// The table called `name`; "auto" is the first. Throws std::invalid_argument naming those there are.
const Kernels* find_table(const std::string& name);

}  // namespace truffula

// Which function tables this machine can run.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace truffula {

// Usable tables, the best first; the portable one is always there. `why`: the reason for the first where there was a
// choice, else empty.
struct Tables {
  std::vector<const Kernels*> usable;
  std::string why;
};
const Tables& tables();

// The table called `name`; "auto" is the first. Throws std::invalid_argument naming those there are.
const Kernels* find_table(const std::string& name);

}  // namespace truffula

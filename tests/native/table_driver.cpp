// Compares every op of every instruction table of the machine, in many shapes. One static program without Python, so
// that it runs in an emulator of another processor too (CONTRIBUTING.md). Tables with fused products must give equal
// bits; the portable table, and tiles with bfloat16, may differ by rounding. No kernel may access memory after a row's
// end: arrays end at an unmapped page. The hash of each op's results by the first fused table can be compared between
// machines.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "denormals.h"
#include "dispatch.h"
#include "table_cases.h"
#include "tables.h"

namespace truffula {
namespace {

bool equal_bits(float a, float b) { return std::memcmp(&a, &b, sizeof a) == 0 || (a != a && b != b); }

// The differences of one table's results from another's.
struct Tally {
  long cases = 0, unequal = 0;
  double worst = 0.0;  // of a case's largest difference, by its largest number

  void add(const std::vector<float>& got, const std::vector<float>& wanted) {
    double most = 0.0, off = 0.0;
    bool equal = got.size() == wanted.size();
    for (size_t i = 0; i < wanted.size() && i < got.size(); ++i) {
      equal = equal && equal_bits(got[i], wanted[i]);
      if (!(std::abs(wanted[i]) < INFINITY) || !(std::abs(got[i]) < INFINITY)) continue;
      most = std::max(most, std::abs(static_cast<double>(wanted[i])));
      off = std::max(off, std::abs(static_cast<double>(got[i]) - wanted[i]));
    }
    ++cases;
    unequal += !equal;
    worst = std::max(worst, most > 0.0 ? off / most : off);
  }
};

uint64_t hashed(uint64_t hash, const std::vector<float>& numbers) {
  for (float number : numbers) {
    uint32_t bits = 0x7fc00000u;
    if (number == number) std::memcpy(&bits, &number, sizeof bits);
    hash = (hash ^ bits) * 1099511628211u;
  }
  return hash;
}

// For tables without fused products; larger in bfloat16, where a rounding may go the other way.
double tolerance(const Op& op) { return op.rounds ? 0.02 : 1e-4; }

// Whether a table's results of an op may differ from the others' by rounding.
bool rounds_its_way(const Op& op, const Kernels& table) {
  return !op.exact && (&table == &kPortable || (op.tiles && table.pairs == kPairsByTiles));
}

// Whether all tables agree on an op.
bool check(const Op& op, const std::vector<const Kernels*>& tables, const Kernels* fused) {
  std::vector<Tally> tallies(tables.size());
  uint64_t hash = 14695981039346656037u;
  for (int32_t number = 0; number < op.cases; ++number) {
    const Case one = op.make(number);
    const std::vector<float> wanted = one.run(*fused);
    hash = hashed(hash, wanted);
    for (size_t t = 0; t < tables.size(); ++t)
      if (!one.wild || !(tables[t] == &kPortable || rounds_its_way(op, *tables[t]))) tallies[t].add(one.run(*tables[t]), wanted);
  }
  bool right = true;
  for (size_t t = 0; t < tables.size(); ++t) {
    const Tally& tally = tallies[t];
    const bool passed = rounds_its_way(op, *tables[t]) ? tally.worst <= tolerance(op) : tally.unequal == 0;
    std::printf("%s %-12s %-22s %5ld cases, %ld with other bits than %s, at most %.1e off\n", passed ? "PASS" : "FAIL",
                tables[t]->name, op.name, tally.cases, tally.unequal, fused->name, tally.worst);
    right = right && passed;
  }
  std::printf("     %-12s %-22s hash %016llx\n", fused->name, op.name, static_cast<unsigned long long>(hash));
  std::fflush(stdout);
  return right;
}

// The table that others are compared with: avx2, or the first where there is no avx2.
const Kernels* fused_table() {
  for (const Kernels* table : tables())
    if (std::string(table->name) == "avx2") return table;
  return tables().front();
}

int drive() {
  const FlushDenormals flush;
  bool right = true;
  std::printf("usable, best first:");
  for (const Kernels* table : tables()) std::printf(" %s", table->name);
  std::puts("");
  for (const Op& op : all_ops()) right = check(op, tables(), fused_table()) && right;
  std::puts(right ? "done" : "tables differ");
  return right ? 0 : 1;
}

}  // namespace
}  // namespace truffula

int main() { return truffula::drive(); }

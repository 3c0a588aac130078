#include "dispatch.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "tables.h"

#if defined(TRUFFULA_X86)
#include <cpuid.h>
#endif
#if defined(TRUFFULA_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace truffula {
namespace {

#if defined(TRUFFULA_X86)

struct Features {
  bool avx2 = false, avx512 = false, vnni = false, bf16 = false, amx = false;
};

// Linux lets a process use tiles after it has requested their 8 KB of state (ARCH_REQ_XCOMP_PERM in
// arch/x86/include/uapi).
bool tiles_granted() {
#if defined(TRUFFULA_AMX) && defined(__linux__)
  constexpr int kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

// Instruction sets that the processor has and whose registers the operating system saves at a task switch (XCR0).
Features features() {
  Features found;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
  const bool osxsave = c & (1u << 27), avx = c & (1u << 28), fma = c & (1u << 12), f16c = c & (1u << 29);
  if (!osxsave || !avx) return found;
  unsigned low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const bool ymm = (low & 0x6u) == 0x6u, zmm = (low & 0xe6u) == 0xe6u;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  found.avx2 = ymm && fma && f16c && (b & (1u << 5));
  const bool tiles = (low & 0x60000u) == 0x60000u && (d & (1u << 24)) && (d & (1u << 22)) && (d & (1u << 25));
  const unsigned wanted = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // F, DQ, BW, VL
  found.avx512 = found.avx2 && zmm && (b & wanted) == wanted;
  found.vnni = found.avx512 && (c & (1u << 11));
  if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) found.bf16 = found.vnni && (a & (1u << 5));
  found.amx = found.bf16 && tiles && tiles_granted();
  return found;
}

#endif

#if defined(TRUFFULA_X86)
bool made_by_amd() {
  unsigned a = 0, name[3] = {};
  __get_cpuid(0, &a, &name[0], &name[2], &name[1]);
  return std::memcmp(name, "AuthenticAMD", sizeof name) == 0;
}
#endif

std::vector<const Kernels*> usable_tables() {
  std::vector<const Kernels*> found;
#if defined(TRUFFULA_X86)
  const Features has = features();
#if defined(TRUFFULA_AMX) && !defined(TRUFFULA_EMULATE)
  if (has.amx) found.push_back(&kAmx);
#endif
  // VDPBF16PS has twice the rate of float32 instructions on AMD's processors (Zen 4, Zen 5) and half of it on Intel's.
  if (has.bf16 && made_by_amd()) found.push_back(&kAvx512Bf16);
  if (has.vnni) found.push_back(&kAvx512Vnni);
  if (has.bf16 && !made_by_amd()) found.push_back(&kAvx512Bf16);
  if (has.avx512) found.push_back(&kAvx512);
  if (has.avx2) found.push_back(&kAvx2);
#endif
  found.push_back(&kPortable);
#if defined(TRUFFULA_EMULATE)
  // Emulated tables are for tests: listed last, so that "auto" never takes them.
  for (const Kernels* table : {&kAvx512, &kAvx512Vnni, &kAvx512Bf16, &kAmx})
    if (std::find(found.begin(), found.end(), table) == found.end()) found.push_back(table);
#endif
  return found;
}

}  // namespace

const std::vector<const Kernels*>& tables() {
  static const std::vector<const Kernels*> found = usable_tables();
  return found;
}

const Kernels* find_table(const std::string& name) {
  std::string names;
  for (const Kernels* table : tables()) {
    if (name == "auto" || name == table->name) return table;
    names += (names.empty() ? "" : ", ") + std::string(table->name);
  }
  throw std::invalid_argument("instruction set '" + name + "' is not usable on this machine; it has " + names);
}

}  // namespace truffula

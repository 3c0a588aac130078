// Denormal numbers are treated as zero in a step: softmax produces many, and each costs about a hundred cycles.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#endif
#include <cstdint>

namespace truffula {

// Treats results and operands below 1.2e-38 as zero on this thread, until the destructor restores the former mode.
class FlushDenormals {
 public:
#if defined(__x86_64__) || defined(_M_X64)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(before_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  unsigned before_;
#elif defined(__aarch64__)
  FlushDenormals() : before_(fpcr()) { set_fpcr(before_ | uint64_t{1} << 24); }
  ~FlushDenormals() { set_fpcr(before_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  static uint64_t fpcr() {
    uint64_t value;
    asm volatile("mrs %0, fpcr" : "=r"(value));
    return value;
  }
  static void set_fpcr(uint64_t value) { asm volatile("msr fpcr, %0" : : "r"(value)); }
  uint64_t before_;
#else
  FlushDenormals() {}
#endif
};

}  // namespace truffula

// Test cases for table_driver.cpp: the number of a case determines its shape, options and values.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "kernels.h"
#include "numbers.h"

namespace truffula {

// An array that ends at an unmapped page.
class Guarded {
 public:
  explicit Guarded(size_t bytes) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    mapped_ = (bytes + page - 1) / page * page + page;
    base_ = static_cast<uint8_t*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + mapped_ - page, page, PROT_NONE) != 0) std::abort();
    data_ = base_ + mapped_ - page - bytes;
    bytes_ = bytes;
  }
  ~Guarded() { munmap(base_, mapped_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  uint8_t* bytes() const { return data_; }
  float* floats() const { return reinterpret_cast<float*>(data_); }
  size_t size() const { return bytes_; }

 private:
  uint8_t *base_, *data_;
  size_t mapped_, bytes_;
};

using Array = std::shared_ptr<Guarded>;
inline Array array_of(int64_t bytes) { return std::make_shared<Guarded>(static_cast<size_t>(bytes)); }

// Pseudo-random numbers, the same on every machine. `wild`: of all magnitudes, with zeros, denormals, infinities and
// NaN.
struct Numbers {
  uint32_t state;
  bool wild = false, half = false;  // half: rounded to bfloat16

  uint32_t bits() { return (state = state * 1664525u + 1013904223u) >> 8; }
  int32_t below(int32_t end) { return static_cast<int32_t>(bits() % static_cast<uint32_t>(end)); }
  float next() {
    float number = static_cast<float>(static_cast<int32_t>(bits()) - (1 << 23)) * 0x1p-23f;
    if (wild) {
      static constexpr float kRare[] = {0.0f, -0.0f, 1e-39f, -1e-39f, 1.2e-38f, 1e38f, INFINITY, NAN};
      number = bits() % 61 == 0 ? kRare[bits() % 8] : std::ldexp(number, below(41) - 20);
    }
    return half ? from_bf16(to_bf16(number)) : number;
  }
  void fill(float* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = next();
  }
  Array floats(int64_t count) {
    Array made = array_of(count * 4);
    fill(made->floats(), count);
    return made;
  }
};

// Rows in a guarded array, `apart` floats from one to the next. The floats between rows hold a mark.
constexpr float kMark = -77.25f;
struct RowArray {
  Array memory;
  int64_t count, width, apart;

  RowArray(int64_t rows, int64_t wide, int64_t gap = 3)
      : memory(array_of(((rows - 1) * (wide + gap) + wide) * 4)), count(rows), width(wide), apart(wide + gap) {
    std::fill_n(memory->floats(), memory->size() / 4, kMark);
  }
  static RowArray random(Numbers& numbers, int64_t rows, int64_t wide, int64_t gap = 3) {
    RowArray made(rows, wide, gap);
    for (int64_t r = 0; r < rows; ++r) numbers.fill(made.memory->floats() + r * made.apart, wide);
    return made;
  }
  RowArray copy() const {
    RowArray made = *this;
    made.memory = array_of(static_cast<int64_t>(memory->size()));
    std::memcpy(made.memory->bytes(), memory->bytes(), memory->size());
    return made;
  }
  Rows rows() const { return {memory->floats(), apart}; }
  // The rows, concatenated; with one more number when the floats between them were overwritten.
  std::vector<float> taken() const {
    std::vector<float> all;
    bool spilt = false;
    for (int64_t i = 0; i < static_cast<int64_t>(memory->size() / 4); ++i) {
      const float number = memory->floats()[i];
      if (i % apart < width) all.push_back(number);
      else spilt = spilt || number != kMark;
    }
    if (spilt) std::puts("written between rows"), all.push_back(kMark);
    return all;
  }
};

struct Case {
  bool wild;
  std::function<std::vector<float>(const Kernels&)> run;
};

// `exact`: equal bits in every table; `rounds`: some results are rounded to bfloat16; `tiles`: a table of tiles sums in
// an order of its own.
struct Op {
  const char* name;
  int32_t cases;
  bool exact, rounds;
  std::function<Case(int32_t)> make;
  bool tiles = false;
};

std::vector<Op> product_ops();
std::vector<Op> row_ops();
std::vector<Op> attention_ops();
std::vector<Op> state_ops();

inline std::vector<Op> all_ops() {
  std::vector<Op> all;
  for (const auto& some : {product_ops(), row_ops(), attention_ops(), state_ops()})
    all.insert(all.end(), some.begin(), some.end());
  return all;
}

}  // namespace truffula

// Memory for weights, activations and cached keys: aligned, and in huge pages where the system has them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace truffula {

// `bytes` of zeros that the system commits when they are first touched. Throws std::bad_alloc.
class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes);
  ~Memory();
  Memory(Memory&& other) noexcept { *this = std::move(other); }
  Memory& operator=(Memory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(small_pages_, other.small_pages_);
    return *this;
  }

  uint8_t* data() const { return data_; }
  float* floats() const { return reinterpret_cast<float*>(data_); }
  size_t size() const { return bytes_; }
  // Returns the whole pages in bytes begin .. end to the system; their contents are lost. From the first call on, all
  // pages are small: the kernel would fill a huge page again around what is left of it.
  void release(size_t begin, size_t end);

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
  [[maybe_unused]] bool small_pages_ = false;
};

}  // namespace truffula

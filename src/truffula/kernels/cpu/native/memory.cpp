#include "memory.h"

#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace truffula {
namespace {
constexpr size_t kHuge = size_t{2} << 20;
}

#if defined(__SANITIZE_ADDRESS__)

// From the sanitizer's own heap, to the byte: what is read beyond the end is seen.
Memory::Memory(size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  data_ = static_cast<uint8_t*>(std::calloc(bytes, 1));
  if (data_ == nullptr) throw std::bad_alloc();
}

Memory::~Memory() { std::free(data_); }

#elif defined(__linux__)

Memory::Memory(size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<uint8_t*>(found);
  if (bytes >= kHuge) madvise(found, bytes, MADV_HUGEPAGE);  // a wish: without it the pages are small
}

Memory::~Memory() {
  if (data_) munmap(data_, bytes_);
}

#else

Memory::Memory(size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  data_ = static_cast<uint8_t*>(::operator new(bytes, std::align_val_t{4096}));
  std::memset(data_, 0, bytes);
}

Memory::~Memory() {
  if (data_) ::operator delete(data_, std::align_val_t{4096});
}

#endif

}  // namespace truffula

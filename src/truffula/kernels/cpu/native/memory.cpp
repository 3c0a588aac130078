#include "memory.h"

#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#define TF_MMAP
#endif

namespace truffula {
#if defined(TF_MMAP)
namespace {
[[maybe_unused]] constexpr size_t kHuge = size_t{2} << 20;
#if defined(MAP_NORESERVE)
[[maybe_unused]] constexpr int kFlags = MAP_PRIVATE | MAP_ANON | MAP_NORESERVE;
#else
[[maybe_unused]] constexpr int kFlags = MAP_PRIVATE | MAP_ANON;
#endif
}  // namespace
#endif

#if defined(__SANITIZE_ADDRESS__)

// From the sanitizer's own heap, to the byte: what is read beyond the end is seen.
Memory::Memory(size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  data_ = static_cast<uint8_t*>(std::calloc(bytes, 1));
  if (data_ == nullptr) throw std::bad_alloc();
}

Memory::~Memory() { std::free(data_); }

void Memory::release(size_t, size_t) {}

#elif defined(TF_MMAP)

Memory::Memory(size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, kFlags, -1, 0);
  if (found == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<uint8_t*>(found);
#if defined(MADV_HUGEPAGE)
  if (bytes >= kHuge) madvise(found, bytes, MADV_HUGEPAGE);  // a wish: without it the pages are small
#endif
}

Memory::~Memory() {
  if (data_) munmap(data_, bytes_);
}

void Memory::release([[maybe_unused]] size_t begin, [[maybe_unused]] size_t end) {
#if defined(__linux__)  // elsewhere MADV_DONTNEED does not return memory
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  begin = (begin + page - 1) / page * page;
  end = end / page * page;
  if (begin >= end) return;
  if (!std::exchange(small_pages_, true)) madvise(data_, bytes_, MADV_NOHUGEPAGE);
  madvise(data_ + begin, end - begin, MADV_DONTNEED);
#endif
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

void Memory::release(size_t, size_t) {}

#endif

}  // namespace truffula

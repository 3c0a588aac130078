#include "team.h"

#include <stdexcept>
#include <utility>

#if defined(_WIN32)
#include <process.h>
#define TF_GETPID _getpid
#else
#include <unistd.h>
#define TF_GETPID getpid
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace truffula {
namespace {

// Most waits are for a neighbour a few microseconds behind: worth spinning. A longer one is for a core that the
// system has given to somebody else: then sleeping lets it come back sooner. (Yielding in a loop does neither.)
constexpr int kSpins = 2000;

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void wait_for_change(std::atomic<uint32_t>& value, uint32_t old) {
  for (int i = 0; i < kSpins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    relax();
  }
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

Team::Team(int threads) : size_(threads), process_(TF_GETPID()) {
  if (threads < 1 || threads > 1024) throw std::invalid_argument("a team has 1 to 1024 threads");
  workers_.reserve(static_cast<size_t>(threads) - 1);
  try {
    for (int thread = 1; thread < threads; ++thread) workers_.emplace_back(&Team::work, this, thread);
  } catch (...) {  // the system gives no more threads: those there are must end first
    dismiss();
    throw;
  }
}

Team::~Team() { dismiss(); }

void Team::dismiss() {
  if (TF_GETPID() != process_) {
    // Forked: there is nobody to join, and what stands for a thread may by now be another's. Left alone, for good.
    new std::vector<std::thread>(std::move(workers_));
    return;
  }
  stop_ = true;
  started_.fetch_add(1, std::memory_order_release);
  started_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Team::run(void (*job)(void*, int), void* context) {
  if (TF_GETPID() != process_) throw std::runtime_error("this process was forked: the model's threads are not in it");
  job_ = job;
  context_ = context;
  started_.fetch_add(1, std::memory_order_release);
  started_.notify_all();
  join_job(0);
}

void Team::join_job(int thread) {
  job_(context_, thread);
  barrier();
}

void Team::work(int thread) {
  for (uint32_t seen = 0;;) {
    wait_for_change(started_, seen);
    ++seen;
    if (stop_) return;
    join_job(thread);
  }
}

void Team::barrier() {
  if (size_ == 1) return;
  const uint32_t round = passed_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    passed_.fetch_add(1, std::memory_order_release);
    passed_.notify_all();
  } else {
    wait_for_change(passed_, round);
  }
}

}  // namespace truffula

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

constexpr int kJobShift = 40, kChunksShift = 20;
constexpr uint64_t kField = (uint64_t{1} << kChunksShift) - 1;
constexpr int32_t kNone = -1, kOver = -2;
constexpr uint32_t kJobMask = (uint32_t{1} << (64 - kJobShift)) - 1;

void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

int64_t process_id() { return TF_GETPID(); }

Team::Team(int threads) : size_(threads), process_(process_id()) {
  if (threads < 1 || threads > 1024) throw std::invalid_argument("a team has 1 to 1024 threads");
  resize(1);
  workers_.reserve(static_cast<size_t>(threads) - 1);
  try {
    for (int thread = 1; thread < threads; ++thread) workers_.emplace_back(&Team::serve, this, thread);
  } catch (...) {  // the system gives no more threads: those there are must end first
    dismiss();
    throw;
  }
}

Team::~Team() { dismiss(); }

void Team::require_own_process() const {
  if (process_id() != process_) throw std::runtime_error("this process was forked: the model's threads are not in it");
}

void Team::dismiss() {
  if (process_id() != process_) {
    // Forked: there is nobody to join, and what stands for a thread may by now be another's. Left alone, for good.
    new std::vector<std::thread>(std::move(workers_));
    return;
  }
  stop_ = true;
  job_.fetch_add(1);
  job_.notify_all();
  tell_news();
  for (std::thread& worker : workers_) worker.join();
}

// Tells those who sleep behind a phase that it may be over, or their job. The number only grows: one that came back to
// an old value would look to a late sleeper as if nothing had happened.
void Team::tell_news() {
  news_.fetch_add(1);
  news_.notify_all();
}

void Team::resize(int32_t phases) {
  require_own_process();
  next_phases_ = phases;
  if (phases <= capacity_) return;
  // Nobody may enter with a job that is over; who is still inside leaves at the next look.
  num_phases_.store(0);
  job_.fetch_add(1);
  tell_news();
  while (inside_.load() > 0) relax();
  phases_ = std::make_unique<Phase[]>(static_cast<size_t>(phases));
  capacity_ = phases;
}

void Team::set(int32_t phase, int32_t chunks) {
  static_assert(kMostChunks == kField);
  if (chunks < 0 || chunks > kMostChunks) throw std::invalid_argument("a phase has too many chunks");
  Phase& p = phases_[phase];
  p.done.store(0, std::memory_order_relaxed);
  const uint64_t job = (job_.load(std::memory_order_relaxed) + 1) & kJobMask;
  p.claim.store(job << kJobShift | static_cast<uint64_t>(chunks) << kChunksShift, std::memory_order_release);
}

void Team::run(Work work, void* context) {
  require_own_process();
  work_ = work;
  context_ = context;
  num_phases_.store(next_phases_);
  const uint32_t job = job_.fetch_add(1) + 1;
  if (size_ > 1) {
    job_.notify_all();
    tell_news();  // to who went to sleep between the last job and this one
  }
  take_part(job, 0);
}

void Team::run_chunks(int32_t chunks, Work work, void* context) {
  resize(1);
  set(0, chunks);
  run(work, context);
}

// The next chunk of a phase, kNone when all are taken, kOver when the phase is another job's by now.
int32_t Team::take(Phase& phase, uint32_t job, int32_t* chunks) {
  uint64_t claim = phase.claim.load(std::memory_order_acquire);
  for (;;) {
    const auto total = static_cast<int32_t>(claim >> kChunksShift & kField), next = static_cast<int32_t>(claim & kField);
    *chunks = total;
    if (claim >> kJobShift != (job & kJobMask)) return kOver;
    if (next >= total) return kNone;
    if (phase.claim.compare_exchange_weak(claim, claim + 1, std::memory_order_acq_rel)) return next;
  }
}

void Team::take_part(uint32_t job, int thread) {
  for (int32_t index = 0; index < num_phases_.load(); ++index) {
    Phase& phase = phases_[index];
    int32_t chunks = 0, chunk;
    while ((chunk = take(phase, job, &chunks)) >= 0) {
      work_(context_, index, chunk, thread);
      if (phase.done.fetch_add(1) + 1 == static_cast<uint32_t>(chunks) && size_ > 1) tell_news();
    }
    if (chunk == kOver) return;
    for (int spins = 0;; ++spins) {
      const uint32_t news = news_.load();  // before looking: what comes after it ends the sleep
      if (phase.done.load() >= static_cast<uint32_t>(chunks)) break;
      if (job_.load() != job) return;  // late: that job is over
      if (spins < kSpins) relax();
      else news_.wait(news);
    }
  }
}

void Team::serve(int thread) {
  for (uint32_t seen = 0;;) {
    for (int spins = 0; job_.load(std::memory_order_acquire) == seen && spins < kSpins; ++spins) relax();
    job_.wait(seen, std::memory_order_acquire);
    inside_.fetch_add(1);
    seen = job_.load();
    if (!stop_.load()) take_part(seen, thread);
    inside_.fetch_sub(1);
    if (stop_.load()) return;
  }
}

}  // namespace truffula

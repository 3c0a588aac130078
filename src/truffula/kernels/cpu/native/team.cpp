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

// Most waits last a few microseconds, for a thread that is slightly behind: spinning is fastest. In a longer wait the
// system has given the other thread's core to another process: sleeping frees a core for it. (Yielding in a loop does
// not.)
constexpr int kSpins = 2000;

constexpr int kJobShift = 40, kChunksShift = 20;
constexpr uint64_t kField = (uint64_t{1} << kChunksShift) - 1;
constexpr int32_t kNoChunk = -1, kJobOver = -2;
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
    for (int thread = 1; thread < threads; ++thread) workers_.emplace_back(&Team::worker_loop, this, thread);
  } catch (...) {  // the system refused a thread: end those already started
    stop_workers();
    throw;
  }
}

Team::~Team() { stop_workers(); }

void Team::require_own_process() const {
  if (process_id() != process_) throw std::runtime_error("this process was forked, and the model's threads exist in its parent only");
}

void Team::stop_workers() {
  if (process_id() != process_) {
    // In a forked child the threads do not exist, and their handles may name other threads: leak them.
    new std::vector<std::thread>(std::move(workers_));
    return;
  }
  stop_ = true;
  job_.fetch_add(1);
  job_.notify_all();
  notify_waiters();
  for (std::thread& worker : workers_) worker.join();
}

// Wakes the threads that wait for the end of a phase or job. The counter only grows: if it returned to an old value, a
// thread about to sleep would miss the change.
void Team::notify_waiters() {
  progress_.fetch_add(1);
  progress_.notify_all();
}

void Team::resize(int32_t phases) {
  require_own_process();
  next_phases_ = phases;
  if (phases <= capacity_) return;
  // No thread can enter with an ended job; those still inside leave when they next read the job's number.
  num_phases_.store(0);
  job_.fetch_add(1);
  notify_waiters();
  while (num_inside_.load() > 0) relax();
  phases_ = std::make_unique<Phase[]>(static_cast<size_t>(phases));
  capacity_ = phases;
}

void Team::set(int32_t phase, int32_t chunks) {
  static_assert(kMaxChunks == kField);
  if (chunks < 0 || chunks > kMaxChunks) throw std::invalid_argument("a phase has too many chunks");
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
    notify_waiters();  // threads that fell asleep between the jobs
  }
  run_phases(job, 0);
}

void Team::run_chunks(int32_t chunks, Work work, void* context) {
  resize(1);
  set(0, chunks);
  run(work, context);
}

// Claims the next chunk of a phase. kNoChunk: all are claimed; kJobOver: the phase already belongs to another job.
int32_t Team::claim_chunk(Phase& phase, uint32_t job, int32_t* chunks) {
  uint64_t claim = phase.claim.load(std::memory_order_acquire);
  for (;;) {
    const auto total = static_cast<int32_t>(claim >> kChunksShift & kField), next = static_cast<int32_t>(claim & kField);
    *chunks = total;
    if (claim >> kJobShift != (job & kJobMask)) return kJobOver;
    if (next >= total) return kNoChunk;
    if (phase.claim.compare_exchange_weak(claim, claim + 1, std::memory_order_acq_rel)) return next;
  }
}

void Team::run_phases(uint32_t job, int thread) {
  for (int32_t index = 0; index < num_phases_.load(); ++index) {
    Phase& phase = phases_[index];
    int32_t chunks = 0, chunk;
    while ((chunk = claim_chunk(phase, job, &chunks)) >= 0) {
      work_(context_, index, chunk, thread);
      if (phase.done.fetch_add(1) + 1 == static_cast<uint32_t>(chunks) && size_ > 1) notify_waiters();
    }
    if (chunk == kJobOver) return;
    for (int spins = 0;; ++spins) {
      const uint32_t news = progress_.load();  // read before `done`: a later change ends the wait
      if (phase.done.load() >= static_cast<uint32_t>(chunks)) break;
      if (job_.load() != job) return;  // the job has ended meanwhile
      if (spins < kSpins) relax();
      else progress_.wait(news);
    }
  }
}

void Team::worker_loop(int thread) {
  for (uint32_t seen = 0;;) {
    for (int spins = 0; job_.load(std::memory_order_acquire) == seen && spins < kSpins; ++spins) relax();
    job_.wait(seen, std::memory_order_acquire);
    num_inside_.fetch_add(1);
    seen = job_.load();
    if (!stop_.load()) run_phases(seen, thread);
    num_inside_.fetch_sub(1);
    if (stop_.load()) return;
  }
}

}  // namespace truffula

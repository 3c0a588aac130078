// A pool of threads that runs jobs of phases; each phase is a number of chunks and begins when the one before has
// ended.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace truffula {

// The id of this process; it changes in a forked child.
int64_t process_id();

// The calling thread takes part. A phase ends when all its chunks are done, and any thread may claim any chunk: a
// thread that the system has descheduled delays the others only while it holds a chunk. Between jobs the threads spin
// briefly, then sleep, so an idle server uses no CPU.
//
// One job at a time, from one thread. The threads do not exist in a forked child: `run` throws std::runtime_error
// there.
class Team {
 public:
  // Runs one chunk. Must not throw. Sees all writes of earlier phases.
  using Work = void (*)(void* context, int32_t phase, int32_t chunk, int thread);

  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // The most chunks of a phase.
  static constexpr int32_t kMaxChunks = (1 << 20) - 1;

  // `resize` sets the number of phases of the next job; then `set` the chunks of each of them.
  void resize(int32_t phases);
  void set(int32_t phase, int32_t chunks);

  // Returns when every chunk of every phase is done.
  void run(Work work, void* context);

  // One phase: work(context, 0, chunk, thread) for each chunk.
  void run_chunks(int32_t chunks, Work work, void* context);

 private:
  // `claim` packs job, chunks and next chunk into one integer, so that a late thread can neither claim a chunk of a job
  // that has ended nor miscount one of the next job.
  struct alignas(64) Phase {
    std::atomic<uint64_t> claim{0};
    std::atomic<uint32_t> done{0};
  };

  void require_own_process() const;
  void stop_workers();
  void worker_loop(int thread);
  void run_phases(uint32_t job, int thread);
  int32_t claim_chunk(Phase& phase, uint32_t job, int32_t* chunks);
  void notify_waiters();

  const int size_;
  const int64_t process_;
  std::unique_ptr<Phase[]> phases_;
  int32_t capacity_ = 0, next_phases_ = 0;
  // Read only by threads that hold a chunk of the job, so they do not change during a read.
  Work work_ = nullptr;
  void* context_ = nullptr;
  std::atomic<int32_t> num_phases_{0};
  // On cache lines of their own: a core that spins on one must not slow down others.
  alignas(128) std::atomic<uint32_t> job_{0};
  alignas(128) std::atomic<uint32_t> progress_{0};
  alignas(128) std::atomic<bool> stop_{false};
  // The number of threads that read phases_, which is replaced only when it is 0.
  std::atomic<int32_t> num_inside_{0};
  std::vector<std::thread> workers_;
};

}  // namespace truffula

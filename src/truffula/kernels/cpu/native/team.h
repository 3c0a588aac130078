// A team of threads that works through phases of chunks, each phase after all of the one before.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace truffula {

// Of this process: another one's after a fork.
int64_t process_id();

// The caller is one of the team. Nobody has to turn up: a phase is over when its chunks are done, whoever did them, so
// that a thread which the system has put aside holds the others up only while it has a chunk in hand. Between jobs the
// threads spin shortly, then sleep: an idle server burns nothing.
//
// One job at a time, from one thread. A forked child has no team: `run` throws std::runtime_error there.
class Team {
 public:
  // Does one chunk. Must not throw. What chunks of earlier phases wrote is seen.
  using Work = void (*)(void* context, int32_t phase, int32_t chunk, int thread);

  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // Chunks of a phase, at most.
  static constexpr int32_t kMostChunks = (1 << 20) - 1;

  // Chunks of the phases of the next job: `set` each of 0 .. phases, none left out.
  void resize(int32_t phases);
  void set(int32_t phase, int32_t chunks);

  // Returns when every chunk of every phase is done.
  void run(Work work, void* context);

  // One phase: work(context, 0, chunk, thread) for each chunk.
  void run_chunks(int32_t chunks, Work work, void* context);

 private:
  // `claim` is job | chunks | next: one number, so that a thread that is late can neither take a chunk of a job that
  // is over nor miscount one of the next.
  struct alignas(64) Phase {
    std::atomic<uint64_t> claim{0};
    std::atomic<uint32_t> done{0};
  };

  void require_own_process() const;
  void dismiss();
  void serve(int thread);
  void take_part(uint32_t job, int thread);
  int32_t take(Phase& phase, uint32_t job, int32_t* chunks);
  void tell_news();

  const int size_;
  const int64_t process_;
  std::unique_ptr<Phase[]> phases_;
  int32_t capacity_ = 0, next_phases_ = 0;
  // Read by whoever holds a chunk of the job, so they never change under a reader.
  Work work_ = nullptr;
  void* context_ = nullptr;
  std::atomic<int32_t> num_phases_{0};
  // On lines of its own: a core that spins on it must not slow others.
  alignas(128) std::atomic<uint32_t> job_{0};
  alignas(128) std::atomic<uint32_t> news_{0};
  alignas(128) std::atomic<bool> stop_{false};
  // Threads inside phases_: it may only be replaced when there are none.
  std::atomic<int32_t> inside_{0};
  std::vector<std::thread> workers_;
};

}  // namespace truffula

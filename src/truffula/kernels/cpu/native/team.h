// A team of threads that works on one job after another, and its barrier.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace truffula {

// The caller is thread 0. Between jobs the others spin shortly, then sleep: an idle server burns nothing. One job at a
// time; a job must not throw. A forked child has no team: its `run` throws std::runtime_error.
class Team {
 public:
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // job(context, thread) on every thread; returns when all are done.
  void run(void (*job)(void*, int), void* context);

  // Inside a job: nobody goes on before everybody is here. What was written before is seen after.
  void barrier();

 private:
  void work(int thread);
  void dismiss();
  void join_job(int thread);

  const int size_;
  const int64_t process_;
  void (*job_)(void*, int) = nullptr;
  void* context_ = nullptr;
  bool stop_ = false;
  // Each on its own lines: a core that spins on one must not slow the core that writes another.
  alignas(128) std::atomic<uint32_t> started_{0};
  alignas(128) std::atomic<int32_t> arrived_{0};
  alignas(128) std::atomic<uint32_t> passed_{0};
  std::vector<std::thread> workers_;
};

}  // namespace truffula

// What this machine can reach with one instruction set, measured: the limits for benchmarks/kernels.py, which compiles
// this file for the instruction set it measures and loads it as a shared library.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "peak.h"

namespace truffula {
namespace {

constexpr int kTries = 7;
constexpr double kLeastSeconds = 0.008;  // of a try: beside that, starting threads is nothing

using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Seconds until all threads have done `work(thread)`; they begin together.
double together(int threads, const std::function<void(int)>& work) {
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  bool called_off = false;
  std::vector<std::thread> team;
  try {
    for (int i = 0; i < threads; ++i)
      team.emplace_back([&, i] {
        ++ready;
        while (!go) std::this_thread::yield();
        if (!called_off) work(i);
      });
  } catch (...) {  // the machine gives no more threads
    called_off = true;
    go = true;
    for (std::thread& thread : team) thread.join();
    throw;
  }
  while (ready < threads) std::this_thread::yield();
  const auto start = Clock::now();
  go = true;
  for (std::thread& thread : team) thread.join();
  return since(start);
}

// The least seconds of `kTries` of work that is repeated until one thread needs long enough; the repetitions, too.
double least(int threads, const std::function<void(int, int64_t)>& work, int64_t& repeats) {
  for (repeats = 1;; repeats *= 2)
    if (together(threads, [&](int i) { work(i, repeats); }) >= kLeastSeconds) break;
  double best = 1e9;
  for (int i = 0; i < kTries; ++i) best = std::min(best, together(threads, [&](int n) { work(n, repeats); }));
  return best;
}

}  // namespace
}  // namespace truffula

using namespace truffula;

// Operations a second of a kind of instructions (see Peak), all threads together; 0 where the set has none.
extern "C" double truffula_peak_rate(int32_t kind, int32_t threads) {
  constexpr int64_t kRounds = 4096;
  const int64_t each = peak(kind, kRounds);
  if (each == 0) return 0.0;
  int64_t repeats = 0;
  const double seconds = least(threads, [&](int, int64_t n) { while (n--) peak(kind, kRounds); }, repeats);
  return static_cast<double>(each) * static_cast<double>(repeats) * threads / seconds;
}

// Bytes a second that the threads read together when they read their shares of `bytes` again and again.
extern "C" double truffula_read_rate(int32_t threads, int64_t bytes) {
  const int64_t share = std::max<int64_t>(bytes / threads / 256, 1) * 256;
  const auto size = static_cast<size_t>(share * threads);
  const std::unique_ptr<uint8_t, decltype(&std::free)> data(
      static_cast<uint8_t*>(std::aligned_alloc(256, size)), &std::free);
  if (!data) return 0.0;
  std::memset(data.get(), 1, size);
  std::atomic<uint32_t> kept{0};
  int64_t repeats = 0;
  const double seconds = least(
      threads, [&](int thread, int64_t n) { while (n--) kept |= read_through(data.get() + thread * share, share); },
      repeats);
  return static_cast<double>(size) * static_cast<double>(repeats) / seconds;
}

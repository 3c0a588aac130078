#include "rates.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "memory.h"

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

double peak_rate(const Kernels& table, int32_t kind, int threads) {
  constexpr int64_t kRounds = 4096;
  const int64_t each = table.peak(kind, kRounds);
  if (each == 0) return 0.0;
  int64_t repeats = 0;
  const double seconds = least(threads, [&](int, int64_t n) { while (n--) table.peak(kind, kRounds); }, repeats);
  return static_cast<double>(each) * static_cast<double>(repeats) * threads / seconds;
}

double read_rate(const Kernels& table, int threads, int64_t bytes) {
  const int64_t share = std::max<int64_t>(bytes / threads / 256, 1) * 256;
  const Memory data(static_cast<size_t>(share * threads));
  std::memset(data.data(), 1, static_cast<size_t>(share * threads));
  std::atomic<uint32_t> kept{0};
  int64_t repeats = 0;
  const double seconds = least(
      threads,
      [&](int thread, int64_t n) { while (n--) kept |= table.read(data.data() + thread * share, share); }, repeats);
  return static_cast<double>(share * threads) * static_cast<double>(repeats) / seconds;
}

}  // namespace truffula

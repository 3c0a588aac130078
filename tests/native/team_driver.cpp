// Runs jobs of many phases on non-atomic numbers that one phase writes and the next reads. Thread sanitizer reports
// accesses that the team does not order; without it, wrong sums fail the program and a lost wake-up hangs it.
#include "team.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

struct Job {
  std::vector<long> numbers;  // one per chunk, not atomic on purpose
  long wrong = 0;
  int32_t chunks = 0;
};

// Even phases add one to each number, one per chunk; odd phases have a single chunk, which compares the numbers.
void work(void* context, int32_t phase, int32_t chunk, int) {
  Job& job = *static_cast<Job*>(context);
  if (phase % 2 == 0) {
    job.numbers[static_cast<size_t>(chunk)] += 1;
    return;
  }
  for (int32_t i = 1; i < job.chunks; ++i) job.wrong += job.numbers[static_cast<size_t>(i)] != job.numbers[0];
}

// Runs `jobs` jobs with varying numbers of phases and chunks. False when a number was wrong.
bool drive(int threads, int jobs, int most_phases) {
  truffula::Team team(threads);
  for (int i = 0; i < jobs; ++i) {
    Job job;
    job.chunks = 1 + i % 7;
    job.numbers.assign(static_cast<size_t>(job.chunks), 0);
    if (i % 3 == 2) {  // between two steps: sampling, a weight that is packed
      team.run_chunks(job.chunks, work, &job);
      if (job.numbers[static_cast<size_t>(job.chunks) - 1] != 1) return false;
      continue;
    }
    const int32_t phases = 2 * (1 + i % most_phases);
    team.resize(phases);
    for (int32_t phase = 0; phase < phases; ++phase) team.set(phase, phase % 2 ? 1 : job.chunks);
    team.run(work, &job);
    if (job.wrong || job.numbers[0] != phases / 2) return false;
  }
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  const int jobs = count > 1 ? std::atoi(arguments[1]) : 1000;
  for (int threads = 1; threads <= 4; ++threads)
    if (!drive(threads, jobs, 20)) {
      std::printf("%d threads: a phase did not see the one before it\n", threads);
      return 1;
    }
  // Teams that end after zero or a few jobs: sleeping threads must be woken.
  for (int i = 0; i < jobs; ++i)
    if (!drive(1 + i % 4, i % 5, 3)) return 1;
  std::puts("done");
}

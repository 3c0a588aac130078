// Many jobs on a team of threads, each with barriers, on plain numbers: what one thread writes before a barrier another
// reads behind it. Thread sanitizer sees whatever the barrier does not order; without it, wrong sums end the program.
#include "team.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

constexpr int kRounds = 20;

struct Job {
  truffula::Team* team;
  std::vector<long>* numbers;  // one per thread, not atomic on purpose
  long wrong = 0;
};

void work(void* context, int thread) {
  Job& job = *static_cast<Job*>(context);
  std::vector<long>& numbers = *job.numbers;
  const auto mine = static_cast<size_t>(thread), size = numbers.size();
  for (int round = 0; round < kRounds; ++round) {
    numbers[mine] += 1;
    job.team->barrier();
    long sum = 0;
    for (long number : numbers) sum += number;
    if (thread == 0 && sum != numbers[0] * static_cast<long>(size)) ++job.wrong;
    job.team->barrier();
  }
}

}  // namespace

int main(int count, char** arguments) {
  const int jobs = count > 1 ? std::atoi(arguments[1]) : 1000;
  for (int threads = 1; threads <= 4; ++threads) {
    truffula::Team team(threads);
    std::vector<long> numbers(static_cast<size_t>(threads), 0);
    Job job{&team, &numbers};
    for (int i = 0; i < jobs; ++i) team.run(work, &job);
    if (job.wrong || numbers[0] != static_cast<long>(jobs) * kRounds) {
      std::printf("%d threads: %ld wrong sums\n", threads, job.wrong);
      return 1;
    }
  }
  for (int i = 0; i < 200; ++i) truffula::Team team(1 + i % 4);  // made and gone without a job
  std::puts("done");
}

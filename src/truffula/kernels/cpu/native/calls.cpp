#include "calls.h"

#include <nanobind/nanobind.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>

#include "team.h"

namespace nb = nanobind;

namespace truffula {
namespace {

struct InFlightCalls {
  std::atomic<int32_t> count{0};
  std::atomic<bool> closed{false};
  const int64_t process = process_id();
};

InFlightCalls& calls() {
  static InFlightCalls all;
  return all;
}

void wait_for_calls() {
  calls().closed = true;
  // A forked child does not have the threads that were in a call when it was forked: it must not wait for them.
  if (process_id() != calls().process) return;
  const nb::gil_scoped_release release;
  for (int32_t count; (count = calls().count.load()) > 0;) calls().count.wait(count);
}

}  // namespace

InFlightCall::InFlightCall() {
  if (calls().closed) throw std::runtime_error("the interpreter is ending");
  calls().count.fetch_add(1);
}

InFlightCall::~InFlightCall() {
  calls().count.fetch_sub(1);
  calls().count.notify_all();
}

void wait_for_calls_at_exit() {
  calls();
  nb::module_::import_("atexit").attr("register")(nb::cpp_function(wait_for_calls));
}

}  // namespace truffula

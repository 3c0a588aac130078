#include "guests.h"

#include <nanobind/nanobind.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>

#include "team.h"

namespace nb = nanobind;

namespace truffula {
namespace {

struct Guests {
  std::atomic<int32_t> inside{0};
  std::atomic<bool> closed{false};
  const int64_t process = process_id();
};

Guests& guests() {
  static Guests those;
  return those;
}

// (A forked child waits for nobody: the threads it would wait for are not in it.)
void see_guests_out() {
  guests().closed = true;
  if (process_id() != guests().process) return;
  const nb::gil_scoped_release release;
  for (int32_t left; (left = guests().inside.load()) > 0;) guests().inside.wait(left);
}

}  // namespace

Guest::Guest() {
  if (guests().closed) throw std::runtime_error("the interpreter is ending");
  guests().inside.fetch_add(1);
}

Guest::~Guest() {
  guests().inside.fetch_sub(1);
  guests().inside.notify_all();
}

void see_guests_out_at_exit() {
  guests();
  nb::module_::import_("atexit").attr("register")(nb::cpp_function(see_guests_out));
}

}  // namespace truffula

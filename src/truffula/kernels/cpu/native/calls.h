// Native calls that run without Python's lock, and the end of the interpreter. A thread that asks for the lock after
// the interpreter has ended is terminated by unwinding its stack, which C++ frames do not survive. So the interpreter
// waits at exit until no call is in flight, and starts no new one.
#pragma once

namespace truffula {

// Counts one call as in flight: constructed before the lock is released, destroyed after it was taken again.
// Throws std::runtime_error once the interpreter is ending.
class InFlightCall {
 public:
  InFlightCall();
  ~InFlightCall();
  InFlightCall(const InFlightCall&) = delete;
  InFlightCall& operator=(const InFlightCall&) = delete;
};

// Registers the wait with Python's atexit. Needs Python's lock.
void wait_for_calls_at_exit();

}  // namespace truffula

// Calls without Python's lock, and the end of the interpreter. Python ends a thread that asks for its lock then by
// unwinding its stack, which C++ frames do not survive: so nobody may be in such a call, or begin one, by then.
#pragma once

namespace truffula {

// One thread's call: made before the lock is given away, gone after it was taken again. Throws std::runtime_error
// once the interpreter is ending.
class Guest {
 public:
  Guest();
  ~Guest();
  Guest(const Guest&) = delete;
  Guest& operator=(const Guest&) = delete;
};

// From now on the interpreter's end waits for the guests that are inside, and lets nobody else in. With the lock held.
void see_guests_out_at_exit();

}  // namespace truffula

// Native code without the GIL, for both extensions.
#pragma once

#include <Python.h>
#include <unistd.h>

namespace fastsample {

// A call without the GIL. pybind11's gil_scoped_release will not do: while the interpreter is being
// finalised, taking the GIL back ends this thread by unwinding its stack (up to Python 3.13), and
// that would abort the process in a destructor, and in pybind11 where the C++ library is Clang's.
// end() lets nothing through, so that a destructor may call it.
class Unlocked {
 public:
  void begin() { state_ = PyEval_SaveThread(); }
  void end() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      for (;;) pause();  // as Python 3.14 has it; the process is about to end
    }
  }

 private:
  PyThreadState* state_ = nullptr;
};

// No GIL for as long as this lives.
class WithoutGil {
 public:
  WithoutGil() { unlocked_.begin(); }
  ~WithoutGil() { unlocked_.end(); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  Unlocked unlocked_;
};

}  // namespace fastsample

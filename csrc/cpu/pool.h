// A few threads that wait for work.
#pragma once

#include <functional>

namespace fastsample {

// Calls work() on this thread and on threads - 1 others at once; returns when all are done. The
// first exception that work throws is thrown again here. Callable from many threads: while the pool
// is busy, a caller works alone.
void run_on_threads(int threads, const std::function<void()>& work);

}  // namespace fastsample

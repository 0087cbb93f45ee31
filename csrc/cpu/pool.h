// A few threads that wait for work.
#pragma once

#include <functional>

namespace fastsample {

// Calls work(0) on this thread and work(1), work(2), ... on threads - 1 others at once; returns
// when all are done. A call may be left out, but never work(0): another has no time, or the pool is
// busy with another caller. The first exception that work throws is thrown again here. Callable
// from many threads.
void run_on_threads(int threads, const std::function<void(int)>& work);

}  // namespace fastsample

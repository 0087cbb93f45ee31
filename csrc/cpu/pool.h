// A few threads that wait for work.
#pragma once

#include <functional>

namespace fastsample {

// Calls work(0) on this thread and work(1), work(2), ... on up to threads - 1 others at once;
// returns when all calls have. Every call but work(0) may be left out: a thread wakes too late, or
// the pool works for another caller. The first exception that work throws is thrown again here. Any
// number of threads may call this.
void run_on_threads(int threads, const std::function<void(int)>& work);

}  // namespace fastsample

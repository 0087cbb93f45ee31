#include "cpu/pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

namespace fastsample {
namespace {

// A waiting thread looks this often before it sleeps, some tens of microseconds in all: a sleeping
// one takes as long to wake as eight rows of a large vocabulary take to sample.
constexpr int kSpins = 4000;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  // Runs work() here and on `helpers` threads of the pool.
  void run(int helpers, const std::function<void()>& work) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (; size_ < helpers; ++size_) {
        std::thread([this, index = size_, seen = round_.load()] { serve(index, seen); }).detach();
      }
      work_ = &work;
      running_ = helpers;
      round_ = (round_ / kMaxThreads + 1) * kMaxThreads + (uint64_t)helpers;
      if (sleeping_) start_.notify_all();
    }
    attempt(work);
    wait(done_, [this] { return running_ == 0; });
    if (const std::exception_ptr error = std::exchange(error_, nullptr)) {
      std::rethrow_exception(error);
    }
  }

  static constexpr uint64_t kMaxThreads = 4096;

  std::mutex busy;  // held by the caller whose work this is

 private:
  void serve(int index, uint64_t seen) {
    for (;;) {
      wait(start_, [&] { return round_ != seen; });
      // One load says both which round it is and who takes part; who does holds the next round up.
      seen = round_;
      if ((uint64_t)index >= seen % kMaxThreads) continue;
      attempt(*work_);
      if (--running_ == 0) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (sleeping_) done_.notify_all();
      }
    }
  }

  template <class Condition>
  void wait(std::condition_variable& event, Condition condition) {
    for (int i = 0; i < kSpins; ++i) {
      if (condition()) return;
      relax();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleeping_;
    event.wait(lock, condition);
    --sleeping_;
  }

  void attempt(const std::function<void()>& work) {
    try {
      work();
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  std::mutex mutex_;
  std::condition_variable start_, done_;
  const std::function<void()>* work_ = nullptr;
  std::exception_ptr error_;
  std::atomic<uint64_t> round_{0};  // number of the round, and of its helpers in the lowest digits
  std::atomic<int> running_{0};
  int size_ = 0, sleeping_ = 0;
};

// Never destroyed: its threads may still wait when the process exits. A forked child has none of
// them, so it starts with a pool of its own and forgets the parent's, whose locks may have been
// held.
Pool* pool = nullptr;
std::once_flag once;

Pool& instance() {
  std::call_once(once, [] {
    pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
  });
  return *pool;
}

}  // namespace

void run_on_threads(int threads, const std::function<void()>& work) {
  if (threads <= 1) return work();
  threads = std::min(threads, (int)Pool::kMaxThreads);
  Pool& shared = instance();
  const std::unique_lock<std::mutex> mine(shared.busy, std::try_to_lock);
  if (!mine) return work();
  shared.run(threads - 1, work);
}

}  // namespace fastsample

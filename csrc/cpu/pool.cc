#include "cpu/pool.h"

#include <pthread.h>

#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

namespace fastsample {
namespace {

class Pool {
 public:
  // Runs work() here and on `helpers` threads of the pool.
  void run(int helpers, const std::function<void()>& work) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      while (size_ < helpers) {
        std::thread([this, index = size_] { serve(index); }).detach();
        ++size_;
      }
      work_ = &work;
      wanted_ = helpers;
      running_ = helpers;
      ++round_;
    }
    start_.notify_all();
    attempt(work);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
    work_ = nullptr;
    if (const std::exception_ptr error = std::exchange(error_, nullptr))
      std::rethrow_exception(error);
  }

  std::mutex busy;  // held by the caller whose work this is

 private:
  void serve(int index) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      start_.wait(lock, [&] { return round_ != seen; });
      seen = round_;
      if (index >= wanted_) continue;
      const std::function<void()>& work = *work_;
      lock.unlock();
      attempt(work);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
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
  uint64_t round_ = 0;
  int size_ = 0, wanted_ = 0, running_ = 0;
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
  Pool& shared = instance();
  const std::unique_lock<std::mutex> mine(shared.busy, std::try_to_lock);
  if (!mine) return work();
  shared.run(threads - 1, work);
}

}  // namespace fastsample

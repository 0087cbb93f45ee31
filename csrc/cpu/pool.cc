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

#include "cpu/platform.h"

namespace fastsample {
namespace {

// How often a waiting thread looks before it sleeps, some tens of microseconds in all: to wake it
// again takes as long as to sample eight rows of a large vocabulary.
constexpr int kSpins = 4000;

// A round is a piece of work and a number of places for helpers. A thread that takes a place before
// the round is closed takes part. The caller closes the round when it has nothing left to do
// itself, and waits for the threads that took part, not for one that was too slow to wake.
class Pool {
 public:
  // Runs work(0) here and work(1), work(2), ... on those threads of the pool that wake in time;
  // returns when every call has.
  void run(int helpers, const std::function<void(int)>& work) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      core_ = platform::this_core();
      for (; size_ < helpers; ++size_) {
        std::thread([this, seen = round(gate_)] { serve(seen); }).detach();
      }
      work_ = &work;
      finished_ = 0;
      gate_ = (round(gate_) + 1) << kPlaceBits | (uint64_t)helpers;
      if (sleeping_) start_.notify_all();
    }
    attempt(work, 0);
    const int joined = helpers - (int)places(gate_.fetch_and(~kPlaces));
    wait(done_, kSpins, [&] { return finished_ == joined; });
    if (const std::exception_ptr error = std::exchange(error_, nullptr)) {
      std::rethrow_exception(error);
    }
  }

  static constexpr int kMaxThreads = 4096;

  std::mutex busy;  // held by the caller whose work this is

 private:
  static constexpr int kPlaceBits = 16;
  static constexpr uint64_t kPlaces = ((uint64_t)1 << kPlaceBits) - 1;

  static uint64_t round(uint64_t gate) { return gate >> kPlaceBits; }
  static uint64_t places(uint64_t gate) { return gate & kPlaces; }

  // The place taken, or 0.
  int join() {
    uint64_t gate = gate_;
    while (places(gate)) {
      if (gate_.compare_exchange_weak(gate, gate - 1)) return (int)places(gate);
    }
    return 0;
  }

  void serve(uint64_t seen) {
    // A helper that wakes too late sleeps again at once: it may share its core with the caller.
    for (int spins = kSpins;;) {
      wait(start_, spins, [&] { return round(gate_) != seen; });
      if (const int core = core_; core >= 0 && core == platform::this_core())
        platform::move_off(core);
      seen = round(gate_);
      const int place = join();
      spins = place ? kSpins : 0;
      if (!place) continue;
      attempt(*work_, place);
      ++finished_;
      const std::lock_guard<std::mutex> lock(mutex_);
      if (sleeping_) done_.notify_all();
    }
  }

  template <class Condition>
  void wait(std::condition_variable& event, int spins, Condition condition) {
    for (int i = 0; i < spins; ++i) {
      if (condition()) return;
      platform::relax();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleeping_;
    event.wait(lock, condition);
    --sleeping_;
  }

  void attempt(const std::function<void(int)>& work, int place) {
    try {
      work(place);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  std::mutex mutex_;
  std::condition_variable start_, done_;
  const std::function<void(int)>* work_ = nullptr;
  std::exception_ptr error_;
  std::atomic<uint64_t> gate_{0};  // the round's number; in the lowest bits, the places left in it
  std::atomic<int> finished_{0};
  std::atomic<int> core_{-1};  // the caller's
  int size_ = 0, sleeping_ = 0;
};

// Never destroyed: its threads may still wait when the process exits. A forked child has none of
// the threads, and the parent's locks may have been held, so it starts with a pool of its own.
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

void run_on_threads(int threads, const std::function<void(int)>& work) {
  if (threads <= 1) return work(0);
  threads = std::min(threads, Pool::kMaxThreads);
  Pool& shared = instance();
  const std::unique_lock<std::mutex> mine(shared.busy, std::try_to_lock);
  if (!mine) return work(0);
  shared.run(threads - 1, work);
}

}  // namespace fastsample

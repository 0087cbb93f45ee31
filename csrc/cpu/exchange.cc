#include "cpu/exchange.h"

#include <poll.h>
#include <sched.h>
#include <string.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>

namespace fastsample {
namespace {

// A rank's part of the memory. A rank writes to a place for the second time only after all others
// have begun the round between, and so have read it.
struct Place {
  std::atomic<int64_t> round;  // of its last message
  int64_t bytes[2];
  alignas(64) char messages[];
};
static_assert(std::atomic<int64_t>::is_always_lock_free, "processes share it");

int64_t stride_of(int64_t room) { return (int64_t)sizeof(Place) + 2 * ((room + 63) / 64 * 64); }

// Waits until done() holds: first without giving the core away, as a rank is seldom much later than
// another; then so that other processes run.
class Patience {
 public:
  explicit Patience(double seconds)
      : end_(Clock::now() + std::chrono::milliseconds((int64_t)(seconds * 1000))) {}

  template <class Done, class Fails>
  bool wait(Done done, Fails fails) {
    constexpr int kSpins = 2000, kYields = 2000;
    for (int i = 0; i < kSpins; ++i) {
      if (done()) return true;
      pause();
    }
    for (int i = 0; i < kYields; ++i) {
      if (done()) return true;
      sched_yield();
    }
    const timespec nap = {0, 50000};
    while (!done()) {
      if (fails(Clock::now() >= end_)) return false;
      nanosleep(&nap, nullptr);
    }
    return true;
  }

 private:
  typedef std::chrono::steady_clock Clock;
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  const Clock::time_point end_;
};

bool has_ended(int process) {
  pollfd p = {process, POLLIN, 0};
  return poll(&p, 1, 0) > 0;
}

}  // namespace

int64_t SharedPlaces::bytes_of(int size, int64_t room) { return size * stride_of(room); }

ExchangeResult exchange(const SharedPlaces& places, int64_t* round, const char* own, int64_t bytes,
                        char* found, double seconds, const std::vector<int>& processes,
                        const std::function<bool()>& stop) {
  const int64_t stride = stride_of(places.room), apart = (places.room + 63) / 64 * 64;
  const auto place_of = [&](int rank) { return (Place*)(places.memory + rank * stride); };
  Patience patience(seconds);
  memcpy(found + places.rank * bytes, own, (size_t)bytes);
  for (int64_t begin = 0; begin < bytes; begin += places.room) {
    const int64_t n = std::min(places.room, bytes - begin), now = ++*round;
    Place* const mine = place_of(places.rank);
    memcpy(mine->messages + now % 2 * apart, own + begin, (size_t)n);
    mine->bytes[now % 2] = bytes;
    mine->round.store(now, std::memory_order_release);
    for (int i = 1; i < places.size; ++i) {
      const int other = (places.rank + i) % places.size;
      Place* const theirs = place_of(other);
      ExchangeResult failed = {kDone, other};
      const auto arrived = [&] { return theirs->round.load(std::memory_order_acquire) >= now; };
      const auto fails = [&](bool late) {
        for (int rank = 0; rank < places.size && failed.what == kDone; ++rank) {
          if (rank != places.rank && has_ended(processes[(size_t)rank])) failed = {kGone, rank};
        }
        if (failed.what == kDone && late) failed.what = kTimedOut;
        if (failed.what == kDone && stop()) failed.what = kStopped;
        return failed.what != kDone && !arrived();
      };
      if (!patience.wait(arrived, fails)) return failed;
      if (theirs->bytes[now % 2] != bytes) return {kOtherSize, other};
      memcpy(found + other * bytes + begin, theirs->messages + now % 2 * apart, (size_t)n);
    }
  }
  return {kDone, -1};
}

}  // namespace fastsample

// Messages between the processes of a group on one machine, through memory that all have mapped.
#pragma once

#include <stdint.h>

#include <functional>
#include <vector>

namespace fastsample {

// Memory for `size` ranks: each has a round and two places of `room` bytes, used in turn.
struct SharedPlaces {
  char* memory;
  int64_t room;
  int rank, size;

  static int64_t bytes_of(int size, int64_t room);
};

enum Exchanged : int {
  kDone,
  kTimedOut,   // a rank has not answered
  kGone,       // a rank's process has ended
  kOtherSize,  // a rank's message has another size
  kStopped
};

struct ExchangeResult {
  Exchanged what;
  int rank;  // whose message is missing
};

// Gives every other rank the same message, and puts everybody's into found[size, bytes]. `round` is
// how many parts of messages, of at most `room` bytes, there have been; the memory is zeros before.
// `processes` has a file descriptor of each rank's that can be read once it has ended. `stop` is
// asked now and then.
ExchangeResult exchange(const SharedPlaces& places, int64_t* round, const char* own, int64_t bytes,
                        char* found, double seconds, const std::vector<int>& processes,
                        const std::function<bool()>& stop);

}  // namespace fastsample

// Logits as integers of the same order, and what filters leave of a row in terms of them.
#pragma once

#include <string.h>

#include "core/kept.h"
#include "core/key.h"

namespace fastsample {

typedef unsigned long long u64;  // what CUDA's atomics and shuffles call uint64_t

typedef Place<int32_t> KeyPlace;
typedef Kept<int32_t> KeptKeys;

constexpr int32_t kKeyNaN = INT32_MAX;
constexpr int32_t kKeyInfinity = 0x7f800000;
constexpr int32_t kKeyMinusInfinity = -0x7f800000;
constexpr int32_t kKeyLowest = -0x7f7fffff;  // of the lowest finite float

constexpr int32_t kKeyAboveZero = 1;  // of the lowest positive float

// All tokens from a key up: of logits those above -inf.
FS_HD KeptKeys everything(int32_t lowest = kKeyLowest) { return all_between(kKeyInfinity, lowest); }

// Whether a token ranks within the interval; its mass is for the caller to compare. Few filters
// move `high`, so it is often open.
FS_HD bool within(const KeptKeys& kept, KeyPlace place) {
  if (ranks_before(kept.low, place)) return false;
  return kept.high.x == kKeyInfinity || ranks_before(kept.high, place);
}

FS_HD float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

FS_HD uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// A place as one integer that is larger the earlier it ranks, so that a maximum finds the first;
// and back.
FS_HD long long ranked(KeyPlace place) {
  return (long long)((u64)(uint32_t)place.x << 32 | (uint32_t)(INT32_MAX - place.id));
}
FS_HD KeyPlace place_of(long long ranked) {
  return KeyPlace{(int32_t)(ranked >> 32), INT32_MAX - (int32_t)(ranked & INT32_MAX)};
}

}  // namespace fastsample

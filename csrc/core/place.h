// Places in the rank order as integers, by which ranks of a process group compare tokens, and the
// words by which they tell each other of these.
#pragma once

#include <string.h>

#include "core/kept.h"
#include "core/key.h"

namespace fastsample {

constexpr int64_t kHighestKey = INT64_MAX, kNoKey = INT64_MIN, kLastId = UINT32_MAX;

// Higher for what ranks before: the logit's key, then the id from high to low.
FS_HD int64_t key_of_place(Place<float> place, int64_t start = 0) {
  return key_of(place.x) * ((int64_t)1 << 32) + (kLastId - (start + place.id));
}

FS_HD Place<float> place_of_key(int64_t key, int64_t start = 0) {
  const int64_t id = kLastId - (key & kLastId) - start;
  return {from_key((int32_t)(key >> 32)), (int32_t)(id < -1          ? -1
                                                    : id > INT32_MAX ? INT32_MAX
                                                                     : id)};
}

FS_HD float float_of(int64_t bits) {
  const uint32_t low = (uint32_t)bits;
  float x;
  memcpy(&x, &low, sizeof x);
  return x;
}

FS_HD int64_t bits_of(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// A token: the bits of its logit above its id, -1 where there is none.
FS_HD Place<float> token_of_word(int64_t word) {
  return {float_of(word >> 32), (int32_t)(uint32_t)word};
}

FS_HD int64_t word_of_token(Place<float> token) {
  uint32_t bits;
  memcpy(&bits, &token.x, sizeof bits);
  return (int64_t)((uint64_t)bits << 32 | (uint32_t)token.id);
}

}  // namespace fastsample

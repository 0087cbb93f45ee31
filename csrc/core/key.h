// Logits as integers of the same order.
#pragma once

#include <string.h>

#include "core/rows.h"

namespace fastsample {

// -0.0 and +0.0 share key 0, and no key between those of two finite floats is a NaN's.
FS_HD int32_t key_of(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits < 0 ? -(bits & INT32_MAX) : bits;
}

FS_HD float from_key(int32_t key) {
  const uint32_t bits = key < 0 ? 0x80000000u | (0u - (uint32_t)key) : (uint32_t)key;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace fastsample

// Any processor: vector extensions alone.
#pragma once

#define FASTSAMPLE_VECTOR_BYTES 16
#include "cpu/simd/plain.h"

namespace fastsample {
namespace {

FS_INLINE Mask ordered_where(Mask m, vf a, vf b) { return m & (a == a) & (b == b); }
FS_INLINE uint32_t bits(Mask m) {
  uint32_t b = 0;
  for (int i = 0; i < kLanes; ++i) b |= (uint32_t)(m[i] & 1) << i;
  return b;
}

FS_INLINE vf max(vf a, vf b) { return select(a > b, a, b); }
FS_INLINE vf min(vf a, vf b) { return select(a < b, a, b); }
FS_INLINE vs max(vs a, vs b) { return a > b ? a : b; }
FS_INLINE vs min(vs a, vs b) { return a < b ? a : b; }

// Products of the lower halves of each lane.
FS_INLINE vq multiply_low(vq a, vq b) {
  return (a & splat((uint64_t)UINT32_MAX)) * (b & splat((uint64_t)UINT32_MAX));
}

FS_INLINE vf load(const Half* p) { return half_to_float(load_as<vh>(p)); }

}  // namespace
}  // namespace fastsample

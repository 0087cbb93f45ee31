// Any x86-64.
#pragma once

#include <immintrin.h>

#define FASTSAMPLE_VECTOR_BYTES 16
#include "cpu/simd/plain.h"

namespace fastsample {
namespace {

FS_INLINE Mask ordered_where(Mask m, vf a, vf b) {
  return m & (vi)_mm_cmpord_ps((__m128)a, (__m128)b);
}
FS_INLINE uint32_t bits(Mask m) { return (uint32_t)_mm_movemask_ps((__m128)m); }

FS_INLINE vf max(vf a, vf b) { return (vf)_mm_max_ps((__m128)a, (__m128)b); }
FS_INLINE vf min(vf a, vf b) { return (vf)_mm_min_ps((__m128)a, (__m128)b); }
FS_INLINE vs max(vs a, vs b) { return (vs)_mm_max_epi16((__m128i)a, (__m128i)b); }
FS_INLINE vs min(vs a, vs b) { return (vs)_mm_min_epi16((__m128i)a, (__m128i)b); }

// Products of the lower halves of each lane.
FS_INLINE vq multiply_low(vq a, vq b) { return (vq)_mm_mul_epu32((__m128i)a, (__m128i)b); }

FS_INLINE vf load(const Half* p) { return half_to_float(load_as<vh>(p)); }

}  // namespace
}  // namespace fastsample

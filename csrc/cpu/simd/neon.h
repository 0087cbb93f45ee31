// AArch64.
#pragma once

#include <arm_neon.h>

#define FASTSAMPLE_VECTOR_BYTES 16
#include "cpu/simd/plain.h"

namespace fastsample {
namespace {

FS_INLINE Mask ordered_where(Mask m, vf a, vf b) { return m & (a == a) & (b == b); }
FS_INLINE uint32_t bits(Mask m) {
  const vu lane_bit = {1, 2, 4, 8};
  return vaddvq_u32((uint32x4_t)((vu)m & lane_bit));
}

FS_INLINE vf max(vf a, vf b) { return (vf)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
FS_INLINE vf min(vf a, vf b) { return (vf)vminq_f32((float32x4_t)a, (float32x4_t)b); }
FS_INLINE vs max(vs a, vs b) { return a > b ? a : b; }
FS_INLINE vs min(vs a, vs b) { return a < b ? a : b; }

// Products of the lower halves of each lane.
FS_INLINE vq multiply_low(vq a, vq b) {
  return (vq)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
}

FS_INLINE vf load(const Half* p) {
  return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p)));
}

}  // namespace
}  // namespace fastsample

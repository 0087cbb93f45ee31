// AVX2 with F16C, BMI and POPCNT.
#pragma once

#define FASTSAMPLE_VECTOR_BYTES 32
#include "cpu/simd/lanes.h"
#include "cpu/simd/x86.h"

namespace fastsample {
namespace {

FS_INLINE Mask ordered_where(Mask m, vf a, vf b) {
  return m & (vi)_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_ORD_Q);
}
FS_INLINE uint32_t bits(Mask m) { return (uint32_t)_mm256_movemask_ps((__m256)m); }

FS_INLINE vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
FS_INLINE vf min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
FS_INLINE vs max(vs a, vs b) { return (vs)_mm256_max_epi16((__m256i)a, (__m256i)b); }
FS_INLINE vs min(vs a, vs b) { return (vs)_mm256_min_epi16((__m256i)a, (__m256i)b); }
FS_INLINE int16_t reduce_max(vs v) { return reduce_max_of_16((__m256i)v); }

// Products of the lower halves of each lane.
FS_INLINE vq multiply_low(vq a, vq b) { return (vq)_mm256_mul_epu32((__m256i)a, (__m256i)b); }

// For every mask, the lanes that are set, lowest first.
struct LaneTable {
  int32_t lane[256][8] = {};

  constexpr LaneTable() {
    for (int mask = 0; mask < 256; ++mask) {
      for (int i = 0, n = 0; i < 8; ++i) {
        if (mask >> i & 1) lane[mask][n++] = i;
      }
    }
  }
};
constexpr LaneTable kLaneTable;

// Stores the lanes of m next to each other; writes at most a whole vector, returns how many count.
template <class T, class V>
FS_INLINE int compress_store(T* to, V v, Mask m) {
  const __m256i lanes = (__m256i)load(kLaneTable.lane[bits(m)]);
  store(to, (V)_mm256_permutevar8x32_epi32((__m256i)v, lanes));
  return count(m);
}

FS_INLINE vf load(const BFloat* p) {
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
FS_INLINE vf load(const Half* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }

// What load_pair took apart, put together: in its order, and without loss.
FS_INLINE vs bits_of_pair(Half, vf a, vf b) {
  const __m128i low = _mm256_cvtps_ph((__m256)a, 0), high = _mm256_cvtps_ph((__m256)b, 0);
  return (vs)_mm256_set_m128i(high, low);
}

// As unsigned numbers, a - b, or 0 where b is greater.
FS_INLINE vs subtract_to_zero(vs a, vs b) { return (vs)_mm256_subs_epu16((__m256i)a, (__m256i)b); }

// For each of 32 16-bit values, a bit: whether the value - low, as an unsigned number, is at most
// `most`.
template <class T>
FS_INLINE uint32_t bits_in_range(const T* x, int16_t low, int16_t most) {
  const auto inside = [&](const T* at) __attribute__((always_inline)) {
    return subtract_to_zero(load_as<vs>(at) - low, vs{} + most) == 0;
  };
  const vs a = inside(x), b = inside(x + 2 * kLanes);
  const __m256i both = _mm256_packs_epi16((__m256i)a, (__m256i)b);
  return (uint32_t)_mm256_movemask_epi8(_mm256_permute4x64_epi64(both, 0xd8));
}

}  // namespace
}  // namespace fastsample

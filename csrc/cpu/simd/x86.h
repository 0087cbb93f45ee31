// What AVX2 and AVX-512 share.
#pragma once

#include <immintrin.h>

#include "cpu/simd/vectors.h"

namespace fastsample {
namespace {

constexpr bool kCompresses = true;

FS_INLINE float upcast(Half x) { return _cvtsh_ss(x.bits); }

// The values at four places.
FS_INLINE Four values_at(const Half* x, const int (&at)[4]) {
  uint64_t bits = 0;
  for (int i = 0; i < 4; ++i) bits |= (uint64_t)x[at[i]].bits << 16 * i;
  return (Four)_mm_cvtph_ps(_mm_cvtsi64_si128((int64_t)bits));
}

// The bits of a 16-bit value with no other between it and x.
FS_INLINE uint16_t bits_beside(Half, float x) {
  return (uint16_t)_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
}

FS_INLINE int16_t reduce_max_of_16(__m256i v) {
  const __m128i m = _mm_max_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  // The one instruction that reduces finds an unsigned minimum.
  const __m128i flip = _mm_set1_epi16(0x7fff);
  return (int16_t)(_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(m, flip))) ^ 0x7fff);
}

}  // namespace
}  // namespace fastsample

// The vectors of the instruction set that this translation unit is compiled for. The files in simd/
// have one vocabulary, so that the algorithms need not know which it is; what they are not made of
// intrinsics for is here. All is in an anonymous namespace: it means something else in every
// instruction set's translation unit.
#pragma once

#if defined(FASTSAMPLE_ISA_avx512)
#include "cpu/simd/avx512.h"
#elif defined(FASTSAMPLE_ISA_avx2)
#include "cpu/simd/avx2.h"
#elif defined(__x86_64__)
#include "cpu/simd/sse2.h"
#elif defined(__aarch64__)
#include "cpu/simd/neon.h"
#else
#include "cpu/simd/generic.h"
#endif

namespace fastsample {
namespace {

// The lowest n lanes; none where n < 0.
FS_INLINE Mask first(int n) {
  return from_bits(n >= kLanes ? kAllLanes : n < 0 ? 0 : (1u << n) - 1);
}
FS_INLINE void set_all(Mask& m) { m = from_bits(kAllLanes); }
FS_INLINE bool all(Mask m) { return bits(m) == kAllLanes; }
FS_INLINE bool any(Mask m) { return bits(m) != 0; }

// Stores the lanes of four vectors that are at least `least` next to each other, in no order;
// returns their end. Where no lane holds two such values, as is likely where they are few, two
// vectors are stored as one.
FS_INLINE float* append_at_least(float* to, const vf (&v)[4], vf least) {
  const auto append = [&](vf x) __attribute__((always_inline)) {
    to += compress_store(to, x, ge(x, least));
  };
  if (__builtin_expect(any(ge(max(min(v[0], v[1]), min(v[2], v[3])), least)), false)) {
    for (const vf& x : v) append(x);
  } else {
    append(max(v[0], v[1]));
    append(max(v[2], v[3]));
  }
  return to;
}

}  // namespace
}  // namespace fastsample

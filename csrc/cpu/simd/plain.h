// What SSE2, NEON and the vector extensions share: they have no instruction that compresses a
// vector, nor one that takes two 16-bit logits apart.
#pragma once

#include "cpu/simd/lanes.h"

namespace fastsample {
namespace {

constexpr bool kCompresses = false;

// Stores the lanes of m next to each other; writes at most a whole vector, returns how many count.
template <class T, class V>
FS_INLINE int compress_store(T* to, V v, Mask m) {
  const uint32_t set = bits(m);
  int at = 0;
  if (!set) return at;
  // No branch depends on a lane: it would be mispredicted.
  for (int i = 0; i < kLanes; ++i) {
    to[at] = v[i];
    at += (int)(set >> i & 1);
  }
  return at;
}

FS_INLINE vf load(const BFloat* p) {
  return (vf)(__builtin_convertvector(load_as<vh>(p), vu) << 16);
}

FS_INLINE vf half_to_float(vh bits) {
  const vu h = __builtin_convertvector(bits, vu);
  // Exponent and mantissa in place, rescaled by an exact product, which also makes subnormals
  // normal.
  const vf magnitude = (vf)((h & 0x7fff) << 13) * 0x1p112f;
  const vu special = (vu)((h & 0x7c00) == 0x7c00) & 0x7f800000;
  return (vf)((vu)magnitude | special | ((h & 0x8000) << 16));
}

FS_INLINE vf load(const Half* p);  // each instruction set has its own
FS_INLINE float upcast(Half x) {
  Half lanes[kLanes] = {x};
  return load(lanes)[0];
}

FS_INLINE int16_t reduce_max(vs v) {
  int16_t m = v[0];
  for (int i = 1; i < 2 * kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// As unsigned numbers, a - b, or 0 where b is greater.
FS_INLINE vs subtract_to_zero(vs a, vs b) {
  typedef uint16_t Unsigned __attribute__((vector_size(FASTSAMPLE_VECTOR_BYTES)));
  return (vs)((Unsigned)a > (Unsigned)b) & (a - b);
}

}  // namespace
}  // namespace fastsample

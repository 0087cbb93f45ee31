// 16-bit logits: as vectors of floats, and as vectors of their bits, twice as many at a time.
#pragma once

#include "cpu/simd.h"

namespace fastsample {
namespace {

// The bits of -inf.
template <class T>
constexpr uint16_t bottom() {
  return (uint16_t)T::kInfinity | 0x8000;
}

// Vectors full of -inf.
template <class T>
FS_INLINE vf all_masked() {
  return (vf)(vu{} + bottom<T>() * 0x10001u);
}
template <>
vf all_masked<float>() {
  return splat(-INFINITY);
}

// Two vectors of values that stand side by side, in any order.
template <class T>
FS_INLINE void load_pair(const T* p, vf& a, vf& b) {
  a = load(p);
  b = load(p + kLanes);
}

FS_INLINE void load_pair(const BFloat* p, vf& a, vf& b) {
  const vu both = load_as<vu>(p);
  a = (vf)(both & 0xffff0000u);
  b = (vf)(both << 16);
}

// What load_pair took apart, put together.
FS_INLINE vs bits_of_pair(BFloat, vf a, vf b) { return (vs)((vu)a | (vu)b >> 16); }

FS_INLINE float upcast(float x) { return x; }
FS_INLINE float upcast(BFloat x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

// The values at four places.
template <class T>
FS_INLINE Four values_at(const T* x, const int (&at)[4]) {
  return Four{upcast(x[at[0]]), upcast(x[at[1]]), upcast(x[at[2]]), upcast(x[at[3]])};
}

// The bits of a value with no other between it and x.
FS_INLINE uint16_t bits_beside(BFloat, float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return (uint16_t)(bits >> 16);
}

// The bits of a magnitude next to x; infinite where nothing is gained by knowing.
template <class T>
FS_INLINE int16_t edge_at(float x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return 0;
  } else if constexpr (kCompresses) {
    return (int16_t)bits_beside(T{}, x);
  } else {
    return T::kInfinity;
  }
}

// 16-bit floats that are not below x, and perhaps the next one below it, as a range of their bits:
// from 0 up these rise with the value, then they fall. For instruction sets that compress.
template <class T>
struct AtLeast {
  uint16_t base, size;

  FS_MEMBER explicit AtLeast(float x) : AtLeast(bits_beside(T{}, x)) {}
  FS_MEMBER explicit AtLeast(uint16_t low) {
    const uint16_t negative = 0x8000;
    const bool above_zero = low && low < negative;  // -0 is not below +0
    base = above_zero ? low : 0;
    size = (uint16_t)(above_zero ? negative - low : (low ? low : negative) + 1);
  }

  // Without the next one below x.
  static FS_MEMBER AtLeast exactly(float x) {
    const uint16_t low = bits_beside(T{}, x);
    const bool below = upcast(T{low}) < x;
    return AtLeast((uint16_t)(low + (low & 0x8000 ? -below : below)));
  }

  // A bit for each of 32 values.
  FS_MEMBER uint32_t among(const T* x) const {
    return bits_in_range(x, (int16_t)base, (int16_t)(size - 1));
  }

  // Whether one of two neighbours is.
  FS_MEMBER Mask either(vs bits) const {
    return nonzero((vi)subtract_to_zero(vs{} + (int16_t)size, bits - (int16_t)base));
  }
};

// Stores next to each other the pairs with a value that is at least that; returns how many.
template <class T>
FS_INLINE int copy_pairs(float* to, vs bits, AtLeast<T> least) {
  return compress_store(to, (vf)bits, least.either(bits));
}

}  // namespace
}  // namespace fastsample

// What the instruction sets without mask registers share: a truth value is a lane of ones or zeros.
#pragma once

#include "cpu/simd/vectors.h"

namespace fastsample {
namespace {

typedef vi Mask;

// Each instruction set has its own.
FS_INLINE uint32_t bits(Mask m);
FS_INLINE vs max(vs a, vs b);
FS_INLINE vf min(vf a, vf b);
FS_INLINE vf max(vf a, vf b);

constexpr int kMaskChains = 1;  // masks in which tests that follow each other are collected

FS_INLINE Mask gt(vf a, vf b) { return a > b; }
FS_INLINE Mask ge(vf a, vf b) { return a >= b; }
FS_INLINE Mask gt_where(Mask m, vf a, vf b) { return m & (a > b); }
FS_INLINE Mask eq(vf a, vf b) { return a == b; }
FS_INLINE Mask le(vi a, vi b) { return a <= b; }
FS_INLINE Mask nonzero(vi a) { return a != 0; }
FS_INLINE Mask both(Mask a, Mask b) { return a & b; }
FS_INLINE Mask either(Mask a, Mask b) { return a | b; }
FS_INLINE Mask but_not(Mask a, Mask b) { return a & ~b; }
FS_INLINE Mask from_bits(uint32_t b) {
  vi lane_bit;
  for (int i = 0; i < kLanes; ++i) lane_bit[i] = 1 << i;
  return (splat((int32_t)b) & lane_bit) != 0;
}
FS_INLINE vf select(Mask m, vf a, vf b) { return (vf)((m & (vi)a) | (~m & (vi)b)); }
FS_INLINE vu keep(Mask m, vu a) { return (vu)m & a; }
FS_INLINE vu add_where(Mask m, vu sum, vu a) { return sum + ((vu)m & a); }
FS_INLINE vf add_where(Mask m, vf sum, vf a) { return sum + (vf)(m & (vi)a); }
FS_INLINE int count(Mask m) { return __builtin_popcountll(bits(m)); }
FS_INLINE vi truncate(vf a) { return __builtin_convertvector(a, vi); }

// The higher of y and a negative number.
FS_INLINE vf raise_to(float low, vf y) { return max(y, splat(low)); }

// a - b, with a rounded down to 11 fractional bits, for numbers from 0 to 2^9; far from 0 where a
// is higher.
FS_INLINE vf round_down_11(vf a, float b) {
  return to_float(truncate(min(a, splat(0x1p10f)) * 0x1p11f)) * 0x1p-11f - b;
}
// y rounded up to 14 fractional bits, for numbers from -2^9 to 0.
FS_INLINE vf round_up_14(vf y) { return to_float(truncate(y * 0x1p14f)) * 0x1p-14f; }
// a * b + c, which need not be rounded in between.
FS_INLINE vf multiply_add(vf a, vf b, vf c) { return a * b + c; }

// Half of a vector's lanes as doubles.
typedef float vf_half __attribute__((vector_size(FASTSAMPLE_VECTOR_BYTES / 2)));
FS_INLINE vd widen(vf v, int half) {
  vf_half part;
  memcpy(&part, (const char*)&v + half * (int)sizeof part, sizeof part);
  return __builtin_convertvector(part, vd);
}

FS_INLINE float reduce_max(vf v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}
FS_INLINE float reduce_min(vf v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] < m ? v[i] : m;
  return m;
}
FS_INLINE uint64_t reduce_add(vu v) {
  uint64_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// Takes y apart into the nearest integer and a fraction; the integer is in the lowest bits of what
// is returned, where times_power looks for it.
FS_INLINE vf split_integer(vf y, vf& fraction) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  const vf integer = y + kMagic;
  fraction = y - (integer - kMagic);
  return integer;
}

// p * 2^integer where m holds, else 0; normal floats stay normal.
FS_INLINE vf times_power(Mask m, vf p, vf integer) {
  return (vf)keep(m, (vu)p + ((vu)integer << 23));
}

FS_INLINE Halves to_fixed(vf q) {
  const vi hi = truncate(q);
  return Halves{(vu)hi, (vu)truncate((q - to_float(hi)) * 0x1p20f)};
}

// Sums of floats from 0 to 2^20, each rounded down to 20 fractional bits.
struct FixedSum {
  static constexpr int kMost = 1 << 11;                // summands
  static constexpr uint32_t kHiBias = 0, kLoBias = 0;  // that each lane of a half has besides
  Halves sum = {};

  FS_MEMBER void add(vf q) {
    const Halves w = to_fixed(q);
    sum.hi += w.hi;
    sum.lo += w.lo;
  }
  FS_MEMBER void add(vf q, Mask m) {
    const Halves w = to_fixed(q);
    sum.hi = fastsample::add_where(m, sum.hi, w.hi);
    sum.lo = fastsample::add_where(m, sum.lo, w.lo);
  }
  // To `part` only where m holds.
  FS_MEMBER void add(vf q, FixedSum& part, Mask m) {
    const Halves w = to_fixed(q);
    sum.hi += w.hi;
    sum.lo += w.lo;
    part.sum.hi = add_where(m, part.sum.hi, w.hi);
    part.sum.lo = add_where(m, part.sum.lo, w.lo);
  }
  FS_MEMBER Halves halves() const { return sum; }
};

// Whether all 16-bit numbers met so far, as unsigned ones, are at most `bound`.
struct AtMost {
  int16_t bound;
  vs most = vs{} + kSign;

  FS_MEMBER void test(vs v) { most = max(most, v ^ kSign); }
  FS_MEMBER bool all() const { return !bits(nonzero((vi)(most > (int16_t)(bound ^ kSign)))); }
};

}  // namespace
}  // namespace fastsample

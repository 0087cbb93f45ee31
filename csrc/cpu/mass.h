// Stage 6 in vectors. A mass w is held as w = hi * 2^20 + lo, two 32-bit lanes that every ISA can convert and add.
#pragma once

#include <float.h>
#include <math.h>

#include "core/mass.h"
#include "cpu/simd.h"

namespace fastsample {
namespace {

constexpr int kHalfBits = kMassBits / 2;

struct Mass {
  vu hi, lo;
};

struct Weigher {
  float max;
  float scale;
  uint64_t floor;  // masses below it count as 0 (min-p)
};

FS_INLINE Mass weigh(const Weigher& w, vf x) {
  // -inf clamps to a y that has no mass; valid rows hold no NaN.
  const vf y = max((x - w.max) * w.scale, splat(kMassFloor));
  const vf t = y + kRoundMagic;
  const vf p = exp2_polynomial(y - (t - kRoundMagic));
  // t's low bits are n: shifted into the exponent they make p * 2^n; 2^20 more puts hi before the binary point.
  const vf q = (vf)((vu)p + ((vu)t << 23) + ((uint32_t)kHalfBits << 23));
  const vi hi = truncate(q);
  const vi lo = truncate((q - to_float(hi)) * 0x1p20f);
  if (!w.floor) return Mass{(vu)hi, (vu)lo};
  // The threshold has at most 24 significant bits, so it is exact as a float, and trunc(q) >= t is q >= t.
  const Mask heavy = ge(q, splat((float)w.floor * 0x1p-20f));
  return Mass{keep(heavy, (vu)hi), keep(heavy, (vu)lo)};
}

FS_INLINE uint64_t weigh(const Weigher& w, float x) {
  const uint64_t mass = mass_of(x, w.max, w.scale);
  return mass >= w.floor ? mass : 0;
}

// Sums of at most kBlock masses.
struct MassSum {
  vu hi = {}, lo = {};
};

FS_INLINE void add(MassSum& s, Mass m) {
  s.hi += m.hi;
  s.lo += m.lo;
}

FS_INLINE void add_where(MassSum& s, Mask where, Mass m) {
  s.hi = add_where(where, s.hi, m.hi);
  s.lo = add_where(where, s.lo, m.lo);
}

FS_INLINE uint64_t total(const MassSum& s) { return (reduce_add(s.hi) << kHalfBits) + reduce_add(s.lo); }

// An x below which no token of at least this mass can lie (conservative: rounding errors are far below the margin).
FS_INLINE float lowest_x(const Weigher& w, uint64_t mass) {
  const double y = log2((double)mass) - kMassBits - 1e-3;
  const double x = (double)w.max + y / (double)w.scale;
  const float low = (float)(x - fabs(x) * 1e-6);
  return low < -FLT_MAX ? -FLT_MAX : low;
}

}  // namespace
}  // namespace fastsample

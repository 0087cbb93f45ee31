// Stage 6 in vectors. A mass is held in halves of 20 bits, two 32-bit lanes that every ISA can
// convert and add.
#pragma once

#include <float.h>
#include <math.h>

#include "core/mass.h"
#include "cpu/half.h"
#include "cpu/kernel.h"
#include "cpu/plan.h"

namespace fastsample {
namespace {

constexpr int kHalfBits = kFractionBits;
static_assert(2 * kHalfBits == kMassBits, "FixedSum adds up halves of a mass");

// How far below the maximum a token of at least this mass can lie. The margin is far above all
// rounding errors.
struct Reach {
  double drop, margin;

  Reach(float scale, uint64_t mass)
      : drop((kMassBits + 1e-3 - log2((double)mass)) / (double)scale),
        margin(2e-3 / (double)scale) {}

  // An x that such a token exceeds; rises with the maximum.
  FS_MEMBER float below(float max) const {
    const double x = (double)max - drop;
    const double low = x - fabs(x) * 1e-6;
    return low < -FLT_MAX ? -INFINITY : (float)low;
  }
  // An x from which every token has that mass.
  FS_MEMBER float above(float max) const {
    const double x = (double)max - drop + margin;
    return (float)(x + fabs(x) * 1e-6);
  }
};

// What the masses of a row's tokens are computed from, where they are logits.
struct LogitWeigher {
  float max;
  float scale;         // of the masses that are drawn from
  float judged_scale;  // of those that filters judge by

  static constexpr bool kOfLogits = true;
  static constexpr float kLowestAlive = -FLT_MAX;
  FS_MEMBER LogitWeigher judge() const { return {max, judged_scale, judged_scale}; }
  // Whether filters judge by other masses.
  FS_MEMBER bool judges_apart() const { return judged_scale != scale; }
  FS_MEMBER uint64_t unit() const { return kMassUnit; }
  FS_MEMBER LogitWeigher below(float x) const { return {x, scale, judged_scale}; }
  FS_MEMBER uint64_t mass(float x) const { return mass_of(x, max, scale); }
  // A value that every token of at least this mass exceeds, and one from which all have it.
  FS_MEMBER float lowest(uint64_t mass) const { return Reach(scale, mass).below(max); }
  FS_MEMBER float surely(uint64_t mass) const { return Reach(scale, mass).above(max); }
};

// The same for probabilities: a mass is the product of one and a power of two, as two factors,
// since it may exceed all floats.
struct ProbabilityWeigher {
  float max;
  int32_t shift;
  float factor[2];  // to kRoughUnit

  explicit ProbabilityWeigher(float largest)
      : max(largest), shift(probability_shift(largest)), factor{1.0f, 1.0f} {
    const int32_t exponent = power() - kFractionBits, most = 64;
    factor[0] = ldexpf(1.0f, exponent > most ? most : exponent);
    factor[1] = ldexpf(1.0f, exponent > most ? exponent - most : 0);
  }

  static constexpr bool kOfLogits = false;
  static constexpr float kLowestAlive = FLT_TRUE_MIN;
  FS_MEMBER ProbabilityWeigher judge() const { return *this; }
  FS_MEMBER bool judges_apart() const { return false; }
  FS_MEMBER uint64_t unit() const { return mass(max); }
  FS_MEMBER ProbabilityWeigher below(float x) const { return ProbabilityWeigher(x); }
  FS_MEMBER uint64_t mass(float x) const { return x > 0 ? mass_of_probability(x, shift) : 0; }
  FS_MEMBER float lowest(uint64_t mass) const {
    return nextafterf((float)ldexp((double)mass, -power()), -INFINITY);
  }
  FS_MEMBER float surely(uint64_t mass) const {
    return nextafterf((float)ldexp((double)mass, -power()), INFINITY);
  }

 private:
  // The mass of p is trunc(p * 2^power).
  FS_MEMBER int32_t power() const { return shift + 150; }
};

// Vectors that are weighed side by side. The chain of operations for one is some 70 cycles long,
// and an out-of-order core looks only two or three such chains ahead.
constexpr int kAbreast = 8;

template <int N>
struct Pack {
  vf v[N];
};

#define FS_PACK_OPERATOR(op)                                   \
  template <int N>                                             \
  FS_INLINE Pack<N> operator op(Pack<N> a, float b) {          \
    FS_EACH(N) a.v[u] = a.v[u] op b;                           \
    return a;                                                  \
  }                                                            \
  template <int N>                                             \
  FS_INLINE Pack<N> operator op(Pack<N> a, const Pack<N>& b) { \
    FS_EACH(N) a.v[u] = a.v[u] op b.v[u];                      \
    return a;                                                  \
  }
FS_PACK_OPERATOR(+)
FS_PACK_OPERATOR(-)
FS_PACK_OPERATOR(*)
#undef FS_PACK_OPERATOR

// N vectors; where the values have 16 bits, each pair of vectors holds its values in any order.
template <int N, class T>
FS_INLINE Pack<N> load_pack(const T* x) {
  Pack<N> p;
  if (N == 1) {
    p.v[0] = load(x);
  } else {
    _Pragma("GCC unroll 4") for (int u = 0; u < N; u += 2) {
      load_pair(x + u * kLanes, p.v[u], p.v[u + 1]);
    }
  }
  return p;
}

// Where lanes count.
template <int N>
struct Where {
  Mask m[N];
};

template <int N>
FS_INLINE Where<N> everywhere() {
  Where<N> w;
  FS_EACH(N) w.m[u] = from_bits(kAllLanes);
  return w;
}

// The maximum's mass before it becomes an integer. Of a float mass in this unit the integer part is
// the upper half, and the fraction holds the lower one.
constexpr float kRoughUnit = 0x1p20f;

// The sum of the masses of at most a group.
struct MassSum {
  vu hi = {}, lo = {};
  uint32_t biases = 0;  // how often all lanes together hold FixedSum's

  FS_MEMBER void operator+=(const MassSum& s) {
    hi += s.hi;
    lo += s.lo;
    biases += s.biases;
  }
};

// kRoughUnit * exp2(y) where lanes count, else 0.
template <int N>
FS_INLINE Pack<N> exp2_where(const Where<N>& where, const Pack<N>& y) {
  Pack<N> integer, fraction;
  FS_EACH(N) integer.v[u] = split_integer(y.v[u], fraction.v[u]);
  Pack<N> p = exp2_polynomial(fraction, kRoughUnit);
  FS_EACH(N) p.v[u] = times_power(where.m[u], p.v[u], integer.v[u]);
  return p;
}

FS_INLINE void add(MassSum& s, const FixedSum& p) {
  const Halves sums = p.halves();
  s.hi += sums.hi;
  s.lo += sums.lo;
  s.biases += kLanes;
}

template <int N>
FS_INLINE void add(MassSum& s, const Pack<N>& q) {
  static_assert(N <= FixedSum::kMost, "a sum holds no more");
  FixedSum sum;
  FS_EACH(N) sum.add(q.v[u]);
  add(s, sum);
}

// Masses in kRoughUnit, not yet integers. -inf is clamped to a y that has no mass; valid rows hold
// no NaN. Where `near` says that no y is below kLowestY there is nothing to clamp.
template <int N>
FS_INLINE Pack<N> weigh_roughly(const LogitWeigher& w, const Pack<N>& x, const Where<N>& where,
                                bool near = false) {
  Pack<N> y = (x - w.max) * w.scale;
  if (!near) FS_EACH(N) y.v[u] = raise_to(kMassFloor, y.v[u]);
  return exp2_where(where, y);
}

template <int N>
FS_INLINE Pack<N> weigh_roughly(const ProbabilityWeigher& w, const Pack<N>& x,
                                const Where<N>& where, bool = false) {
  Pack<N> q;
  FS_EACH(N) q.v[u] = (vf)keep(where.m[u], (vu)max(x.v[u], splat(0.0f)));
  return q * w.factor[0] * w.factor[1];
}

// The least float in kRoughUnit whose mass is not below the floor. A float q has trunc(q) >= floor
// where q >= floor, and that where q is at least the floor rounded up to a float.
FS_INLINE float rough_floor(uint64_t floor) {
  float least = (float)floor;
  uint32_t bits;
  memcpy(&bits, &least, sizeof bits);
  bits += (uint64_t)least < floor;
  memcpy(&least, &bits, sizeof least);
  return least * (0x1p-40f * kRoughUnit);
}

// Masses where lanes count and are judged to be at least `floor` (in kRoughUnit), else 0.
template <int N, class W>
FS_INLINE Pack<N> weigh(const W& w, float floor, const Pack<N>& x, const Where<N>& where,
                        bool near = false) {
  Pack<N> q = weigh_roughly(w, x, where, near);
  if (floor > 0) {
    const Pack<N> judged = w.judges_apart() ? weigh_roughly(w.judge(), x, where) : q;
    FS_EACH(N) q.v[u] = (vf)keep(ge(judged.v[u], splat(floor)), (vu)q.v[u]);
  }
  return q;
}

// Of those lanes the ones whose mass is at least `floor` (in kRoughUnit).
template <class W>
FS_INLINE Mask heavy(const W& w, float floor, vf x, Mask where) {
  const vf q = weigh_roughly(w, Pack<1>{{x}}, Where<1>{{where}}).v[0];
  return both(where, ge(q, splat(floor)));
}

// The sum of either half has 31 bits; with the biases in it, it is right modulo 2^32.
FS_INLINE uint64_t total(const MassSum& s) {
  const uint32_t hi = (uint32_t)reduce_add(s.hi) - s.biases * FixedSum::kHiBias;
  const uint32_t lo = (uint32_t)reduce_add(s.lo) - s.biases * FixedSum::kLoBias;
  return ((uint64_t)hi << kHalfBits) + lo;
}

}  // namespace
}  // namespace fastsample

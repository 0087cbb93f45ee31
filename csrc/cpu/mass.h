// Stage 6 in vectors. A mass is held in halves of 20 bits, two 32-bit lanes that every ISA can
// convert and add.
#pragma once

#include <float.h>
#include <math.h>

#include "core/mass.h"
#include "cpu/half.h"
#include "cpu/kernel.h"

namespace fastsample {
namespace {

constexpr int kHalfBits = kMassBits / 2;

struct Weigher {
  float max;
  float scale;
  uint64_t floor;  // masses below it count as 0 (min-p)
};

// From here up no step from y to the mass leaves the normal floats.
constexpr float kLowestY = -140.0f;

// All values of up to this magnitude are near each other.
FS_INLINE float near_bound(float scale) { return -kLowestY / 2 / scale; }

FS_INLINE bool is_near(const Weigher& w, float x) { return (x - w.max) * w.scale >= kLowestY; }

// Vectors that are weighed side by side. The chain of one is some 70 cycles long, and an
// out-of-order core sees only two or three such chains ahead when they stand one behind the other.
constexpr int kAbreast = 8;

#define FS_EACH(N) _Pragma("GCC unroll 8") for (int u = 0; u < N; ++u)

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

// N vectors, each pair of them in any order where the values have 16 bits.
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

// The maximum's mass before it becomes an integer: then its integer part is the upper half, and its
// fraction has the lower.
constexpr float kRoughUnit = 0x1p20f;

// A vector's masses as integers: w = hi * 2^20 + lo in every lane.
struct Halves {
  vu hi, lo;
};

FS_INLINE Halves to_integers(vf q) {
  const vi hi = truncate(q);
  return Halves{(vu)hi, (vu)truncate((q - to_float(hi)) * 0x1p20f)};
}

// Sums of the masses of a group at most.
struct MassSum {
  vu hi = {}, lo = {};
  uint32_t biases = 0;  // that both halves' lanes hold, all together

  FS_MEMBER void operator+=(const MassSum& s) {
    hi += s.hi;
    lo += s.lo;
    biases += s.biases;
  }
};

// kRoughUnit * exp2(y) where lanes count, else 0.
template <int N>
FS_INLINE Pack<N> exp2_where(const Where<N>& where, const Pack<N>& y) {
#if defined(FASTSAMPLE_ISA_avx512)
  Pack<N> f;
  FS_EACH(N) f.v[u] = (vf)_mm512_reduce_ps((__m512)y.v[u], _MM_FROUND_TO_NEAREST_INT);
  const Pack<N> n = y - f;
  Pack<N> p = exp2_polynomial(f, kRoughUnit);
  FS_EACH(N) { p.v[u] = (vf)_mm512_maskz_scalef_ps(where.m[u], (__m512)p.v[u], (__m512)n.v[u]); }
  return p;
#else
  // 20 more in the magic leaves n as it is and puts n + 20 into t's low bits, to go to the
  // exponent.
  constexpr float kMagic = kRoundMagic + kHalfBits;
  const Pack<N> t = y + kMagic;
  Pack<N> p = exp2_polynomial(y - (t - kMagic));
  FS_EACH(N) p.v[u] = (vf)keep(where.m[u], (vu)p.v[u] + ((vu)t.v[u] << 23));
  return p;
#endif
}

// Sums of a pack, vector by vector.
#if defined(FASTSAMPLE_ISA_avx512)

constexpr int kDown = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;
constexpr uint32_t kHiBias = 0x4b000000, kLoBias = 0x41000000;  // the bits of 2^23 and of 8

// In floats: rounded down, one that begins at 2^23 takes an integer part and one that begins at 8
// what of a fraction counts, and both leave integers in their lowest bits.
struct PackSum {
  static constexpr int kMost = 8;  // vectors
  vf hi = splat(0x1p23f), lo = splat(8.0f);

  FS_MEMBER void add(vf q) {
    hi = (vf)_mm512_add_round_ps((__m512)hi, (__m512)q, kDown);
    lo = (vf)_mm512_add_round_ps((__m512)lo, fraction(q), kDown);
  }
  // To `part` only where lanes count.
  FS_MEMBER void add(vf q, PackSum& part, Mask m) {
    add(q);
    part.hi = (vf)_mm512_mask_add_round_ps((__m512)part.hi, m, (__m512)part.hi, (__m512)q, kDown);
    part.lo = (vf)_mm512_mask_add_round_ps((__m512)part.lo, m, (__m512)part.lo, fraction(q), kDown);
  }

 private:
  static FS_MEMBER __m512 fraction(vf q) { return _mm512_reduce_ps((__m512)q, kDown); }
};

#else

constexpr uint32_t kHiBias = 0, kLoBias = 0;

struct PackSum {
  static constexpr int kMost = kGroup * kBlock / kLanes;
  vu hi = {}, lo = {};

  FS_MEMBER void add(vf q) {
    const Halves w = to_integers(q);
    hi += w.hi;
    lo += w.lo;
  }
  // To `part` only where lanes count.
  FS_MEMBER void add(vf q, PackSum& part, Mask m) {
    const Halves w = to_integers(q);
    hi += w.hi;
    lo += w.lo;
    part.hi = add_where(m, part.hi, w.hi);
    part.lo = add_where(m, part.lo, w.lo);
  }
};

#endif

FS_INLINE void add(MassSum& s, const PackSum& p) {
  s.hi += (vu)p.hi;
  s.lo += (vu)p.lo;
  s.biases += kLanes;
}

template <int N>
FS_INLINE void add(MassSum& s, const Pack<N>& q) {
  static_assert(N <= PackSum::kMost, "a sum holds no more");
  PackSum sum;
  FS_EACH(N) sum.add(q.v[u]);
  add(s, sum);
}

// Mass before it becomes an integer. -inf clamps to a y that has no mass; valid rows hold no NaN.
// Where `near` says that no y is below kLowestY there is nothing to clamp.
template <int N>
FS_INLINE Pack<N> weigh_roughly(const Weigher& w, const Pack<N>& x, const Where<N>& where,
                                bool near = false) {
  Pack<N> y = (x - w.max) * w.scale;
  if (!near) FS_EACH(N) y.v[u] = max(y.v[u], splat(kMassFloor));
  return exp2_where(where, y);
}

// Masses where lanes count, else 0; of kRoughUnit, not yet rounded down.
template <int N>
FS_INLINE Pack<N> weigh(const Weigher& w, const Pack<N>& x, const Where<N>& where,
                        bool near = false) {
  Pack<N> q = weigh_roughly(w, x, where, near);
  if (w.floor) {
    // The threshold has at most 24 significant bits, so it is exact as a float, and trunc(q * 2^40)
    // >= t is q * 2^40 >= t.
    const vf floor = splat((float)w.floor * (0x1p-40f * kRoughUnit));
    FS_EACH(N) q.v[u] = (vf)keep(ge(q.v[u], floor), (vu)q.v[u]);
  }
  return q;
}

FS_INLINE Halves weigh(const Weigher& w, vf x, Mask where) {
  return to_integers(weigh(w, Pack<1>{{x}}, Where<1>{{where}}).v[0]);
}

FS_INLINE uint64_t weigh(const Weigher& w, float x) {
  const uint64_t mass = mass_of(x, w.max, w.scale);
  return mass >= w.floor ? mass : 0;
}

// Either half's sum has 31 bits; with the biases it is right modulo 2^32.
FS_INLINE uint64_t total(const MassSum& s) {
  const uint32_t hi = (uint32_t)reduce_add(s.hi) - s.biases * kHiBias;
  const uint32_t lo = (uint32_t)reduce_add(s.lo) - s.biases * kLoBias;
  return ((uint64_t)hi << kHalfBits) + lo;
}

// How far below the maximum a token of at least this mass lies at most. Conservative: rounding
// errors are far below the margin.
struct Reach {
  double drop;

  Reach(float scale, uint64_t mass)
      : drop((kMassBits + 1e-3 - log2((double)mass)) / (double)scale) {}

  // An x that such a token exceeds; rises with the maximum.
  FS_MEMBER float below(float max) const {
    const double x = (double)max - drop;
    const double low = x - fabs(x) * 1e-6;
    return low < -FLT_MAX ? -INFINITY : (float)low;
  }
};

FS_INLINE float lowest_x(const Weigher& w, uint64_t mass) {
  return Reach(w.scale, mass).below(w.max);
}

}  // namespace
}  // namespace fastsample

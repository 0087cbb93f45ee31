// Stage 6 in vectors. A mass w is held as w = hi * 2^20 + lo, two 32-bit lanes that every ISA can
// convert and add.
#pragma once

#include <float.h>
#include <math.h>

#include "core/mass.h"
#include "cpu/kernel.h"
#include "cpu/simd.h"

namespace fastsample {
namespace {

constexpr int kHalfBits = kMassBits / 2;

struct Weigher {
  float max;
  float scale;
  uint64_t floor;  // masses below it count as 0 (min-p)
};

// Vectors that are weighed side by side. The chain of one is some 70 cycles long, and an
// out-of-order core sees only two or three such chains ahead when they stand one behind the other.
// As many as the registers hold.
#if defined(FASTSAMPLE_ISA_avx512)
constexpr int kAbreast = 8;
#else
constexpr int kAbreast = 2;
#endif

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

template <int N>
FS_INLINE Pack<N> load_pack(const float* x) {
  Pack<N> p;
  FS_EACH(N) p.v[u] = load(x + u * kLanes);
  return p;
}

template <int N>
struct Mass {
  vu hi[N], lo[N];
};

// Masses of N vectors. -inf clamps to a y that has no mass; valid rows hold no NaN.
template <int N>
FS_INLINE Mass<N> weigh(const Weigher& w, const Pack<N>& x) {
  // 20 more in the magic leaves n as it is and puts n + 20 into t's low bits: shifted into the
  // exponent of p they make q = p * 2^n * 2^20, with hi before the binary point.
  constexpr float kMagic = kRoundMagic + kHalfBits;
  Pack<N> y = (x - w.max) * w.scale;
  FS_EACH(N) y.v[u] = max(y.v[u], splat(kMassFloor));
  const Pack<N> t = y + kMagic;
  Pack<N> q = exp2_polynomial(y - (t - kMagic));
  FS_EACH(N) q.v[u] = (vf)((vu)q.v[u] + ((vu)t.v[u] << 23));
  Mass<N> m;
  FS_EACH(N) m.hi[u] = (vu)truncate(q.v[u]);
  FS_EACH(N) m.lo[u] = (vu)truncate((q.v[u] - to_float((vi)m.hi[u])) * 0x1p20f);
  if (!w.floor) return m;
  // The threshold has at most 24 significant bits, so it is exact as a float, and trunc(q) >= t is
  // q >= t.
  const vf floor = splat((float)w.floor * 0x1p-20f);
  FS_EACH(N) {
    const Mask heavy = ge(q.v[u], floor);
    m.hi[u] = keep(heavy, m.hi[u]);
    m.lo[u] = keep(heavy, m.lo[u]);
  }
  return m;
}

FS_INLINE Mass<1> weigh(const Weigher& w, vf x) { return weigh(w, Pack<1>{{x}}); }

FS_INLINE uint64_t weigh(const Weigher& w, float x) {
  const uint64_t mass = mass_of(x, w.max, w.scale);
  return mass >= w.floor ? mass : 0;
}

// Sums of the masses of a group at most.
struct MassSum {
  vu hi = {}, lo = {};
};

template <int N>
FS_INLINE void add_where(MassSum& s, const Mask (&where)[N], const Mass<N>& m) {
  FS_EACH(N) {
    s.hi = add_where(where[u], s.hi, m.hi[u]);
    s.lo = add_where(where[u], s.lo, m.lo[u]);
  }
}

FS_INLINE uint64_t total(const MassSum& s) {
  return (reduce_add(s.hi) << kHalfBits) + reduce_add(s.lo);
}

// An x that every token of at least this mass exceeds. Conservative: rounding errors are far below
// the margin.
FS_INLINE float lowest_x(const Weigher& w, uint64_t mass) {
  const double y = log2((double)mass) - kMassBits - 1e-3;
  const double x = (double)w.max + y / (double)w.scale;
  const double low = x - fabs(x) * 1e-6;
  return low < -FLT_MAX ? -INFINITY : (float)low;
}

}  // namespace
}  // namespace fastsample

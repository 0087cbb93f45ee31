// Stage 6b in vectors: statistics of what is kept of a domain.
#pragma once

#include "core/stats.h"
#include "cpu/domain.h"

namespace fastsample {
namespace {

// A sum of products of 32-bit lanes.
struct ProductSum {
  vq lanes = {};

  FS_MEMBER void add(vu a, vu b) {
    lanes += multiply_low((vq)a, (vq)b) + multiply_low((vq)a >> 32, (vq)b >> 32);
  }
  FS_MEMBER uint64_t total() const {
    uint64_t sum = 0;
    for (int i = 0; i < kWideLanes; ++i) sum += lanes[i];
    return sum;
  }
};

// What is summed up beside the masses, which are given with the values that they belong to.
struct Depths {
  LogitWeigher weigher;
  ProductSum high = {}, low = {};

  FS_MEMBER void add(vf x, const Halves& w) {
    const vf y = max((x - weigher.max) * weigher.scale, splat(kMassFloor));
    const vu depth = (vu)truncate(y * -0x1p14f);
    high.add(w.hi, depth);
    low.add(w.lo, depth);
  }
  FS_MEMBER DepthSums sums(uint64_t mass) const {
    return DepthSums{mass, high.total(), low.total()};
  }
};

struct Squares {
  ProductSum high = {}, cross = {}, low = {};

  FS_MEMBER void add(vf, const Halves& w) {
    high.add(w.hi, w.hi);
    cross.add(w.hi, w.lo);
    low.add(w.lo, w.lo);
  }
  FS_MEMBER SquareSums sums(uint64_t mass) const {
    return SquareSums{mass, high.total(), cross.total(), low.total()};
  }
};

// What is kept of block b: its mass is added to `sum`, and `more` sees all that has mass.
template <class Domain, class Weight, class More>
FS_INLINE void measure_block(const Domain& d, int b, const Kept<float>& kept, const Weight& weight,
                             MassSum& sum, More& more) {
  constexpr int N = 4;
  float buffer[kBlock];
  const float* x = values(d, b, buffer);
  for (int i = 0; i < kBlock; i += N * kLanes) {
    const Pack<N> p = load_pack<N>(x + i);
    Where<N> where;
    FS_EACH(N) where.m[u] = ranks_within(kept, p.v[u], ids(d, b, i + u * kLanes));
    const auto q = weight.of(p, where);
    FS_EACH(N) {
      const Halves w = to_fixed(q.v[u]);
      sum.hi += w.hi;
      sum.lo += w.lo;
      more.add(p.v[u], w);
    }
  }
}

// The mass of what is kept, in all and in each group; `more` is a sum of something else.
template <class Domain, class W, class More>
uint64_t measure(const Domain& d, const Kept<float>& kept, const W& weigher, const Workspace& ws,
                 More& more) {
  const Weighing weight(weigher, kept.floor);
  const float lowest = weight.lowest();
  More own = more;  // in registers
  uint64_t total = 0;
  for (int g = 0; g < groups(d); ++g) {
    MassSum sum;
    for (int b = g * kGroup; b < group_end(d, g); ++b) {
      fetch_ahead(d, b, ws);
      if (!may_keep(d, b, kept) || upper_bound(d, b) < lowest) continue;
      measure_block(d, b, kept, weight, sum, own);
    }
    ws.group_mass[g] = weight.total(sum);
    total += ws.group_mass[g];
  }
  more = own;
  return total;
}

// The mass of the heaviest token that is kept.
template <class Domain, class W>
uint64_t heaviest(const Domain& d, const Kept<float>& kept, const W& weigher) {
  const Weighing weight(weigher, kept.floor);
  const float lowest = weight.lowest();
  float buffer[kBlock];
  uint64_t most = 0;
  for (int b = 0; b < blocks(d); ++b) {
    if (!may_keep(d, b, kept) || upper_bound(d, b) < lowest) continue;
    const float* x = values(d, b, buffer);
    for (int i = 0; i < kBlock; i += kLanes) {
      const vf v = load(x + i);
      const Halves w = weight.of(v, ranks_within(kept, v, ids(d, b, i)));
      for (int lane = 0; lane < kLanes; ++lane) {
        const uint64_t mass = ((uint64_t)w.hi[lane] << kHalfBits) + w.lo[lane];
        most = mass > most ? mass : most;
      }
    }
  }
  return most;
}

// Of all tokens above -inf.
template <class T>
SpreadSums spread(const Dense<T>& d, float peak) {
  vu count = {};
  uint64_t total = 0;
  ProductSum squares;
  float buffer[kBlock];
  for (int g = 0; g < groups(d); ++g) {
    vu sum = {};
    for (int b = g * kGroup; b < group_end(d, g); ++b) {
      if (upper_bound(d, b) == -INFINITY) continue;
      const float* x = values(d, b, buffer);
      for (int i = 0; i < kBlock; i += kLanes) {
        const vf v = load(x + i);
        const Mask alive = gt(v, splat(-INFINITY));
        const vf below = min((splat(peak) - v) * 0x1p11f, splat(0x1.ffffep19f));
        const vu distance = keep(alive, (vu)truncate(below));
        count = add_where(alive, count, (vu)splat(1));
        sum += distance;
        squares.add(distance, distance);
      }
    }
    total += reduce_add(sum);
  }
  return SpreadSums{reduce_add(count), total, squares.total()};
}

}  // namespace
}  // namespace fastsample

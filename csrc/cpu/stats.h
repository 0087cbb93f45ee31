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
    const vf y = raise_to(kMassFloor, (x - weigher.max) * weigher.scale);
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
template <class Weight, class T, class Keep, class More>
FS_INLINE void measure_values(const Weight& weight, const T* x, Keep keep, bool near, MassSum& sum,
                              More& more) {
  constexpr int N = kAbreast;
  for (int i = 0; i < kBlock; i += N * kLanes) {
    const Pack<N> p = load_pack<N>(x + i);
    Where<N> where;
    FS_EACH(N) where.m[u] = keep(p.v[u], i + u * kLanes);
    const auto q = weight.of(p, where, near);
    FS_EACH(N) {
      const Halves w = to_fixed(q.v[u]);
      sum.hi += w.hi;
      sum.lo += w.lo;
      more.add(p.v[u], w);
    }
  }
}

template <class Domain, class Weight, class More>
FS_INLINE void measure_block(const Domain& d, int b, const Kept<float>& kept, const Weight& weight,
                             MassSum& sum, More& more) {
  float buffer[kBlock];
  const auto within = [&](vf v, int i) { return ranks_within(kept, v, ids(d, b, i)); };
  measure_values(weight, values(d, b, buffer), within, false, sum, more);
}

// The mass of what is kept, in all and in each group; `more` is a sum of something else.
template <class Domain, class W, class More>
uint64_t measure(const Domain& d, const Kept<float>& kept, const W& weigher, const Workspace& ws,
                 More& more) {
  const Weighing weight(weigher, kept.floor);
  const float lowest = weight.lowest();
  const bool all = bounds_of(kept, W::kLowestAlive) == kUnbounded;
  const auto has_mass = [&](int b) { return upper_bound(d, b) >= lowest; };
  const auto every = [](vf, int) { return from_bits(kAllLanes); };
  More own = more;  // in registers
  uint64_t total = 0;
  for (int g = 0; g < groups(d); ++g) {
    MassSum sum;
    if (all) {
      each_run(d, g, has_mass, [&](auto run, auto near) {
        MassSum run_sum;
        More run_more = own;
        for (int b = run.begin; b < run.end; ++b) {
          const auto* x = run.x + (b - run.begin) * kBlock;
          measure_values(weight, x, every, near, run_sum, run_more);
        }
        sum += run_sum;
        own = run_more;
      });
    }
    for (int b = g * kGroup; b < group_end(d, g); ++b) {
      fetch_ahead(d, b, ws);
      if (all || !may_keep(d, b, kept) || upper_bound(d, b) < lowest) continue;
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

// Sums of float distances from a value near their mean, in blocks whose tokens are all above -inf
// and not far below the maximum.
struct RoughSpread {
  float peak, middle;  // `middle` is a multiple of 2^-11, at most kFarthestMiddle
  vd sum = {}, squares = {};
  double rest_sum = 0, rest_squares = 0;  // token by token, of other blocks
  int64_t count = 0;
  int others = 0;

  // Whether the block could be added up. The sums of a lane's distances are exact, as they are
  // multiples of 2^-11 below 2^9, 16 at a time; those of the squares are off by less than 2^-19.
  template <class T>
  FS_MEMBER bool add(const T* x) {
    constexpr int kMost = 16, kSums = kBlock / kLanes / kMost;
    vf one[kSums] = {}, two[kSums] = {};
    for (int i = 0; i < kMost; ++i) {
      _Pragma("GCC unroll 4") for (int s = 0; s < kSums; ++s) {
        const vf below = splat(peak) - load(x + (i * kSums + s) * kLanes);
        const vf distance = round_down_11(below, middle);
        one[s] = one[s] + distance;
        two[s] = multiply_add(distance, distance, two[s]);
      }
    }
    // Where a distance is cut off, a square shows it.
    Mask near = from_bits(kAllLanes);
    for (int s = 0; s < kSums; ++s) near = both(near, gt(splat(kFarSquare), two[s]));
    if (!all(near)) return false;
    for (int s = 0; s < kSums; ++s) {
      sum = sum + widen(one[s], 0) + widen(one[s], 1);
      squares = squares + widen(two[s], 0) + widen(two[s], 1);
    }
    count += kBlock;
    return true;
  }

  FS_MEMBER void add_each(const float* x) {
    ++others;
    for (int i = 0; i < kBlock; ++i) {
      if (!(x[i] > -INFINITY)) continue;
      const double distance = distance_below(x[i], peak) * 0x1p-11 - (double)middle;
      rest_sum += distance;
      rest_squares += distance * distance;
      ++count;
    }
  }

  // The error of the exact variance's own three roundings is far below 2^-48 of the mean square.
  FS_MEMBER Deviation deviation() const {
    double one = rest_sum, two = rest_squares;
    for (int i = 0; i < kWideLanes; ++i) {
      one += sum[i];
      two += squares[i];
    }
    const double n = (double)count, mean = one / n, square = two / n;
    const double whole = square + (fabs(mean) + (double)middle) * (fabs(mean) + (double)middle);
    const double variance = square - mean * mean, error = square * 0x1p-18 + whole * 0x1p-46;
    return Deviation{variance > error ? sqrt(variance - error) : 0, sqrt(variance + error)};
  }

  static constexpr double kFarthestMiddle = 200;

 private:
  // From 512 on, distances are cut off: that is more than 300 from `middle`.
  static constexpr float kFarSquare = 300.0f * 300.0f;
};

// Nothing where too many blocks have to be added up token by token.
template <class T>
bool estimate_deviation(const Dense<T>& d, float peak, Deviation* found) {
  constexpr int kMostOthers = 8;
  if (d.row.mask) return false;
  float buffer[kBlock];
  const float* x = values(d, 0, buffer);
  double middle = 0;
  for (int i = 0; i < kBlock; i += 8) middle += (double)peak - (double)x[i];
  middle = floor(middle * 0x1p11 / (kBlock / 8)) * 0x1p-11;
  if (!(middle <= RoughSpread::kFarthestMiddle)) return false;
  RoughSpread spread = {peak, (float)middle};
  for (int b = 0; b < blocks(d); ++b) {
    bool added = false;
    with_values(d, b, [&](const auto* v, auto) { added = spread.add(v); });
    if (added) continue;
    if (spread.others == kMostOthers) return false;
    spread.add_each(values(d, b, buffer));
  }
  *found = spread.deviation();
  return true;
}

// Whether a token lies in low <= x < high.
template <class Domain>
bool any_between(const Domain& d, float low, float high) {
  float buffer[kBlock];
  for (int b = 0; b < blocks(d); ++b) {
    if (!(upper_bound(d, b) >= low)) continue;
    const float* x = values(d, b, buffer);
    Mask found = from_bits(0);
    for (int i = 0; i < kBlock; i += kLanes) {
      const vf v = load(x + i);
      found = either(found, both(ge(v, splat(low)), gt(splat(high), v)));
    }
    if (any(found)) return true;
  }
  return false;
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

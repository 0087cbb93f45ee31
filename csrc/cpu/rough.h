// Stage 6b, estimated: sums of products with each mass, from below and above, along with the exact
// masses. They tell between which bounds a floor lies; where no token has a mass between them, any
// of these floors keeps the same tokens.
#pragma once

#include "cpu/stats.h"

namespace fastsample {
namespace {

struct Bounded {
  double low, high;
};

// Of the float mass, or of 2^14 times how far y lies below 0, in whole numbers.
struct OfMass {
  template <int N>
  FS_MEMBER Pack<N> operator()(const Pack<N>&, const Pack<N>& q) const {
    return q;
  }
};
struct OfDepth {
  LogitWeigher weigher;

  template <int N>
  FS_MEMBER Pack<N> operator()(const Pack<N>& x, const Pack<N>&) const {
    Pack<N> y = (x - weigher.max) * weigher.scale;
    FS_EACH(N) { y.v[u] = to_float(truncate(max(y.v[u], splat(kMassFloor)) * -0x1p14f)); }
    return y;
  }
};

constexpr int kChains = 2;  // sums of a block side by side

// The mass of a row, in all and in each group, and the sum of the products of a factor and the
// masses (in kRoughUnit) before they become integers. No number is negative, so the sum is off by
// at most what each product and each addition rounds.
template <class T, class W, class Factor>
uint64_t measure_roughly(const Dense<T>& d, const Weighing<W>& weight, const Workspace& ws,
                         Factor factor, Bounded* found) {
  constexpr int N = kAbreast;
  const float lowest = weight.lowest();
  const auto has_mass = [&](int b) { return upper_bound(d, b) >= lowest; };
  uint64_t total = 0;
  vd products = {};
  for (int g = 0; g < groups(d); ++g) {
    MassSum sum;
    each_run(d, g, has_mass, [&](auto run, auto near) {
      MassSum run_sum;
      vd run_products = {};
      for (int b = run.begin; b < run.end; ++b) {
        const auto* x = run.x + (b - run.begin) * kBlock;
        fetch_ahead(d, b, ws);
        vf chain[kChains] = {};
        for (int i = 0; i < kBlock; i += N * kLanes) {
          const Pack<N> p = load_pack<N>(x + i);
          const Pack<N> q = weight.of(p, everywhere<N>(), near), f = factor(p, q);
          FS_EACH(N) chain[u % kChains] = multiply_add(q.v[u], f.v[u], chain[u % kChains]);
          add(run_sum, q);
        }
        for (const vf& c : chain) run_products = run_products + widen(c, 0) + widen(c, 1);
      }
      sum += run_sum;
      products = products + run_products;
    });
    ws.group_mass[g] = weight.total(sum);
    total += ws.group_mass[g];
  }
  double all = 0;
  for (int i = 0; i < kWideLanes; ++i) all += products[i];
  constexpr double kRoundings = kBlock / kLanes / kChains + 4;
  *found = Bounded{all * (1 - kRoundings * 0x1p-24), all * (1 + kRoundings * 0x1p-24)};
  return total;
}

// Where a floor lies, both ends included.
struct FloorBounds {
  uint64_t low, high;
};

// Far above what the few operations that lead from a sum to a floor round.
FS_INLINE FloorBounds widen_bounds(uint64_t low, uint64_t high) {
  return {low - (low >> 20) - (low > 0), high + (high >> 20) + 1};
}

// Q is less than the sum of the squares of the float masses: each mass w has lost less than 1 when
// it became an integer, and its square less than 2w + 1.
template <class T, class W>
FloorBounds rough_p_less_floor(const Dense<T>& d, const Weighing<W>& weight, const Workspace& ws,
                               uint64_t heaviest, uint64_t* total) {
  Bounded sum;
  *total = measure_roughly(d, weight, ws, OfMass(), &sum);
  const double unit = 0x1p40 / (double)kRoughUnit, tokens = (double)blocks(d) * kBlock;
  const auto floor_of = [&](double q) {
    const uint64_t high = q > 0 ? (uint64_t)(q * 0x1p-40) : 0;
    const uint64_t low = q > 0 ? (uint64_t)(q - (double)high * 0x1p40) : 0;
    return p_less_floor(SquareSums{*total, high, 0, low}, heaviest);
  };
  const double cut = 2 * ((double)*total + tokens);
  return widen_bounds(floor_of(sum.low * unit * unit - cut), floor_of(sum.high * unit * unit));
}

// The same for E: each product has lost less than the depth, which is at most 60 * 2^14.
template <class T>
FloorBounds rough_eta_floor(const Dense<T>& d, const Weighing<LogitWeigher>& weight,
                            const Workspace& ws, const RowParams& p, uint64_t heaviest,
                            uint64_t* total) {
  Bounded sum;
  *total = measure_roughly(d, weight, ws, OfDepth{weight.weigher}, &sum);
  const double unit = 0x1p40 / (double)kRoughUnit, tokens = (double)blocks(d) * kBlock;
  const auto floor_of = [&](double depth) {
    const uint64_t high = depth > 0 ? (uint64_t)(depth * 0x1p-20) : 0;
    const uint64_t low = depth > 0 ? (uint64_t)(depth - (double)high * 0x1p20) : 0;
    return eta_floor(p, DepthSums{*total, high, low}, heaviest);
  };
  const double cut = tokens * (-kMassFloor * 0x1p14);
  // The deeper, the lower.
  return widen_bounds(floor_of(sum.high * unit), floor_of(sum.low * unit - cut));
}

// Logits around a floor: from `high` up, every token has at least the floor's upper bound, below
// `low` none has its lower bound. The margins are far above all rounding errors of a y and its
// exponential.
struct Edge {
  float low, high;

  Edge(const LogitWeigher& w, FloorBounds floor) {
    constexpr double kMargin = 1e-4;
    const auto at = [&](uint64_t mass, double margin) {
      return (double)w.max - (kMassBits + margin - log2((double)mass)) / (double)w.scale;
    };
    low = floor.low ? nextafterf((float)at(floor.low, kMargin), -INFINITY) : -INFINITY;
    high = nextafterf((float)at(floor.high, -kMargin), INFINITY);
  }
};

// Whether every token has at least the floor's upper bound as its mass, or less than the lower one.
template <class T>
bool determines(const Dense<T>& d, const LogitWeigher& w, FloorBounds floor, Edge edge) {
  float buffer[kBlock];
  for (int b = 0; b < blocks(d); ++b) {
    if (!(upper_bound(d, b) >= edge.low)) continue;
    const float* x = values(d, b, buffer);
    Mask near = from_bits(0);
    for (int i = 0; i < kBlock; i += kLanes) {
      const vf v = load(x + i);
      near = either(near, both(ge(v, splat(edge.low)), gt(splat(edge.high), v)));
    }
    if (!any(near)) continue;
    for (int i = 0; i < kBlock; ++i) {
      if (!(x[i] >= edge.low && x[i] < edge.high)) continue;
      const uint64_t mass = w.mass(x[i]);
      if (mass >= floor.low && mass < floor.high) return false;
    }
  }
  return true;
}

// Takes the few tokens below a floor, all of them below `edge`, out of the mass of each group;
// returns how much is left.
template <class T>
uint64_t take_out_light(const Dense<T>& d, const LogitWeigher& w, const Kept<float>& kept,
                        uint64_t floor, float edge, const Workspace& ws) {
  const Weighing before(w, kept.floor), after(w, floor);
  const auto every = [](vf) { return from_bits(kAllLanes); };
  float buffer[kBlock];
  uint64_t left = 0;
  for (int g = 0; g < groups(d); ++g) {
    int n = 0;
    for (int b = g * kGroup; b < group_end(d, g); ++b) {
      const float* x = values(d, b, buffer);
      n += append(x, block_bits(x, [&](vf v, int) { return gt(splat(edge), v); }), ws.values + n);
    }
    fill_up(ws.values, n);
    if (n) {
      ws.group_mass[g] -= weigh_some(before, ws.values, n, every);
      ws.group_mass[g] += weigh_some(after, ws.values, n, every);
    }
    left += ws.group_mass[g];
  }
  return left;
}

}  // namespace
}  // namespace fastsample

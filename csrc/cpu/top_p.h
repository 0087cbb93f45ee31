// Stage 7, top-p: the value at which the mass of the rank order reaches its share of all there is.
#pragma once

#include "cpu/estimate.h"

namespace fastsample {
namespace {

// One pass over a domain: its weight, the weight from high up (in each group too), and the values
// in the bracket.
struct Split {
  uint64_t total, upper;
  Span middle;  // in id order; group g's part begins at segment[g]
};

// A block's share of it: adds up what it weighs and what of that lies below the bracket's upper
// end, and copies the bracket's values; returns their end. To compress each vector costs the same
// however many of its lanes count.
template <class Weight, class T>
FS_INLINE float* split_block(const Weight& weight, const T* x, bool near, Bracket bracket,
                             float* values, MassSum& all, MassSum& rest) {
  constexpr int N = kAbreast;
  static_assert(N <= FixedSum::kMost, "a sum holds no more");
  BlockBits inside = {};
  for (int i = 0; i < kBlock; i += N * kLanes) {
    const Pack<N> p = load_pack<N>(x + i);
    const auto w = weight.of(p, everywhere<N>(), near);
    FixedSum sum, some;
    FS_EACH(N) {
      const Mask below = gt(splat(bracket.high), p.v[u]);
      sum.add(w.v[u], some, below);
      const Mask in = gt_where(below, p.v[u], splat(bracket.low));
      if (kCompresses) {
        values += compress_store(values, p.v[u], in);
      } else {
        inside.set(i + u * kLanes, in);
      }
    }
    add(all, sum);
    add(rest, some);
  }
  if constexpr (!kCompresses) values += append(x, inside, values);
  return values;
}

template <class Domain, class Weight>
Split split(const Weight& weight, const Domain& d, Bracket bracket, const Workspace& ws) {
  const float lowest = weight.lowest();
  const auto has_mass = [&](int b) { return upper_bound(d, b) > lowest; };
  Split s = {0, 0, {ws.values, 0, bracket.low, bracket.high}};
  for (int g = 0; g < groups(d); ++g) {
    ws.segment[g] = s.middle.n;
    MassSum all, rest, low;
    each_run(d, g, has_mass, [&](auto run, auto near) {
      // Copies: to the compiler, a store of values might change the originals.
      const Weight own_weight = weight;
      const Bracket own = bracket;
      MassSum run_all, run_rest, run_low;
      float* end = ws.values + s.middle.n;
      for (int b = run.begin; b < run.end; ++b) {
        const auto* x = run.x + (b - run.begin) * kBlock;
        fetch_ahead(d, b, ws);
        if (upper_bound(d, b) > own.low) {
          end = split_block(own_weight, x, near, own, end, run_all, run_rest);
        } else {
          add_whole(own_weight, x, near, run_low);
        }
      }
      s.middle.n = (int)(end - ws.values);
      all += run_all;
      rest += run_rest;
      low += run_low;
    });
    ws.group_mass[g] = weight.total(all) - weight.total(rest);
    s.upper += ws.group_mass[g];
    s.total += weight.total(all) + weight.total(low);
  }
  ws.segment[groups(d)] = s.middle.n;
  fill_up(ws.values, s.middle.n);
  return s;
}

// Adds to each group's mass what the boundary keeps of the group's values in the bracket, m ties
// first; returns the cutoff.
template <class Domain, class Weight>
Place<float> add_segments(const Domain& d, const Weight& weight, const Boundary& edge, uint64_t m,
                          const Workspace& ws) {
  Place<float> low = {edge.x, INT32_MAX};
  const bool all_ties = m == (uint64_t)edge.equal, only_ties = edge.equal == ws.segment[groups(d)];
  const uint64_t each = weight.one(edge.x);
  for (int g = 0; g < groups(d); ++g) {
    const float* x = ws.values + ws.segment[g];
    const int n = ws.segment[g + 1] - ws.segment[g];
    if (all_ties && !only_ties) {
      ws.group_mass[g] += weigh_some(weight, x, n, [&](vf v) { return ge(v, splat(edge.x)); });
      continue;
    }
    const uint64_t equal = only_ties ? (uint64_t)n : count_equal(x, n, edge.x);
    const uint64_t ties = equal < m ? equal : m;
    if (!all_ties && m && ties == m) low.id = nth_equal(d, edge.x, m, g * kGroup);
    m -= ties;
    ws.group_mass[g] += ties * each;
    if (only_ties) continue;
    ws.group_mass[g] += weigh_some(weight, x, n, [&](vf v) { return gt(v, splat(edge.x)); });
  }
  return low;
}

// Where the bracket was missed: the values next to it, then eight times as many. `before` is the
// weight of what lies above bracket.low.
template <class Domain, class Weight>
Place<float> search_below(const Domain& d, const Weight& weight, Bracket bracket, uint64_t before,
                          uint64_t target, const Workspace& ws) {
  const float lowest = weight.lowest();
  float top = nextafterf(bracket.low, INFINITY);
  for (double width = (double)bracket.high - (double)bracket.low;; width *= 8) {
    float low = (float)((double)top - width);
    if (!(low < top)) low = nextafterf(top, -INFINITY);
    if (!(low > lowest)) low = lowest;
    const Span near = collect(d, low, top, ws.values);
    const Boundary edge = narrow(weight, near, before, target, near.x);
    before = reached(weight, edge);
    if (before >= target || low == lowest) {
      return place_of(d, edge.x, ties_needed(weight, edge, target), edge.equal);
    }
    top = nextafterf(low, INFINITY);
  }
}

// The same above it; `upper` is the weight from bracket.high up.
template <class Domain, class Weight>
Place<float> search_above(const Domain& d, const Weight& weight, Bracket bracket, uint64_t upper,
                          uint64_t target, const Workspace& ws) {
  for (double width = (double)bracket.high - (double)bracket.low;; width *= 8) {
    const double end = (double)bracket.high + width;
    const float top = end < FLT_MAX ? (float)end : INFINITY;
    const Span near = collect(d, nextafterf(bracket.high, -INFINITY), top, ws.values);
    const uint64_t above = upper - weight_above(weight, near, -INFINITY);
    if (above >= target) continue;
    const Boundary edge = narrow(weight, near, above, target, near.x);
    return place_of(d, edge.x, ties_needed(weight, edge, target), edge.equal);
  }
}

struct Found {
  Place<float> low;  // the last token that is kept
  uint64_t total;    // of what it keeps, if ws.group_mass holds that group by group; else 0
};

// Top-p of a domain, all of whose tokens are its base set.
template <class Domain, class Weight>
Found find_top_p(const Domain& d, const Weight& weight, const Workspace& ws) {
  const Bracket bracket = find_bracket(weight, d, ws);
  const Split s = split(weight, d, bracket, ws);
  const uint64_t target = weight.target(s.total);
  if (s.upper >= target) return Found{search_above(d, weight, bracket, s.upper, target, ws), 0};
  const Span middle = span_of(ws.values, s.middle.n);
  const Boundary edge = narrow(weight, middle, s.upper, target, ws.spare, true);
  const uint64_t from_low = reached(weight, edge);
  if (from_low < target) return Found{search_below(d, weight, bracket, from_low, target, ws), 0};
  const uint64_t m = ties_needed(weight, edge, target);
  return Found{add_segments(d, weight, edge, m, ws), edge.above + m * weight.one(edge.x)};
}

}  // namespace
}  // namespace fastsample

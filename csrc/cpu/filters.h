// Stage 7: the cutoffs of top-k and top-p.
#pragma once

#include "cpu/estimate.h"

namespace fastsample {
namespace {

// Adds the weight of block b.
template <class Weight, class Domain>
FS_INLINE void add_whole(const Domain& d, int b, const Weight& weight, typename Weight::Sum& sum) {
  const auto every = [](vf, int) { return from_bits(kAllLanes); };
  with_values(d, b, [&](const auto* x) { add_kept(weight, x, kBlock, every, sum); });
}

// Adds the mass that a cutoff keeps of block b.
template <class Domain>
FS_INLINE void add_block(const Domain& d, int b, Cutoff cut, const Weighing& weight, float lowest,
                         MassSum& sum) {
  if (!may_keep(d, b, cut) || upper_bound(d, b) < lowest) return;
  if (cut.x == -FLT_MAX && cut.id == INT32_MAX) {
    add_whole(d, b, weight, sum);
  } else if (cut.id == INT32_MAX) {
    const auto above = [&](vf v, int) { return ge(v, splat(cut.x)); };
    with_values(d, b, [&](const auto* x) { add_kept(weight, x, kBlock, above, sum); });
  } else {
    float buffer[kBlock];
    const auto kept = [&](vf v, int i) { return keeps(cut, v, ids(d, b, i)); };
    add_kept(weight, values(d, b, buffer), kBlock, kept, sum);
  }
}

// Mass that a cutoff keeps, in all and in each group.
template <class Domain>
uint64_t weigh_groups(const Domain& d, Cutoff cut, const Weigher& weigher, const Workspace& ws) {
  const Weighing weight = {weigher, 1.0f};
  const float lowest = weight.lowest();
  uint64_t total = 0;
  for (int g = 0; g < groups(d); ++g) {
    MassSum sum;
    for (int b = g * kGroup; b < group_end(d, g); ++b) {
      fetch_ahead(d, b, ws);
      add_block(d, b, cut, weight, lowest, sum);
    }
    ws.group_mass[g] = weight.total(sum);
    total += ws.group_mass[g];
  }
  return total;
}

// One pass over a domain: its weight, the weight from high up (in each group too), and the values
// in the bracket.
struct Split {
  uint64_t total, upper;
  Span middle;  // in id order; group g's part begins at segment[g]
};

// Block b's part of that: what it weighs, what lies below the bracket's upper end, and the
// bracket's values; returns how many. To compress each vector costs the same however many of its
// lanes count.
template <class Weight, class T>
FS_INLINE int split_block(const Weight& weight, const T* x, Bracket bracket, float* values,
                          typename Weight::Sum& all, typename Weight::Sum& rest) {
  constexpr int N = kAbreast < 4 ? kAbreast : 4;  // masks need registers too
  BlockBits inside = {};
  int n = 0;
  for (int i = 0; i < kBlock; i += N * kLanes) {
    const Pack<N> p = load_pack<N>(x + i);
    const auto w = weight.of(p, everywhere<N>());
    weight.add_all(all, w);
    Where<N> below;
    FS_EACH(N) below.m[u] = gt(splat(bracket.high), p.v[u]);
    if (bracket.high < INFINITY) weight.add_where(rest, w, below);
    FS_EACH(N) {
      const Mask in = gt_where(below.m[u], p.v[u], splat(bracket.low));
      if (kCompresses) {
        n += compress_store(values + n, p.v[u], in);
      } else {
        inside.set(i + u * kLanes, in);
      }
    }
  }
  if constexpr (!kCompresses) n = append(x, inside, values);
  return n;
}

template <class Weight, class Domain>
Split split(const Weight& weight, const Domain& d, Bracket bracket, const Workspace& ws) {
  const float lowest = weight.lowest();
  Split s = {0, 0, {ws.values, 0, bracket.low, bracket.high}};
  for (int g = 0; g < groups(d); ++g) {
    ws.segment[g] = s.middle.n;
    typename Weight::Sum all, rest, low;
    for (int b = g * kGroup; b < group_end(d, g); ++b) {
      if (!(upper_bound(d, b) > lowest)) continue;
      fetch_ahead(d, b, ws);
      if (upper_bound(d, b) > bracket.low) {
        with_values(d, b, [&](const auto* x) {
          s.middle.n += split_block(weight, x, bracket, ws.values + s.middle.n, all, rest);
        });
      } else if (Weight::kNeedsTotal) {
        add_whole(d, b, weight, low);
      }
    }
    ws.group_mass[g] = bracket.high < INFINITY ? weight.total(all) - weight.total(rest) : 0;
    s.upper += ws.group_mass[g];
    s.total += weight.total(all) + weight.total(low);
  }
  ws.segment[groups(d)] = s.middle.n;
  fill_up(ws.values, s.middle.n);
  return s;
}

// Adds to each group's mass what the boundary keeps of the group's values in the bracket, m ties
// first; returns the cutoff.
template <class Domain>
Cutoff add_segments(const Domain& d, const Weighing& weight, const Boundary& edge, uint64_t m,
                    const Workspace& ws) {
  Cutoff cut = {edge.x, INT32_MAX};
  const uint64_t each = weight.one(edge.x);
  const bool only_ties = edge.equal == ws.segment[groups(d)], some = m < (uint64_t)edge.equal;
  for (int g = 0; g < groups(d); ++g) {
    const float* x = ws.values + ws.segment[g];
    const int n = ws.segment[g + 1] - ws.segment[g];
    MassSum above;
    uint64_t equal = only_ties ? (uint64_t)n : 0;
    for (int i = 0; i < n && !only_ties; i += kAbreast * kLanes) {
      const Pack<kAbreast> p = load_pack<kAbreast>(x + i);
      Where<kAbreast> kept;
      FS_EACH(kAbreast) {
        const Mask own = first(n - i - u * kLanes);
        kept.m[u] = both(own, gt(p.v[u], splat(edge.x)));
        equal += (uint64_t)count(both(own, eq(p.v[u], splat(edge.x))));
      }
      weight.add(above, weight.of(p, kept));
    }
    const uint64_t ties = equal < m ? equal : m;
    if (some && m && ties == m) cut.id = nth_equal(d, edge.x, m, g * kGroup);
    m -= ties;
    ws.group_mass[g] += total(above) + ties * each;
  }
  return cut;
}

template <class Domain>
Cutoff add_segments(const Domain& d, const Counting&, const Boundary& edge, uint64_t m,
                    const Workspace&) {
  return cut_at(d, edge.x, m, edge.equal);
}

struct Found {
  Cutoff cut;
  uint64_t
      total;  // what the cutoff keeps, when workspace.group_mass holds it group by group; else 0
};

// The cutoff at which the weight of a domain's rank order reaches the weight's target.
template <class Weight, class Domain>
Found find_cutoff(const Weight& weight, const Domain& d, const Workspace& ws) {
  const Bracket bracket = find_bracket(weight, d, ws);
  const Split s = split(weight, d, bracket, ws);
  const uint64_t target = weight.target(s.total);
  if (s.upper < target) {
    Span middle = span_of(ws.values, s.middle.n);
    if (middle.low < middle.high) middle = copy(middle.x, middle.n, ws.spare);  // to be reordered
    const Boundary edge = narrow(weight, middle, s.upper, target);
    if (reached(weight, edge) >= target) {
      const uint64_t m = ties_needed(weight, edge, target);
      return Found{add_segments(d, weight, edge, m, ws), edge.above + m * weight.one(edge.x)};
    }
    // Below the bracket. All there is may still be too little for a count: then everything is kept.
    const Span rest = collect(d, weight.lowest(), nextafterf(bracket.low, INFINITY), ws.values);
    const Boundary last = narrow(weight, rest, reached(weight, edge), target);
    if (reached(weight, last) < target) return Found{kKeepAlive, 0};
    return Found{cut_at(d, last.x, ties_needed(weight, last, target), last.equal), 0};
  }
  // Above the bracket, or at its upper end, where the ties may be many.
  const Span rest = collect(d, bracket.high, INFINITY, ws.values);
  const uint64_t above = weight_above(weight, rest, -INFINITY);
  const int equal = (int)((s.upper - above) / weight.one(bracket.high));
  const Boundary edge =
      above < target ? Boundary{bracket.high, equal, above} : narrow(weight, rest, 0, target);
  return Found{cut_at(d, edge.x, ties_needed(weight, edge, target), edge.equal), 0};
}

// The k-th largest block maximum: at least k tokens are not below it, and few are above.
template <class T>
Cutoff small_top_k(const Dense<T>& d, int32_t k, const Workspace& ws) {
  const Span peaks = copy(d.block_max, d.row.blocks, ws.values);
  if (peaks.n < k) return find_cutoff(Counting{(uint64_t)k}, d, ws).cut;
  if (k == 1) return Cutoff{peaks.high, nth_equal(d, peaks.high, 1)};
  const float bound = narrow(Counting{}, peaks, 0, (uint64_t)k).x;
  const Span above = collect(d, bound, INFINITY, ws.values);
  if (above.n < k) return Cutoff{bound, nth_equal(d, bound, (uint64_t)(k - above.n))};
  const Boundary edge = narrow(Counting{}, above, 0, (uint64_t)k);
  return cut_at(d, edge.x, (uint64_t)k - edge.above, edge.equal);
}

FS_INLINE Cutoff small_top_k(const List& d, int32_t k, const Workspace& ws) {
  return find_cutoff(Counting{(uint64_t)k}, d, ws).cut;
}

template <class Domain>
Cutoff top_k_cutoff(const Domain& d, int32_t k, int32_t ties, const Workspace& ws) {
  Cutoff cut =
      k <= blocks(d) ? small_top_k(d, k, ws) : find_cutoff(Counting{(uint64_t)k}, d, ws).cut;
  if (ties == kTiesAll) cut.id = INT32_MAX;
  return cut;
}

// top-p over the whole domain; `weigher.floor` leaves out what min-p dropped before.
template <class Domain>
Found top_p_cutoff(const Domain& d, const Weigher& weigher, float top_p, const Workspace& ws) {
  return find_cutoff(Weighing{weigher, top_p}, d, ws);
}

}  // namespace
}  // namespace fastsample

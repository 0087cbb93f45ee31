// Stage 7: the cutoffs of top-k and top-p.
#pragma once

#include "cpu/process.h"
#include "cpu/select.h"

namespace fastsample {
namespace {

// A domain is a set of tokens in id order, in blocks of kBlock: a whole row, or a list gathered
// from it.
template <class T>
struct Dense {
  Row<T> row;
  const float* block_max;
};

struct List {
  const float* x;     // [n + kPad], -inf past n
  const int32_t* id;  // [n + kPad], ascending
  int32_t n;
};

template <class T>
FS_INLINE int blocks(const Dense<T>& d) {
  return d.row.blocks;
}
template <class T>
FS_INLINE float upper_bound(const Dense<T>& d, int b) {
  return d.block_max[b];
}
template <class T>
FS_INLINE const float* values(const Dense<T>& d, int b, float* buffer) {
  return block(d.row, b, buffer);
}
template <class T>
FS_INLINE vi ids(const Dense<T>&, int b, int i) {
  return iota() + (b * kBlock + i);
}

template <class T>
FS_INLINE int32_t id_at(const Dense<T>&, int b, int i) {
  return b * kBlock + i;
}

// Blocks stand in groups of kGroup.
template <class Domain>
FS_INLINE int groups(const Domain& d) {
  return (blocks(d) + kGroup - 1) / kGroup;
}
template <class Domain>
FS_INLINE int group_end(const Domain& d, int g) {
  return (g + 1) * kGroup < blocks(d) ? (g + 1) * kGroup : blocks(d);
}

FS_INLINE int blocks(const List& l) { return (l.n + kBlock - 1) / kBlock; }
FS_INLINE float upper_bound(const List&, int) { return INFINITY; }
FS_INLINE const float* values(const List& l, int b, float*) { return l.x + b * kBlock; }
FS_INLINE vi ids(const List& l, int b, int i) { return load(l.id + b * kBlock + i); }
FS_INLINE int32_t id_at(const List& l, int b, int i) { return l.id[b * kBlock + i]; }

constexpr Cutoff kKeepAlive = {-FLT_MAX, INT32_MAX};  // everything above -inf

FS_INLINE Mask keeps(Cutoff c, vf x, vi id) {
  return either(gt(x, splat(c.x)), both(eq(x, splat(c.x)), le(id, splat(c.id))));
}

// The values x of a domain with low < x < high.
template <class Domain>
Span collect(const Domain& d, float low, float high, float* to) {
  float buffer[kBlock];
  int n = 0;
  for (int b = 0; b < blocks(d); ++b) {
    if (!(upper_bound(d, b) > low)) continue;
    const float* x = values(d, b, buffer);
    append(x, block_bits(x, [&](vf v, int) { return both(gt(v, splat(low)), gt(splat(high), v)); }),
           to, &n);
  }
  return copy(to, n, to);
}

// The id of the m-th token (from 1) whose logit equals x, in id order; INT32_MAX where there are
// fewer.
template <class Domain>
int32_t nth_equal(const Domain& d, float x, uint64_t m) {
  float buffer[kBlock];
  for (int b = 0; b < blocks(d); ++b) {
    if (!(upper_bound(d, b) >= x)) continue;
    const float* v = values(d, b, buffer);
    for (int i = 0; i < kBlock; i += kLanes) {
      uint32_t equal = bits(eq(load(v + i), splat(x)));
      const uint64_t here = (uint64_t)__builtin_popcount(equal);
      if (here < m) {
        m -= here;
        continue;
      }
      for (; m > 1; --m) equal &= equal - 1;
      return ids(d, b, i)[__builtin_ctz(equal)];
    }
  }
  return INT32_MAX;
}

// The cutoff that keeps m of the `equal` tokens at x.
template <class Domain>
Cutoff cut_at(const Domain& d, float x, uint64_t m, int equal) {
  return Cutoff{x, m == (uint64_t)equal ? INT32_MAX : nth_equal(d, x, m)};
}

// Adds the mass that a cutoff keeps of block b.
template <class Domain>
FS_INLINE void add_block(const Domain& d, int b, Cutoff cut, const Weighing& weight, float lowest,
                         MassSum& sum) {
  if (upper_bound(d, b) < cut.x || upper_bound(d, b) < lowest) return;
  float buffer[kBlock];
  const float* x = values(d, b, buffer);
  if (cut.x == -FLT_MAX && cut.id == INT32_MAX) {
    add_kept(weight, x, kBlock, [](vf, int) { return from_bits(kAllLanes); }, sum);
  } else if (cut.id == INT32_MAX) {
    add_kept(weight, x, kBlock, [&](vf v, int) { return ge(v, splat(cut.x)); }, sum);
  } else {
    add_kept(weight, x, kBlock, [&](vf v, int i) { return keeps(cut, v, ids(d, b, i)); }, sum);
  }
}

// Mass that a cutoff keeps, in all and in each group.
template <class Domain>
uint64_t weigh_groups(const Domain& d, Cutoff cut, const Weigher& weigher, uint64_t* group_mass) {
  const Weighing weight = {weigher, 1.0f};
  const float lowest = weight.lowest();
  uint64_t total = 0;
  for (int g = 0; g < groups(d); ++g) {
    MassSum sum;
    for (int b = g * kGroup; b < group_end(d, g); ++b) add_block(d, b, cut, weight, lowest, sum);
    group_mass[g] = weight.total(sum);
    total += group_mass[g];
  }
  return total;
}

// Where the boundary is believed to lie: low < x < high. A wrong belief costs time, never a token.
struct Bracket {
  float low, high;
};

// Some values of a domain, evenly spread, about kSample of them; returns how many tokens each
// stands for.
constexpr int kSample = 2048;

template <class Domain>
double take_sample(const Domain& d, float* to, int* n) {
  constexpr int kTaken = 32, kStride = kBlock / kTaken;  // of each sampled block
  float buffer[kBlock];
  const int sampled = blocks(d) < kSample / kTaken ? blocks(d) : kSample / kTaken;
  for (int s = 0; s < sampled; ++s) {
    const int b = (int)((2 * (int64_t)s + 1) * blocks(d) / (2 * sampled));
    const float* x = values(d, b, buffer);
    for (int i = 0; i < kTaken; ++i) to[s * kTaken + i] = x[i * kStride + s % kStride];
  }
  *n = sampled * kTaken;
  return (double)blocks(d) * kBlock / *n;
}

// The highest fifth of a row's block maxima: nearly all of its highest tokens, each of which stands
// for itself.
template <class T>
Span take_heads(const Dense<T>& d, float* to) {
  Span all = copy(d.block_max, d.row.blocks, to);
  if (!all.n) return Span{to, 0, INFINITY, INFINITY};
  const float edge = narrow(Counting{}, all, 0, (uint64_t)all.n / 5 + 1).x;
  return filter(d.block_max, d.row.blocks, to, [&](vf v) { return ge(v, splat(edge)); });
}

FS_INLINE Span take_heads(const List&, float* to) { return Span{to, 0, INFINITY, INFINITY}; }

// Estimates the boundary from the heads (the top of the distribution) and a sample (its body).
template <class Weight, class Domain>
Bracket find_bracket(const Weight& weight, const Domain& d, const Workspace& ws) {
  if (blocks(d) < 2 * kSample / kBlock) return Bracket{weight.lowest(), INFINITY};
  Span heads = take_heads(d, ws.spare);
  float* spare = ws.spare + heads.n + kPad;
  int n;
  const double each = take_sample(d, ws.values, &n);
  double head = (double)weight_above(weight, heads, -INFINITY);
  // Where few tokens lie above a value that the boundary cannot lie below, there is nothing to
  // estimate.
  const float certain = weight.certain_low(head, (double)blocks(d) * kBlock);
  const Span few = filter(ws.values, n, spare, [&](vf v) { return gt(v, splat(certain)); });
  if (few.n < n / 32) return Bracket{certain, INFINITY};
  // Sorted rows hide their highest tokens behind few block maxima; the sample tells.
  const Span shared = filter(ws.values, n, spare, [&](vf v) { return ge(v, splat(heads.low)); });
  if (shared.n > 8 + 2 * heads.n / each) {
    heads = Span{ws.spare, 0, INFINITY, INFINITY};
    head = 0;
  }
  const auto below_heads = [&](vf v) {
    return both(gt(v, splat(-INFINITY)), gt(splat(heads.low), v));
  };
  const Span body = filter(ws.values, n, ws.values, below_heads);
  const double mean = (double)weight_above(weight, body, -INFINITY);
  const double target = weight.estimate_target(head + each * mean);
  if (target <= 0) return Bracket{weight.lowest(), INFINITY};  // what has mass, the sample missed
  const auto value_at = [&](double goal, float none) {
    if (goal <= 0) return (float)INFINITY;
    if (goal < head) return narrow(weight, copy(heads.x, heads.n, spare), 0, (uint64_t)goal + 1).x;
    const double rest = (goal - head) / each;
    return rest < mean ? narrow(weight, copy(body.x, body.n, spare), 0, (uint64_t)rest + 1).x
                       : none;
  };
  // Two and a half standard deviations of the estimate, were the sample Poisson: what lies above
  // the boundary counts against what lies below it as far as both move the target.
  const double share = weight.share();
  const float guess = value_at(target, weight.lowest());
  double above, below;
  sum_squares(weight, body, guess, &above, &below);
  above += (double)weight.one(guess) * (double)weight.one(guess);
  const double slack = 2.5 * each * sqrt((1 - share) * (1 - share) * above + share * share * below);
  const float high = value_at(target - slack, -FLT_MAX),
              low = value_at(target + slack, weight.lowest());
  return Bracket{low < high ? low : nextafterf(high, -INFINITY), high};
}

// One pass over a domain: its weight, the weight from high up (in each group too), and the values
// in the bracket.
struct Split {
  uint64_t total, upper;
  Span middle;  // in id order; group g's part begins at segment[g]
};

// Block b's part of that.
template <class Weight>
FS_INLINE void split_block(const Weight& weight, const float* x, Bracket bracket, float* values,
                           int* n, typename Weight::Sum& all, typename Weight::Sum& upper) {
  BlockBits inside = {};
  for (int i = 0; i < kBlock; i += kAbreast * kLanes) {
    const Pack<kAbreast> p = load_pack<kAbreast>(x + i);
    const typename Weight::Of w = weight.of(p);
    Mask every[kAbreast], high[kAbreast];
    FS_EACH(kAbreast) every[u] = from_bits(kAllLanes);
    FS_EACH(kAbreast) high[u] = ge(p.v[u], splat(bracket.high));
    if (Weight::kNeedsTotal) weight.add(all, w, every);
    if (bracket.high < INFINITY) weight.add(upper, w, high);
    FS_EACH(kAbreast) {
      inside.set(i + u * kLanes, but_not(gt(p.v[u], splat(bracket.low)), high[u]));
    }
  }
  append(x, inside, values, n);
}

template <class Weight, class Domain>
Split split(const Weight& weight, const Domain& d, Bracket bracket, const Workspace& ws) {
  const float lowest = Weight::kNeedsTotal ? weight.lowest() : bracket.low;
  float buffer[kBlock];
  Split s = {0, 0, {ws.values, 0, bracket.low, bracket.high}};
  for (int g = 0; g < groups(d); ++g) {
    ws.segment[g] = s.middle.n;
    typename Weight::Sum all, upper;
    for (int b = g * kGroup; b < group_end(d, g); ++b) {
      if (!(upper_bound(d, b) > lowest)) continue;
      const float* x = values(d, b, buffer);
      if (upper_bound(d, b) > bracket.low) {
        split_block(weight, x, bracket, ws.values, &s.middle.n, all, upper);
      } else {
        add_kept(weight, x, kBlock, [](vf, int) { return from_bits(kAllLanes); }, all);
      }
    }
    if (Weight::kNeedsTotal) s.total += weight.total(all);
    ws.group_mass[g] = weight.total(upper);
    s.upper += ws.group_mass[g];
  }
  ws.segment[groups(d)] = s.middle.n;
  fill_up(ws.values, s.middle.n);
  return s;
}

// Adds to each group's mass what the boundary keeps of the group's values in the bracket, m ties
// first.
FS_INLINE void add_segments(const Weighing& weight, const Boundary& edge, uint64_t m, int groups,
                            const Workspace& ws) {
  const uint64_t each = weight.one(edge.x);
  for (int g = 0; g < groups; ++g) {
    const float* x = ws.values + ws.segment[g];
    const int n = ws.segment[g + 1] - ws.segment[g];
    MassSum above;
    uint64_t equal = 0;
    for (int i = 0; i < n; i += kAbreast * kLanes) {
      const Pack<kAbreast> p = load_pack<kAbreast>(x + i);
      Mask kept[kAbreast];
      FS_EACH(kAbreast) {
        const Mask own = first(n - i - u * kLanes);
        kept[u] = both(own, gt(p.v[u], splat(edge.x)));
        equal += (uint64_t)count(both(own, eq(p.v[u], splat(edge.x))));
      }
      weight.add(above, weight.of(p), kept);
    }
    const uint64_t ties = equal < m ? equal : m;
    m -= ties;
    ws.group_mass[g] += total(above) + ties * each;
  }
}

FS_INLINE void add_segments(const Counting&, const Boundary&, uint64_t, int, const Workspace&) {}

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
    const Boundary edge = narrow(weight, copy(ws.values, s.middle.n, ws.spare), s.upper, target);
    if (reached(weight, edge) >= target) {
      const uint64_t m = ties_needed(weight, edge, target);
      add_segments(weight, edge, m, groups(d), ws);
      return Found{cut_at(d, edge.x, m, edge.equal), edge.above + m * weight.one(edge.x)};
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

// The first n tokens of a pair of buffers as a domain.
FS_INLINE List list_of(float* x, int32_t* id, int n) {
  fill_up(x, n);
  for (int i = 0; i < kPad; i += kLanes) store(id + n + i, splat(INT32_MAX));
  return List{x, id, n};
}

// The tokens a cutoff keeps, in id order.
template <class Domain>
List gather(const Domain& d, Cutoff cut, float* x, int32_t* id) {
  float buffer[kBlock];
  int n = 0;
  for (int b = 0; b < blocks(d); ++b) {
    if (upper_bound(d, b) < cut.x) continue;
    const float* v = values(d, b, buffer);
    const BlockBits set =
        cut.id == INT32_MAX
            ? block_bits(v, [&](vf value, int) { return ge(value, splat(cut.x)); })
            : block_bits(v, [&](vf value, int i) { return keeps(cut, value, ids(d, b, i)); });
    each_set(
        set, &n,
        [&](int to,
            const int (&at)[kGuess]) {  // x and id may be the domain's own: read, then write
          float value[kGuess];
          int32_t token[kGuess];
          FS_EACH(kGuess) value[u] = v[at[u]];
          FS_EACH(kGuess) token[u] = id_at(d, b, at[u]);
          memcpy(x + to, value, sizeof value);
          memcpy(id + to, token, sizeof token);
        },
        [&](int to, int i, Mask m) {
          const vf value = load(v + i);
          compress_store(id + to, ids(d, b, i), m);
          compress_store(x + to, value, m);
        });
  }
  return list_of(x, id, n);
}

}  // namespace
}  // namespace fastsample

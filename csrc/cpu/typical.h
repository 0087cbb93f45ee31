// Stage 7, typical: the tokens nearest to the mean logit, of both sides, whose mass reaches the
// target.
#pragma once

#include "cpu/estimate.h"
#include "cpu/stats.h"

namespace fastsample {
namespace {

// Values in no order, filled up with -inf, and the range of their distances from a mean.
struct Around {
  float* x;
  int n;
  float near, far;
};

FS_INLINE vf distance(vf x, float mean) { return (vf)((vu)(x - mean) & INT32_MAX); }

// Copies the n values for which keep(distance) holds to `to` (which may be x itself).
template <class Keep>
FS_INLINE Around keep_around(const float* x, int n, float* to, float mean, Keep keep) {
  Around kept = {to, 0, 0, 0};
  vf near = splat(INFINITY), far = splat(0.0f);
  for (int i = 0; i < n; i += kLanes) {
    const vf v = load(x + i), d = distance(v, mean);
    const Mask m = both(first(n - i), keep(d));
    near = select(m, min(near, d), near);
    far = select(m, max(far, d), far);
    kept.n += compress_store(to + kept.n, v, m);
  }
  fill_up(to, kept.n);
  kept.near = reduce_min(near);
  kept.far = reduce_max(far);
  return kept;
}

// The weight of the values at most this far away.
template <class Weight>
uint64_t weight_within(const Weight& weight, const Around& s, float mean, float limit) {
  constexpr int kMost = kGroup * kBlock;  // that a Sum can hold
  const auto within = [&](vf v, int) { return ge(splat(limit), distance(v, mean)); };
  uint64_t weighed = 0;
  for (int begin = 0; begin < s.n; begin += kMost) {
    typename Weight::Sum sum;
    add_kept(weight, s.x + begin, s.n - begin < kMost ? s.n - begin : kMost, within, sum);
    weighed += weight.total(sum);
  }
  return weighed;
}

// The weight of n values, from a few of them.
template <class Weight>
double estimate_weight(const Weight& weight, const float* x, int n) {
  constexpr int kFew = 16;
  double sum = 0;
  for (int i = 0; i < kFew; ++i) sum += (double)weight.one(x[(int64_t)n * i / kFew]);
  return sum / kFew * n;
}

// The distance within which `inside` and the weight of s, from the nearest on, reach the target.
// Where the weight is spread evenly over the range (`even`), pivots near the expected place leave
// few values; see narrow().
template <class Weight>
float nearest_limit(const Weight& weight, Around s, float mean, uint64_t inside, uint64_t target,
                    bool even = false) {
  double left = even ? estimate_weight(weight, s.x, s.n) : 0;
  for (int round = 0; key_of(s.near) < key_of(s.far); ++round) {
    double share = 0.5;  // of the range, on the near side
    if (left > 0) {
      share = (double)(target - inside) / left;
      share += (share > 0.5 ? -1.5 : 1.5) / sqrt((double)s.n);
    }
    const float pivot =
        round % 3 == 2 ? middle_key(s.near, s.far) : value_below(s.near, s.far, 1 - share);
    const uint64_t more = weight_within(weight, s, mean, pivot);
    if (inside + more >= target) {
      s = keep_around(s.x, s.n, s.x, mean, [&](vf d) { return ge(splat(pivot), d); });
      if (even) left = (double)more;
    } else {
      inside += more;
      left -= (double)more;
      s = keep_around(s.x, s.n, s.x, mean, [&](vf d) { return gt(d, splat(pivot)); });
    }
  }
  return s.far;
}

// The values of what is kept that may have mass.
template <class Domain, class Weight>
Around collect_kept(const Domain& d, const Kept<float>& kept, const Weight& weight, float mean,
                    float* to) {
  const Place<float> light = {weight.lowest(), INT32_MAX};
  const Kept<float> within = narrow_above(kept, light);
  float buffer[kBlock];
  int n = 0;
  for (int b = 0; b < blocks(d); ++b) {
    if (!may_keep(d, b, within)) continue;
    const float* x = values(d, b, buffer);
    n += append(x, bits_within(d, b, x, within), to + n);
  }
  return keep_around(to, n, to, mean, [](vf) { return from_bits(kAllLanes); });
}

// How far from the mean typical keeps tokens of what is kept so far.
template <class Domain, class Weight>
float typical_limit(const Domain& d, const Kept<float>& kept, const Weight& weight, float mean,
                    uint64_t target, const Workspace& ws) {
  const Around all = collect_kept(d, kept, weight, mean, ws.values);
  return nearest_limit(weight, all, mean, 0, target);
}

// A sample by distance: its values are replaced by negative distances, so that the nearest is the
// highest.
FS_INLINE void negate_distances(float* x, int n, float mean) {
  for (int i = 0; i < n; i += kLanes) store(x + i, splat(0.0f) - distance(load(x + i), mean));
  fill_up(x, n);
}

// How far off the weight at `edge` or above it may be: two and a half standard deviations.
FS_INLINE double uncertainty_of_share(const Sample& s, float edge, double share) {
  double above = 0, below = 0;
  for (int i = 0; i < s.n; ++i) {
    const double square = (double)s.weight[i] * (double)s.weight[i];
    (s.x[i] >= edge ? above : below) += square;
  }
  return 2.5 * s.each * sqrt((1 - share) * (1 - share) * above + share * share * below);
}

// The distances between which the limit probably lies. A wrong estimate costs time, but changes no
// token.
struct Distances {
  float near, far;
};

template <class Weight>
Distances find_distances(StandIns& s, const Weight& weight, float mean, double share,
                         const Workspace& ws) {
  const Span& heads = s.heads;
  Sample& body = s.body;
  float* head_weight = ws.spare + heads.n + kPad;
  weight.roughly(body.x, body.n, body.weight);
  weight.roughly(heads.x, heads.n, head_weight);
  negate_distances(body.x, body.n, mean);
  negate_distances(heads.x, heads.n, mean);
  const Span a = span_of(body.x, body.n), b = span_of(heads.x, heads.n);
  const float low = a.low < b.low ? a.low : b.low, high = a.high > b.high ? a.high : b.high;
  if (!(low <= high)) return {0, INFINITY};
  Histogram h(low, high);
  h.add(body.x, body.weight, body.n, (float)body.each);
  h.add(heads.x, head_weight, heads.n, 1.0f);
  h.accumulate();
  const double target = share * (double)h.total();
  const double slack = uncertainty_of_share(body, h.below(h.reach(target)), share);
  const int top = target > slack ? h.reach(target - slack) : 0;
  return {-h.above(top), -h.below(h.reach(target + slack))};
}

// Some of n values, evenly spread, for which keep(x) holds; returns how many.
template <class Keep>
FS_INLINE int take_some(const float* x, int n, float* to, Keep keep) {
  constexpr int kFew = 512;
  const int few = n < kFew ? n : kFew;
  const double step = few ? (double)n / few : 0;
  for (int i = 0; i < few; ++i) to[i] = x[(int)(i * step)];
  return filter(to, few, to, keep).n;
}

// Where the limit probably lies, from some of the n values in ws.values, which are about as far
// away: within it they weigh `missing`. Those above the mean are few and heavy, those below it many
// and light. Three and a half standard deviations, since missing the limit costs two passes.
template <class Weight>
Distances find_among(const Weight& weight, int n, float mean, double missing, const Workspace& ws) {
  const float* x = ws.values;
  const auto is_above = [&](vf v) { return gt(v, splat(mean)); };
  const auto is_below = [&](vf v) { return ge(splat(mean), v); };
  const Span above = filter(x, n, ws.spare, is_above);
  Sample some;
  const int high = take_some(above.x, above.n, some.x, is_above);
  some.n = high + take_some(x, n, some.x + high, is_below);
  fill_up(some.x, some.n);
  weight.roughly(some.x, some.n, some.weight);
  const double each[2] = {high ? (double)above.n / high : 0,
                          some.n > high ? (double)(n - above.n) / (some.n - high) : 0};
  for (int i = 0; i < some.n; ++i) some.weight[i] *= (float)each[i >= high];
  negate_distances(some.x, some.n, mean);
  const Span span = span_of(some.x, some.n);
  Histogram h(span.low, span.high);
  h.add(some.x, some.weight, some.n, 1.0f);
  h.accumulate();
  const float edge = h.below(h.reach(missing));
  double squares = 0;
  for (int i = 0; i < some.n; ++i) {
    if (some.x[i] < edge) continue;
    squares += (1 - 1 / each[i >= high]) * (double)some.weight[i] * (double)some.weight[i];
  }
  const double slack = 3.5 * sqrt(squares);
  const int top = missing > slack ? h.reach(missing - slack) : 0;
  return {-h.above(top), -h.below(h.reach(missing + slack))};
}

// Values about as far from the mean as the limit, in ws.values, group g's from segment[g] on, and
// the mass of what is nearer, which ws.group_mass holds by groups.
struct Ring {
  uint64_t inside;
  int n;
  Distances bounds;
};

// Where these are many, an estimate of the limit from some of them leaves few: those beyond it are
// dropped, those nearer are added to the masses.
template <class T, class Weight>
void narrow_ring(const Dense<T>& d, const Weight& weight, float mean, uint64_t target, Ring* ring,
                 const Workspace& ws) {
  constexpr int kMany = 4096;
  if (ring->n < kMany || ring->inside >= target) return;
  const double missing = (double)(target - ring->inside);
  const Distances found = find_among(weight, ring->n, mean, missing, ws);
  const Distances before = ring->bounds;
  const Distances bounds = {found.near > before.near ? found.near : before.near,
                            found.far < before.far ? found.far : before.far};
  int left = 0;
  for (int g = 0; g < groups(d); ++g) {
    const int begin = ws.segment[g], n = ws.segment[g + 1] - begin;
    const float* x = ws.values + begin;
    const auto nearer = [&](vf v) { return gt(splat(bounds.near), distance(v, mean)); };
    const uint64_t mass = weigh_some(weight, x, n, nearer);
    ws.group_mass[g] += mass;
    ring->inside += mass;
    ws.segment[g] = left;
    for (int i = 0; i < n; i += kLanes) {
      const vf v = load(x + i), away = distance(v, mean);
      const Mask within = both(first(n - i), ge(splat(bounds.far), away));
      left += compress_store(ws.spare + left, v, but_not(within, gt(splat(bounds.near), away)));
    }
  }
  fill_up(ws.spare, left);
  memcpy(ws.values, ws.spare, (size_t)(left + kLanes) * sizeof *ws.values);
  ws.segment[groups(d)] = ring->n = left;
  ring->bounds = bounds;
}

// The distance within which the ring's values and what is nearer reach the target.
template <class Weight>
float limit_within(const Weight& weight, float mean, uint64_t target, const Ring& ring,
                   const Workspace& ws) {
  const auto every = [](vf) { return from_bits(kAllLanes); };
  const Around around = keep_around(ws.values, ring.n, ws.spare, mean, every);
  return nearest_limit(weight, around, mean, ring.inside, target, true);
}

// Adds to each group's mass what lies within the limit of the values in ws.values.
template <class T, class Weight>
uint64_t add_within(const Dense<T>& d, const Weight& weight, float mean, float limit,
                    const Workspace& ws) {
  uint64_t total = 0;
  for (int g = 0; g < groups(d); ++g) {
    const float* x = ws.values + ws.segment[g];
    ws.group_mass[g] += weigh_some(weight, x, ws.segment[g + 1] - ws.segment[g],
                                   [&](vf v) { return ge(splat(limit), distance(v, mean)); });
    total += ws.group_mass[g];
  }
  return total;
}

struct Limit {
  float distance;
  uint64_t total;  // of what lies within it, which ws.group_mass holds; 0 where it is not found
};

// The limit in a row that is all kept so far: one pass weighs what is nearer than an
// estimate of it, and copies what is about as far away.
template <class T, class Weight>
Limit estimated_limit(const Dense<T>& d, const Weight& weight, float mean, double share,
                      uint64_t target, const Workspace& ws) {
  constexpr int N = kAbreast;
  StandIns sample;
  if (!take_stand_ins(d, weight, ws, &sample)) return {0, 0};
  const Distances about = find_distances(sample, weight, mean, share, ws);
  const float lowest = weight.lowest(), farthest = -highest_near(-mean, about.far);
  const float from = farthest > lowest ? farthest : lowest;
  uint64_t inside = 0;
  float* end = ws.values;
  for (int g = 0; g < groups(d); ++g) {
    ws.segment[g] = (int32_t)(end - ws.values);
    MassSum sum;
    const auto counts = [&](int b) { return upper_bound(d, b) >= from; };
    each_run(d, g, counts, [&](auto run, auto near) {
      const Weight own = weight;  // copies: to the compiler, a store might change the originals
      const Distances bounds = about;
      const float center = mean, least = lowest;
      MassSum run_sum;
      float* next = end;
      const auto* x = run.x;
      for (int i = 0; i < (run.end - run.begin) * kBlock; i += N * kLanes) {
        const Pack<N> p = load_pack<N>(x + i);
        Where<N> nearer;
        Mask around[N];
        FS_EACH(N) {
          const vf away = distance(p.v[u], center);
          nearer.m[u] = gt(splat(bounds.near), away);
          const Mask within = both(ge(splat(bounds.far), away), gt(p.v[u], splat(least)));
          around[u] = but_not(within, nearer.m[u]);
        }
        add(run_sum, own.of(p, nearer, near));
        FS_EACH(N) next += compress_store(next, p.v[u], around[u]);
      }
      sum += run_sum;
      end = next;
    });
    ws.group_mass[g] = weight.total(sum);
    inside += ws.group_mass[g];
  }
  const int n = (int)(end - ws.values);
  ws.segment[groups(d)] = n;
  fill_up(ws.values, n);
  Ring ring = {inside, n, about};
  narrow_ring(d, weight, mean, target, &ring, ws);
  if (!ring.n || ring.inside >= target) return {0, 0};
  const float limit = limit_within(weight, mean, target, ring, ws);
  const uint64_t total = add_within(d, weight, mean, limit, ws);
  return total >= target ? Limit{limit, total} : Limit{0, 0};
}

}  // namespace
}  // namespace fastsample

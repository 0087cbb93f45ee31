// Typical in a row that is all kept so far, by one pass over it.
#pragma once

#include "cpu/crowd.h"
#include "cpu/rough.h"

namespace fastsample {
namespace {

// A row divided by distances from a center: the mass of the row, that of what is certainly within
// the limit (in ws.group_mass by groups), and the values of what may be (in ws.values, group g's
// part from segment[g] on).
struct Division {
  uint64_t total, inside;
  int around;
  vd depth;
};

// A block's share of it; returns the end of the values that it has copied.
template <bool kReaches, class T, class Weight>
FS_INLINE float* divide_block(const Weight& weight, const T* x, bool near, float center,
                              Distances bounds, float* values, vd& depth, MassSum& all,
                              MassSum& inside) {
  constexpr int N = kAbreast;
  const OfDepth factor(weight.weigher);
  vf product = {};
  BlockBits around = {};
  for (int i = 0; i < kBlock; i += N * kLanes) {
    const Pack<N> p = load_pack<N>(x + i);
    const Pack<N> q = weight.of(p, everywhere<N>(), near), f = factor(p, q);
    product = product + add_products(q, f);
    FixedSum sum, some;
    FS_EACH(N) {
      if (!kReaches) {
        sum.add(q.v[u]);
        continue;
      }
      const vf away = distance(p.v[u], center);
      const Mask within = ge(splat(bounds.far), away);
      const Mask nearer = gt_where(within, splat(bounds.near), away);
      sum.add(q.v[u], some, nearer);
      if (kCompresses) {
        values += compress_store(values, p.v[u], but_not(within, nearer));
      } else {
        around.set(i + u * kLanes, but_not(within, nearer));
      }
    }
    add(all, sum);
    if (kReaches) add(inside, some);
  }
  if constexpr (kReaches && !kCompresses) values += append(x, around, values);
  depth = depth + widen_sum(product);
  return values;
}

template <class T, class Weight>
Division divide(const Dense<T>& d, const Weight& weight, float center, Distances bounds,
                const Workspace& ws) {
  const float lowest = weight.lowest(), from = -highest_near(-center, bounds.far);
  const auto has_mass = [&](int b) { return upper_bound(d, b) >= lowest; };
  Division found = {0, 0, 0, {}};
  float* end = ws.values;
  for (int g = 0; g < groups(d); ++g) {
    ws.segment[g] = (int32_t)(end - ws.values);
    MassSum all, inside;
    each_run(d, g, has_mass, [&](auto run, auto near) {
      const Weight own = weight;  // copies: to the compiler, a store might change the originals
      const Distances own_bounds = bounds;
      const float own_center = center;
      vd depth = {};
      MassSum run_all, run_inside;
      float* next = end;
      for (int b = run.begin; b < run.end; ++b) {
        const auto* x = run.x + (b - run.begin) * kBlock;
        fetch_ahead(d, b, ws);
        next = upper_bound(d, b) >= from ? divide_block<true>(own, x, near, own_center, own_bounds,
                                                              next, depth, run_all, run_inside)
                                         : divide_block<false>(own, x, near, own_center, own_bounds,
                                                               next, depth, run_all, run_inside);
      }
      end = next;
      found.depth = found.depth + depth;
      all += run_all;
      inside += run_inside;
    });
    ws.group_mass[g] = weight.total(inside);
    found.inside += ws.group_mass[g];
    found.total += weight.total(all);
  }
  found.around = ws.segment[groups(d)] = (int32_t)(end - ws.values);
  fill_up(ws.values, found.around);
  return found;
}

// The mean logit from below and above.
struct MeanBounds {
  float low, high;
};

template <class T>
MeanBounds bound_mean(const Dense<T>& d, const LogitWeigher& w, const Division& found) {
  const Bounded depth = depth_bounds(bounds_of_products(found.depth), (double)blocks(d) * kBlock);
  const double all = (double)found.total, slack = 0x1p-40;  // far above the contract's roundings
  return {mean_logit(depth.high / all * (1 + slack), w.max, w.scale),
          mean_logit(fmax(depth.low, 0) / all * (1 - slack), w.max, w.scale)};
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
  const Distances found = find_among(weight, ring->n, mean, missing, ring->bounds, ws);
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

// Whether the tokens within `limit` of a mean are those that the contract keeps, whose mean is off
// by at most `error`: the farthest of them have one value, and all else that is about as far away
// lies on its side of the mean, in the order of the logits. Two distances change by 2 errors and
// their roundings against each other, and differ where logits on a side are further apart than the
// distances are rounded.
bool is_certain(const float* x, int n, float mean, float limit, double error) {
  if (error == 0) return true;  // so are all distances
  const double slack = 2 * error + (double)limit * 0x1p-22;
  if (!((double)limit > 4 * slack)) return false;
  const float low = (float)((double)limit - slack), high = (float)((double)limit + slack);
  const float step = limit * 0x1.1p-23f;
  float edge = 0;
  bool found = false;
  for (int turn = 0; turn < 2; ++turn) {  // finds the edge, then looks around it
    for (int i = 0; i < n; i += kLanes) {
      const vf away = distance(load(x + i), mean);
      uint32_t near = bits(both(ge(away, splat(low)), ge(splat(high), away)));
      for (; near; near &= near - 1) {
        const float v = x[i + __builtin_ctz(near)];
        const float here = v - mean;
        if (!turn) {
          if (fabsf(here) != limit) continue;
          edge = v;
          found = true;
        } else if (v != edge) {
          const bool same_side = (here > 0) == (edge - mean > 0);
          if (!same_side || fabsf(v - edge) <= step) return false;
        }
      }
    }
  }
  return found;
}

struct Limit {
  float distance;
  uint64_t total;  // of what lies within it, which ws.group_mass holds; 0 where it is not found
};

// What a division finds. Where it does not determine the limit, it may be tried again around the
// mean that it has found.
struct Trial {
  Limit limit = {0, 0};
  float mean = 0;
};

// One pass bounds the mean, weighs what is nearer to an estimate of it than an estimate of the
// limit, and copies what is about as far away.
template <class T>
Trial try_center(const Dense<T>& d, const Weighing<LogitWeigher>& weight, float typical_p,
                 const RowCrowd& crowd, Center center, const Workspace& ws) {
  const LogitWeigher& w = weight.weigher;
  Trial trial;
  const Distances about = crowd.limit(center.value, (double)typical_p);
  const double room = 1.5 * center.off;  // the limit moves with the center, in the same sample
  const Distances bounds = {(float)((double)about.near - room),
                            (float)fmin((double)about.far + room, (double)FLT_MAX)};
  const Division found = divide(d, weight, center.value, bounds, ws);
  const MeanBounds means = bound_mean(d, w, found);
  const float middle = (float)(((double)means.low + (double)means.high) / 2);
  double error = fmax((double)means.high - (double)middle, (double)middle - (double)means.low);
  const uint64_t target = top_p_target(typical_p, found.total);
  Ring ring = {found.inside, found.around, bounds};
  narrow_ring(d, weight, middle, target, &ring, ws);
  trial.mean = middle;
  if (!ring.n || ring.inside >= target) return trial;
  float limit = limit_within(weight, middle, target, ring, ws);
  // The ring may lack tokens without mass.
  const bool all_weigh = (double)center.value - (double)bounds.far > (double)weight.lowest();
  if (!all_weigh || !is_certain(ws.values, ring.n, middle, limit, error)) {
    const DepthSums sums = exact_sums(d, weight, Depths{w}, ws);
    trial.mean = mean_logit(mean_depth(sums), w.max, w.scale);
    error = 0;
    limit = limit_within(weight, trial.mean, target, ring, ws);
  }
  // What has been taken to lie within the limit or beyond it does, whatever the mean is.
  const auto fits = [&](Distances within, float from) {
    const double shift = fabs((double)trial.mean - (double)from);
    const double moved = shift + 2 * error + (double)limit * 0x1p-20;
    return (double)limit > (double)within.near + moved &&
           (double)limit < (double)within.far - moved;
  };
  if (!fits(bounds, center.value) || !fits(ring.bounds, middle)) return trial;
  const uint64_t total = add_within(d, weight, trial.mean, limit, ws);
  if (total >= target) trial.limit = {limit, total};
  return trial;
}

// Typical in a row that is all kept so far. A sample that lacks heavy tokens misjudges the mean;
// the second time it is known.
template <class T>
Limit rough_typical(const Dense<T>& d, const Weighing<LogitWeigher>& weight, float typical_p,
                    const Workspace& ws, float* mean) {
  constexpr Limit kUnknown = {0, 0};
  StandIns sample;
  if (!take_stand_ins(d, weight, ws, &sample)) return kUnknown;
  const RowCrowd crowd(d, sample, weight, ws);
  const Center center = crowd.mean(weight.weigher.max);
  if (!(center.off < (double)FLT_MAX) || !(fabsf(center.value) <= FLT_MAX)) return kUnknown;
  Trial trial = try_center(d, weight, typical_p, crowd, center, ws);
  if (!trial.limit.total) {
    trial = try_center(d, weight, typical_p, crowd, Center{trial.mean, 0}, ws);
  }
  *mean = trial.mean;
  return trial.limit;
}

}  // namespace
}  // namespace fastsample

// Stage 7, typical: the tokens nearest to the mean logit, of both sides, whose mass reaches the
// target.
#pragma once

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

}  // namespace
}  // namespace fastsample

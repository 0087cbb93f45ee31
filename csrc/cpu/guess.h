// Where a floor that is measured on a whole row probably lies, from a sample of it.
#pragma once

#include "cpu/estimate.h"

namespace fastsample {
namespace {

// Logits below `low` are too light, those from `high` up are heavy enough.
struct Guess {
  float low, high;
};

// Estimates from a sample: of the mass of a row, where its maximum has 1, and of the mean of a
// factor by mass; with so many standard deviations of each. A wrong estimate costs time, but
// changes no token.
struct Average {
  double mass, mass_error, mean, mean_error;
};

constexpr Average kNoAverage = {0, INFINITY, 0, INFINITY};

// Sums over n values and their factors; keeps both.
struct Weighed {
  vf mass = {}, product = {};

  template <class Factor>
  Weighed(const LogitWeigher& w, Factor factor, const float* x, int n, float* mass_to,
          float* factor_to) {
    for (int i = 0; i < n; i += kLanes) {
      const Pack<1> p = {{load(x + i)}};
      const Pack<1> q = weigh_roughly(w, p, Where<1>{{first(n - i)}}), f = factor(p, q);
      store(mass_to + i, q.v[0]);
      store(factor_to + i, f.v[0]);
      mass = mass + q.v[0];
      product = product + q.v[0] * f.v[0];
    }
  }
};

// How far off an average may be, in standard deviations: a floor that lies outside of its guess
// costs another pass, and a wider guess hardly anything.
constexpr double kOfFloors = 3.5;

template <class Factor>
Average estimate_average(const StandIns& s, const LogitWeigher& w, Factor factor) {
  float mass[kSample + kPad], factors[kSample + kPad];
  // The heads are a fifth of the blocks, unless they tie: then some of them will do.
  static_assert(kMaxBlocks / 5 < kSample, "there is room for them");
  const Weighed heads(w, factor, s.heads.x, s.heads.n < kSample ? s.heads.n : kSample, mass,
                      factors);
  const Weighed body(w, factor, s.body.x, s.body.n, mass, factors);
  const auto sum = [&](vf sampled, vf own) {
    return s.body.each * (double)reduce_add(sampled) + (double)reduce_add(own);
  };
  const double all = sum(body.mass, heads.mass), mean = sum(body.product, heads.product) / all;
  vf mass_error = {}, mean_error = {};
  for (int i = 0; i < s.body.n; i += kLanes) {
    const vf q = load(mass + i) * (1 / kRoughUnit), off = q * (load(factors + i) - (float)mean);
    mass_error = mass_error + q * q;
    mean_error = mean_error + off * off;
  }
  // The sample may lack heavy values: as if there were one more, just below the heads.
  const Pack<1> low = {{splat(s.heads.n ? s.heads.low : -INFINITY)}};
  const Pack<1> q = weigh_roughly(w, low, everywhere<1>()), f = factor(low, q);
  const double unseen = (double)q.v[0][0] / (double)kRoughUnit;
  const double off = unseen * ((double)f.v[0][0] - mean), one = all / (double)kRoughUnit;
  const auto deviations = [&](vf e, double more) {
    return kOfFloors * s.body.each * sqrt((double)reduce_add(e) + more * more);
  };
  return Average{one, deviations(mass_error, unseen), mean, deviations(mean_error, off) / one};
}

template <class T, class Factor>
Average average_of_floor(const Dense<T>& d, const Weighing<LogitWeigher>& weight, Factor factor,
                         const Workspace& ws) {
  StandIns sample;
  const bool taken = take_stand_ins(d, weight, ws, &sample);
  return taken ? estimate_average(sample, weight.weigher, factor) : kNoAverage;
}

// A margin beyond what estimates of float sums are off by.
FS_INLINE Guess guess_of(const LogitWeigher& w, double least, double most) {
  constexpr double kMargin = 2e-3;
  const auto at = [&](double mass, double margin) {
    return (double)w.max + (log2(mass < 1 ? mass : 1) + margin) / (double)w.scale;
  };
  const double low = least > 0 ? at(least, -kMargin) : -INFINITY;
  const double high = most < INFINITY ? at(most, kMargin) : INFINITY;
  return Guess{low >= -FLT_MAX ? (float)low : -FLT_MAX, high <= FLT_MAX ? (float)high : INFINITY};
}

}  // namespace
}  // namespace fastsample

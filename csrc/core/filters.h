// Stage 7: the parts of the filters that every engine shares.
#pragma once

#include <float.h>

#include "core/kept.h"
#include "core/key.h"
#include "core/stats.h"

namespace fastsample {

FS_HD bool is_greedy(const RowParams& p) { return p.temperature < kGreedyBelow; }

FS_HD bool uses_top_k(const RowParams& p, int32_t vocab) { return p.top_k > 0 && p.top_k < vocab; }

FS_HD bool uses_top_p(const RowParams& p) { return p.top_p < 1.0f; }

// The mass that top-p's prefix must reach: max(1, floor(trunc(p * 2^30) * total / 2^30)), for a
// total of at most 2^60.
FS_HD uint64_t top_p_target(float top_p, uint64_t total) {
  const uint64_t low = ((uint64_t)1 << 30) - 1;
  const uint64_t p30 = (uint64_t)(top_p * 0x1p30f);
  const uint64_t target = p30 * (total >> 30) + (p30 * (total & low) >> 30);
  return target > 0 ? target : 1;
}

FS_HD bool uses_top_n_sigma(const RowParams& p) { return p.top_n_sigma > 0.0f; }

FS_HD bool uses_typical(const RowParams& p) { return p.typical_p < 1.0f; }

FS_HD bool uses_measured_floors(const RowParams& p) {
  return p.epsilon_cutoff > 0.0f || p.eta_cutoff > 0.0f || p.top_a > 0.0f || p.p_less;
}

FS_HD bool uses_xtc(const RowParams& p) { return p.xtc_probability > 0.0f; }

// The temperature of the masses that filters judge by, of a row that is not greedy.
FS_HD float judging_temperature(const RowParams& p) {
  return p.order == kTemperatureLast ? 1.0f : p.temperature;
}

// Top-n-sigma keeps the logits from here up.
FS_HD float lowest_within_sigma(const RowParams& p, float max, double sigma) {
  return max - (float)((double)p.top_n_sigma * sigma);
}

FS_HD float lowest_within_sigma(const RowParams& p, float max, const SpreadSums& s) {
  return lowest_within_sigma(p, max, deviation(s));
}

// Typical keeps an interval around the mean logit: this is the highest float in it. `limit` is a
// distance from the mean that some token has, so the interval is not empty. That of the lowest one
// is -highest_near(-mean, limit).
FS_HD_CALLED float highest_near(float mean, float limit) {
  int64_t near = key_of(mean), far = (int64_t)key_of(FLT_MAX) + 1;
  while (far - near > 1) {
    const int64_t middle = (near + far) >> 1;
    const float distance = from_key((int32_t)middle) - mean;
    if (distance <= limit) {
      near = middle;
    } else {
      far = middle;
    }
  }
  return from_key((int32_t)near);
}

// A fraction of a mass. Like quotient(), GPUs call it.
FS_HD_CALLED uint64_t part_of(uint64_t mass, float fraction) {
  return (uint64_t)((double)fraction * (double)mass);
}

// A floor that keeps at least the heaviest token of the set that it was measured on.
FS_HD uint64_t floor_at(double mass, uint64_t heaviest) {
  return mass < (double)heaviest ? (uint64_t)mass : heaviest;
}

// What floor_at() makes the floors of the measured filters of.
FS_HD double epsilon_mass(const RowParams& p, uint64_t total) {
  return (double)p.epsilon_cutoff * (double)total;
}

FS_HD double eta_mass(const RowParams& p, const DepthSums& s) {
  const double e = (double)p.eta_cutoff;
  const double linear = e * (double)s.mass;
  const float y = -(float)(mean_depth(s) * 0x1p-14);
  const double root = square_root(e) * (double)mass_at(y);
  return linear < root ? linear : root;
}

// `unit` is the mass of the row's heaviest token: kMassUnit, or that of a probability.
FS_HD double top_a_mass(const RowParams& p, uint64_t total, uint64_t unit) {
  return ((double)p.top_a * (double)unit) * quotient((double)unit, (double)total);
}

FS_HD double p_less_mass(const SquareSums& s) {
  return quotient(sum_of_squares(s), (double)s.mass);
}

// The mass of a top choice, for XTC.
FS_HD uint64_t xtc_floor(const RowParams& p, uint64_t total) {
  return part_of(total, p.xtc_threshold);
}

// Tokens of at least this fraction of the mass of the heaviest one that is kept so far, `unit`; 0
// keeps all.
template <class X>
FS_HD Kept<X> min_p(Kept<X> kept, const RowParams& p, uint64_t unit) {
  return narrow_to_mass(kept, part_of(unit, p.min_p));
}

// The filters that keep the tokens from some mass up, whatever the rest of the row holds. They
// stand where the orders have min-p. A new one is a function like min_p and a line here; the
// engines call this function only. A floor is at most `unit`, the mass of the heaviest token that
// is kept so far (2^40 for logits, unless typical has left out the maximum), so that one always
// stays.
template <class X>
FS_HD Kept<X> mass_floors(Kept<X> kept, const RowParams& p, uint64_t unit) {
  kept = min_p(kept, p, unit);
  return kept;
}

FS_HD uint64_t mass_floor(const RowParams& p, uint64_t unit) {
  return mass_floors(Kept<int32_t>{}, p, unit).floor;
}

// The kinds of filters, as bits. A shorter path through an engine is for sets of them that it names
// in full, so that a kind which it does not know cannot be left out.
enum Filter : uint32_t {
  kUsesTopK = 1,
  kUsesTopP = 2,
  kUsesMassFloor = 4,
  kUsesTopNSigma = 8,
  kUsesTypical = 16,
  kUsesMeasuredFloors = 32,
  kUsesXtc = 64,
};

// The filters that are on in a row that is not greedy.
FS_HD uint32_t filters_of(const RowParams& p, int32_t vocab) {
  uint32_t filters = 0;
  if (uses_top_k(p, vocab)) filters |= kUsesTopK;
  if (uses_top_p(p)) filters |= kUsesTopP;
  if (mass_floor(p, kMassUnit)) filters |= kUsesMassFloor;
  if (uses_top_n_sigma(p)) filters |= kUsesTopNSigma;
  if (uses_typical(p)) filters |= kUsesTypical;
  if (uses_measured_floors(p)) filters |= kUsesMeasuredFloors;
  if (uses_xtc(p)) filters |= kUsesXtc;
  return filters;
}

}  // namespace fastsample

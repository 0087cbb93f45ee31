// Stage 7: the filters, each of which narrows what is kept of a row; stem of csrc/core/filters.h.
#pragma once

#include "core/filters.h"
#include "cuda/measure.cuh"
#include "cuda/search.cuh"

namespace fastsample {

// Logits at most some standard deviations below the highest, of the whole row in every order.
template <class S, Policy kPolicy>
FS_DEVICE KeptKeys top_n_sigma(const Team<kPolicy>& team, const RowTask& t, KeptKeys kept) {
  const RowParams& p = *t.params;
  if (!uses_top_n_sigma(p)) return kept;
  measure_spread<S>(team, t);
  const Verdict& v = decide(team, [&](const u64* m, Verdict& found) {
    found.low = lowest_within_sigma(p, t.peak, SpreadSums{m[0], m[1], m[2]});
  });
  return narrow_above(kept, {key_of(v.low), INT32_MAX});
}

// Tokens that each weigh less than this weigh less, together, than what top-p leaves out of a set;
// 0 where it is not known how much the set weighs.
FS_DEVICE u64 too_light(const RowTask& t, const KeptKeys& base, int32_t vocab) {
  if (base.high.x != kKeyInfinity) return 0;  // the heaviest token may be gone
  const u64 p30 = (u64)(t.params->top_p * 0x1p30f);
  const u64 light = divide((((u64)1 << 30) - p30) << 10, (u64)vocab);
  return t.factor ? light >> 1 : light;  // the heaviest probability has half of 2^40 at least
}

// Filters that keep the tokens up to one at which a count, or a mass, reaches a target.
enum Cut { kTopKCut, kTopPCut, kTypicalCut };

// Of those nearest to the mean logit, the farthest that is kept is at `limit`: an interval of the
// rank order, with all that are equally near.
template <Policy kPolicy>
FS_DEVICE KeptKeys keep_near(const Team<kPolicy>& team, const RowTask& t, KeptKeys kept, float mean,
                             float limit) {
  const Verdict& v = decide(team, [&](const u64*, Verdict& found) {
    found.high = highest_near(mean, limit);
    found.low = -highest_near(-mean, limit);
  });
  kept = narrow_above(kept, {key_of(v.low), INT32_MAX});
  return v.high < t.peak ? narrow_below(kept, {key_of(v.high), -1}) : kept;
}

// Top-k: the first k tokens of the whole row, in every order. Top-p: the shortest prefix of the
// base set with enough of its mass. Typical: those nearest to the mean logit with enough of the
// mass. They share the code, which is much.
template <Policy kPolicy, class S>
FS_DEVICE KeptKeys cut(const Team<kPolicy>& team, const S& slice, const RowTask& t, Cut which,
                       const KeptKeys& base, const KeptKeys& kept) {
  const RowParams& p = *t.params;
  int32_t low = t.k_bound, high = t.peak_key;
  float mean = 0.0f;
  if (which == kTypicalCut) {
    measure<S>(team, t, base);
    mean = decide(team, [&](const u64* m, Verdict& found) {
             found.low = mean_logit(mean_depth(depth_sums(m)), t.peak, t.scale);
           }).low;
    low = kKeyMinusInfinity;  // the nearest has the highest key
    high = 0;
  } else if (which == kTopPCut) {
    const u64 light = too_light(t, base, slice.vocab);
    low = lowest_key(t, base, light > base.floor ? light : base.floor);
  }
  const auto key_in = [&](float x) { return key_of(which == kTypicalCut ? -fabsf(x - mean) : x); };
  const auto weight = [&](float x, int32_t, int32_t id) -> u64 {
    return which == kTopKCut ? 1 : kept_mass(t, base, x, KeyPlace{key_of(x), id});
  };
  const float share = which == kTypicalCut ? p.typical_p : p.top_p;
  const auto target_of = [&](u64 total) -> u64 {
    return which == kTopKCut ? (u64)p.top_k : top_p_target(share, total);
  };
  const int unused = which == kTypicalCut ? 0 : low_bits(slice);
  const Bracket b =
      select(team, slice, unused, low, high, which != kTopKCut, key_in, weight, target_of);
  if (which == kTypicalCut) return keep_near(team, t, kept, mean, -from_key(b.low));
  if (b.low < base.low.x) return kept;  // fewer than k tokens
  // Of the tokens at the last key, each of weight w, as many as the target takes.
  const u64 w = which == kTopKCut ? 1 : mass_of_one(from_key(b.low), t);
  const u64 nth = divide(target_of(b.total) - b.above + w - 1, w);
  const bool ties = which == kTopKCut && p.ties == kTiesAll;
  int32_t last = INT32_MAX;
  if (!ties && b.above + nth * w < b.reached) {
    last = nth_equal<S>(team, base.high, b.low, nth);
  }
  return narrow_above(kept, {b.low, last});
}

// Whether the mass floors are measured like those below, since the heaviest token may be gone. They
// come directly before them then.
FS_DEVICE bool measures_mass_floors(const RowTask& t, const KeptKeys& kept) {
  const RowParams& p = *t.params;
  return p.order == kTemperatureLast && kept.high.x != kKeyInfinity && mass_floor(p, kMassUnit);
}

// Floors that are measured on what is kept so far, one after the other.
enum Floors { kMassFloors, kEpsilonFloor, kEtaFloor, kTopAFloor, kPLessFloor };

// Those but the first that a row uses, as bits. Rows need this, and floor_of(), where they take the
// candidates' way and where not.
FS_CALLED uint32_t floors_used() {
  const RowParams& p = own_shared()->params;
  uint32_t used = 0;
  if (p.epsilon_cutoff > 0.0f) used |= 1 << kEpsilonFloor;
  if (p.eta_cutoff > 0.0f) used |= 1 << kEtaFloor;
  if (p.top_a > 0.0f) used |= 1 << kTopAFloor;
  if (p.p_less) used |= 1 << kPLessFloor;
  return used;
}

// `unit` is the mass of the row's heaviest token, `heaviest` that of those that are kept.
FS_CALLED u64 floor_of(int which, DepthSums depths, SquareSums squares, u64 heaviest, u64 unit) {
  const RowParams& p = own_shared()->params;
  if (which == kMassFloors) return mass_floor(p, heaviest);
  const double mass = which == kEpsilonFloor ? epsilon_mass(p, depths.mass)
                      : which == kEtaFloor   ? eta_mass(p, depths)
                      : which == kTopAFloor  ? top_a_mass(p, depths.mass, unit)
                                             : p_less_mass(squares);
  return floor_at(mass, heaviest);
}

template <class S, Policy kPolicy>
FS_DEVICE KeptKeys measured_floors(const Team<kPolicy>& team, const RowTask& t, KeptKeys kept) {
  uint32_t left = floors_used() | (measures_mass_floors(t, kept) ? 1 << kMassFloors : 0);
#pragma unroll 1  // one pass in the code serves them all
  for (; left; left &= left - 1) {
    measure<S>(team, t, kept);
    const int which = __ffs((int)left) - 1;
    const Verdict& v = decide(team, [&](const u64* m, Verdict& found) {
      found.floor = floor_of(which, depth_sums(m), square_sums(m), m[kHeaviest], unit_of(t));
    });
    kept = narrow_to_mass(kept, v.floor);
  }
  return kept;
}

// The last place of those that XTC excludes: before the last of two or more top choices. Above all
// tokens where there are none.
template <class S, Policy kPolicy>
FS_DEVICE KeyPlace xtc(const Team<kPolicy>& team, const RowTask& t, const KeptKeys& kept) {
  const RowParams& p = *t.params;
  const KeyPlace none = everything(t).high;
  if (!uses_xtc(p)) return none;
  KeptKeys choices = kept;
#pragma unroll 1  // one pass in the code serves both
  for (bool known = false;; known = true) {
    measure<S>(team, t, choices);
    if (known) break;
    const Verdict& v = decide(
        team, [&](const u64* m, Verdict& found) { found.floor = xtc_floor(p, m[kMassSum]); });
    choices = narrow_to_mass(choices, v.floor);
  }
  const u64* found = team.own->measures;
  if (found[kTokens] < 2) return none;
  const KeyPlace last = place_of(-(long long)found[kLastPlace]);
  return KeyPlace{last.x, last.id - 1};
}

// The orders differ in the set that top-p is judged on alone: what top-k keeps, what the mass
// floors and top-k keep, or (joint) the whole row.
FS_DEVICE KeptKeys top_p_base(const RowTask& t, const KeptKeys& kept) {
  return t.params->order == kJoint ? everything(t) : kept;
}

// What is kept before top-k: by n-sigma, and where the order has them there by the mass floors.
template <class S, Policy kPolicy>
FS_DEVICE KeptKeys before_top_k(const Team<kPolicy>& team, const RowTask& t) {
  const KeptKeys kept = top_n_sigma<S>(team, t, everything(t));
  return t.params->order == kMinPFirst ? mass_floors(kept, *t.params, unit_of(t)) : kept;
}

// The filters from top-k on.
template <Policy kPolicy, class S>
FS_DEVICE Drawable apply_filters(const Team<kPolicy>& team, const S& slice, const RowTask& t,
                                 KeptKeys kept) {
  const RowParams& p = *t.params;
  // "temperature_last" has typical before top-p, the others have it last.
  const bool typical_first = p.order == kTemperatureLast;
#pragma unroll 1  // one pass in the code serves them all
  for (int i = 0; i < 3; ++i) {
    const Cut which = i == 0 ? kTopKCut : (i == 1) == typical_first ? kTypicalCut : kTopPCut;
    const bool wanted = which == kTopKCut      ? uses_top_k(p, slice.vocab)
                        : which == kTypicalCut ? uses_typical(p)
                                               : uses_top_p(p);
    if (wanted) {
      const KeptKeys base = which == kTopKCut   ? everything(t)
                            : which == kTopPCut ? top_p_base(t, kept)
                                                : kept;
      kept = cut(team, slice, t, which, base, kept);
    }
    if (which == kTopPCut && !measures_mass_floors(t, kept)) {
      kept = mass_floors(kept, p, unit_of(t));
    }
  }
  kept = measured_floors<S>(team, t, kept);
  const KeyPlace top = xtc<S>(team, t, kept);
  // What is excluded in every draw is not kept at all.
  if (p.xtc_probability == 1.0f) return Drawable{narrow_below(kept, top), everything(t).high};
  return Drawable{kept, top};
}

}  // namespace fastsample

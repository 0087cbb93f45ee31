// Stage 7: the filters, each of which narrows what is kept of a row; stem of csrc/core/filters.h.
#pragma once

#include "core/filters.h"
#include "cuda/measure.cuh"
#include "cuda/select.cuh"

namespace fastsample {

// Logits at most some standard deviations below the highest, of the whole row in every order.
template <Policy kPolicy, class S>
FS_DEVICE KeptKeys top_n_sigma(const Team<kPolicy>& team, const S& slice, const RowTask& t,
                               KeptKeys kept) {
  const RowParams& p = *t.params;
  if (!uses_top_n_sigma(p)) return kept;
  measure_spread(team, slice, t);
  const Verdict& v = decide(team, [&](const u64* m, Verdict& found) {
    found.low = lowest_within_sigma(p, t.peak, SpreadSums{m[0], m[1], m[2]});
  });
  return narrow_above(kept, {key_of(v.low), INT32_MAX});
}

// The first k tokens of the whole row, in every order.
template <Policy kPolicy, class S>
FS_DEVICE KeptKeys top_k(const Team<kPolicy>& team, const S& slice, const RowTask& t,
                         KeptKeys kept) {
  const RowParams& p = *t.params;
  if (!uses_top_k(p, slice.vocab)) return kept;
  const auto one = [](float, int32_t, int32_t) -> u64 { return 1; };
  return narrow_above(kept, nth_place(team, slice, everything(t), t.k_bound, t.peak_key,
                                      (u64)p.top_k, p.ties == kTiesAll, one));
}

// Tokens that each weigh less than this weigh less, together, than what top-p leaves out of a set;
// 0 where it is not known how much the set weighs.
FS_DEVICE u64 too_light(const RowTask& t, const KeptKeys& base, int32_t vocab) {
  if (base.high.x != kKeyInfinity) return 0;  // the heaviest token may be gone
  const u64 p30 = (u64)(t.params->top_p * 0x1p30f);
  const u64 light = ((((u64)1 << 30) - p30) << 10) / (u64)vocab;
  return t.factor ? light >> 1 : light;  // the heaviest probability has half of 2^40 at least
}

// The shortest prefix of the base set with enough of its mass.
template <Policy kPolicy, class S>
FS_DEVICE KeptKeys top_p(const Team<kPolicy>& team, const S& slice, const RowTask& t,
                         const KeptKeys& base, KeptKeys kept) {
  const float top_p = t.params->top_p;
  if (!uses_top_p(*t.params)) return kept;
  const u64 light = too_light(t, base, slice.vocab);
  const int32_t low = lowest_key(t, base, light > base.floor ? light : base.floor);
  const auto weight = [&](float x, int32_t key, int32_t id) -> u64 {
    return kept_mass(t, base, x, KeyPlace{key, id});
  };
  const auto target_of = [top_p](u64 total) -> u64 { return top_p_target(top_p, total); };
  const Bracket b = select<true>(team, slice, low, t.peak_key, weight, target_of);
  // Of the tokens at the last key, each of mass w, as many as the target takes.
  const u64 w = mass_in(t, from_key(b.low));
  const u64 nth = (target_of(b.total) - b.above + w - 1) / w;
  const bool all = b.above + nth * w >= b.reached;
  const int32_t last = all ? INT32_MAX : nth_equal(team, slice, base.high, b.low, nth);
  return narrow_above(kept, {b.low, last});
}

// Those nearest to the mean logit with enough of the mass, all that are equally near included: an
// interval of the rank order.
template <Policy kPolicy, class S>
FS_DEVICE KeptKeys typical(const Team<kPolicy>& team, const S& slice, const RowTask& t,
                           KeptKeys kept) {
  const float typical_p = t.params->typical_p;
  if (!uses_typical(*t.params)) return kept;
  measure(team, slice, t, kept);
  const float mean = decide(team, [&](const u64* m, Verdict& found) {
                       found.low = mean_logit(mean_depth(depth_sums(m)), t.peak, t.scale);
                     }).low;
  // The nearest has the highest key.
  const auto nearness = [mean](float x) { return key_of(-fabsf(x - mean)); };
  const auto weight = [&](float x, int32_t, int32_t id) -> u64 {
    return kept_mass(t, kept, x, KeyPlace{key_of(x), id});
  };
  const auto target_of = [typical_p](u64 total) -> u64 { return top_p_target(typical_p, total); };
  const Bracket b =
      select_by<true, true>(team, slice, 0, kKeyMinusInfinity, 0, nearness, weight, target_of);
  const Verdict& v = decide(team, [&](const u64*, Verdict& found) {
    const float limit = -from_key(b.low);
    found.high = highest_near(mean, limit);
    found.low = -highest_near(-mean, limit);
  });
  kept = narrow_above(kept, {key_of(v.low), INT32_MAX});
  return v.high < t.peak ? narrow_below(kept, {key_of(v.high), -1}) : kept;
}

// Whether the mass floors are measured like those below, since the heaviest token may be gone. They
// come directly before them then.
FS_DEVICE bool measures_mass_floors(const RowTask& t, const KeptKeys& kept) {
  const RowParams& p = *t.params;
  return p.order == kTemperatureLast && kept.high.x != kKeyInfinity && mass_floor(p, kMassUnit);
}

// Floors that are measured on what is kept so far, one after the other.
template <Policy kPolicy, class S>
FS_DEVICE KeptKeys measured_floors(const Team<kPolicy>& team, const S& slice, const RowTask& t,
                                   KeptKeys kept) {
  const RowParams& p = *t.params;
  const bool mass_too = measures_mass_floors(t, kept);
  if (!mass_too && !uses_measured_floors(p)) return kept;
  enum { kMassFloors, kEpsilon, kEta, kTopA, kPLess, kEnd };
#pragma unroll 1  // one pass in the code serves them all
  for (int which = mass_too ? kMassFloors : kEpsilon; which < kEnd; ++which) {
    const float value = which == kMassFloors ? 1.0f
                        : which == kEpsilon  ? p.epsilon_cutoff
                        : which == kEta      ? p.eta_cutoff
                        : which == kTopA     ? p.top_a
                                             : (float)p.p_less;
    if (value == 0.0f) continue;
    measure(team, slice, t, kept);
    const Verdict& v = decide(team, [&](const u64* m, Verdict& found) {
      const u64 heaviest = m[kHeaviest];
      found.floor = which == kMassFloors ? mass_floor(p, heaviest)
                    : which == kEpsilon  ? epsilon_floor(p, m[kMassSum], heaviest)
                    : which == kEta      ? eta_floor(p, depth_sums(m), heaviest)
                    : which == kTopA     ? top_a_floor(p, m[kMassSum], unit_of(t), heaviest)
                                         : p_less_floor(square_sums(m), heaviest);
    });
    kept = narrow_to_mass(kept, v.floor);
  }
  return kept;
}

// The last place of those that XTC excludes: before the last of two or more top choices. Above all
// tokens where there are none.
template <Policy kPolicy, class S>
FS_DEVICE KeyPlace xtc(const Team<kPolicy>& team, const S& slice, const RowTask& t,
                       const KeptKeys& kept) {
  const RowParams& p = *t.params;
  const KeyPlace none = everything(t).high;
  if (!uses_xtc(p)) return none;
  KeptKeys choices = kept;
#pragma unroll 1  // one pass in the code serves both
  for (bool known = false;; known = true) {
    measure(team, slice, t, choices);
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

template <Policy kPolicy, class S>
FS_DEVICE Drawable apply_filters(const Team<kPolicy>& team, const S& slice, const RowTask& t) {
  const RowParams& p = *t.params;
  KeptKeys kept = everything(t);
  kept = top_n_sigma(team, slice, t, kept);
  if (p.order == kMinPFirst) kept = mass_floors(kept, p, unit_of(t));
  kept = top_k(team, slice, t, kept);
  // "temperature_last" has typical first, the others last.
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    if ((i == 0) == (p.order == kTemperatureLast)) {
      kept = typical(team, slice, t, kept);
    } else {
      kept = top_p(team, slice, t, top_p_base(t, kept), kept);
      if (!measures_mass_floors(t, kept)) kept = mass_floors(kept, p, unit_of(t));
    }
  }
  kept = measured_floors(team, slice, t, kept);
  const KeyPlace top = xtc(team, slice, t, kept);
  // What is excluded in every draw is not kept at all.
  if (p.xtc_probability == 1.0f) return Drawable{narrow_below(kept, top), everything(t).high};
  return Drawable{kept, top};
}

}  // namespace fastsample

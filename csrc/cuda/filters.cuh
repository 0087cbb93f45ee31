// Stage 7: top-k, top-p and the mass floors, each of which narrows what is kept of a row; stem of
// csrc/core/filters.h.
#pragma once

#include "core/filters.h"
#include "cuda/scan.cuh"
#include "cuda/select.cuh"

namespace fastsample {

// A key below which every token's mass is less than `mass`. Within 2^-19 of it, mass doubles with
// every step of y; the factor of 2 that is left out here covers all rounding.
FS_DEVICE int32_t key_reaching(u64 mass, float peak, float scale) {
  const float y = mass ? (float)(63 - __clzll((long long)mass)) - 41.0f : -41.0f;
  const int32_t key = key_of(peak + y / scale);
  return key > kKeyLowest ? key : kKeyLowest;
}

// The lowest key that a kept token of any mass can have.
FS_DEVICE int32_t lowest_key(const RowTask& t, const KeptKeys& kept, u64 mass) {
  const int32_t key = key_reaching(mass, t.peak, t.scale);
  return key > kept.low.x ? key : kept.low.x;
}

FS_DEVICE bool is_kept(const RowTask& t, const KeptKeys& kept, float x, int32_t id) {
  return within(kept, {key_of(x), id}) && (!kept.floor || mass_in(t, x) >= kept.floor);
}

// A token's mass where it is kept, else 0.
FS_DEVICE u64 kept_mass(const RowTask& t, const KeptKeys& kept, float x, KeyPlace place) {
  if (!within(kept, place)) return 0;
  const u64 w = mass_in(t, x);
  return w >= kept.floor ? w : 0;
}

// The first k tokens of the whole row, in every order.
template <Policy kPolicy, class S>
FS_DEVICE KeptKeys top_k(const Team<kPolicy>& team, const S& slice, const RowTask& t,
                         KeptKeys kept) {
  const RowParams& p = *t.params;
  if (!uses_top_k(p, slice.vocab)) return kept;
  const auto one = [](float, int32_t, int32_t) -> u64 { return 1; };
  return narrow_above(kept, nth_place(team, slice, everything().high, t.k_bound, t.peak_key,
                                      (u64)p.top_k, p.ties == kTiesAll, one));
}

// The shortest prefix of the base set with enough of its mass.
template <Policy kPolicy, class S>
FS_DEVICE KeptKeys top_p(const Team<kPolicy>& team, const S& slice, const RowTask& t,
                         const KeptKeys& base, KeptKeys kept) {
  const float top_p = t.params->top_p;
  if (!uses_top_p(*t.params)) return kept;
  // Tokens that each weigh less than this weigh less, together, than what top-p leaves out.
  const u64 p30 = (u64)(top_p * 0x1p30f);
  const u64 light = ((((u64)1 << 30) - p30) << 10) / (u64)slice.vocab;
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

// The orders differ in the set that top-p is judged on alone: what top-k keeps, what the mass
// floors and top-k keep, or (joint) the whole row.
FS_DEVICE KeptKeys top_p_base(const KeptKeys& kept, int32_t order) {
  return order == kJoint ? everything() : kept;
}

template <Policy kPolicy, class S>
FS_DEVICE KeptKeys apply_filters(const Team<kPolicy>& team, const S& slice, const RowTask& t) {
  const RowParams& p = *t.params;
  KeptKeys kept = everything();
  if (p.order == kMinPFirst) kept = mass_floors(kept, p, kMassUnit);
  kept = top_k(team, slice, t, kept);
  kept = top_p(team, slice, t, top_p_base(kept, p.order), kept);
  kept = mass_floors(kept, p, kMassUnit);
  return kept;
}

}  // namespace fastsample

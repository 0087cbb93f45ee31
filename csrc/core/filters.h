// Stage 7: the parts of the filters that every engine shares.
#pragma once

#include "core/kept.h"
#include "core/mass.h"
#include "core/rows.h"

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

// Tokens of at least this fraction of the maximum's mass; 0 keeps all.
template <class X>
FS_HD Kept<X> min_p(Kept<X> kept, const RowParams& p) {
  return narrow_to_mass(kept, (uint64_t)(p.min_p * 0x1p40f));
}

// The filters that keep the tokens from some mass up, whatever the rest of the row holds. They
// stand where the orders have min-p. A new one is a function like min_p and a line here; the
// engines call this function only. A floor is at most kMassUnit, so that the maximum is always
// kept.
template <class X>
FS_HD Kept<X> mass_floors(Kept<X> kept, const RowParams& p) {
  kept = min_p(kept, p);
  return kept;
}

FS_HD uint64_t mass_floor(const RowParams& p) { return mass_floors(Kept<int32_t>{}, p).floor; }

// The kinds of filters, as bits. A shorter path through an engine is for sets of them that it names
// in full, so that a kind which it does not know cannot be left out.
enum Filter : uint32_t { kUsesTopK = 1, kUsesTopP = 2, kUsesMassFloor = 4 };

// The filters that are on in a row that is not greedy.
FS_HD uint32_t filters_of(const RowParams& p, int32_t vocab) {
  uint32_t filters = 0;
  if (uses_top_k(p, vocab)) filters |= kUsesTopK;
  if (uses_top_p(p)) filters |= kUsesTopP;
  if (mass_floor(p)) filters |= kUsesMassFloor;
  return filters;
}

}  // namespace fastsample

// Stage 7's one invariant: what any filters, in any order, leave of a row.
#pragma once

#include "core/rows.h"

namespace fastsample {

// A token's place in the rank order: x descending, then id ascending. X is a float logit, or the
// integer key that has its order.
template <class X>
struct Place {
  X x;
  int32_t id;
};

template <class X>
FS_HD bool ranks_before(Place<X> a, Place<X> b) {
  return a.x > b.x || (a.x == b.x && a.id < b.id);
}

// The tokens ranked below `high` (exclusive), ranked at or above `low`, of mass `floor` or more. A
// filter takes one and returns one that keeps no more.
template <class X>
struct Kept {
  Place<X> high;
  Place<X> low;
  uint64_t floor;
};

// Whether a token's place lies in the interval; its mass is the caller's to compare.
template <class X>
FS_HD bool ranks_within(const Kept<X>& kept, Place<X> token) {
  return ranks_before(kept.high, token) && !ranks_before(kept.low, token);
}

template <class X>
FS_HD Kept<X> narrow_below(Kept<X> kept, Place<X> high) {
  if (ranks_before(kept.high, high)) kept.high = high;
  return kept;
}

template <class X>
FS_HD Kept<X> narrow_above(Kept<X> kept, Place<X> low) {
  if (ranks_before(low, kept.low)) kept.low = low;
  return kept;
}

template <class X>
FS_HD Kept<X> narrow_to_mass(Kept<X> kept, uint64_t floor) {
  if (floor > kept.floor) kept.floor = floor;
  return kept;
}

}  // namespace fastsample

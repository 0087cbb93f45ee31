// What filters leave of a row, in any number and any order: the invariant of stage 7.
#pragma once

#include "core/rows.h"

namespace fastsample {

// A token's place in the rank order: x descending, then id ascending. X is a float logit, or an
// integer key of the same order.
template <class X>
struct Place {
  X x;
  int32_t id;
};

template <class X>
FS_HD bool ranks_before(Place<X> a, Place<X> b) {
  return a.x > b.x || (a.x == b.x && a.id < b.id);
}

// The tokens that are ranked after `high`, that are `low` or ranked before it, and whose mass is at
// least `floor`. Every filter takes one and returns one that keeps no more. An id of INT32_MAX in
// `low` keeps all tokens that equal low.x; an id of -1 in `high` keeps all that equal high.x.
template <class X>
struct Kept {
  Place<X> high;
  Place<X> low;
  uint64_t floor;
};

// Every token above -inf. `infinity` and `lowest` are X's values of +inf and of the lowest finite
// float.
template <class X>
FS_HD Kept<X> all_between(X infinity, X lowest) {
  return Kept<X>{{infinity, -1}, {lowest, INT32_MAX}, 0};
}

template <class X>
FS_HD bool equal(const Kept<X>& a, const Kept<X>& b) {
  return a.high.x == b.high.x && a.high.id == b.high.id && a.low.x == b.low.x &&
         a.low.id == b.low.id && a.floor == b.floor;
}

// Whether a token ranks within the interval. Its mass is for the caller to compare with the floor.
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

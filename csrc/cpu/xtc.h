// Stage 7, XTC: which of the kept tokens a draw may leave out.
#pragma once

#include "cpu/domain.h"

namespace fastsample {
namespace {

// Of what is kept, the tokens that rank at `last` or before it are top choices that a draw leaves
// out with this probability; that of none at all is 0.
struct TopChoices {
  Place<float> last;
  float probability;
};

constexpr TopChoices kNoTopChoices = {{INFINITY, -1}, 0.0f};

// The first token that stays when the top choices are left out.
FS_INLINE Place<float> next_after(const TopChoices& top) {
  return Place<float>{top.last.x, top.last.id + 1};
}

// What is kept but for the top choices, and the top choices.
FS_INLINE Kept<float> without(const Kept<float>& kept, const TopChoices& top) {
  return narrow_below(kept, top.last);
}
FS_INLINE Kept<float> only(const Kept<float>& kept, const TopChoices& top) {
  return narrow_above(kept, top.last);
}

// How many tokens are kept, and which is the last of them in rank order.
struct Last {
  uint64_t count;
  Place<float> place;
};

template <class Domain, class W>
Last last_of(const Domain& d, const Kept<float>& kept, const W& weigher) {
  const Weighing weight(weigher, kept.floor);
  const Kept<float> reach = within_reach(kept, weigher);
  Last found = {0, {INFINITY, -1}};
  float buffer[kBlock];
  for (int b = 0; b < blocks(d); ++b) {
    if (!may_keep(d, b, reach)) continue;
    const float* x = values(d, b, buffer);
    for (int i = 0; i < kBlock; i += kLanes) {
      const vf v = load(x + i);
      const Mask in = weight.keep(v, ranks_within(reach, v, ids(d, b, i)));
      if (!any(in)) continue;
      found.count += (uint64_t)count(in);
      const float low = reduce_min(select(in, v, splat(INFINITY)));
      if (low > found.place.x) continue;
      // Ids ascend, so that the last of equal ones is the last that is met.
      const uint32_t equal = bits(both(in, eq(v, splat(low))));
      found.place = {low, ids(d, b, i)[31 - __builtin_clz(equal)]};
    }
  }
  return found;
}

// The first token of what is kept, in rank order.
template <class Domain, class W>
Place<float> first_of(const Domain& d, const Kept<float>& kept, const W& weigher) {
  const Weighing weight(weigher, kept.floor);
  Place<float> found = {-INFINITY, -1};
  float buffer[kBlock];
  for (int b = 0; b < blocks(d); ++b) {
    if (!may_keep(d, b, kept)) continue;
    const float* x = values(d, b, buffer);
    for (int i = 0; i < kBlock; i += kLanes) {
      const vf v = load(x + i);
      const Mask in = weight.keep(v, ranks_within(kept, v, ids(d, b, i)));
      if (!any(in)) continue;
      const float high = reduce_max(select(in, v, splat(-INFINITY)));
      if (!(high > found.x)) continue;  // ids ascend: the first of equal ones is met first
      const uint32_t equal = bits(both(in, eq(v, splat(high))));
      found = {high, ids(d, b, i)[__builtin_ctz(equal)]};
    }
  }
  return found;
}

// `heavy` is of the tokens that are heavy enough: the last of them stays, and so does a lone one.
FS_INLINE TopChoices top_choices(const Last& heavy, float probability) {
  if (heavy.count < 2) return kNoTopChoices;
  return TopChoices{{heavy.place.x, heavy.place.id - 1}, probability};
}

}  // namespace
}  // namespace fastsample

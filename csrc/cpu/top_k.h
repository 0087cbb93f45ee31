// Stage 7, top-k: a bound below which the k-th token does not lie, then the few tokens above it.
#pragma once

#include "cpu/estimate.h"

namespace fastsample {
namespace {

// The first tokens of a rank order, and the place of the last of them.
struct Head {
  List list;
  Place<float> low;
};

// Where the k-th token's value lies. At least k tokens are not below the k-th highest block
// maximum, and few are above it. Where there are fewer blocks than k, an estimate.
template <class T>
Bracket top_k_bracket(const Dense<T>& d, int32_t k, const Workspace& ws) {
  const Span peaks = copy(d.block_max, d.row.blocks, ws.values);
  if (k == 1) return Bracket{peaks.high, INFINITY};
  if (k <= peaks.n) return Bracket{narrow(Counting{}, peaks, 0, (uint64_t)k, peaks.x).x, INFINITY};
  Bracket found = find_bracket(Counting{(uint64_t)k}, d, ws);
  // Where a bracket holds one value, that value is the better bound: many tokens may equal it.
  const float lowest = nextafterf(found.low, INFINITY);
  if (nextafterf(lowest, INFINITY) == found.high) found.low = lowest;
  return found;
}

FS_INLINE Bracket top_k_bracket(const List&, int32_t, const Workspace&) {
  return Bracket{-INFINITY, INFINITY};
}

// The first k tokens of a domain's rank order, in list_x and list_id; with kTiesAll all that equal
// the last of them too.
template <class Domain>
Head take_head(const Domain& d, int32_t k, int32_t ties, const Workspace& ws) {
  const auto gather_until = [&](const auto& from, Place<float> low) {
    if (ties == kTiesAll) low.id = INT32_MAX;
    return Head{gather(from, narrow_above(everything(), low), ws.list_x, ws.list_id), low};
  };
  const auto above = [&](float x) {
    return gather(d, keep_from(nextafterf(x, INFINITY)), ws.list_x, ws.list_id);
  };
  Bracket bracket = top_k_bracket(d, k, ws);
  List list = above(bracket.low);
  for (bool again = false; list.n < k; again = true) {
    if (bracket.low < -FLT_MAX) return Head{list, everything().low};  // there are no more
    // What is missing are tokens at the bound; or the estimate was wrong, and they lie below it:
    // then a lower bound is estimated, and after that all tokens are taken.
    const int32_t last = nth_equal(d, bracket.low, (uint64_t)(k - list.n));
    if (last != INT32_MAX) return gather_until(d, Place<float>{bracket.low, last});
    const float lower = again ? -INFINITY : find_bracket(Counting{8 * (uint64_t)k}, d, ws).low;
    bracket = Bracket{lower, INFINITY};
    list = above(lower);
  }
  Span middle = filter(list.x, list.n, ws.values, [&](vf v) { return gt(splat(bracket.high), v); });
  if (list.n - middle.n >= k) middle = copy(list.x, list.n, ws.values);  // above a wrong estimate
  const Boundary edge = narrow(Counting{}, middle, (uint64_t)(list.n - middle.n), (uint64_t)k,
                               ws.values, bracket.high < INFINITY);
  const uint64_t needed = (uint64_t)k - edge.above;
  return gather_until(list, place_of(list, edge.x, needed, edge.equal));
}

}  // namespace
}  // namespace fastsample

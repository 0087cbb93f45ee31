// Stage 7, top-k: a bound below which the k-th token does not lie, then the few tokens above it.
#pragma once

#include "cpu/estimate.h"

namespace fastsample {
namespace {

// What top-k leaves, and where it cut the rank order.
struct TopK {
  List list;
  Cutoff cut;
};

// Where the k-th token's value lies. Of the k highest block maxima, the lowest: at least k tokens
// are not below it, and few are above. Where there are fewer blocks, an estimate.
template <class T>
Bracket top_k_bracket(const Dense<T>& d, int32_t k, const Workspace& ws) {
  const Span peaks = copy(d.block_max, d.row.blocks, ws.values);
  if (k == 1) return Bracket{peaks.high, INFINITY};
  if (k <= peaks.n) return Bracket{narrow(Counting{}, peaks, 0, (uint64_t)k, peaks.x).x, INFINITY};
  Bracket found = find_bracket(Counting{(uint64_t)k}, d, ws);
  // Of a bracket with one value in it that value is the better bound: its ties may be many.
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
TopK top_k(const Domain& d, int32_t k, int32_t ties, const Workspace& ws) {
  const auto until = [&](float x, int32_t id) {
    return Cutoff{x, ties == kTiesAll ? INT32_MAX : id};
  };
  const auto above = [&](float x) {
    return gather(d, Cutoff{nextafterf(x, INFINITY), INT32_MAX}, ws.list_x, ws.list_id);
  };
  Bracket bracket = top_k_bracket(d, k, ws);
  List list = above(bracket.low);
  for (bool again = false; list.n < k; again = true) {
    if (bracket.low < -FLT_MAX) return TopK{list, kKeepAlive};  // there are no more
    // Tokens at the bound complete them, or what lies below a wrong estimate: below one for many
    // more tokens, or all there are.
    const int32_t last = nth_equal(d, bracket.low, (uint64_t)(k - list.n));
    if (last != INT32_MAX) {
      const Cutoff cut = until(bracket.low, last);
      return TopK{gather(d, cut, ws.list_x, ws.list_id), cut};
    }
    const float lower = again ? -INFINITY : find_bracket(Counting{8 * (uint64_t)k}, d, ws).low;
    bracket = Bracket{lower, INFINITY};
    list = above(lower);
  }
  Span middle = filter(list.x, list.n, ws.values, [&](vf v) { return gt(splat(bracket.high), v); });
  if (list.n - middle.n >= k) middle = copy(list.x, list.n, ws.values);  // above a wrong estimate
  const Boundary edge = narrow(Counting{}, middle, (uint64_t)(list.n - middle.n), (uint64_t)k,
                               ws.values, bracket.high < INFINITY);
  const uint64_t needed = (uint64_t)k - edge.above;
  const Cutoff cut = until(edge.x, cut_at(list, edge.x, needed, edge.equal).id);
  return TopK{gather(list, cut, ws.list_x, ws.list_id), cut};
}

}  // namespace
}  // namespace fastsample

// Stage 7: top-k, top-p and the floors of the mass, in each order.
#pragma once

#include "cpu/outputs.h"
#include "cpu/top_k.h"
#include "cpu/top_p.h"

namespace fastsample {
namespace {

// The base set that a filter is judged on: the row, or once something narrows it, a list of tokens.
template <class T>
struct Base {
  const Task<T>& task;
  bool listed = false;
  List list = {};
  Kept<float> within = everything();  // what the list holds, at least

  // What of the base set is kept, if ws.group_mass holds its mass; a total of 0 says that it does
  // not.
  Kept<float> weighed = everything();
  uint64_t total = 0;

  // f(the tokens).
  template <class F>
  auto on(F f) const {
    return listed ? f(list) : f(task.dense);
  }

  void set_list(const List& tokens, const Kept<float>& holds) {
    list = tokens;
    listed = true;
    within = holds;
    total = 0;
  }
};

// Leaves tokens out of a base set that are no longer kept.
template <class T>
void narrow(Base<T>& base, const Kept<float>& kept) {
  const Task<T>& t = base.task;
  Kept<float> reach = within_reach(kept, t.weigher);
  reach.floor = 0;  // gathering does not weigh
  if (!gathers(reach, base.within)) return;
  const List list =
      base.on([&](const auto& d) { return gather(d, reach, t.ws.list_x, t.ws.list_id); });
  base.set_list(list, reach);
}

template <class T>
Kept<float> top_k(Base<T>& base, Kept<float> kept, const RowParams& p) {
  const Task<T>& t = base.task;
  if (!uses_top_k(p, t.dense.row.vocab)) return kept;
  const Head head = base.on([&](const auto& d) { return take_head(d, p.top_k, p.ties, t.ws); });
  base.set_list(head.list, narrow_above(base.within, head.low));
  return narrow_above(kept, head.low);
}

template <class T>
Kept<float> top_p(Base<T>& base, Kept<float> kept, const RowParams& p) {
  const Task<T>& t = base.task;
  if (!uses_top_p(p)) return kept;
  narrow(base, kept);
  const Weighing weight(t.weigher, kept.floor, p.top_p);
  const Found found = base.on([&](const auto& d) { return find_top_p(d, weight, t.ws); });
  base.weighed = narrow_above(kept, found.low);
  base.total = found.total;
  return base.weighed;
}

// What the filters leave of the row; in the end, `base` holds all of it.
template <class T>
Kept<float> apply_filters(Base<T>& base, const RowParams& p) {
  Kept<float> kept = everything();
  switch (p.order) {
    case kMinPFirst:
      kept = mass_floors(kept, p, kMassUnit);
      kept = top_k(base, kept, p);
      kept = top_p(base, kept, p);
      break;
    case kJoint:  // each on the whole row: top-p leaves the base set as it is
      kept = top_p(base, kept, p);
      kept = top_k(base, kept, p);
      kept = mass_floors(kept, p, kMassUnit);
      break;
    default:
      kept = top_k(base, kept, p);
      kept = top_p(base, kept, p);
      kept = mass_floors(kept, p, kMassUnit);
  }
  return kept;
}

// Stages 7 and 8.
template <class T>
void filter_and_finish(const Task<T>& t, const RowParams& p) {
  Base<T> base = {t};
  const Kept<float> kept = apply_filters(base, p);
  const bool weighed = base.total && equal(base.weighed, kept);
  if (!weighed) narrow(base, kept);
  base.on([&](const auto& d) { finish(t, d, kept, weighed ? base.total : 0); });
}

}  // namespace
}  // namespace fastsample

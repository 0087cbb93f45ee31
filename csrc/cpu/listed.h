// Rows that are split over ranks, of which each has listed its first tokens: all filters and the
// draw, as far as the lists, and what ranks tell besides, decide them.
#pragma once

#include "cpu/spread.h"

namespace fastsample {
namespace {

// Of an undecided row, by which others divide.
constexpr uint64_t kSomeMass = 1;

uint64_t weigh(ListedBase& base, const Kept<float>& kept, const RowParams&) {
  if (base.is_whole(kept) && base.row.has_sums()) return base.row.sum(0);
  if (base.holds(kept)) return weigh_groups(base.list, kept, base.judge, base.task.ws);
  const int64_t ranks = base.row.head.ranks;
  if (base.has_found(kept)) return total_of({base.masses, 1}, ranks);
  const Answered* sums = base.hear_sums(kept, 0, 1);
  return sums ? total_of({sums->first, sums->stride}, ranks) : kSomeMass;
}

// Those of kSums that a measure consists of.
template <class SumOf>
DepthSums sums_of(const Depths&, SumOf sum) {
  return {sum(0), sum(1), sum(2)};
}
template <class SumOf>
SquareSums sums_of(const Squares&, SumOf sum) {
  return {sum(0), sum(3), sum(4), sum(5)};
}

template <class More>
auto measure(ListedBase& base, const Kept<float>& kept, const RowParams&, More more) {
  if (base.is_whole(kept) && base.row.has_sums()) {
    return sums_of(more, [&](int i) { return base.row.sum(i); });
  }
  if (base.holds(kept)) {
    const uint64_t total = measure(base.list, kept, base.judge, base.task.ws, more);
    return more.sums(total ? total : kSomeMass);
  }
  const Answered* sums = base.hear_sums(kept, kWantsProducts, 6);
  return sums_of(more, [&](int i) {
    return sums ? total_of({sums->first, sums->stride}, base.row.head.ranks, i) : kSomeMass;
  });
}

uint64_t heaviest(ListedBase& base, const Kept<float>& kept) {
  if (kept.high.x == INFINITY) return base.judge.unit();
  uint64_t most = heaviest(base.list, kept, base.judge);
  if (base.holds(kept) || most >= base.beyond) return most;
  const Answered* ends = base.hear(base.query_of(kept), kEnds, 0, kEndWords, 1);
  for (int64_t rank = 0; ends && rank < base.row.head.ranks; ++rank) {
    const auto own = (uint64_t)ends->first[rank * ends->stride];
    most = own > most ? own : most;
  }
  return most;
}

Kept<float> top_n_sigma(ListedBase& base, Kept<float> kept, const RowParams& p) {
  if (!uses_top_n_sigma(p)) return kept;
  base.require(base.row.has_sums());
  if (!base.decided) return kept;
  return narrow_above(kept, {lowest_within_sigma(p, base.judge.max, base.row.spread()), INT32_MAX});
}

// The place of the last of a list's tokens at x: others that equal them need not be on the list.
Place<float> last_at(const List& list, float x) {
  return {x, nth_equal(list, x, count_equal(list.x, list.n, x))};
}

Kept<float> top_k(ListedBase& base, Kept<float> kept, const RowParams& p) {
  if (!uses_top_k(p, base.row.vocab())) return kept;
  if (!base.prefix.complete && base.list.n < p.top_k) {
    Place<float> low = search(base, everything(), kByNumber, (uint64_t)p.top_k).low;
    if (p.ties == kTiesAll) low.id = INT32_MAX;
    return narrow_above(kept, low);
  }
  const Head head = take_head(base.list, p.top_k, p.ties, base.task.ws);
  base.list = head.list;
  const bool ends = p.ties == kTiesFirst && head.low.x > -FLT_MAX;
  return narrow_above(kept, ends ? last_at(head.list, head.low.x) : head.low);
}

Kept<float> top_p(ListedBase& base, Kept<float> kept, const RowParams& p) {
  if (!uses_top_p(p)) return kept;
  const Workspace& ws = base.task.ws;
  const uint64_t target = top_p_target(p.top_p, weigh(base, kept, p));
  const Weighing weight(base.judge, kept.floor);
  Kept<float> within = kept;
  within.floor = 0;  // gathering does not weigh
  base.list = gather(base.list, within, ws.list_x, ws.list_id);
  const Boundary edge =
      narrow(weight, copy(base.list.x, base.list.n, ws.values), 0, target, ws.values, true);
  if (reached(weight, edge) < target) return search(base, kept, kByMass, target);
  // Tokens that equal the last of the list need not be on it.
  const uint64_t m = ties_needed(weight, edge, target);
  return narrow_above(kept, {edge.x, nth_equal(base.list, edge.x, m)});
}

Kept<float> mass_floors(ListedBase& base, Kept<float> kept, const RowParams& p) {
  return p.min_p > 0 ? mass_floors(kept, p, heaviest(base, kept)) : kept;
}

Kept<float> typical(ListedBase& base, Kept<float> kept, const RowParams& p) {
  if (!uses_typical(p)) return kept;
  const Workspace& ws = base.task.ws;
  const DepthSums sums = measure(base, kept, p, Depths{base.judge});
  const uint64_t target = top_p_target(p.typical_p, sums.mass);
  if (!base.decided) return kept;
  const float mean = mean_logit(mean_depth(sums), base.judge.max, base.judge.scale);
  if (weigh_groups(base.list, kept, base.judge, ws) < target) {
    return search(base, kept, kByDistance, target, mean);
  }
  const Weighing weight(base.judge, kept.floor);
  const float limit = typical_limit(base.list, kept, weight, mean, target, ws);
  const float high = highest_near(mean, limit), low = -highest_near(-mean, limit);
  if (!base.holds(kept) && low <= base.prefix.last.x) {
    return search(base, kept, kByDistance, target, mean);
  }
  if (high < base.judge.max) kept = narrow_below(kept, Place<float>{high, -1});
  return narrow_above(kept, Place<float>{low, INT32_MAX});
}

template <class FloorOf>
Kept<float> floor_of_total(ListedBase& base, const Kept<float>& kept, const RowParams& p,
                           FloorOf floor_of) {
  const uint64_t total = weigh(base, kept, p);
  return narrow_to_mass(kept, floor_of(total, heaviest(base, kept)));
}

Kept<float> eta(ListedBase& base, const Kept<float>& kept, const RowParams& p) {
  const uint64_t most = heaviest(base, kept);
  return narrow_to_mass(kept,
                        floor_at(eta_mass(p, measure(base, kept, p, Depths{base.judge})), most));
}

Kept<float> p_less(ListedBase& base, const Kept<float>& kept, const RowParams& p) {
  const uint64_t most = heaviest(base, kept);
  return narrow_to_mass(kept, floor_at(p_less_mass(measure(base, kept, p, Squares{})), most));
}

TopChoices xtc(ListedBase& base, const Kept<float>& kept, const RowParams& p) {
  if (!uses_xtc(p)) return kNoTopChoices;
  const Kept<float> heavy = narrow_to_mass(kept, xtc_floor(p, weigh(base, kept, p)));
  if (base.holds(heavy)) {
    return top_choices(last_of(base.list, heavy, base.judge), p.xtc_probability);
  }
  const Answered* ends = base.hear(base.query_of(heavy), kEnds, 0, kEndWords, kEndWords);
  if (!ends) return kNoTopChoices;
  int64_t low = kHighestKey;
  for (int64_t rank = 0; rank < base.row.head.ranks; ++rank) {
    const int64_t* own = ends->first + rank * ends->stride;
    if (own[2] && own[1] < low) low = own[1];
  }
  const uint64_t count = total_of({ends->first, ends->stride}, base.row.head.ranks, 2);
  return top_choices({count, place_of_key(low)}, p.xtc_probability);
}

// Stages 7 and 8 of a row that is not greedy.
bool decide(const Task<float, LogitWeigher>& t, const Batch& given, const ListedRow& row,
            const Prefix& prefix, const RowParams& p, float* log_kept_mass, bool* told) {
  ListedBase base = {t, row, prefix};
  Kept<float> kept = apply_filters(base, p);
  TopChoices top = xtc(base, kept, p);
  if (top.probability == 1) {
    kept = without(kept, top);
    top = kNoTopChoices;
  }
  if (log_kept_mass) base.require(row.has_sums() && !t.weigher.judges_apart());
  if (!base.decided) return false;
  if (!base.holds(kept)) {
    *told = true;
    return finish_spread({base, kept, top, given});
  }
  const uint64_t total = weigh_groups(base.list, kept, t.weigher, t.ws);
  if (log_kept_mass) *log_kept_mass = (float)log_share(total, row.sum(0));
  if (total) {
    finish(t, base.list, kept, total, top);
  } else {
    finish_alone(t, first_of(base.list, kept, base.judge));
  }
  return true;
}

Status sample_listed(const Batch& given, int64_t r, Draws draws, const Workspace& workspace) {
  const ListedRow row(given, r);
  const RowParams& p = at(given.rows.params, r);
  Workspace ws = workspace;
  ws.table[0].ends = nullptr;  // a table would look for logits in the row
  const Prefix prefix = take_prefix(row, ws);
  const Missing missing = {row};
  missing.note(kNothing);
  if (prefix.peak.status != kValid) {
    write_invalid(given.out, r, draws, row.vocab());
    return prefix.peak.status;
  }
  Batch batch = given;  // without what takes more than the kept tokens
  batch.out.ranks = nullptr;
  batch.out.log_kept_mass = nullptr;
  float* const mass =
      draws.begin || !given.out.log_kept_mass ? nullptr : given.out.log_kept_mass + r;
  const float temperature = is_greedy(p) ? 1.0f : p.temperature;
  const float judged = is_greedy(p) ? 1.0f : judging_temperature(p);
  const LogitWeigher weigher = {prefix.peak.max, mass_scale(temperature), mass_scale(judged)};
  Dense<float> none = {};  // but for how wide the row is
  none.row.vocab = row.vocab();
  const Task<float, LogitWeigher> task = {batch, r, draws, ws, none, weigher, temperature};
  if (is_greedy(p)) {
    if (mass) *mass = 0;
    finish_alone(task, first_of(prefix.list, everything(), weigher));
  } else {
    missing.note(kUnasked);
    bool told = false;
    if (!decide(task, given, row, prefix, p, mass, &told)) return (Status)kUndecided;
    missing.note(kNothing);
    if (told) return kValid;
  }
  if (given.out.ranks && given.out.mode == kProcessedLogprobs) write_ranks(given, r, draws, row);
  return kValid;
}

}  // namespace
}  // namespace fastsample

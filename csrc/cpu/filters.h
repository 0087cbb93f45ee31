// Stage 7: the filters, in each order.
#pragma once

#include "cpu/near.h"
#include "cpu/outputs.h"
#include "cpu/rough.h"
#include "cpu/top_k.h"
#include "cpu/top_p.h"
#include "cpu/typical.h"

namespace fastsample {
namespace {

// The base set that a filter is judged on: the row, or once something narrows it, a list of tokens.
template <class T, class W>
struct Base {
  typedef W Weigher;

  const Task<T, W>& task;
  W judge = task.weigher.judge();
  bool listed = false;
  List list = {};
  Kept<float> within = alive(judge);  // what the list holds, at least

  // What of the base set is kept, if ws.group_mass holds its mass as filters judge it; a total of 0
  // says that it does not.
  Kept<float> weighed = within;
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

  void set_weighed(const Kept<float>& kept, uint64_t mass) {
    weighed = kept;
    total = mass;
  }
  bool has_weighed(const Kept<float>& kept) const { return total && equal(weighed, kept); }
};

// How much of a row a sample of it shows to lie at a value or above it.
template <class T>
double share_from(const Dense<T>& d, float x) {
  if (blocks(d) < 2 * kSample / kBlock) return 0;
  Sample sample;
  take_sample<32>(d, &sample);
  return (double)count_above(sample.x, sample.n, nextafterf(x, -INFINITY)) / sample.n;
}

// Leaves tokens out of a base set that are no longer kept.
template <class T, class W>
void narrow(Base<T, W>& base, const Kept<float>& kept, bool measured = false) {
  const Task<T, W>& t = base.task;
  Kept<float> reach = within_reach(kept, t.weigher);
  reach.floor = 0;  // gathering does not weigh
  if (!gathers(reach, base.within)) return;
  if (measured && !base.listed && weighs_rather(share_from(t.dense, reach.low.x))) return;
  const List list =
      base.on([&](const auto& d) { return gather(d, reach, t.ws.list_x, t.ws.list_id); });
  base.set_list(list, reach);
}

// Z.
template <class T, class W>
uint64_t weigh(Base<T, W>& base, const Kept<float>& kept, const RowParams& p) {
  if (base.has_weighed(kept)) return base.total;
  narrow(base, kept, uses_measured_floors(p));
  const uint64_t total =
      base.on([&](const auto& d) { return weigh_groups(d, kept, base.judge, base.task.ws); });
  base.set_weighed(kept, total);
  return total;
}

// Z, and sums of something else.
template <class T, class W, class More>
auto measure(Base<T, W>& base, const Kept<float>& kept, const RowParams& p, More more) {
  narrow(base, kept, uses_measured_floors(p));
  const uint64_t total =
      base.on([&](const auto& d) { return measure(d, kept, base.judge, base.task.ws, more); });
  base.set_weighed(kept, total);
  return more.sums(total);
}

// The mass of the heaviest token that is kept: the row's maximum, unless something has left it out.
template <class T, class W>
uint64_t heaviest(const Base<T, W>& base, const Kept<float>& kept) {
  if (kept.high.x == INFINITY) return base.judge.unit();
  return base.on([&](const auto& d) { return heaviest(d, kept, base.judge); });
}

// Tries bounds of the deviation: they will do where no token of the base set lies between the
// lowest logits that they allow. The set is gathered before it is looked through.
template <class T, class W>
bool narrow_within_sigma(Base<T, W>& base, Deviation sigma, const RowParams& p, Kept<float>* kept) {
  if (!(sigma.high < INFINITY)) return false;
  const float low = lowest_within_sigma(p, base.judge.max, sigma.high);
  const float high = lowest_within_sigma(p, base.judge.max, sigma.low);
  if (high <= kept->low.x) return true;
  const Kept<float> within = narrow_above(*kept, Place<float>{low, INT32_MAX});
  if (!base.listed) narrow(base, within, uses_measured_floors(p));
  if (base.on([&](const auto& d) { return any_between(d, low, high); })) return false;
  *kept = within;
  return true;
}

template <class T, class W>
Kept<float> top_n_sigma(Base<T, W>& base, Kept<float> kept, const RowParams& p) {
  if (!uses_top_n_sigma(p)) return kept;
  const Dense<T>& d = base.task.dense;
  if (narrow_within_sigma(base, d.spread, p, &kept)) return kept;
  Deviation sigma;
  const float peak = base.judge.max;
  if (estimate_deviation(d, peak, &sigma) && narrow_within_sigma(base, sigma, p, &kept)) {
    return kept;
  }
  const float lowest = lowest_within_sigma(p, peak, spread(d, peak));
  return narrow_above(kept, Place<float>{lowest, INT32_MAX});
}

template <class T, class W>
Kept<float> top_k(Base<T, W>& base, Kept<float> kept, const RowParams& p) {
  const Task<T, W>& t = base.task;
  if (!uses_top_k(p, t.dense.row.vocab)) return kept;
  const Head head = base.on([&](const auto& d) { return take_head(d, p.top_k, p.ties, t.ws); });
  base.set_list(head.list, narrow_above(base.within, head.low));
  return narrow_above(kept, head.low);
}

template <class T, class W>
Kept<float> top_p(Base<T, W>& base, Kept<float> kept, const RowParams& p) {
  const Task<T, W>& t = base.task;
  if (!uses_top_p(p)) return kept;
  narrow(base, kept);
  // What a floor or typical has left out of the base set, `find_top_p` must not see.
  const Weighing weight(base.judge, kept.floor, p.top_p);
  const Found found = base.on([&](const auto& d) { return find_top_p(d, weight, t.ws); });
  kept = narrow_above(kept, found.low);
  base.set_weighed(kept, found.total);
  return kept;
}

template <class T, class W>
Kept<float> mass_floors(const Base<T, W>& base, Kept<float> kept, const RowParams& p) {
  return mass_floors(kept, p, heaviest(base, kept));
}

template <class T, class W>
Kept<float> typical(Base<T, W>& base, Kept<float> kept, const RowParams& p) {
  if constexpr (W::kOfLogits) {
    if (!uses_typical(p)) return kept;
    const Weighing weight(base.judge, kept.floor);
    Limit limit = {0, 0};
    float mean;
    if (!base.listed && bounds_of(kept) == kUnbounded) {
      limit = rough_typical(base.task.dense, weight, p.typical_p, base.task.ws, &mean);
    }
    if (!limit.total) {
      const DepthSums sums = measure(base, kept, p, Depths{base.judge});
      mean = mean_logit(mean_depth(sums), base.judge.max, base.judge.scale);
      const uint64_t target = top_p_target(p.typical_p, sums.mass);
      limit.distance = base.on([&](const auto& d) {
        return typical_limit(d, kept, weight, mean, target, base.task.ws);
      });
    }
    const float high = highest_near(mean, limit.distance);
    const float low = -highest_near(-mean, limit.distance);
    if (high < base.judge.max) kept = narrow_below(kept, Place<float>{high, -1});
    kept = narrow_above(kept, Place<float>{low, INT32_MAX});
    base.set_weighed(kept, limit.total);
  }
  return kept;
}

// Whether the few tokens of a list are looked at so often that it pays to gather them even where
// they have been weighed.
template <class T, class W>
bool looks_often(const Task<T, W>& t, const RowParams& p) {
  return t.draws.end - t.draws.begin >= kManyDraws || t.batch.out.num_top || uses_xtc(p);
}

// Narrows to the floor that rough(d, weight) finds, if it does.
template <class T, class W, class Rough>
bool narrow_roughly(Base<T, W>& base, Kept<float>* kept, const RowParams& p, Rough rough) {
  if constexpr (W::kOfLogits) {
    const Dense<T>& d = base.task.dense;
    if (base.listed || bounds_of(*kept) != kUnbounded) return false;
    const RoughFloor found = rough(d, Weighing(base.judge, kept->floor));
    base.set_weighed(*kept, 0);
    if (!found.floor) return false;
    *kept = narrow_to_mass(*kept, found.floor);
    const float edge = base.judge.lowest(kept->floor);
    const bool gathers = looks_often(base.task, p) && !weighs_rather(share_from(d, edge));
    base.set_weighed(*kept, gathers ? 0 : found.total);
    return true;
  }
  return false;
}

template <class T, class W>
Kept<float> eta(Base<T, W>& base, Kept<float> kept, const RowParams& p) {
  const uint64_t most = heaviest(base, kept);
  const bool found = narrow_roughly(base, &kept, p, [&](const auto& d, const auto& weight) {
    return rough_eta_floor(d, weight, base.task.ws, p, most);
  });
  if (found) return kept;
  return narrow_to_mass(kept,
                        floor_at(eta_mass(p, measure(base, kept, p, Depths{base.judge})), most));
}

template <class T, class W>
Kept<float> p_less(Base<T, W>& base, Kept<float> kept, const RowParams& p) {
  const uint64_t most = heaviest(base, kept);
  const bool found = narrow_roughly(base, &kept, p, [&](const auto& d, const auto& weight) {
    return rough_p_less_floor(d, weight, base.task.ws, most);
  });
  if (found) return kept;
  return narrow_to_mass(kept, floor_at(p_less_mass(measure(base, kept, p, Squares{})), most));
}

// A floor that is floor_of(Z, the mass of the heaviest token).
template <class T, class W, class FloorOf>
Kept<float> floor_of_total(Base<T, W>& base, Kept<float> kept, const RowParams& p,
                           FloorOf floor_of) {
  const uint64_t most = heaviest(base, kept);
  const auto of_total = [&](uint64_t total) { return floor_of(total, most); };
  const auto rough = [&](const auto& d, const auto& weight) {
    return rough_floor_of_total(d, weight, base.task.ws, most, of_total);
  };
  if (!base.has_weighed(kept) && narrow_roughly(base, &kept, p, rough)) return kept;
  return narrow_to_mass(kept, of_total(weigh(base, kept, p)));
}

// The filters that keep every token of at least some mass, which is measured on what is kept so
// far.
template <class Base>
Kept<float> measured_floors(Base& base, Kept<float> kept, const RowParams& p) {
  if (p.epsilon_cutoff > 0) {
    kept = floor_of_total(base, kept, p, [&](uint64_t total, uint64_t heaviest) {
      return floor_at(epsilon_mass(p, total), heaviest);
    });
  }
  if constexpr (Base::Weigher::kOfLogits) {
    if (p.eta_cutoff > 0) kept = eta(base, kept, p);
  }
  if (p.top_a > 0) {
    kept = floor_of_total(base, kept, p, [&](uint64_t total, uint64_t heaviest) {
      return floor_at(top_a_mass(p, total, base.judge.unit()), heaviest);
    });
  }
  if (p.p_less) kept = p_less(base, kept, p);
  return kept;
}

template <class T, class W>
TopChoices xtc(Base<T, W>& base, const Kept<float>& kept, const RowParams& p) {
  if (!uses_xtc(p)) return kNoTopChoices;
  const Kept<float> heavy = narrow_to_mass(kept, xtc_floor(p, weigh(base, kept, p)));
  const Last last = base.on([&](const auto& d) { return last_of(d, heavy, base.judge); });
  return top_choices(last, p.xtc_probability);
}

// The first token of what is kept.
template <class T, class W>
Place<float> first_of(const Base<T, W>& base, const Kept<float>& kept) {
  return base.on([&](const auto& d) { return first_of(d, kept, base.judge); });
}

// Top-k and top-n-sigma, in either order: both keep the first tokens of the whole row's rank order,
// whatever else is kept. Few tokens are left of top-k to compare with top-n-sigma's bounds.
template <class Base>
Kept<float> heads(Base& base, const Kept<float>& kept, const RowParams& p) {
  return top_n_sigma(base, top_k(base, kept, p), p);
}

// What the filters up to XTC leave of the row; in the end, `base` holds all of it.
template <class Base>
Kept<float> apply_filters(Base& base, const RowParams& p) {
  Kept<float> kept = alive(base.judge);
  switch (p.order) {
    case kMinPFirst:
      kept = heads(base, kept, p);
      kept = mass_floors(base, kept, p);
      kept = top_p(base, kept, p);
      kept = typical(base, kept, p);
      break;
    case kJoint:  // top-p on the whole row, which it leaves as the base set
      kept = top_p(base, kept, p);
      kept = heads(base, kept, p);
      kept = mass_floors(base, kept, p);
      kept = typical(base, kept, p);
      break;
    case kTemperatureLast:
      kept = heads(base, kept, p);
      kept = typical(base, kept, p);
      kept = top_p(base, kept, p);
      kept = mass_floors(base, kept, p);
      break;
    default:
      kept = heads(base, kept, p);
      kept = top_p(base, kept, p);
      kept = mass_floors(base, kept, p);
      kept = typical(base, kept, p);
  }
  return measured_floors(base, kept, p);
}

// Stages 7 and 8.
template <class T, class W>
void filter_and_finish(const Task<T, W>& t, const RowParams& p) {
  Base<T, W> base = {t};
  Kept<float> kept = apply_filters(base, p);
  TopChoices top = xtc(base, kept, p);
  const bool excludes = top.probability == 1;
  if (excludes) {
    kept = without(kept, top);
    top = kNoTopChoices;
  }
  const bool weighed = base.has_weighed(kept) && !t.weigher.judges_apart();
  if (!weighed) narrow(base, kept, uses_measured_floors(p));
  uint64_t total = weighed ? base.total : 0;
  if (t.weigher.judges_apart() || excludes) {  // the maximum may be gone, and all mass with it
    total = base.on([&](const auto& d) { return weigh_groups(d, kept, t.weigher, t.ws); });
    if (!total) return finish_alone(t, first_of(base, kept));
  }
  base.on([&](const auto& d) { finish(t, d, kept, total, top); });
}

}  // namespace
}  // namespace fastsample

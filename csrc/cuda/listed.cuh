// Stages 7 and 8 of a row whose candidates hold all that is kept: by the leading block, on a sorted
// list. Filters keep its first tokens, so each is a matter of where the list ends. Stem of
// csrc/cpu/listed.h.
#pragma once

#include "cuda/candidates.cuh"
#include "cuda/draws.cuh"
#include "cuda/filters.cuh"

namespace fastsample {

FS_DEVICE KeyPlace candidate(const Shared& own, int32_t e) {
  return place_of((long long)own.sorted[e]);
}

// Of the first `end` candidates, how many come before the first that `fails`, for all lanes of a
// warp.
template <class Fails>
FS_DEVICE int32_t first_failing(int32_t end, Fails fails) {
#pragma unroll 1
  for (int32_t from = 0; from < end; from += 32) {
    const int32_t e = from + lane();
    const uint32_t found = __ballot_sync(kWholeWarp, e < end && fails(e));
    if (found) return from + __ffs((int)found) - 1;
  }
  return end;
}

// Top-k and the filters behind it, by one warp, from the running sums of the masses.
struct ListFilters {
  const Shared& own;
  const RowTask& t;

  FS_METHOD u64 sum(int32_t end) const { return end ? own.running[end - 1] : 0; }
  FS_METHOD u64 mass(int32_t e) const { return own.running[e] - sum(e); }
  FS_METHOD int32_t until_lighter(int32_t end, u64 floor) const {
    return first_failing(end, [&](int32_t e) { return mass(e) < floor; });
  }

  FS_METHOD int32_t top_k(int32_t size) const {
    const int32_t k = t.params->top_k;
    if (k >= size) return size;
    if (t.params->ties != kTiesAll) return k;
    const int32_t last = candidate(own, k - 1).x;
    return first_failing(size, [&](int32_t e) { return candidate(own, e).x < last; });
  }

  FS_METHOD int32_t top_p(int32_t end, u64 total) const {
    if (!uses_top_p(*t.params)) return end;
    const u64 target = top_p_target(t.params->top_p, total);
    const int32_t last = first_failing(end, [&](int32_t e) { return sum(e + 1) >= target; });
    return last < end ? last + 1 : end;
  }

  FS_METHOD int32_t measured_floors(int32_t end) const {
    if (!uses_measured_floors(*t.params)) return end;
#pragma unroll 1  // one pass in the code serves them all
    for (int which = kEpsilonFloor; which < kFloorsEnd; ++which) {
      const float value = floor_value(*t.params, which);
      if (value == 0.0f) continue;
      u64 sums[6] = {};
      if (which == kEtaFloor || which == kPLessFloor) measure(end, sums);
      const u64 total = sum(end);
      end = until_lighter(end, floor_of(which, value, {total, sums[0], sums[1]},
                                        {total, sums[3], sums[4], sums[5]}, mass(0), unit_of(t)));
    }
    return end;
  }

  // The sums of stage 6b over the first `end`, but for that of their mass.
  FS_METHOD void measure(int32_t end, u64 (&sums)[6]) const {
    DepthSums depths = {};
    SquareSums squares = {};
    for (int32_t e = lane(); e < end; e += 32) {
      const u64 w = mass(e);
      if (!w) continue;
      const float x = from_key(candidate(own, e).x);
      depths.add(w, t.factor ? 0 : depth_at((x - t.peak) * t.scale));
      squares.add(w);
    }
    u64 mine[6] = {depths.high, depths.low, 0, squares.high, squares.cross, squares.low};
#pragma unroll 1
    for (int i = 0; i < 6; ++i) {
      const u64 all = warp_sum(mine[0]);
#pragma unroll
      for (int j = 1; j < 6; ++j) {
        mine[j - 1] = mine[j];
        sums[j - 1] = sums[j];
      }
      sums[5] = all;
    }
  }

  // How many are kept; `before` is what is kept already.
  FS_METHOD int32_t kept(const Listed& list, const KeptKeys& before) const {
    const RowParams& p = *t.params;
    int32_t end = top_k(list.size);
    end = first_failing(end, [&](int32_t e) { return candidate(own, e).x < before.low.x; });
    end = until_lighter(end, before.floor);
    end = top_p(end, p.order == kJoint ? list.total : sum(end));
    end = until_lighter(end, mass_floor(p, unit_of(t)));
    return measured_floors(end);
  }
};

// Leaves the end of what is kept, and of XTC's top choices, in shared memory.
template <Policy kPolicy>
FS_DEVICE void filter_list(const Team<kPolicy>& team, const RowTask& t, const Listed& list,
                           const KeptKeys& before) {
  Shared& own = *team.own;
  u64 sum = 0;
  for (int32_t from = 0; from < list.size; from += threads()) {
    const int32_t e = from + (int32_t)threadIdx.x;
    const u64 w = e < list.size ? mass_in(t, from_key(candidate(own, e).x)) : 0;
    const auto [below, total] = block_scan(w);
    if (e < list.size) own.running[e] = sum + below + w;
    sum += total;
  }
  __syncthreads();
  if (warp() == 0) {
    const ListFilters filters = {own, t};
    const int32_t end = filters.kept(list, before);
    int32_t choices = 0;
    if (uses_xtc(*t.params)) {
      choices = filters.until_lighter(end, xtc_floor(*t.params, filters.sum(end)));
    }
    if (lane() == 0) {
      own.kept_end = end;
      own.choices = choices;
    }
  }
  __syncthreads();
}

// What is kept, as later kernels are told.
FS_DEVICE Drawable drawable_of(const Shared& own, const RowTask& t) {
  const KeyPlace none = everything(t).high;
  const KeptKeys kept = narrow_above(everything(t), candidate(own, own.kept_end - 1));
  if (own.choices < 2) return Drawable{kept, none};
  KeyPlace top = candidate(own, own.choices - 1);
  --top.id;
  // What is excluded in every draw is not kept at all.
  if (t.params->xtc_probability == 1.0f) return Drawable{narrow_below(kept, top), none};
  return Drawable{kept, top};
}

// The draws among the candidates from `begin` on, which are all, or those whose coin says
// `excluding`. Returns their mass.
template <Policy kPolicy>
FS_DEVICE u64 draw_listed(const Batch& batch, int64_t r, const Team<kPolicy>& team,
                          const RowTask& t, int32_t begin, bool all, bool excluding) {
  Shared& own = *team.own;
  const int32_t end = own.kept_end;
  u64 mine = 0;  // of those whose mass this thread has written
#pragma unroll 1
  for (int32_t e = (int32_t)threadIdx.x; e < end; e += threads()) {
    if (e >= begin) mine += own.running[e];
  }
  const u64 total = block_sum(mine);
  const Outputs& out = batch.out;
  if (!out.tokens || (!total && !excluding)) return total;
  each_with_sum(
      begin, end,
      [&](int32_t e, int32_t j) -> u64 {  // the lower half is larger the lower the id is
        return (uint32_t)own.sorted[j] > (uint32_t)own.sorted[e] ? own.running[j] : 0;
      },
      [&](int32_t e, u64 before) {
        const int64_t id = candidate(own, e).id;
        // What is left may weigh nothing: then its first token, the last top choice, counts alone.
        const u64 w = total ? own.running[e] : e == begin;
#pragma unroll 1
        for (int32_t j = 0; j < out.num_samples; ++j) {
          if (!all && !takes_part(own.stream, j, t.params->xtc_probability, excluding)) continue;
          const u64 threshold = random_below(own.stream, j, kPlainDraw, total);
          if (before > threshold || threshold >= before + w) continue;
          store_global(out.tokens + r * out.num_samples + j, id);
        }
      });
  return total;
}

// Filters and draws. `before`: what is kept already. Returns whether anything that is kept has
// mass; where not, `first` is its first token.
template <Policy kPolicy>
FS_DEVICE bool finish_listed(const Batch& batch, const Workspace& ws, int64_t r,
                             const Team<kPolicy>& team, RowTask& t, const Listed& list,
                             const KeptKeys& before, KeyPlace& first) {
  Shared& own = *team.own;
  filter_list(team, t, list, before);
  set_drawn_scale(t);
  for (int32_t e = (int32_t)threadIdx.x; e < own.kept_end; e += threads()) {
    own.running[e] = drawn_mass(t, from_key(candidate(own, e).x));
  }
  const int32_t rest = own.choices < 2 ? 0 : own.choices - 1;
  const bool all = !rest || t.params->xtc_probability == 1.0f;
  const int32_t begin = all ? rest : 0;
  Totals totals = {0, 0};
#pragma unroll 1  // one copy of the code serves both
  for (bool excluding = false;; excluding = true) {
    totals.rest = draw_listed(batch, r, team, t, excluding ? rest : begin, all, excluding);
    if (!excluding) totals.all = totals.rest;
    if (all || excluding || !totals.all) break;
  }
  first = candidate(own, begin);
  if (totals.all && threadIdx.x == 0) write_state(ws, r, t, drawable_of(own, t), totals);
  return totals.all;
}

}  // namespace fastsample

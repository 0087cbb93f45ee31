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

FS_DEVICE u64 sum_of_first(const Shared& own, int32_t n) { return n ? own.running[n - 1] : 0; }

// Of the first `end` candidates, how many come before the first whose mass is less than the floor.
FS_CALLED int32_t until_lighter(int32_t end, u64 floor) {
  const Shared& own = *own_shared();
  return first_failing(end,
                       [&](int32_t e) { return own.running[e] - sum_of_first(own, e) < floor; });
}

// Likewise, before the first whose key is lower. Both are called, since filters often ask.
FS_CALLED int32_t until_lower(int32_t end, int32_t key) {
  const Shared& own = *own_shared();
  return first_failing(end, [&](int32_t e) { return candidate(own, e).x < key; });
}

// Top-k and the filters behind it, by one warp, from the running sums of the masses.
struct ListFilters {
  const Shared& own;
  const RowTask& t;

  FS_METHOD u64 sum(int32_t end) const { return sum_of_first(own, end); }
  FS_METHOD u64 mass(int32_t e) const { return sum(e + 1) - sum(e); }

  FS_METHOD int32_t top_k(int32_t size) const {
    const int32_t k = t.params->top_k;
    if (k >= size) return size;
    if (t.params->ties != kTiesAll) return k;
    return until_lower(size, candidate(own, k - 1).x);
  }

  FS_METHOD int32_t top_p(int32_t end, u64 total) const {
    if (!uses_top_p(*t.params)) return end;
    const u64 target = top_p_target(t.params->top_p, total);
    const int32_t last = first_failing(end, [&](int32_t e) { return sum(e + 1) >= target; });
    return last < end ? last + 1 : end;
  }

  FS_METHOD int32_t measured_floors(int32_t end) const {
#pragma unroll 1  // one pass in the code serves them all
    for (uint32_t left = floors_used(); left; left &= left - 1) {
      const int which = __ffs((int)left) - 1;
      u64 sums[6] = {};
      if (which == kEtaFloor || which == kPLessFloor) measure(end, sums);
      const u64 total = sum(end);
      end = until_lighter(end, floor_of(which, {total, sums[0], sums[1]},
                                        {total, sums[3], sums[4], sums[5]}, mass(0), unit_of(t)));
    }
    return end;
  }

  // The sums of stage 6b over the first `end`, but for that of their mass.
  FS_METHOD void measure(int32_t end, u64 (&sums)[6]) const {
    DepthSums depths = {};
    SquareSums squares = {};
#pragma unroll 1
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
    end = until_lower(end, before.low.x);
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
#pragma unroll 1
  for (int32_t from = 0; from < list.size; from += threads()) {
    const int32_t e = from + (int32_t)threadIdx.x;
    const u64 w = e < list.size ? mass_of_one(from_key(candidate(own, e).x), t) : 0;
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
      choices = until_lighter(end, xtc_floor(*t.params, filters.sum(end)));
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

// Filters and draws, as filter_and_draw(). `before`: what is kept already.
template <Policy kPolicy>
FS_DEVICE Totals finish_listed(const Batch& batch, int64_t r, const Team<kPolicy>& team,
                               const RowTask& t, const Listed& list, const KeptKeys& before,
                               Drawable& found, KeyPlace& first) {
  Shared& own = *team.own;
  filter_list(team, t, list, before);
  Masses drawn = t;
  drawn.scale = t.drawn_scale;
#pragma unroll 1
  for (int32_t e = (int32_t)threadIdx.x; e < own.kept_end; e += threads()) {
    own.running[e] = mass_of_one(from_key(candidate(own, e).x), drawn);
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
  found = drawable_of(own, t);
  return totals;
}

}  // namespace fastsample

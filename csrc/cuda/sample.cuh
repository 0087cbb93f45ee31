// The pipeline for one row, from logits to token, run by a team of blocks; stem of
// csrc/cpu/sample.cc.
//
//   process   stages 1 to 3: what lies over the row's logits
//   scan      stages 0 and 4: the maximum, its lowest id, and a key that k tokens reach
//   filter    stage 7: for top-k, top-p and typical up to 3 rounds of selection each, and a place
//             among equal tokens where only some are kept; for the others a pass or two each
//   draw      stage 8: the kept mass of each warp's segment, then each draw's segment and token
//
// Sums and maxima are of integers, so nothing depends on the order of atomics or on how the row
// is cut up.
#pragma once

#include "core/philox.h"
#include "cuda/listed.cuh"
#include "cuda/verify.cuh"

namespace fastsample {

// Stage 8: the draws from `kept`, which are all, or those whose coin says `excluding`. Returns the
// kept mass; unless some tokens have been excluded, there are no draws where that is 0.
template <Policy kPolicy, class S>
FS_DEVICE u64 draw_from(const Batch& batch, int64_t r, const Team<kPolicy>& team, const S& slice,
                        const RowTask& t, const KeptKeys& kept, bool all, bool excluding) {
  const int32_t lowest = lowest_drawn_key(t, kept);
  const auto weight = [&](float x, int32_t id) -> u64 {
    const int32_t key = key_of(x);
    return key < lowest ? 0 : kept_drawn_mass(t, kept, x, KeyPlace{key, id});
  };
  const u64 total = sum_segments(team, slice, weight);
  const Outputs& out = batch.out;
  if (!out.tokens || (!total && !excluding)) return total;
  // Seed, offset and total are loaded again for each draw rather than held in registers.
  for (int32_t j = 0; j < out.num_samples; ++j) {
    const auto [seed, offset] = stream_of(batch, r);
    const float coin = t.params->xtc_probability;
    if (!all && xtc_excludes(seed, offset, (uint32_t)j, coin) != excluding) continue;
    const u64 sum = team.own->running[team.parts * warps() - 1];
    int64_t* token = out.tokens + r * out.num_samples + j;
    locate(team, slice, draw_threshold(seed, offset, (uint32_t)j, sum), weight,
           [&](int32_t id) { store_global(token, (int64_t)id); });
    // What is left may weigh nothing. Its first token is the last top choice.
    if (!sum && team.leads() && threadIdx.x == 0) store_global(token, (int64_t)kept.high.id + 1);
  }
  return total;
}

// All draws. With top choices, those draws come first that take them.
template <Policy kPolicy, class S>
FS_DEVICE Totals draw(const Batch& batch, int64_t r, const Team<kPolicy>& team, const S& slice,
                      const RowTask& t, const Drawable& from) {
  KeptKeys kept = from.kept;
  const bool all = from.top.x == kKeyInfinity;
  Totals totals = {0, 0};
#pragma unroll 1  // one pass in the code serves both
  for (bool excluding = false;; excluding = true) {
    totals.rest = draw_from(batch, r, team, slice, t, kept, all, excluding);
    if (!excluding) totals.all = totals.rest;
    if (all || excluding || !totals.all) return totals;
    kept = narrow_below(kept, from.top);
    team.sync();  // the board's sums are free
  }
}

// The same token for every draw, or -1 in an invalid row.
template <Policy kPolicy>
FS_DEVICE void write_same_token(const Outputs& out, int64_t r, const Team<kPolicy>& team,
                                int64_t token) {
  if (!out.tokens || !team.leads()) return;
  for (int32_t j = (int32_t)threadIdx.x; j < out.num_samples; j += threads()) {
    store_global(out.tokens + r * out.num_samples + j, token);
  }
}

FS_DEVICE Drawable only(const RowTask& t, KeyPlace token) {
  const KeptKeys kept = narrow_below(everything(t), {token.x, token.id - 1});
  return Drawable{narrow_above(kept, token), everything(t).high};
}

// Stages 7 and 8 of a valid row that is not greedy. Where its candidates do, the leading block
// finishes it, and the others are free.
template <Policy kPolicy, class S>
FS_DEVICE Totals filter_and_draw(const Batch& batch, int64_t r, const Team<kPolicy>& team,
                                 const S& slice, RowTask& t, Drawable& found) {
  const KeptKeys before = before_top_k(team, slice, t);
  if (uses_candidates(t, slice.vocab)) {
    const Listed list = list_candidates(team, slice, t);
    if (list.size >= 0) {
      return team.leads() ? finish_listed(batch, r, team, t, list, before, found) : Totals{1, 1};
    }
  }
  found = apply_filters(team, slice, t, before);
  set_drawn_scale(t);
  const Totals totals = draw(batch, r, team, slice, t, found);
  // What is kept weighs nothing: its first token counts for everything, as if it were the peak.
  if (!totals.all) {
    const KeyPlace first = first_kept(team, slice, t, found.kept);
    t.peak_key = first.x;
    t.argmax = first.id;
  }
  return totals;
}

template <class T, Policy kPolicy, bool kPlain>
FS_DEVICE void sample_row(const Batch& batch, const Workspace& ws, int64_t r,
                          const Team<kPolicy>& team, bool starts) {
  typedef Reading<kPolicy == kClusterPolicy, kPlain> How;
  auto slice = make_slice<T, How>(batch, r, team.rank, team.parts);
  RowTask t = make_task(at(batch.rows.params, r), batch.logits.input);
  process_row(batch, ws, r, *t.params, team, slice);
  scan(team, slice, t.params->top_k, t, starts);
  Drawable found = {};
  Totals totals = {0, 0};
  if (t.status == kValid && !t.greedy) {
    totals = filter_and_draw(batch, r, team, slice, t, found);
  }
  if (!totals.all) {
    found = only(t, {t.peak_key, t.argmax});
    write_same_token(batch.out, r, team, t.status == kValid ? t.argmax : -1);
  }
  if (team.leads() && threadIdx.x == 0) {
    store_global(batch.out.status + r, (int32_t)t.status);
    if (ws.states) ws.states[r] = RowState{t.status, t.peak_key, found, totals.all, totals.rest};
  }
}

// Persistent over rows: team i takes rows i, i + teams, ... Between two rows nothing has to wait for
// another block: what the next row's scan publishes has a place of its own, and all else is told
// after the barrier that ends it.
template <class T, Policy kPolicy, bool kPlain>
FS_DEVICE void sample_rows(const Batch& batch, const Workspace& ws, int32_t parts) {
  Shared* own = (Shared*)shared_memory();
  Team<kPolicy> team = {own, nullptr, 0, parts, 0};
  const uint32_t index = blockIdx.x / (uint32_t)parts, teams = gridDim.x / (uint32_t)parts;
  clear_bins(team);
  if constexpr (kPolicy == kClusterPolicy) {
    team.rank = cluster_rank();
    cluster_arrive();
  }
  if constexpr (kPolicy == kGridPolicy) {
    team.rank = (int)(blockIdx.x % (uint32_t)parts);
    team.grid_board = ws.boards + index;
    if (threadIdx.x == 0) own->semaphore = ws.semaphores + index;
  }
  for (uint32_t r = index; r < (uint32_t)batch.logits.rows; r += teams) {
    sample_row<T, kPolicy, kPlain>(batch, ws, r, team, r == index);
    if (batch.drafts.num_accepted) {
      team.sync();  // the row's token is written
      if (team.leads() && threadIdx.x == 0) settle(batch, r);
    }
    __syncthreads();  // this row's shared memory is free
    team.turn ^= 1;
  }
}

template <class T, Policy kPolicy, bool kPlain>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    sample_kernel(const __grid_constant__ Batch batch, const __grid_constant__ Workspace ws,
                  int32_t parts) {
  if constexpr (kPolicy != kClusterPolicy || kHasClusters) {
    sample_rows<T, kPolicy, kPlain>(batch, ws, parts);
  }
}

}  // namespace fastsample

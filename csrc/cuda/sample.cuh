// The pipeline for one row, from logits to token, run by a team of blocks; stem of
// csrc/cpu/sample.cc.
//
//   process   stages 1 to 3: what lies over the row's logits
//   scan      stages 0 and 4: the maximum, its lowest id, and a key that k tokens reach
//   listed    stages 7 and 8 behind a top-k that is not large: a pass hands the tokens that reach
//             the key to the leading block, which sorts them, filters and draws. Else:
//   filter    stage 7: for top-k, top-p and typical up to 3 rounds of selection each, and a place
//             among equal tokens where only some are kept; for the others a pass or two each
//   draw      stage 8: the kept mass of each warp's segment, then each draw's segment and token
//
// Sums and maxima are of integers, so nothing depends on the order of atomics or on how the row
// is cut up.
#pragma once

#include "cuda/listed.cuh"
#include "cuda/scan.cuh"
#include "cuda/verify.cuh"

namespace fastsample {

// Stage 8: the draws from `kept`, which are all, or those whose coin says `excluding`. Returns the
// kept mass; unless some tokens have been excluded, there are no draws where that is 0.
template <class S, Policy kPolicy>
FS_DEVICE u64 draw_from(const Batch& batch, int64_t r, const Team<kPolicy>& team, const RowTask& t,
                        const KeptKeys& kept, bool all, bool excluding) {
  const Weighed drawn = {kept, false};
  const u64 total = sum_segments<S, kPolicy>(team.rank, team.parts, t, drawn);
  const Outputs& out = batch.out;
  if (!out.tokens || (!total && !excluding)) return total;
  // Seed, offset and total are loaded again for each draw rather than held in registers.
#pragma unroll 1
  for (int32_t j = 0; j < out.num_samples; ++j) {
    const Stream stream = team.own->stream;
    if (!all && !takes_part(stream, j, t.params->xtc_probability, excluding)) continue;
    const u64 sum = team.own->running[team.parts * warps() - 1];
    int64_t* token = out.tokens + r * out.num_samples + j;
    const u64 threshold = random_below(stream, j, kPlainDraw, sum);
    const int32_t id = locate<S, kPolicy>(team.rank, team.parts, t, drawn, threshold);
    if (id >= 0) store_global(token, (int64_t)id);
    // What is left may weigh nothing. Its first token is the last top choice.
    if (!sum && team.leads() && threadIdx.x == 0) store_global(token, (int64_t)kept.high.id + 1);
  }
  return total;
}

// All draws. With top choices, those draws come first that take them.
template <class S, Policy kPolicy>
FS_DEVICE Totals draw(const Batch& batch, int64_t r, const Team<kPolicy>& team, const RowTask& t,
                      Drawable from) {
  const bool all = from.top.x == kKeyInfinity;
  Totals totals = {0, 0};
#pragma unroll 1  // one pass in the code serves both
  for (bool excluding = false;; excluding = true) {
    totals.rest = draw_from<S>(batch, r, team, t, from.kept, all, excluding);
    if (!excluding) totals.all = totals.rest;
    if (all || excluding || !totals.all) return totals;
    from.kept = narrow_below(from.kept, from.top);
    team.sync();  // the board's sums are free
  }
}

// The same token for every draw, by the leading block: one that counts for everything, as if it
// were the peak, or that of an invalid row.
FS_DEVICE Drawable take_only(const Batch& batch, int64_t r, RowTask& t, KeyPlace token) {
  const Outputs& out = batch.out;
  const int64_t id = t.status == kValid ? token.id : -1;
#pragma unroll 1
  for (int32_t j = (int32_t)threadIdx.x; out.tokens && j < out.num_samples; j += threads()) {
    store_global(out.tokens + r * out.num_samples + j, id);
  }
  t.peak_key = token.x;
  const KeptKeys kept = narrow_below(everything(t), {token.x, token.id - 1});
  return Drawable{narrow_above(kept, token), everything(t).high};
}

// Stages 7 and 8 of a valid row that is not greedy. Where its candidates do, the leading block
// finishes it, and the others are free. If nothing in what is `found` has mass, `first` is its
// first token, which counts for everything.
template <Policy kPolicy, class S>
FS_DEVICE Totals filter_and_draw(const Batch& batch, int64_t r, const Team<kPolicy>& team,
                                 const S& slice, const RowTask& t, Drawable& found,
                                 KeyPlace& first) {
  const KeptKeys before = before_top_k<S>(team, t);
  if (uses_candidates(t, slice.vocab)) {
    const Listed list = list_candidates(team, slice, t);
    if (list.size >= 0) {
      if (!team.leads()) return Totals{0, 0};
      return finish_listed(batch, r, team, t, list, before, found, first);
    }
  }
  found = apply_filters(team, slice, t, before);
  const Totals totals = draw<S>(batch, r, team, t, found);
  if (!totals.all) first = first_kept<S>(team, t, found.kept);
  return totals;
}

// Brings to shared memory what a row is drawn with: it arrives while the logits are on their way.
// After the team's next barrier nobody reads the offset any more.
FS_DEVICE void bring(const Batch& batch, int64_t r, Shared& own) {
  const int32_t* words = (const int32_t*)&at(batch.rows.params, r);
#pragma unroll 1
  for (int i = (int)threadIdx.x; i < (int)(sizeof(RowParams) / 4); i += threads()) {
    ((int32_t*)&own.params)[i] = words[i];
  }
  if (threadIdx.x == 0) own.stream = stream_of(batch, r);
}

template <class T, Policy kPolicy, bool kPlain>
FS_DEVICE void sample_row(const Batch& batch, const Workspace& ws, int64_t r,
                          const Team<kPolicy>& team, int32_t per_warp, bool meets) {
  typedef Reading<kPolicy == kClusterPolicy, kPlain> How;
  const int32_t top_k = at(batch.rows.params, r).top_k;
  bring(batch, r, *team.own);
  auto slice = make_slice<T, How>(batch, r, team.rank, per_warp);
  RowTask t = make_task(team.own->params, batch.logits.input);
  process_row(batch, ws, r, *t.params, team, slice);
  note(*team.own, slice);
  scan(team, slice, top_k, t, meets);
  const bool leader = team.leads() && threadIdx.x == 0;
  if (leader) store_global(batch.out.status + r, (int32_t)t.status);
  Drawable found;
  KeyPlace only = {t.peak_key, t.argmax};
  Totals totals = {0, 0};
  if (t.status == kValid && !t.greedy) {
    totals = filter_and_draw(batch, r, team, slice, t, found, only);
  }
  if (!totals.all && team.leads()) found = take_only(batch, r, t, only);
  if (!leader) return;
  write_state(ws, r, t, found, totals);
  if (ws.offsets) ws.offsets[r] = (int64_t)(team.own->stream.offset + 1);
}

// Persistent over rows: team i takes rows i, i + teams, ... Between two rows nothing has to wait
// for another block: what the next row's scan publishes has a place of its own, and all else is
// told after the barrier that ends it.
template <class T, Policy kPolicy, bool kPlain>
FS_DEVICE void sample_rows(const Batch& batch, const Workspace& ws, int32_t parts,
                           int32_t per_warp) {
  Shared* own = (Shared*)shared_memory();
  Team<kPolicy> team = {own, 0, parts, 0};
  const uint32_t index = blockIdx.x / (uint32_t)parts, teams = gridDim.x / (uint32_t)parts;
  clear_bins(team);
  if constexpr (kPolicy == kClusterPolicy) {
    team.rank = cluster_rank();
    cluster_arrive();
    if (!kPlain) cluster_wait();  // stage 3 may have to meet before the scan
  }
  if constexpr (kPolicy == kGridPolicy) {
    team.rank = (int)(blockIdx.x % (uint32_t)parts);
    if (threadIdx.x == 0) {
      own->semaphore = ws.semaphores + index;
      own->far_board = ws.boards + index;
      own->far_candidates = ws.candidates + (int64_t)index * parts * kMaxListed;
    }
  }
  for (uint32_t r = index; r < (uint32_t)batch.logits.rows; r += teams) {
    sample_row<T, kPolicy, kPlain>(batch, ws, r, team, per_warp, kPlain && r == index);
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
                  int32_t parts, int32_t per_warp) {
  if constexpr (kPolicy != kClusterPolicy || kHasClusters) {
    sample_rows<T, kPolicy, kPlain>(batch, ws, parts, per_warp);
  }
}

}  // namespace fastsample

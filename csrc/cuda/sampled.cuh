// Rows that `sample` has been through, as the kernels after it see them: one block per row.
#pragma once

#include "cuda/sample.cuh"

namespace fastsample {

// Calls f(r, team, slice, t, state) for every row of the calling block, with the task as it was
// when the row was drawn from.
template <class T, class F>
FS_DEVICE void each_sampled_row(const Batch& batch, const Workspace& ws, F f) {
  const Team<kBlockPolicy> team = {(Shared*)shared_memory(), 0, 1, 0};
  clear_bins(team);
  const int32_t per_warp = vectors_per_warp(batch.logits.vocab, (int32_t)sizeof(T), warps());
  for (int64_t r = blockIdx.x; r < batch.logits.rows; r += gridDim.x) {
    auto slice = make_slice<T, Reading<false, false>>(batch, r, 0, per_warp);
    RowTask t = make_task(at(batch.rows.params, r), batch.logits.input);
    const RowState& state = ws.states[r];
    set_peak(t, {state.peak_key, 0});
    process_row(batch, ws, r, *t.params, team, slice);
    f(r, team, slice, t, state);
    __syncthreads();  // this row's shared memory is free
  }
}

// The mass of all that is kept.
FS_DEVICE u64 mass_of_all(const RowTask& t, const RowState& state) {
  return state.total ? state.total : unit_of(t);
}

// How probable a kept token is: over draws that take XTC's top choices and draws that do not.
FS_DEVICE double share(const RowTask& t, const RowState& state, float x, int32_t id) {
  const double w = (double)drawn_mass(t, x);
  const double total = (double)mass_of_all(t, state);
  if (state.total == state.rest) return w / total;
  const double coin = (double)t.params->xtc_probability;
  const double with = (1.0 - coin) * w / total;
  const KeyPlace top = state.drawable.top, place = {key_of(x), id};
  if (!ranks_before(top, place)) return with;
  if (state.rest) return with + coin * w / (double)state.rest;
  // Those that are left weigh nothing: the first counts for everything.
  return place.x == top.x && id == top.id + 1 ? with + coin : with;
}

}  // namespace fastsample

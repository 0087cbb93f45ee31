// Whole rows of output and log-probabilities, from what `sample` found: a second kernel, so that
// the first one has no float64 for each token. One block per row.
#pragma once

#include "cuda/logprobs.cuh"

namespace fastsample {

// filter_logits and probabilities. An invalid row keeps nothing.
template <class S>
FS_DEVICE void write_rows(const Batch& batch, int64_t r, const S& slice, const RowTask& t,
                          const RowState& state) {
  const Outputs& out = batch.out;
  const int32_t vocab = slice.vocab;
  const KeptKeys among = state.drawable.kept;
  const bool valid = state.status == kValid;
  const float divisor = t.greedy ? 1.0f : t.params->temperature;
  const auto write = [&](float x, int32_t id, auto probability) {
    if (id < 0 || id >= vocab) return;
    const bool kept = valid && is_kept(t, among, x, id);
    if (out.filtered) store_global(out.filtered + r * vocab + id, kept ? x / divisor : -INFINITY);
    if (out.probabilities) {
      const double p = kept ? probability(x, id) : 0.0;
      store_global(out.probabilities + r * vocab + id, (float)p);
    }
  };
  if (state.total == state.rest) {
    const double total = (double)mass_of_all(t, state);
    each(slice, [&](float x, int32_t id) {
      write(x, id, [&](float y, int32_t) { return (double)drawn_mass(t, y) / total; });
    });
  } else {
    each_rolled(slice, [&](float x, int32_t id) {
      write(x, id, [&](float y, int32_t i) { return share(t, state, y, i); });
    });
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    outputs_kernel(const __grid_constant__ Batch batch, const __grid_constant__ Workspace ws) {
  each_sampled_row<T>(
      batch, ws,
      [&](int64_t r, const auto& team, const auto& slice, const RowTask& t, const RowState& state) {
        if (batch.out.filtered || batch.out.probabilities) write_rows(batch, r, slice, t, state);
        if (batch.out.mode != kNoLogprobs) write_logprobs(batch, ws, r, team, slice, t, state);
      });
}

}  // namespace fastsample

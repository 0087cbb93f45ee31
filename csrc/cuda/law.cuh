// The law of a draw, from what `sample` found: a kernel of its own, which runs before `outputs`,
// since a given token replaces the drawn one. One block per row. Stem of csrc/cpu/law.h.
#pragma once

#include "core/philox.h"
#include "cuda/sampled.cuh"

namespace fastsample {

// The masses that draw 0 is from.
struct Law {
  KeptKeys kept;
  u64 total;
  int32_t lone;  // the token that has all the mass where nothing else has any, else -1
};

FS_DEVICE Law law_of(const Batch& batch, int64_t r, const RowTask& t, const RowState& state) {
  Law law = {state.drawable.kept, mass_of_all(t, state), -1};
  if (!state.total || state.drawable.top.x == kKeyInfinity) return law;
  const auto [seed, offset] = stream_of(batch, r);
  if (!xtc_excludes(seed, offset, 0, t.params->xtc_probability)) return law;
  law.kept = narrow_below(law.kept, state.drawable.top);
  law.total = state.rest;
  if (state.rest) return law;
  law.lone = state.drawable.top.id + 1;
  RowTask own = t;
  set_peak(own, {state.drawable.top.x, law.lone});
  law.total = unit_of(own);
  return law;
}

FS_DEVICE u64 mass_in_law(const RowTask& t, const Law& law, float x, int32_t id) {
  if (law.lone >= 0) return id == law.lone ? law.total : 0;
  return kept_drawn_mass(t, law.kept, x, KeyPlace{key_of(x), id});
}

template <class S>
FS_DEVICE void write_law(const Batch& batch, int64_t r, const S& slice, const RowTask& t,
                         const RowState& state) {
  const Outputs& out = batch.out;
  const bool valid = state.status == kValid;
  Law law = {};
  if (valid) law = law_of(batch, r, t, state);
  if (out.masses) {
    each_rolled(slice, [&](float x, int32_t id) {
      if (id < 0 || id >= slice.vocab) return;
      const u64 mass = valid ? mass_in_law(t, law, x, id) : 0;
      store_global(out.masses + r * slice.vocab + id, (int64_t)mass);
    });
  }
  if (threadIdx.x) return;
  int64_t token = out.tokens[r];
  if (valid && out.given && out.given[r] >= 0 && out.given[r] < slice.vocab) {
    token = out.given[r];
    store_global(out.tokens + r, token);
  }
  const int32_t id = (int32_t)token;
  const u64 mass = valid ? mass_in_law(t, law, slice.value(id), id) : 0;
  store_global(out.weights + 2 * r, (int64_t)mass);
  store_global(out.weights + 2 * r + 1, (int64_t)law.total);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    law_kernel(const __grid_constant__ Batch batch, const __grid_constant__ Workspace ws) {
  each_sampled_row<T>(batch, ws,
                      [&](int64_t r, const auto&, const auto& slice, const RowTask& t,
                          const RowState& state) { write_law(batch, r, slice, t, state); });
}

}  // namespace fastsample

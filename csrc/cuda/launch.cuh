// Which kernel each launch takes, whether CUDA's runtime launches it or tests/simt.
#pragma once

#include "cuda/keep.cuh"
#include "cuda/law.cuh"
#include "cuda/outputs.cuh"

namespace fastsample {

// Calls f(kernel) with the one that serves a plan.
template <class T, bool kPlain, class F>
auto with_sample_kernel(Policy policy, F f) {
  switch (policy) {
    case kClusterPolicy:
      return f(sample_kernel<T, kClusterPolicy, kPlain>);
    case kGridPolicy:
      return f(sample_kernel<T, kGridPolicy, kPlain>);
    default:
      return f(sample_kernel<T, kBlockPolicy, kPlain>);
  }
}
template <class T, class F>
auto with_sample_kernel(Policy policy, bool plain, F f) {
  return plain ? with_sample_kernel<T, true>(policy, f) : with_sample_kernel<T, false>(policy, f);
}

// launch(kernel, plan, arguments...) starts plan.teams * plan.parts blocks; it returns 0 or an
// error.
template <class T, class Launch>
int launch_sample(const Batch& batch, const Plan& plan, Workspace ws, Launch launch) {
  ws.bitmaps = nullptr;
  const int32_t warps = plan.parts * plan.threads / 32;
  const int32_t per_warp = vectors_per_warp(batch.logits.vocab, (int32_t)sizeof(T), warps);
  return with_sample_kernel<T>(plan.policy, is_plain(batch.rows), [&](auto kernel) {
    return launch(kernel, plan, batch, ws, plan.parts, per_warp);
  });
}

template <class T, class Launch>
int launch_keep(const Batch& batch, const Plan& plan, const Workspace& ws, Launch launch) {
  return launch(keep_kernel<T>, plan, batch, ws);
}

template <class T, class Launch>
int launch_law(const Batch& batch, const Plan& plan, const Workspace& ws, Launch launch) {
  return launch(law_kernel<T>, plan, batch, ws);
}

template <class T, class Launch>
int launch_outputs(const Batch& batch, const Plan& plan, const Workspace& ws, Launch launch) {
  return launch(outputs_kernel<T>, plan, batch, ws);
}

}  // namespace fastsample

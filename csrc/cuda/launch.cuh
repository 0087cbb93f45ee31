// Which kernel each launch takes, whether CUDA's runtime launches it or tests/simt.
#pragma once

#include "cuda/keep.cuh"
#include "cuda/law.cuh"
#include "cuda/outputs.cuh"

namespace fastsample {

// launch(kernel, plan, arguments...) starts plan.teams * plan.parts blocks; it returns 0 or an
// error.
template <class T, class Launch>
int launch_sample(const Batch& batch, const Plan& plan, Workspace ws, Launch launch) {
  ws.bitmaps = nullptr;
  switch (plan.policy) {
    case kClusterPolicy:
      return launch(sample_kernel<T, kClusterPolicy>, plan, batch, ws, plan.parts);
    case kGridPolicy:
      return launch(sample_kernel<T, kGridPolicy>, plan, batch, ws, plan.parts);
    default:
      return launch(sample_kernel<T, kBlockPolicy>, plan, batch, ws, plan.parts);
  }
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

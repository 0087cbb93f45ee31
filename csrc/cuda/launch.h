// The launches that the bindings call, one set per dtype. They are asynchronous and never allocate.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/workspace.h"

namespace fastsample {

struct Launches {
  // Lets this dtype's kernels use all the shared memory and the large clusters of the current
  // device.
  cudaError_t (*prepare)(const Device&);
  // How many teams of a plan with clusters or a grid the current device can hold at once.
  cudaError_t (*resident)(const Device&, const Plan&, bool plain, int* teams);
  cudaError_t (*sample)(const Batch&, const Plan&, const Workspace&, cudaStream_t);
  cudaError_t (*keep)(const Batch&, const Plan&, const Workspace&, cudaStream_t);
  cudaError_t (*law)(const Batch&, const Plan&, const Workspace&, cudaStream_t);
  cudaError_t (*outputs)(const Batch&, const Plan&, const Workspace&, cudaStream_t);
};

extern const Launches launches_float32, launches_float16, launches_bfloat16;

// Loads the kernel of the next one on the current device.
cudaError_t prepare_lists();
cudaError_t list_kept(const Lists&, cudaStream_t);

}  // namespace fastsample

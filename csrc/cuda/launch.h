// The launches that the bindings call, one set per dtype: asynchronous, without allocation.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/workspace.h"

namespace fastsample {

struct Launches {
  // Lets this dtype's kernels use the current device's shared memory and its large clusters.
  cudaError_t (*prepare)(const Device&);
  cudaError_t (*sample)(const Batch&, const Plan&, const Workspace&, cudaStream_t);
  cudaError_t (*outputs)(const Batch&, const Plan&, const Workspace&, cudaStream_t);
};

extern const Launches launches_float32, launches_float16, launches_bfloat16;

}  // namespace fastsample

// The kernels of one dtype and their launches. Compiled once per dtype, so that several cores can
// build at once.
#include "cuda/launch.cuh"
#include "cuda/launch.h"

#define FASTSAMPLE_LAUNCHES_(dtype) launches_##dtype
#define FASTSAMPLE_LAUNCHES(dtype) FASTSAMPLE_LAUNCHES_(dtype)

namespace fastsample {
namespace {

typedef FASTSAMPLE_TYPE T;

// How a plan is launched.
struct Config {
  cudaLaunchAttribute attribute = {};
  cudaLaunchConfig_t config = {};

  Config(const Plan& plan, cudaStream_t stream) {
    config.gridDim = dim3((unsigned)(plan.teams * plan.parts));
    config.blockDim = dim3((unsigned)plan.threads);
    config.dynamicSmemBytes = (size_t)plan.shared;
    config.stream = stream;
    config.attrs = &attribute;
    if (plan.policy == kClusterPolicy) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = (unsigned)plan.parts;
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
      config.numAttrs = 1;
    } else if (plan.policy == kGridPolicy) {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
      config.numAttrs = 1;
    }
  }
  Config(const Config&) = delete;  // it points into itself
};

struct Launch {
  cudaStream_t stream;

  template <class... Parameters, class... Arguments>
  int operator()(void (*kernel)(Parameters...), const Plan& plan,
                 const Arguments&... arguments) const {
    const Config how(plan, stream);
    const cudaError_t error = cudaLaunchKernelEx(&how.config, kernel, arguments...);
    return error == cudaSuccess ? error : cudaGetLastError();  // which also clears it
  }
};

cudaError_t prepare(const Device& device) {
  const void* kernels[] = {(const void*)sample_kernel<T, kClusterPolicy>,
                           (const void*)sample_kernel<T, kBlockPolicy>,
                           (const void*)sample_kernel<T, kGridPolicy>,
                           (const void*)keep_kernel<T>,
                           (const void*)law_kernel<T>,
                           (const void*)outputs_kernel<T>};
  cudaError_t error = cudaSuccess;
  for (const void* kernel : kernels) {
    if (error) break;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 device.shared_block);
  }
  if (!error && device.largest_cluster > kPortableCluster) {
    error = cudaFuncSetAttribute(kernels[0], cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (!error) {  // as much as two blocks have, rather than a larger first cache
    error = cudaFuncSetAttribute(kernels[0], cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  }
  return error;
}

cudaError_t resident(const Device& device, const Plan& plan, int* teams) {
  cudaError_t error;
  if (plan.policy == kClusterPolicy) {
    const Config how(plan, nullptr);
    error = cudaOccupancyMaxActiveClusters(teams, sample_kernel<T, kClusterPolicy>, &how.config);
  } else {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(teams, sample_kernel<T, kGridPolicy>,
                                                          plan.threads, (size_t)plan.shared);
    *teams = *teams * device.multiprocessors / plan.parts;
  }
  return error == cudaSuccess ? error : cudaGetLastError();
}

cudaError_t sample(const Batch& batch, const Plan& plan, const Workspace& ws, cudaStream_t stream) {
  return (cudaError_t)launch_sample<T>(batch, plan, ws, Launch{stream});
}

cudaError_t keep(const Batch& batch, const Plan& plan, const Workspace& ws, cudaStream_t stream) {
  return (cudaError_t)launch_keep<T>(batch, plan, ws, Launch{stream});
}

cudaError_t law(const Batch& batch, const Plan& plan, const Workspace& ws, cudaStream_t stream) {
  return (cudaError_t)launch_law<T>(batch, plan, ws, Launch{stream});
}

cudaError_t outputs(const Batch& batch, const Plan& plan, const Workspace& ws,
                    cudaStream_t stream) {
  return (cudaError_t)launch_outputs<T>(batch, plan, ws, Launch{stream});
}

}  // namespace

extern const Launches FASTSAMPLE_LAUNCHES(FASTSAMPLE_DTYPE) = {prepare, resident, sample,
                                                                keep,    law,      outputs};

}  // namespace fastsample

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

cudaError_t prepare_kernel(const void* kernel, Policy policy, const Device& device) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           device.shared_block);
  if (policy != kClusterPolicy) return error;
  if (!error && device.largest_cluster > kPortableCluster) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  // As much as two blocks have, rather than a larger first cache.
  return error ? error
               : cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                      cudaSharedmemCarveoutMaxShared);
}

cudaError_t prepare(const Device& device) {
  cudaError_t error = cudaSuccess;
  for (const Policy policy : {kClusterPolicy, kBlockPolicy, kGridPolicy}) {
    for (const bool plain : {false, true}) {
      if (error) return error;
      error = with_sample_kernel<T>(policy, plain, [&](auto kernel) {
        return prepare_kernel((const void*)kernel, policy, device);
      });
    }
  }
  const void* others[] = {(const void*)keep_kernel<T>, (const void*)law_kernel<T>,
                          (const void*)outputs_kernel<T>};
  for (const void* kernel : others) {
    if (!error) error = prepare_kernel(kernel, kBlockPolicy, device);
  }
  return error;
}

cudaError_t resident(const Device& device, const Plan& plan, bool plain, int* teams) {
  const cudaError_t error = with_sample_kernel<T>(plan.policy, plain, [&](auto kernel) {
    if (plan.policy == kClusterPolicy) {
      const Config how(plan, nullptr);
      return cudaOccupancyMaxActiveClusters(teams, kernel, &how.config);
    }
    const cudaError_t found = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        teams, kernel, plan.threads, (size_t)plan.shared);
    *teams = *teams * device.multiprocessors / plan.parts;
    return found;
  });
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

// The launch of what is the same for every dtype.
#include "cuda/launch.h"
#include "cuda/list.cuh"

namespace fastsample {

cudaError_t prepare_lists() {
  cudaFuncAttributes found;
  return cudaFuncGetAttributes(&found, list_kernel);
}

cudaError_t list_kept(const Lists& lists, cudaStream_t stream) {
  list_kernel<<<(unsigned)lists.rows, kThreads, kListShared, stream>>>(lists);
  return cudaGetLastError();
}

}  // namespace fastsample

// The launch of what is the same for every dtype.
#include "cuda/launch.h"
#include "cuda/list.cuh"

namespace fastsample {

cudaError_t list_kept(const Lists& lists, cudaStream_t stream) {
  list_kernel<<<(unsigned)lists.rows, kThreads, kListShared, stream>>>(lists);
  return cudaGetLastError();
}

}  // namespace fastsample

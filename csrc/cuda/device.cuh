// What the hardware offers: threads, loads and stores, clusters. Only this file knows whether nvcc
// compiles it, or a host compiler for tests/simt, whose simt.h defines CUDA's names for the host.
#pragma once

#include "cuda/workspace.h"

#if !defined(__CUDACC__)
#include "simt.h"
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#include <cooperative_groups.h>
#endif

#define FS_DEVICE static __device__ __forceinline__
#define FS_METHOD __device__ __forceinline__
// A function that is called: much code for few numbers, which are arguments by value, since what a
// reference names would have to lie in memory.
#define FS_CALLED static __device__ __attribute__((noinline, unused))

namespace fastsample {

constexpr uint32_t kWholeWarp = 0xffffffffu;

FS_DEVICE int lane() { return (int)(threadIdx.x & 31); }
FS_DEVICE int warp() { return (int)(threadIdx.x >> 5); }

#if defined(__CUDACC__)

// Every launch has as many, so that loops over a block's threads divide by a constant.
FS_DEVICE int threads() { return kThreads; }

FS_DEVICE char* shared_memory() {
  extern __shared__ Vec16 fastsample_shared[];
  return (char*)fastsample_shared;
}

// Read-only data in device memory: 16 bytes at once, or one element.
FS_DEVICE Vec16 load_global16(const void* p) {
  const uint4 v = __ldg((const uint4*)p);
  return Vec16{{v.x, v.y, v.z, v.w}};
}
// 16 bytes of shared memory at once.
FS_DEVICE Vec16 load_shared16(const Vec16* p) {
  const uint4 v = *(const uint4*)p;
  return Vec16{{v.x, v.y, v.z, v.w}};
}
FS_DEVICE void store_shared16(Vec16* p, const Vec16& v) {
  *(uint4*)p = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}
template <class T>
FS_DEVICE T load_global(const T* p) {
  return __ldg(p);
}
template <class T>
FS_DEVICE void store_global(T* p, T value) {
  *p = value;
}

FS_DEVICE float half_to_float(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

// A number that the compiler takes for a new one at each reading, so that it does not write a loop
// twice, once for each side of a choice that all rounds share.
FS_DEVICE float anew(float x) {
  asm volatile("" : "+f"(x));
  return x;
}

FS_DEVICE void pause() { __nanosleep(32); }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kHasClusters = true;
FS_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.aligned;" ::: "memory"); }
FS_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
// One thread's fence serves the block: a fence is a round trip to the L2 cache. Called, since the
// stages meet in many places.
FS_CALLED void cluster_sync() {
  __syncthreads();
  if (threadIdx.x == 0) asm volatile("fence.acq_rel.cluster;" ::: "memory");
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  cluster_wait();
}
FS_DEVICE int cluster_rank() { return (int)cooperative_groups::this_cluster().block_rank(); }
template <class T>
FS_DEVICE T* of_cluster_block(T* mine, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(mine, rank);
}
#else
constexpr bool kHasClusters = false;
FS_DEVICE void cluster_arrive() {}
FS_DEVICE void cluster_wait() {}
FS_DEVICE void cluster_sync() {}
FS_DEVICE int cluster_rank() { return 0; }
template <class T>
FS_DEVICE T* of_cluster_block(T* mine, int) {
  return mine;
}
#endif

#endif  // __CUDACC__

// Called, since GPUs divide 64 bits in software.
FS_CALLED u64 divide(u64 a, u64 b) { return a / b; }

FS_DEVICE int warps() { return threads() / 32; }

}  // namespace fastsample

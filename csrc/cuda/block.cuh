// Threads, blocks and teams of blocks. This is the only file that knows whether nvcc compiles it,
// or g++ for tests/simt, whose simt.h lends CUDA's names to the host.
#pragma once

#include "core/rows.h"
#include "cuda/workspace.h"

#if !defined(__CUDACC__)
#include "simt.h"
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#include <cooperative_groups.h>
#endif

#define FS_DEVICE static __device__ __forceinline__
#define FS_METHOD __device__ __forceinline__

namespace fastsample {

constexpr uint32_t kWholeWarp = 0xffffffffu;

FS_DEVICE int lane() { return (int)(threadIdx.x & 31); }
FS_DEVICE int warp() { return (int)(threadIdx.x >> 5); }
FS_DEVICE int warps() { return (int)(blockDim.x >> 5); }

#if defined(__CUDACC__)

FS_DEVICE char* shared_memory() {
  extern __shared__ Vec16 fastsample_shared[];
  return (char*)fastsample_shared;
}

// Read-only data: 16 bytes at once, or one element.
FS_DEVICE Vec16 load_global16(const void* p) {
  const uint4 v = __ldg((const uint4*)p);
  return Vec16{{v.x, v.y, v.z, v.w}};
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

FS_DEVICE void pause() { __nanosleep(32); }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kHasClusters = true;
FS_DEVICE void cluster_sync() { cooperative_groups::this_cluster().sync(); }
FS_DEVICE int cluster_rank() { return (int)cooperative_groups::this_cluster().block_rank(); }
template <class T>
FS_DEVICE T* of_cluster_block(T* mine, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(mine, rank);
}
#else
constexpr bool kHasClusters = false;
FS_DEVICE void cluster_sync() {}
FS_DEVICE int cluster_rank() { return 0; }
template <class T>
FS_DEVICE T* of_cluster_block(T* mine, int) {
  return mine;
}
#endif

#endif  // __CUDACC__

// Reductions over a warp; every lane gets the result.
template <class T, class Op>
FS_DEVICE T warp_reduce(T value, Op op) {
  for (int step = 16; step; step >>= 1) {
    value = op(value, (T)__shfl_xor_sync(kWholeWarp, value, step));
  }
  return value;
}
FS_DEVICE u64 warp_sum(u64 value) {
  return warp_reduce(value, [](u64 a, u64 b) { return a + b; });
}
FS_DEVICE long long warp_max(long long value) {
  return warp_reduce(value, [](long long a, long long b) { return a > b ? a : b; });
}

// Sums before each lane's value, lane by lane; `total` is the warp's.
FS_DEVICE u64 warp_scan(u64 value, u64& total) {
  u64 running = value;
  for (int step = 1; step < 32; step <<= 1) {
    const u64 below = __shfl_up_sync(kWholeWarp, running, step);
    if (lane() >= step) running += below;
  }
  total = __shfl_sync(kWholeWarp, running, 31);
  return running - value;
}

// Sums before each thread's value, thread by thread. `scratch` has 32 places; all may be used again
// after the call.
FS_DEVICE u64 block_scan(u64 value, u64* scratch, u64& total) {
  u64 sum;
  const u64 before = warp_scan(value, sum);
  if (lane() == 0) scratch[warp()] = sum;
  __syncthreads();
  const u64 below = warp_scan(lane() < warps() ? scratch[lane()] : 0, total);
  const u64 start = __shfl_sync(kWholeWarp, below, warp());
  __syncthreads();
  return start + before;
}

FS_DEVICE u64 block_sum(u64 value, u64* scratch) {
  u64 total;
  block_scan(value, scratch, total);
  return total;
}

// 64-bit sums as two 32-bit atomics, which shared memory has everywhere: exactly one of the
// additions that wrap the lower half sees it wrap.
FS_DEVICE void add_wide(uint32_t* halves, u64 value) {
  const uint32_t low = (uint32_t)value;
  const uint32_t before = atomicAdd(halves, low);
  const uint32_t high = (uint32_t)(value >> 32) + (before + low < before ? 1 : 0);
  if (high) atomicAdd(halves + 1, high);
}
FS_DEVICE u64 wide(const uint32_t* halves) { return (u64)halves[1] << 32 | halves[0]; }

// Barrier of blocks that are on the device all at once, in device memory. The sign flips when all
// have arrived, so the word is never cleared: each arrival adds 1, the first block what makes the
// sum 2^31.
FS_DEVICE void grid_sync(uint32_t* semaphore, int rank, int parts) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    const uint32_t step = rank == 0 ? 0x80000000u - (uint32_t)(parts - 1) : 1u;
    const uint32_t before = atomicAdd(semaphore, step);
    while (!((before ^ *(volatile uint32_t*)semaphore) >> 31)) pause();
    __threadfence();
  }
  __syncthreads();
}

}  // namespace fastsample

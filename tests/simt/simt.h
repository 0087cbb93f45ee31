// CUDA's names for the host: every thread of a block, a cluster or a grid is a fiber. csrc/cuda
// includes this file when a host compiler compiles it; nothing else differs.
//
// Fibers switch only at barriers and warp operations, in an order that the test chooses: lane by
// lane, or (kWarpByWarp) one warp after another, shuffled, each as far as it gets. So where a
// barrier is missing, some order runs a thread too early or too late.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "cuda/workspace.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace simt {

struct Index {
  uint32_t x, y, z;
};

enum Order : int { kAscending = 0, kDescending = 1, kShuffled = 2, kWarpByWarp = 3 };

// What the launches of a call did.
struct Counters {
  int64_t launches;
  int64_t logit_bytes;    // read from the logits
  int64_t other_bytes;    // read from other device memory through load_global
  int64_t written_bytes;  // through store_global
  int64_t barriers;       // of blocks, once for each block that passes
  int64_t team_barriers;  // of clusters, and of a grid's teams
  int64_t warp_operations;
  int64_t atomics;
  int64_t wide_shared_atomics;  // of 64 bits, in shared memory, which hardware does not have
  // Of the library that counts (counts.cc) alone:
  int64_t held_bytes;  // read from the row that shared memory holds
  int64_t remote;      // accesses to another block's shared memory, each lane's
  int64_t phases;      // a warp's accesses to its own: 1 for 4 bytes a lane, 2 for 8, 4 for 16
  int64_t wavefronts;  // what those take: as many as the words that one bank has of a phase
};

struct Settings {
  int order;
  uint64_t seed;          // of the shuffled orders
  const char* skip_file;  // where the barrier stands that does not make threads wait
  int skip_line;
  const char* logits_begin;
  const char* logits_end;
  size_t held_begin, held_end;              // within a block's shared memory: the row
  const char *semaphores, *semaphores_end;  // of a grid's teams
  int parts;                                // blocks of a team
};

extern Settings settings;
extern Counters counters;

// The running thread's place.
struct Place {
  Index thread, block, block_size, grid_size;
  int cluster_rank;
};
extern Place* here;

void block_barrier(const char* file, int line);
void cluster_arrive();
void cluster_wait();
void pause();
char* shared_memory();
char* shared_memory_of(int cluster_rank);

// Every lane gives 8 bytes and gets those of lane `from`.
uint64_t exchange(uint64_t mine, int from);
uint32_t vote(bool mine);

// Runs grid * block threads in clusters of `cluster` blocks. `together` blocks run at a time and
// may wait for each other. Returns null, or what went wrong.
typedef void (*Body)(const void* context);
const char* run(int64_t grid, int block, size_t shared, int64_t together, int cluster, Body body,
                const void* context);

void count_read(const void* p, size_t bytes);
void count_atomic(const void* p, size_t bytes);

// What counts.cc needs to know of the running thread.
struct Running {
  void* warp;
  char* shared;  // of its block
  size_t shared_size;
  int lane;
};
Running running();
bool is_shared(const void* p);  // by any block
// Called when all lanes of a warp have met: what they have done till then lies side by side.
extern void (*warp_met)(void* warp);

}  // namespace simt

#define threadIdx (simt::here->thread)
#define blockIdx (simt::here->block)
#define blockDim (simt::here->block_size)
#define gridDim (simt::here->grid_size)

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  simt::block_barrier(file, line);
}
inline void __threadfence() {}

template <class T>
inline T simt_exchange(T value, int from) {
  static_assert(sizeof(T) <= 8, "");
  uint64_t word = 0;
  memcpy(&word, &value, sizeof value);
  word = simt::exchange(word, from);
  memcpy(&value, &word, sizeof value);
  return value;
}
inline int simt_lane() { return (int)(threadIdx.x & 31); }
template <class T>
inline T __shfl_sync(uint32_t, T value, int from) {
  return simt_exchange(value, from & 31);
}
template <class T>
inline T __shfl_xor_sync(uint32_t, T value, int mask) {
  return simt_exchange(value, simt_lane() ^ mask);
}
template <class T>
inline T __shfl_up_sync(uint32_t, T value, int step) {
  return simt_exchange(value, simt_lane() >= step ? simt_lane() - step : simt_lane());
}
inline uint32_t __ballot_sync(uint32_t, bool mine) { return simt::vote(mine); }

inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }

// One fiber runs at a time, so plain operations are atomic.
template <class T>
inline T atomicAdd(T* p, T value) {
  simt::count_atomic(p, sizeof *p);
  const T before = *p;
  *p = (T)(before + value);
  return before;
}
inline uint32_t atomicOr(uint32_t* p, uint32_t value) {
  simt::count_atomic(p, sizeof *p);
  const uint32_t before = *p;
  *p |= value;
  return before;
}
inline uint32_t atomicMax(uint32_t* p, uint32_t value) {
  simt::count_atomic(p, sizeof *p);
  const uint32_t before = *p;
  if (value > before) *p = value;
  return before;
}
inline int32_t atomicCAS(int32_t* p, int32_t expected, int32_t value) {
  simt::count_atomic(p, sizeof *p);
  const int32_t before = *p;
  if (before == expected) *p = value;
  return before;
}

// What device.cuh defines for nvcc.
namespace fastsample {

constexpr bool kHasClusters = true;

inline int threads() { return (int)blockDim.x; }

inline char* shared_memory() { return simt::shared_memory(); }
inline Vec16 load_global16(const void* p) {
  simt::count_read(p, 16);
  return *(const Vec16*)p;  // UBSan looks at the alignment
}
// As one access, which counts.cc would otherwise see as four.
typedef unsigned __int128 simt_uint4 __attribute__((may_alias));
inline Vec16 load_shared16(const Vec16* p) {
  const simt_uint4 all = *(const simt_uint4*)p;
  Vec16 v;
  memcpy(&v, &all, sizeof v);
  return v;
}
inline void store_shared16(Vec16* p, const Vec16& v) {
  simt_uint4 all;
  memcpy(&all, &v, sizeof v);
  *(simt_uint4*)p = all;
}
template <class T>
inline T load_global(const T* p) {
  simt::count_read(p, sizeof(T));
  return *p;
}
template <class T>
inline void store_global(T* p, T value) {
  simt::counters.written_bytes += sizeof(T);
  *p = value;
}

// Exact: exponent and mantissa are moved into place, then multiplied by a power of two.
inline float half_to_float(uint16_t bits) {
  const uint32_t magnitude = (bits & 0x7fffu) << 13;
  float x;
  memcpy(&x, &magnitude, sizeof x);
  x *= 0x1p112f;
  uint32_t word;
  memcpy(&word, &x, sizeof word);
  if ((bits & 0x7c00) == 0x7c00) word |= 0x7f800000u;
  word |= (bits & 0x8000u) << 16;
  memcpy(&x, &word, sizeof x);
  return x;
}

inline float anew(float x) { return x; }
inline void pause() { simt::pause(); }
inline void cluster_arrive() { simt::cluster_arrive(); }
inline void cluster_wait() { simt::cluster_wait(); }
inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
inline int cluster_rank() { return simt::here->cluster_rank; }
template <class T>
inline T* of_cluster_block(T* mine, int rank) {
  return (T*)(simt::shared_memory_of(rank) + ((char*)mine - simt::shared_memory()));
}

}  // namespace fastsample

// The threads that work on one row: sums within a warp and a block, and teams of blocks, which meet
// at barriers and share a board.
#pragma once

#include "cuda/row.cuh"

namespace fastsample {

// Reductions over a warp; every lane gets the result. Not unrolled: a shuffle of 64 bits is much
// code and waits for the one before in any case.
template <class T, class Op>
FS_DEVICE T warp_reduce(T value, Op op) {
#pragma unroll 1
  for (int step = 16; step; step >>= 1) {
    value = op(value, (T)__shfl_xor_sync(kWholeWarp, value, step));
  }
  return value;
}

// Sums and signed maxima of 64 bits, which are asked for in many places.
FS_CALLED u64 warp_fold(u64 value, bool sums) {
  return warp_reduce(value, [sums](u64 a, u64 b) {
    return sums ? a + b : (long long)a > (long long)b ? a : b;
  });
}
FS_DEVICE u64 warp_sum(u64 value) { return warp_fold(value, true); }
FS_DEVICE long long warp_max(long long value) { return (long long)warp_fold((u64)value, false); }
FS_DEVICE int32_t warp_min(int32_t value) {
  return warp_reduce(value, [](int32_t a, int32_t b) { return a < b ? a : b; });
}

// The sum of the values in lower lanes; `total` is the whole warp's.
template <class T>
FS_DEVICE T warp_scan(T value, T& total) {
  T running = value;
#pragma unroll 1
  for (int step = 1; step < 32; step <<= 1) {
    const T below = __shfl_up_sync(kWholeWarp, running, step);
    if (lane() >= step) running += below;
  }
  total = __shfl_sync(kWholeWarp, running, 31);
  return running - value;
}

// 32 elements for a block's sums, at the beginning of its shared memory.
FS_DEVICE u64* scratch() { return (u64*)shared_memory(); }

struct Scanned {
  u64 before, total;
};

// The sum of the values of lower threads, and that of the whole block. The scratch is free again
// when the call returns.
FS_CALLED Scanned block_scan(u64 value) {
  u64 sum, total;
  const u64 before = warp_scan(value, sum);
  if (lane() == 0) scratch()[warp()] = sum;
  __syncthreads();
  const u64 below = warp_scan(lane() < warps() ? scratch()[lane()] : (u64)0, total);
  const u64 start = __shfl_sync(kWholeWarp, below, warp());
  __syncthreads();
  return Scanned{start + before, total};
}

FS_DEVICE u64 block_sum(u64 value) { return block_scan(value).total; }

// 64-bit sums as two 32-bit atomics, which shared memory has on every GPU: of the additions that
// make the lower half wrap, each sees its own wrap and carries 1.
FS_DEVICE void add_wide(u64* sum, u64 value) {
  uint32_t* halves = (uint32_t*)sum;
  const uint32_t low = (uint32_t)value;
  const uint32_t before = atomicAdd(halves, low);
  const uint32_t high = (uint32_t)(value >> 32) + (before + low < before ? 1 : 0);
  if (high) atomicAdd(halves + 1, high);
}

// What one thread makes of measures, for all of its block.
struct Verdict {
  u64 floor;
  float low, high;
};

// A block's own shared memory, as far as its size does not depend on the row's.
struct alignas(16) Shared {
  u64 scratch[32];          // the first, since lists have nothing else
  Board board;              // a grid's is in device memory, but for the block's own bins
  u64 running[kMaxListed];  // sums over segments or candidates; or the masses of candidates
  long long best[32];
  // Of this block; a grid's block has a copy of all here in the end.
  alignas(16) int32_t groups[kMaxGroups];
  int32_t warp_low[32];
  int32_t k_bound;
  int32_t listed;
  u64 sorted[kMaxListed];     // candidates in rank order
  int32_t kept_end, choices;  // how many of them are kept, and are XTC's top choices
  int32_t turn;               // of Board::measures
  uint32_t* semaphore;        // kGridPolicy only; for the first thread
  Board* far_board;           // kGridPolicy only: the team's, in device memory
  u64* far_candidates;        // kGridPolicy only: the team's, likewise
  u64 measures[kMeasures];
  Verdict verdict;
  Overlay overlay;
  RowParams params;
  Stream stream;
  Extent extent;  // of the block's slice, for functions that are called
  bool overlaid;  // likewise
};
static_assert(kMaxListed >= kMaxSegments, "running has room for both");
static_assert(sizeof(Shared) <= kFixedShared, "tuning.h plans with less");

// A barrier in device memory, for blocks that all run at once. The word's sign flips when all have
// arrived, so nobody has to clear it: every block adds 1, but the first adds what brings the sum to
// 2^31.
FS_DEVICE void grid_sync(const Shared& own, int rank, int parts) {
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t* semaphore = own.semaphore;
    __threadfence();
    const uint32_t step = rank == 0 ? 0x80000000u - (uint32_t)(parts - 1) : 1u;
    const uint32_t before = atomicAdd(semaphore, step);
    while (!((before ^ *(volatile uint32_t*)semaphore) >> 31)) pause();
    __threadfence();
  }
  __syncthreads();
}

FS_DEVICE Shared* own_shared() { return (Shared*)shared_memory(); }

// The blocks that work on one row.
template <Policy kPolicy>
struct Team {
  Shared* own;
  int rank, parts;
  int turn;  // of the row, for what is published in its scan

  FS_METHOD bool leads() const { return rank == 0; }

  // Where the calling block reads what all blocks are told, and where it lies for the leader.
  FS_METHOD Board& board() const {
    if constexpr (kPolicy == kGridPolicy) return *own->far_board;
    return own->board;
  }

  // An object of a board, in the leader's. It is looked up each time, which costs less than the
  // registers that would hold it.
  template <class V>
  FS_METHOD V* of_leader(V* mine) const {
    if constexpr (kPolicy == kClusterPolicy) return of_cluster_block(mine, 0);
    return mine;
  }

  // Tells all blocks a value: it is at `mine` of every board after the team's next barrier. For one
  // thread.
  template <class V>
  FS_METHOD void tell(V* mine, const V& value) const {
    if constexpr (kPolicy == kClusterPolicy) {
#pragma unroll 1
      for (int i = 0; i < parts; ++i) *of_cluster_block(mine, i) = value;
    } else {
      *mine = value;
    }
  }

  // The same for n values by a whole block.
  template <class V>
  FS_METHOD void tell_all(V* mine, const V* values, int n) const {
    const int boards = kPolicy == kClusterPolicy ? parts : 1;
#pragma unroll 1
    for (int i = (int)threadIdx.x; i < n * boards; i += threads()) {
      const int board = (int)((uint32_t)i / (uint32_t)n), at = i - board * n;
      V* to = mine + at;
      if constexpr (kPolicy == kClusterPolicy) to = of_cluster_block(to, board);
      *to = values[at];
    }
  }

  // The same for one value by all lanes of a warp at once.
  template <class V>
  FS_METHOD void publish(V* mine, V value) const {
    if constexpr (kPolicy == kClusterPolicy) {
      if (lane() < parts) *of_cluster_block(mine, lane()) = value;
    } else {
      if (lane() == 0) *mine = value;
    }
  }

  // Waits until the other blocks of a cluster have started: only then does their memory exist.
  FS_METHOD void meet() const {
    if constexpr (kPolicy == kClusterPolicy) cluster_wait();
  }

  FS_METHOD void sync() const {
    if constexpr (kPolicy == kBlockPolicy) {
      __syncthreads();
    } else if constexpr (kPolicy == kClusterPolicy) {
      cluster_sync();
    } else {
      grid_sync(*own, rank, parts);
    }
  }

  // Adds the blocks' bins up on the leader's board.
  FS_METHOD void merge() const {
    if constexpr (kPolicy != kBlockPolicy) {
      __syncthreads();
      if (kPolicy == kGridPolicy || !leads()) {
        u64* bins = kPolicy == kGridPolicy ? own->far_board->bins : of_leader(own->board.bins);
#pragma unroll 1
        for (int slot = (int)threadIdx.x; slot < kBins; slot += threads()) {
          u64& mine = own->board.bins[slot];
          if (mine) add_wide(bins + slot, mine);
          mine = 0;
        }
      }
    }
    sync();
  }
};

// Adds the sum over the calling block's threads to the board's total.
template <Policy kPolicy>
FS_CALLED void add_on_board(u64 value) {
  const Team<kPolicy> team = {own_shared(), 0, 0, 0};
  value = warp_sum(value);
  if (lane() == 0) add_wide(team.of_leader(&team.board().total), value);
}

// Zeroes what must be 0 before the first selection; the scan's barrier comes in between. A grid's
// board is 0 already.
template <Policy kPolicy>
FS_DEVICE void clear_bins(const Team<kPolicy>& team) {
#pragma unroll 1
  for (int i = (int)threadIdx.x; i < kBins; i += threads()) team.own->board.bins[i] = 0;
  if (threadIdx.x == 0) team.own->board.total = team.own->turn = 0;
}

}  // namespace fastsample

// Stage 7: the cutoffs of top-k and top-p, by radix selection over integer keys, and the tokens at
// a place of a running sum.
#pragma once

#include <limits.h>

#include "core/filters.h"
#include "cuda/process.cuh"
#include "cuda/workspace.h"

namespace fastsample {

constexpr int32_t kKeyNaN = INT32_MAX;
constexpr int32_t kKeyInfinity = 0x7f800000;
constexpr int32_t kKeyMinusInfinity = -0x7f800000;
constexpr int32_t kKeyLowest = -0x7f7fffff;  // of the lowest finite float

// Order-preserving integers; -0.0 and +0.0 share key 0.
FS_DEVICE int32_t key_of(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits < 0 ? -(bits & INT32_MAX) : bits;
}

FS_DEVICE float from_key(int32_t key) {
  return from_bits(key < 0 ? 0x80000000u | (uint32_t)-key : (uint32_t)key);
}

// A token as one integer that follows the rank order, and back.
FS_DEVICE long long ranked(int32_t key, int32_t id) {
  return (long long)((u64)(uint32_t)key << 32 | (uint32_t)(INT32_MAX - id));
}
FS_DEVICE int32_t key_in(long long token) { return (int32_t)(token >> 32); }
FS_DEVICE int32_t id_in(long long token) { return INT32_MAX - (int32_t)(token & INT32_MAX); }

FS_DEVICE bool keeps(KeyCut c, int32_t key, int32_t id) {
  return key > c.key || (key == c.key && id <= c.id);
}
FS_DEVICE KeyCut stricter(KeyCut a, KeyCut b) {
  if (a.key != b.key) return a.key > b.key ? a : b;
  return a.id < b.id ? a : b;
}

// A block's own shared memory, before what depends on the shape.
struct alignas(16) Shared {
  Board board;  // of the whole row in the first block of a cluster, or in a block alone
  u64 running[kMaxSegments];
  u64 scratch[32];
  long long best[32];
  int32_t warp_low[32], lane_low[32];
  int32_t listed;
  Overlay overlay;
};
static_assert(sizeof(Shared) <= kFixedShared, "tuning.h counts on less");

// The blocks that work on one row.
template <Policy kPolicy>
struct Team {
  Shared* own;
  Board* grid_board;  // kGridPolicy only, like the next
  uint32_t* semaphore;
  int rank, parts;

  // The team's board. A cluster's is looked up again each time, which is cheaper than to hold on
  // to.
  FS_METHOD Board* board() const {
    if constexpr (kPolicy == kGridPolicy) return grid_board;
    if constexpr (kPolicy == kClusterPolicy) return of_cluster_block(&own->board, 0);
    return &own->board;
  }

  FS_METHOD bool leads() const { return rank == 0; }
  FS_METHOD bool shares_board() const { return kPolicy == kGridPolicy || !leads(); }

  FS_METHOD void sync() const {
    if constexpr (kPolicy == kBlockPolicy) {
      __syncthreads();
    } else if constexpr (kPolicy == kClusterPolicy) {
      cluster_sync();
    } else {
      grid_sync(semaphore, rank, parts);
    }
  }

  // Adds the blocks' bins up on the board.
  FS_METHOD void merge() const {
    if constexpr (kPolicy != kBlockPolicy) {
      __syncthreads();
      uint32_t* mine = own->board.bins;
      if (shares_board()) {
        for (int bin = (int)threadIdx.x; bin < kBins; bin += (int)blockDim.x) {
          const u64 value = wide(mine + 2 * bin);
          if (value) add_wide(board()->bins + 2 * bin, value);
          mine[2 * bin] = mine[2 * bin + 1] = 0;
        }
      }
    }
    sync();
  }
};

// Zeroes what must be 0 before the first selection, which the scan's barrier stands before. A
// grid's board is 0 already.
template <Policy kPolicy>
FS_DEVICE void clear_bins(const Team<kPolicy>& team) {
  uint32_t* bins = team.own->board.bins;
  for (int i = (int)threadIdx.x; i < 2 * kBins; i += (int)blockDim.x) bins[i] = 0;
  if (threadIdx.x == 0) team.own->board.total = 0;
}

// The leader narrows the bracket to the bin at which the weight, from the top, reaches the target.
template <Policy kPolicy, class Target>
FS_DEVICE void choose_bin(const Team<kPolicy>& team, bool first, int32_t low, int32_t high,
                          int shift, Target target_of) {
  Board& board = *team.board();
  const int each = (kBins + (int)blockDim.x - 1) / (int)blockDim.x;
  const int top = kBins - 1 - (int)threadIdx.x * each;
  u64 sum = 0;
  for (int bin = top; bin > top - each && bin >= 0; --bin) sum += wide(board.bins + 2 * bin);
  const u64 total = first ? board.total : board.bracket.total;
  const u64 target = target_of(total);
  u64 above = first ? 0 : board.bracket.above;
  u64 all;
  above += block_scan(sum, team.own->scratch, all);
  const bool mine = above < target && above + sum >= target;
  for (int bin = top; bin > top - each && bin >= 0; --bin) {
    const u64 here = wide(board.bins + 2 * bin);
    board.bins[2 * bin] = board.bins[2 * bin + 1] = 0;
    if (!mine || above >= target) continue;
    if (above + here >= target) {
      const uint32_t least = (uint32_t)low + ((uint32_t)bin << shift);
      const uint32_t most = least + (((uint32_t)1 << shift) - 1);
      const bool cut_off = (uint32_t)high - least < ((uint32_t)1 << shift);
      board.bracket =
          Bracket{(int32_t)least, cut_off ? high : (int32_t)most, above, above + here, total};
    }
    above += here;
  }
  if (threadIdx.x == 0) board.total = 0;
}

// The key at which the weight of the tokens, from the highest key down, reaches target_of(total).
// It must lie in [low, high]. weight(x, key, id) counts tokens, or (kMass) is a mass, of which the
// first round takes the total over all tokens, inside the bracket or not. A round resolves
// kDigitBits bits, so their number depends on the width of the bracket alone, and is at most 3.
template <bool kMass, Policy kPolicy, class S, class Weight, class Target>
FS_DEVICE Bracket select(const Team<kPolicy>& team, const S& slice, int32_t low, int32_t high,
                         int low_bits, Weight weight, Target target_of) {
  uint32_t* bins = team.own->board.bins;
  low &= -(1 << low_bits);
  for (bool first = true;; first = false) {
    const uint32_t width = (uint32_t)high - (uint32_t)low;
    const int bits = 32 - __clz((int)width) - kDigitBits;
    const int shift = bits > low_bits ? bits : low_bits;
    u64 total = 0;
    each(slice, [&](float x, int32_t id) {
      const int32_t key = key_of(x);
      const uint32_t distance = (uint32_t)key - (uint32_t)low;
      const bool inside = distance <= width;
      if (!inside && !(kMass && first)) return;
      const u64 w = weight(x, key, id);
      if (kMass) total += w;
      if (!inside || !w) return;
      uint32_t* bin = bins + 2 * (distance >> shift);
      if (kMass) {
        add_wide(bin, w);
      } else {
        atomicAdd(bin, 1u);
      }
    });
    if (kMass && first) {
      total = warp_sum(total);
      if (lane() == 0) atomicAdd((u64*)&team.board()->total, total);
    }
    team.merge();
    if (team.leads()) choose_bin(team, first, low, high, shift, target_of);
    team.sync();
    if (shift == low_bits) return team.board()->bracket;
    low = team.board()->bracket.low;
    high = team.board()->bracket.high;
  }
}

// A key below which every token's mass is less than `mass`. Within 2^-19 of it, mass doubles with
// every step of y; the factor of 2 that is left out here covers all rounding.
FS_DEVICE int32_t key_reaching(u64 mass, float peak, float scale) {
  const float y = mass ? (float)(63 - __clzll((long long)mass)) - 41.0f : -41.0f;
  const int32_t key = key_of(peak + y / scale);
  return key > kKeyLowest ? key : kKeyLowest;
}

// Sums weight(x, id) over each warp's segment; afterwards every block has the running sums, and
// the total is returned.
template <Policy kPolicy, class S, class Weight>
FS_DEVICE u64 sum_segments(const Team<kPolicy>& team, const S& slice, Weight weight) {
  u64 sum = 0;
  each(slice, [&](float x, int32_t id) { sum += weight(x, id); });
  sum = warp_sum(sum);
  if (lane() == 0) team.board()->sums[team.rank * warps() + warp()] = sum;
  team.sync();
  const int segments = team.parts * warps();
  u64 before = 0;
  for (int i = 0; i < segments; i += (int)blockDim.x) {
    const int segment = i + (int)threadIdx.x;
    const u64 here = segment < segments ? team.board()->sums[segment] : 0;
    u64 total;
    const u64 running = before + block_scan(here, team.own->scratch, total) + here;
    if (segment < segments) team.own->running[segment] = running;
    before += total;
  }
  __syncthreads();
  return before;
}

// The first token, in id order, at which the running sum of weight(x, id) exceeds the threshold:
// the one thread that has it calls found(id). Follows sum_segments; every thread of every block
// calls it, and the block that owns the segment works.
template <Policy kPolicy, class S, class Weight, class Found>
FS_DEVICE void locate(const Team<kPolicy>& team, const S& slice, u64 threshold, Weight weight,
                      Found found) {
  const u64* running = team.own->running;
  int low = 0, high = team.parts * warps() - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (running[middle] > threshold) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const int owner = low - team.rank * warps();
  if (owner < 0 || owner >= warps()) return;
  u64 before = low ? running[low - 1] : 0;
  const int32_t begin = slice.first + owner * slice.per_warp;
  const int32_t end =
      begin + slice.per_warp < slice.vectors ? begin + slice.per_warp : slice.vectors;
  constexpr int kN = S::kWidth;
  for (int32_t v = begin; v < end; v += (int32_t)blockDim.x) {
    const int32_t mine = v + (int32_t)threadIdx.x;
    float x[kN];
    u64 sum = 0;
    if (mine < end) {
      slice.process(slice.template raw<false>(mine), mine, x);
      for (int i = 0; i < kN; ++i) sum += weight(x[i], mine * kN + i - slice.shift);
    }
    u64 total;
    u64 at = before + block_scan(sum, team.own->scratch, total);
    if (at <= threshold && threshold < at + sum) {
      int32_t id = -1;
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        const u64 w = weight(x[i], mine * kN + i - slice.shift);
        if (threshold >= at && threshold < at + w) id = mine * kN + i - slice.shift;
        at += w;
      }
      found(id);
    }
    before += total;
    if (before > threshold) return;
  }
}

}  // namespace fastsample

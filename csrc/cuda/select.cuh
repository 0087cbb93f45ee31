// Selection over a row: the key, or the token, at which a running weight reaches a target. A weight
// is a count or a mass, an integer either way, so sums depend on no order.
#pragma once

#include <limits.h>

#include "cuda/team.cuh"

namespace fastsample {

// A thread sums up a run of bins, and the threads' runs lie side by side: all banks of shared
// memory are busy at once.
constexpr int kRun = 8, kRuns = kBins / kRun;
FS_DEVICE int slot_of(uint32_t bin) { return (int)(bin % kRun * kRuns + bin / kRun); }

// One pass over the slice: adds weight(x, key, id) to the bins of the bracket [low, low + width],
// and, if `sums`, over all tokens to the board's total, whether in the bracket or not.
template <Policy kPolicy, class S, class Key, class Weight>
FS_DEVICE void fill_bins(const Team<kPolicy>& team, const S& slice, int32_t low, uint32_t width,
                         int shift, bool sums, Key key_in, Weight weight) {
  u64* bins = team.own->board.bins;
  u64 total = 0;
  each<2>(slice, [&](float x, int32_t id) {
    const int32_t key = key_in(x);
    const uint32_t distance = (uint32_t)key - (uint32_t)low;
    const bool inside = distance <= width;
    if (!inside && !sums) return;
    const u64 w = weight(x, key, id);
    total += w;
    if (inside && w) add_wide(bins + slot_of(distance >> shift), w);
  });
  if (sums) add_on_board<kPolicy>(total);
}

// The leading block narrows the bracket to the bin at which the weight, from the top, reaches the
// target.
template <Policy kPolicy, class Target>
FS_DEVICE void choose_bin(const Team<kPolicy>& team, bool first, int32_t low, int32_t high,
                          int shift, Target target_of) {
  Board& board = team.board();
  const int runs = (kRuns + threads() - 1) / threads();
  const int from = kRuns - 1 - (int)threadIdx.x * runs;
  const int until = from - runs > -1 ? from - runs : -1;
  u64 sum = 0;
#pragma unroll 1
  for (int run = from; run > until; --run) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) sum += board.bins[i * kRuns + run];
  }
  const u64 total = first ? board.total : board.bracket.total;
  const u64 target = target_of(total);
  u64 above = (first ? 0 : board.bracket.above) + block_scan(sum).before;
  if (above < target && above + sum >= target) {
    int bin = from * kRun + kRun - 1;
    u64 here = board.bins[slot_of((uint32_t)bin)];
    while (above + here < target) {
      above += here;
      here = board.bins[slot_of((uint32_t)--bin)];
    }
    const uint32_t least = (uint32_t)low + ((uint32_t)bin << shift);
    const uint32_t most = least + (((uint32_t)1 << shift) - 1);
    const bool cut_off = (uint32_t)high - least < ((uint32_t)1 << shift);
    team.tell(&board.bracket,
              Bracket{(int32_t)least, cut_off ? high : (int32_t)most, above, above + here, total});
  }
#pragma unroll 1
  for (int run = from; run > until; --run) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) board.bins[i * kRuns + run] = 0;
  }
  if (threadIdx.x == 0) board.total = 0;
}

// The key at which the weight of the tokens, from the highest key down, reaches target_of(total).
// It must lie in [low, high]. key_in(x) is a token's key, of which the `unused` lowest bits are 0;
// weight(x, key, id) is an integer. With `sums`, total is that of all tokens. A round resolves
// kDigitBits bits, so the number of rounds depends on the width of the bracket alone and is at
// most 3.
template <Policy kPolicy, class S, class Key, class Weight, class Target>
FS_DEVICE Bracket select(const Team<kPolicy>& team, const S& slice, int unused, int32_t low,
                         int32_t high, bool sums, Key key_in, Weight weight, Target target_of) {
  low &= -(1 << unused);
#pragma unroll 1
  for (bool first = true;; first = false) {
    const uint32_t width = (uint32_t)high - (uint32_t)low;
    const int bits = 32 - __clz((int)width) - kDigitBits;
    const int shift = bits > unused ? bits : unused;
    fill_bins(team, slice, low, width, shift, sums && first, key_in, weight);
    team.merge();
    if (team.leads()) choose_bin(team, first, low, high, shift, target_of);
    team.sync();
    if (shift == unused) return team.board().bracket;
    low = team.board().bracket.low;
    high = team.board().bracket.high;
  }
}

}  // namespace fastsample

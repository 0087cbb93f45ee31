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
  each(slice, [&](float x, int32_t id) {
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

// Sums weight(x, id) over each warp's segment. Afterwards every block has the running sums; returns
// the total.
template <Policy kPolicy, class S, class Weight>
FS_DEVICE u64 sum_segments(const Team<kPolicy>& team, const S& slice, Weight weight) {
  u64 sum = 0;
  each(slice, [&](float x, int32_t id) { sum += weight(x, id); });
  sum = warp_sum(sum);
  team.publish(&team.board().sums[team.rank * warps() + warp()], sum);
  team.sync();
  const int segments = team.parts * warps();
  u64 before = 0;
  for (int i = 0; i < segments; i += threads()) {
    const int segment = i + (int)threadIdx.x;
    const u64 here = segment < segments ? team.board().sums[segment] : 0;
    const auto [below, total] = block_scan(here);
    if (segment < segments) team.own->running[segment] = before + below + here;
    before += total;
  }
  __syncthreads();
  return before;
}

// The first segment whose running sum exceeds the threshold.
FS_DEVICE int segment_at(const u64* running, int segments, u64 threshold) {
  int low = 0, high = segments - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (running[middle] > threshold) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// The first token, in id order, at which the running sum of weight(x, id) exceeds the threshold:
// the one thread that reads it calls found(id). Every thread of every block calls this after
// sum_segments; the block that owns the segment does the work.
template <Policy kPolicy, class S, class Weight, class Found>
FS_DEVICE void locate(const Team<kPolicy>& team, const S& slice, u64 threshold, Weight weight,
                      Found found) {
  const u64* running = team.own->running;
  const int segment = segment_at(running, team.parts * warps(), threshold);
  const int owner = segment - team.rank * warps();
  if (owner < 0 || owner >= warps()) return;
  u64 before = segment ? running[segment - 1] : 0;
  const int32_t begin = slice.first + owner * slice.per_warp;
  const int32_t end =
      begin + slice.per_warp < slice.vectors ? begin + slice.per_warp : slice.vectors;
  constexpr int kN = S::kWidth;
  for (int32_t v = begin; v < end; v += threads()) {
    const int32_t mine = v + (int32_t)threadIdx.x;
    const int32_t first = mine * kN - slice.shift;
    float x[kN] = {};
    if (mine < end) slice.process(slice.raw(mine), mine, x);
    u64 sum = 0, at = before;
    int32_t id = -1;
#pragma unroll 1  // one weight in the code serves them all
    for (int i = 0; i < 2 * kN; ++i) {
      if (i == kN) {
        const auto [below, total] = block_scan(sum);
        at += below;
        before += total;
        if (at > threshold || threshold >= at + sum) break;
      }
      const u64 w = mine < end ? weight(x[0], first + i % kN) : 0;
      if (i < kN) {
        sum += w;
      } else {
        if (threshold >= at && threshold < at + w) id = first + i % kN;
        at += w;
      }
      const float seen = x[0];
#pragma unroll
      for (int j = 1; j < kN; ++j) x[j - 1] = x[j];
      x[kN - 1] = seen;
    }
    if (id >= 0) found(id);
    if (before > threshold) return;
  }
}

// The id of the nth (from 1) of the tokens with this key that rank after `high`.
template <Policy kPolicy, class S>
FS_DEVICE int32_t nth_equal(const Team<kPolicy>& team, const S& slice, KeyPlace high, int32_t key,
                            u64 nth) {
  const int32_t after = key == high.x ? high.id : -1;
  const auto equal = [&](float x, int32_t id) -> u64 {
    return key_of(x) == key && id > after && id < slice.vocab;
  };
  sum_segments(team, slice, equal);
  locate(team, slice, nth - 1, equal, [&](int32_t id) { team.tell(&team.board().id, id); });
  team.sync();
  return team.board().id;
}

// The nth (from 1) token, in rank order, of those that `counts` counts, which are in `among` or
// below it; its key lies between `low` and `peak`. Where `among` holds fewer than n, its last
// place.
template <Policy kPolicy, class S, class Counts>
FS_DEVICE KeyPlace nth_place(const Team<kPolicy>& team, const S& slice, const KeptKeys& among,
                             int32_t low, int32_t peak, u64 n, Counts counts) {
  const Bracket b = select(
      team, slice, low_bits(slice), low, peak, false, [](float x) { return key_of(x); }, counts,
      [n](u64) { return n; });
  if (b.low < among.low.x) return among.low;
  if (b.reached == n) return KeyPlace{b.low, INT32_MAX};
  return KeyPlace{b.low, nth_equal(team, slice, among.high, b.low, n - b.above)};
}

}  // namespace fastsample

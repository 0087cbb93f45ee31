// Search over a row: the token at which a running weight, in id order, exceeds a threshold. For
// draws, and for the nth of equal tokens.
#pragma once

#include "cuda/kept.cuh"
#include "cuda/noted.cuh"
#include "cuda/select.cuh"

namespace fastsample {

// What the tokens of a set weigh: their mass in draws, or 1.
struct Weighed {
  KeptKeys kept;
  bool counts;
};

FS_DEVICE u64 weight_of(const Masses& t, const Weighed& what, float x, int32_t id) {
  const KeyPlace place = {key_of(x), id};
  return what.counts ? within(what.kept, place) : kept_drawn_mass(t, what.kept, x, place);
}

// Sums over each warp's segment. Afterwards every block has the running sums; returns the total.
template <class S, Policy kPolicy>
FS_CALLED u64 sum_segments(int rank, int parts, Masses t, Weighed what) {
  Shared& own = *own_shared();
  const Team<kPolicy> team = {&own, rank, parts, 0};
  const S slice = noted_slice<S>(own, rank);
  u64 sum = 0;
  if (what.counts || t.factor || t.drawn_scale != t.scale) {
    each_rolled(slice, [&](float x, int32_t id) { sum += weight_of(t, what, x, id); });
  } else {  // worth code of its own, since it is usual
    const int32_t lowest = lowest_drawn_key(t, what.kept);
    each(slice, [&](float x, int32_t id) {
      const KeyPlace place = {key_of(x), id};
      if (place.x < lowest || !within(what.kept, place)) return;
      const u64 w = mass_of(x, t.peak, t.scale);
      if (w >= what.kept.floor) sum += w;
    });
  }
  sum = warp_sum(sum);
  team.publish(&team.board().sums[team.rank * warps() + warp()], sum);
  team.sync();
  const int segments = team.parts * warps();
  u64 before = 0;
#pragma unroll 1
  for (int i = 0; i < segments; i += threads()) {
    const int segment = i + (int)threadIdx.x;
    const u64 here = segment < segments ? team.board().sums[segment] : 0;
    const auto [below, total] = block_scan(here);
    if (segment < segments) own.running[segment] = before + below + here;
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

// The first token, in id order, at which the running sum exceeds the threshold: for the one thread
// that reads it, and -1 for all others. Every thread of every block calls this after sum_segments;
// the block that owns the segment does the work.
template <class S, Policy kPolicy>
FS_CALLED int32_t locate(int rank, int parts, Masses t, Weighed what, u64 threshold) {
  Shared& own = *own_shared();
  const u64* running = own.running;
  const int segment = segment_at(running, parts * warps(), threshold);
  const int owner = segment - rank * warps();
  if (owner < 0 || owner >= warps()) return -1;
  const S slice = noted_slice<S>(own, rank);
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
      const u64 w = mine < end ? weight_of(t, what, x[0], first + i % kN) : 0;
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
    if (before > threshold) return id;
  }
  return -1;
}

// The id of the nth (from 1) of the tokens with this key that rank after `high`.
template <class S, Policy kPolicy>
FS_DEVICE int32_t nth_equal(const Team<kPolicy>& team, KeyPlace high, int32_t key, u64 nth) {
  const Masses none = {};
  const Weighed equal = {{{key, key == high.x ? high.id : -1}, {key, INT32_MAX}, 0}, true};
  sum_segments<S, kPolicy>(team.rank, team.parts, none, equal);
  const int32_t id = locate<S, kPolicy>(team.rank, team.parts, none, equal, nth - 1);
  if (id >= 0) team.tell(&team.board().id, id);
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
  return KeyPlace{b.low, nth_equal<S>(team, among.high, b.low, n - b.above)};
}

}  // namespace fastsample

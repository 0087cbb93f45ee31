// Stage 6b: sums over a set of tokens, by a team, and what one thread makes of them; stem of
// csrc/core/stats.h.
#pragma once

#include <limits.h>

#include "core/stats.h"
#include "cuda/kept.cuh"
#include "cuda/noted.cuh"

namespace fastsample {

// Adds up the first measures over the team's threads, `sums` of them, and takes the largest of each
// of the rest. Afterwards every block has them in its own shared memory. The loops are not
// unrolled: a shuffle is much code.
template <int kAll, Policy kPolicy>
FS_DEVICE void gather(const Team<kPolicy>& team, u64 (&mine)[kAll], int sums) {
  Shared& own = *team.own;
  // One lane per warp or per block, which `n` counts.
  const auto of = [sums](int measure, int n, const u64* values) -> u64 {
    return lane() < n ? values[lane()] : measure < sums ? 0 : (u64)LLONG_MIN;
  };
#pragma unroll 1
  for (int i = 0; i < kAll; ++i) {
    const u64 value = warp_fold(mine[0], i < sums);
    if (lane() == 0) own.running[i * warps() + warp()] = value;
#pragma unroll
    for (int j = 1; j < kAll; ++j) mine[j - 1] = mine[j];
  }
  __syncthreads();
  Board& board = team.board();
#pragma unroll 1
  for (int i = warp(); i < kAll; i += warps()) {
    const u64 value = warp_fold(of(i, warps(), own.running + i * warps()), i < sums);
    team.publish(&board.measures[own.turn][i][team.rank], value);
  }
  team.sync();
#pragma unroll 1
  for (int i = warp(); i < kAll; i += warps()) {
    const u64 value = warp_fold(of(i, team.parts, board.measures[own.turn][i]), i < sums);
    if (lane() == 0) own.measures[i] = value;
  }
  __syncthreads();
  if (threadIdx.x == 0) own.turn ^= 1;
}

// One thread makes something of what was gathered, and all threads of the block see it. Between two
// calls there is a gather or a selection.
template <Policy kPolicy, class F>
FS_DEVICE const Verdict& decide(const Team<kPolicy>& team, F f) {
  Shared& own = *team.own;
  if (threadIdx.x == 0) f(own.measures, own.verdict);
  __syncthreads();
  return own.verdict;
}

FS_DEVICE DepthSums depth_sums(const u64* m) {
  return DepthSums{m[kMassSum], m[kDepthHigh], m[kDepthLow]};
}

FS_DEVICE SquareSums square_sums(const u64* m) {
  return SquareSums{m[kMassSum], m[kSquareHigh], m[kSquareCross], m[kSquareLow]};
}

// What a pass measures of what is kept: all of enum Measure; or of the logits their spread, as
// kMassSum, kDepthHigh and kDepthLow; or as kLastPlace the first in rank order rather than the
// last.
enum Measuring : int32_t { kMeasureMass, kMeasureSpread, kMeasureFirst };

// Called, since it is much code for filters that are rare.
template <class S, Policy kPolicy>
FS_CALLED void measure_noted(int rank, int parts, Masses t, Measuring what, KeptKeys kept) {
  Shared& own = *own_shared();
  const Team<kPolicy> team = {&own, rank, parts, 0};
  const S slice = noted_slice<S>(own, rank);
  // Without a floor, tokens without mass are kept too, and count.
  const int32_t lowest = kept.floor ? lowest_key(t, kept, kept.floor) : kept.low.x;
  DepthSums depths = {};
  SquareSums squares = {};
  u64 count = 0, heaviest = 0;
  long long last = LLONG_MIN;
  each_rolled(slice, [&](float x, int32_t id) {
    const KeyPlace place = {key_of(x), id};
    if (place.x < lowest || !within(kept, place)) return;
    if (what == kMeasureSpread) {
      const u64 distance = distance_below(x, t.peak);
      ++depths.mass;
      depths.high += distance;
      depths.low += distance * distance;
      return;
    }
    const u64 w = mass_in(t, x);
    if (w < kept.floor) return;
    ++count;
    const long long order = what == kMeasureFirst ? ranked(place) : -ranked(place);
    if (order > last) last = order;
    if (!w) return;
    if (w > heaviest) heaviest = w;
    depths.add(w, t.factor ? 0 : depth_at((x - t.peak) * t.scale));
    squares.add(w);
  });
  u64 mine[kMeasures] = {depths.mass, depths.high, depths.low, squares.high, squares.cross,
                         squares.low, count,       heaviest,   (u64)last};
  gather(team, mine, kHeaviest);
}

// Measures what is kept.
template <class S, Policy kPolicy>
FS_DEVICE void measure(const Team<kPolicy>& team, const Masses& t, const KeptKeys& kept) {
  measure_noted<S, kPolicy>(team.rank, team.parts, t, kMeasureMass, kept);
}

// The first kept token in rank order; some token is kept.
template <class S, Policy kPolicy>
FS_DEVICE KeyPlace first_kept(const Team<kPolicy>& team, const Masses& t, const KeptKeys& kept) {
  measure_noted<S, kPolicy>(team.rank, team.parts, t, kMeasureFirst, kept);
  return place_of((long long)team.own->measures[kLastPlace]);
}

// The spread of everything above -inf.
template <class S, Policy kPolicy>
FS_DEVICE void measure_spread(const Team<kPolicy>& team, const Masses& t) {
  measure_noted<S, kPolicy>(team.rank, team.parts, t, kMeasureSpread, everything());
}

}  // namespace fastsample

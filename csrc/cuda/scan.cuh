// Stages 0 and 4: the first pass over a row, for its maximum and whether it is valid.
#pragma once

#include <limits.h>

#include "cuda/process.cuh"

namespace fastsample {

// The first token in rank order of the calling lane's. One that makes the row invalid outranks all
// others; its id says nothing.
template <class S>
FS_DEVICE KeyPlace scan_lane(const S& slice) {
  Place<float> best = {-INFINITY, 0};
  bool wrong = false, nan = false;
  each_first(slice, [&](float x, int32_t id) {
    // A lane sees ascending ids, so the first of its maxima has the lowest.
    if (x > best.x) best = {x, id};
    wrong |= x < slice.nothing;
    nan |= x != x;
  });
  return KeyPlace{nan ? kKeyNaN : wrong ? kKeyInfinity : key_of(best.x), best.id};
}

// Top-k's last key is bounded by the k-th of the highest keys of disjoint groups of lanes: at least
// k tokens reach it. The more groups than k there are, the fewer others do. A language model's rows
// have their high logits side by side, since frequent tokens have low ids, so that many share a
// group: five groups for each of the k leave about 2 k tokens there.
constexpr int32_t kGroupsWanted = 5;

// Groups per warp, as many as are wanted or as there is room for; 0 where k is too large for them.
FS_DEVICE int32_t groups_of_warp(int32_t k, int parts) {
  const int32_t segments = parts * warps();
  int32_t groups = 0;
#pragma unroll 1
  for (int32_t next = 1; next <= 32 && next * segments <= kMaxGroups; next *= 2) {
    groups = next;
    if (groups * segments >= kGroupsWanted * k) break;
  }
  return 4 * groups * segments >= 5 * k ? groups : 0;
}

// The k-th highest of n keys, in shared memory, for all threads of a block. A multiple of 16 bytes
// may be read past the last.
FS_DEVICE int32_t nth_highest(const int32_t* keys, int32_t n, int32_t k, Shared& own) {
  for (int32_t i = (int32_t)threadIdx.x; i < n; i += threads()) {
    const int32_t mine = keys[i], own_four = i & ~3;
    int32_t before = 0;
#pragma unroll 4
    for (int32_t j = 0; j < n; j += 4) {
      const Vec16 four = load_shared16((const Vec16*)(keys + j));
      const int32_t bar = mine - (j < own_four);  // of equal keys, those in lower fours come before
#pragma unroll
      for (int u = 0; u < 4; ++u) before += (int32_t)four.word[u] > bar;
    }
#pragma unroll 1
    for (int32_t j = n; j & 3; ++j) before -= keys[j] > mine;  // what is read past the last
#pragma unroll 1
    for (int32_t j = own_four; j < i; ++j) before += keys[j] == mine;
    if (before == k - 1) own.k_bound = mine;
  }
  __syncthreads();
  return own.k_bound;
}

// Leaves the highest keys of the calling warp's groups of lanes in shared memory.
template <Policy kPolicy>
FS_DEVICE void note_groups(const Team<kPolicy>& team, int32_t key, int32_t groups) {
  const int32_t log = 6 - __ffs(groups), width = 1 << log;  // lanes
  for (int32_t step = 1; step < width; step *= 2) {
    const int32_t other = __shfl_xor_sync(kWholeWarp, key, step);
    if (other > key) key = other;
  }
  if ((lane() & (width - 1)) == 0) team.own->groups[warp() * groups + (lane() >> log)] = key;
}

template <Policy kPolicy>
FS_DEVICE int32_t bound_of(const Team<kPolicy>& team, int32_t k, int32_t groups) {
  const int32_t* keys = team.board().groups[team.turn];
  const int32_t n = groups * warps() * team.parts;
  if constexpr (kPolicy == kGridPolicy) {  // from device memory, once
    for (int32_t i = (int32_t)threadIdx.x; i < n; i += threads()) team.own->groups[i] = keys[i];
    __syncthreads();
    keys = team.own->groups;
  }
  return nth_highest(keys, n, k, *team.own);
}

// With `meets`, this is the launch's first row, whose cluster has not met yet.
template <Policy kPolicy, class S>
FS_DEVICE void scan(const Team<kPolicy>& team, const S& slice, int32_t top_k, RowTask& t,
                    bool meets) {
  Shared& own = *team.own;
  const int32_t groups = top_k > 0 && top_k < slice.vocab ? groups_of_warp(top_k, team.parts) : 0;
  const KeyPlace mine = scan_lane(slice);
  const bool any = slice.begin() + lane() < slice.end();
  const long long best = warp_max(any ? ranked(mine) : LLONG_MIN);
  if (lane() == 0) own.best[warp()] = best;
  if (groups) note_groups(team, mine.x, groups);
  if (threadIdx.x == 0) own.listed = 0;
  __syncthreads();
  if (meets) team.meet();
  Board& board = team.board();
  if (warp() == 0) {
    const long long all = warp_max(lane() < warps() ? own.best[lane()] : LLONG_MIN);
    team.publish(&board.best[team.turn][team.rank], all);
  }
  const int32_t per_block = groups * warps();
  if (groups) team.tell_all(board.groups[team.turn] + team.rank * per_block, own.groups, per_block);
  team.sync();
  const long long* found = board.best[team.turn];
  set_peak(t, place_of(warp_max(lane() < team.parts ? found[lane()] : LLONG_MIN)));
  t.bounded = groups && t.status == kValid;
  t.k_bound = t.bounded ? bound_of(team, top_k, groups) : kKeyMinusInfinity;
}

}  // namespace fastsample

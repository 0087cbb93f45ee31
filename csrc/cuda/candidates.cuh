// Top-k's candidates: the tokens that reach a key which at least k tokens reach. One pass over the
// row hands them to the leading block, which sorts them. Stem of csrc/cpu/candidates.h.
#pragma once

#include "cuda/kept.cuh"
#include "cuda/team.cuh"

namespace fastsample {

// Whether everything that is kept of the row is among the candidates of its top-k, and can be told
// from their order. Typical goes by another order.
FS_DEVICE bool uses_candidates(const RowTask& t, int32_t vocab) {
  return t.bounded && uses_top_k(*t.params, vocab) && !uses_typical(*t.params);
}

// Where the blocks leave candidates, as ranked() makes integers of them, `room` for each: on the
// leader's board, in the place of its bins, or in device memory.
struct Rooms {
  u64* first;
  int32_t room;
};
template <Policy kPolicy>
FS_DEVICE Rooms rooms_of(const Team<kPolicy>& team) {
  if constexpr (kPolicy == kGridPolicy) return Rooms{team.own->far_candidates, kMaxListed};
  return Rooms{team.board().bins, (int32_t)((uint32_t)kBins / (uint32_t)team.parts)};
}

struct Listed {
  int32_t size;  // candidates; -1 where there are too many
  u64 total;     // the mass of the whole row, where top-p goes by it
};

// The mass of a vector's tokens in the row as a whole.
template <int kN>
FS_DEVICE u64 mass_of_vector(const Masses& t, const float (&x)[kN], int32_t first) {
  const KeptKeys all = everything(t);
  float left[kN];
#pragma unroll
  for (int i = 0; i < kN; ++i) left[i] = x[i];
  u64 total = 0;
#pragma unroll 1  // one mass in the code serves them all
  for (int i = 0; i < kN; ++i) {
    total += kept_mass(t, all, left[0], {key_of(left[0]), first + i});
#pragma unroll
    for (int j = 1; j < kN; ++j) left[j - 1] = left[j];
  }
  return total;
}

// The candidates of the calling block, to the leader.
template <Policy kPolicy, class S>
FS_DEVICE u64 push_candidates(const Team<kPolicy>& team, const S& slice, const RowTask& t,
                              bool weighs, Rooms rooms) {
  constexpr int kN = S::kWidth;
  const float bound = from_key(t.k_bound > t.lowest ? t.k_bound : t.lowest);
  u64* to = team.of_leader(rooms.first) + team.rank * rooms.room;
  u64 total = 0;
  each_vector(slice, [&](const float (&x)[kN], int32_t first) {
    uint32_t found = 0;
#pragma unroll
    for (int i = 0; i < kN; ++i) found |= (uint32_t)(x[i] >= bound) << i;
    if (weighs) total += mass_of_vector(t, x, first);
    for (; found; found &= found - 1) {
      const int at = __ffs((int)found) - 1;
      float mine = x[0];
#pragma unroll
      for (int i = 1; i < kN; ++i) mine = i == at ? x[i] : mine;
      const int32_t slot = atomicAdd(&team.own->listed, 1);
      if (slot < rooms.room) to[slot] = (u64)ranked({key_of(mine), first + at});
    }
  });
  return total;
}

// How many candidates all blocks have found, or -1 where a block's are too many for its share or
// all of them for one block to sort. For a warp.
template <Policy kPolicy>
FS_DEVICE int32_t count_candidates(const Team<kPolicy>& team, int32_t room) {
  const int32_t mine = lane() < team.parts ? team.board().counts[lane()] : 0;
  if (__ballot_sync(kWholeWarp, mine > room)) return -1;
  const int32_t all = warp_reduce(mine, [](int32_t a, int32_t b) { return a + b; });
  return all <= kMaxListed ? all : -1;
}

// Calls done(e, sum), by one thread, with the sum of term(e, j) over the elements j from `begin`
// on, for each element e of them. Where threads are many, several share an element.
template <class Term, class Done>
FS_DEVICE void each_with_sum(int32_t begin, int32_t end, Term term, Done done) {
  const int32_t n = end - begin;
  int32_t log = 0;
#pragma unroll 1
  while (log < 5 && 2 * n << log <= threads()) ++log;
  const int32_t share = 1 << log, part = (int32_t)threadIdx.x & (share - 1);
#pragma unroll 1
  for (int32_t first = begin; first < end; first += threads() >> log) {
    const int32_t e = first + ((int32_t)threadIdx.x >> log);
    u64 sum = 0;
    if (e < end) {
#pragma unroll 4
      for (int32_t j = begin + part; j < end; j += share) sum += term(e, j);
    }
#pragma unroll 1
    for (int step = 1; step < share; step *= 2) sum += __shfl_xor_sync(kWholeWarp, sum, step);
    if (e < end && part == 0) done(e, sum);
  }
}

// Zeroes what lies on the leader's board, for selections; for the leading block. If it `moves`, it
// goes to `to`, one block's after the other's.
template <Policy kPolicy>
FS_DEVICE void take_candidates(const Team<kPolicy>& team, Rooms rooms, bool moves, u64* to) {
  const int32_t mine = lane() < team.parts ? team.board().counts[lane()] : 0;
  int32_t total;
  const int32_t before = warp_scan(mine, total);
#pragma unroll 1
  for (int part = warp(); part < team.parts; part += warps()) {
    const int32_t found = __shfl_sync(kWholeWarp, mine, part);
    u64* into = to + (moves ? __shfl_sync(kWholeWarp, before, part) : 0);
    u64* from = rooms.first + part * rooms.room;
#pragma unroll 1
    for (int32_t i = lane(); i < found && i < rooms.room; i += 32) {
      if (moves) into[i] = from[i];
      from[i] = 0;
    }
  }
}

// Sorts the n candidates that have been taken, by the leading block.
FS_DEVICE void sort_candidates(Shared& own, int32_t n) {
  const u64* taken = own.running;
  __syncthreads();
  each_with_sum(
      0, n, [&](int32_t e, int32_t j) -> u64 { return (long long)taken[j] > (long long)taken[e]; },
      [&](int32_t e, u64 before) { own.sorted[before] = taken[e]; });
  __syncthreads();
}

// One pass over the row and one barrier. Afterwards the leader has the candidates in rank order, or
// there are too many, and the board is as before.
template <Policy kPolicy, class S>
FS_DEVICE Listed list_candidates(const Team<kPolicy>& team, const S& slice, const RowTask& t) {
  const Rooms rooms = rooms_of(team);
  const bool weighs = t.params->order == kJoint && uses_top_p(*t.params);
  const u64 mine = push_candidates(team, slice, t, weighs, rooms);
  if (weighs) add_on_board<kPolicy>(mine);
  __syncthreads();
  if (warp() == 0) team.publish(&team.board().counts[team.rank], team.own->listed);
  team.sync();
  Listed list = {count_candidates(team, rooms.room), 0};
  if (team.leads()) {
    const bool few = list.size >= 0;
    if (weighs && few) list.total = team.board().total;
    take_candidates(team, rooms, few, team.own->running);  // free until there are sums
    if (few) sort_candidates(*team.own, list.size);  // its barriers come after the total is read
    if (threadIdx.x == 0) team.board().total = 0;
  }
  if (list.size < 0) team.sync();  // the bins are zeros again
  return list;
}

}  // namespace fastsample

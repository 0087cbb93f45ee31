// Stage 3's history edits: which tokens of a block's slice would repeat what the row's history ends
// with, and how far back that goes. Every block finds this for its own slice.
#pragma once

#include "core/history.h"
#include "cuda/team.cuh"

namespace fastsample {

// Ids of histories have this bit where the id is one of DRY's breakers.
constexpr int32_t kBreaker = 1 << 30;
FS_DEVICE int32_t token_of(int32_t id) { return id & ~kBreaker; }

// A row's history, the last id first.
struct History {
  const int32_t* ids;
  Search search;
  int32_t returns;  // how often the last id stands before its last place; of how many tokens, at
                    // most, there is anything to find
};

// The i-th id of a row from the end, padding included.
FS_DEVICE int64_t id_from_end(const Rows& rows, int64_t r, int64_t i) {
  const int64_t drafts = rows.drafted.length, outputs = drafts + rows.output.length;
  const TokenIds& ids = i < drafts ? rows.drafted : i < outputs ? rows.output : rows.prompt;
  const int64_t before = i < drafts ? 0 : i < outputs ? drafts : outputs;
  return load_global(ids_of(ids, r) + (ids.length - 1 - (i - before)));
}

// DRY's breakers as bits. In a vocabulary of more bits some tokens share one.
struct Breakers {
  static constexpr int32_t kBits = (int32_t)kTableBytes * 8;
  const int64_t* ids;
  int64_t length;
  uint32_t* bits;
  bool exact;

  FS_METHOD bool has(int32_t id) const {
    if (!ids || !(bits[id % kBits >> 5] >> (id & 31) & 1)) return false;
    bool found = exact;
    for (int64_t i = 0; i < length && !found; ++i) found = load_global(ids + i) == id;
    return found;
  }
};

FS_DEVICE Breakers read_breakers(const Batch& batch, int64_t r, uint32_t* bits) {
  const TokenIds& given = batch.rows.breakers;
  const int32_t vocab = batch.logits.vocab;
  if (!given.data) return Breakers{};
  const Breakers breakers = {ids_of(given, r), given.length, bits, vocab <= Breakers::kBits};
#pragma unroll 1
  for (int32_t i = (int32_t)threadIdx.x; i < Breakers::kBits / 32; i += threads()) {
    bits[i] = 0;
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < given.length; i += threads()) {
    const int64_t id = load_global(breakers.ids + i);
    if (id < 0 || id >= vocab) continue;
    const int32_t bit = (int32_t)id % Breakers::kBits;
    atomicOr(bits + (bit >> 5), 1u << (bit & 31));
  }
  return breakers;
}

// Reads the row's history into `ids`, without what lies outside the vocabulary. `bits` has
// kTableBytes, free again when the call returns.
FS_DEVICE History collect_history(const Batch& batch, int64_t r, const RowParams& p, Shared& own,
                                  int32_t* ids, uint32_t* bits) {
  const Rows& rows = batch.rows;
  const int32_t vocab = batch.logits.vocab;
  const auto inside = [&](int64_t id) { return id >= 0 && id < vocab; };
  const Breakers breakers = p.dry_multiplier > 0.0f ? read_breakers(batch, r, bits) : Breakers{};
  const int64_t all = ids_of_a_row(rows), each = ceil_div(all, threads());
  const int64_t begin = each * threadIdx.x, end = begin + each < all ? begin + each : all;
  u64 count = 0;
  for (int64_t i = begin; i < end; ++i) count += inside(id_from_end(rows, r, i));
  const auto [before, total] = block_scan(count);
  int32_t at = (int32_t)before;
  int32_t unbroken = INT32_MAX;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t id = id_from_end(rows, r, i);
    if (!inside(id)) continue;
    const bool breaks = breakers.has((int32_t)id);
    if (breaks && unbroken == INT32_MAX) unbroken = at;
    ids[at++] = (int32_t)id | (breaks ? kBreaker : 0);
  }
  unbroken = warp_min(unbroken);
  if (lane() == 0) own.warp_low[warp()] = unbroken;
  __syncthreads();
  History history = {ids, search_for(p, (int32_t)total), 0};
  Search& search = history.search;
  unbroken = warp_min(lane() < warps() ? own.warp_low[lane()] : INT32_MAX);
  if (unbroken < search.unbroken) search.unbroken = unbroken;
  const bool bans_all = search.before == 0;
  u64 returns = 0;
  for (int32_t j = (int32_t)threadIdx.x; j < search.length; j += threads()) {
    returns += bans_all || ids[j] == ids[0];
  }
  history.returns = (int32_t)block_sum(returns);
  return history;
}

// How many ids from j on are those from 0 on, if those before `from` are; at most `most`. For all
// lanes of a warp.
FS_DEVICE int32_t count_equal(const int32_t* ids, int32_t j, int32_t from, int32_t most) {
  for (int32_t k = from; k < most; k += 32) {
    const int32_t i = k + lane();
    const uint32_t differ = ~__ballot_sync(kWholeWarp, i < most && ids[j + i] == ids[i]);
    if (differ) return k + __ffs((int)differ) - 1;
  }
  return most;
}

// Puts the longest repetition of each token of the slice into the table, as its count. A warp
// compares 32 ids at a time, and no more than could make a token's repetition longer.
template <class S>
FS_DEVICE void find_repetitions(const History& history, const RowParams& p, const EditTable& table,
                                const S& s) {
  const int32_t* ids = history.ids;
  const int32_t n = history.search.length;
  if (history.search.before == 0) {
    for (int32_t j = (int32_t)threadIdx.x; j < n; j += threads()) {
      const int32_t id = token_of(ids[j]);
      if (s.owns(id)) atomicMax(&table.claim(id).count, (uint32_t)kBanned);
    }
    return;
  }
  const int32_t weighs_no_more = enough(p);
  const auto search_at = [&](int32_t j) {
    Search search = history.search;
    if (ids[j - 1] & kBreaker) search.window = 0;
    return search;
  };
  for (int32_t at = 32 * warp(); at < n; at += 32 * warps()) {
    const int32_t mine = at + lane() + 1;
    const bool worth = mine < n && ids[mine] == ids[0] && s.owns(token_of(ids[mine - 1])) &&
                       most_equal(search_at(mine), mine, weighs_no_more) > 0;
    for (uint32_t found = __ballot_sync(kWholeWarp, worth); found; found &= found - 1) {
      const int32_t j = at + __ffs((int)found), id = token_of(ids[j - 1]);
      const Search search = search_at(j);
      const int32_t most = most_equal(search, j, weighs_no_more);
      int32_t equal = count_equal(ids, j, 0, most < 32 ? most : 32);
      if (equal == 32) {
        int32_t known = 0;
        if (lane() == 0) known = (int32_t)*(volatile uint32_t*)&table.claim(id).count;
        if (__shfl_sync(kWholeWarp, known, 0) >= most) continue;
        equal = count_equal(ids, j, 32, most);
      }
      const int32_t length = repetition(search, j, equal);
      if (lane() == 0 && length) atomicMax(&table.claim(id).count, (uint32_t)length);
    }
  }
}

}  // namespace fastsample

// Draws and outputs of rows that are split over ranks and keep tokens past their lists, by what
// ranks tell.
#pragma once

#include "cpu/lists.h"

namespace fastsample {
namespace {

// How many tokens rank above each of the draws: others than those on the lists are below.
void write_ranks(const Batch& batch, int64_t r, Draws draws, const ListedRow& row) {
  for (int32_t j = draws.begin; j < draws.end; ++j) {
    const int64_t slot = r * batch.out.num_samples + j;
    const int64_t* list = row.list(0);
    float x = INFINITY;
    for (int64_t i = 0; i < row.tokens(); ++i) {
      const Place<float> token = token_of_word(list[i]);
      if (token.id == (int32_t)batch.out.tokens[slot]) x = token.x;
    }
    int64_t above = 0;
    for (int64_t i = 0; i < row.tokens(); ++i) above += token_of_word(list[i]).x > x;
    batch.out.ranks[slot] = 1 + above;
  }
}

// A set of which not all tokens are listed, and what draws from it take.
struct Spread {
  ListedBase& base;
  Kept<float> kept;
  TopChoices top;
  const Batch& batch;  // with all outputs that are wanted

  const Outputs& out() const { return batch.out; }
  int64_t ranks() const { return base.row.head.ranks; }
  bool mixes() const { return top.probability > 0; }
  int64_t slot(int32_t j) const { return base.task.r * out().num_samples + j; }
};

// The masses and the numbers of tokens that each rank has.
struct SpreadShares {
  OfRanks<int64_t> masses, tokens;  // masses: of all, then without XTC's top choices
};

// Whether a search has told them.
bool find_shares(const Spread& s, SpreadShares* shares) {
  const ListedBase& base = s.base;
  Kept<float> kept = s.kept;
  if (!base.searches || s.mixes() || base.task.weigher.judges_apart()) return false;
  // A floor that all tokens pass changes nothing. Masses rise with the logit but for their last
  // bits.
  const uint64_t lightest = base.judge.mass(kept.low.x);
  if (kept.floor + (lightest >> 18) + 2 <= lightest) kept.floor = base.found.floor;
  *shares = {{base.masses, 1}, {base.tokens, 1}};
  return equal(kept, base.found);
}

PartQuery query_of(const Spread& s) {
  PartQuery query = s.base.query_of(s.kept);
  if (s.mixes()) {
    query.top = key_of_place(next_after(s.top));
    query.coin = bits_of(s.top.probability);
  }
  return query;
}

// Whether ranks have told them, by one way or the other. What weighs nothing is left to others: its
// first token is all there is.
bool hear_shares(const Spread& s, SpreadShares* shares, Shares* of) {
  if (!find_shares(s, shares)) {
    const bool counts = s.out().kept_count;
    const Answered* told = s.base.hear(query_of(s), kTotals, counts ? (int64_t)kWantsCount : 0,
                                       kTotalWords, counts || s.mixes() ? kTotalWords : 1);
    if (!told) return false;
    *shares = {{told->first, told->stride}, {told->first + 4, told->stride}};
  }
  const uint64_t total = total_of(shares->masses, s.ranks());
  *of = {total, s.mixes() ? total_of(shares->masses, s.ranks(), 1) : total, s.top};
  s.base.require(of->total && of->rest);
  return s.base.decided;
}

// Where draws fall on this rank, as kDraws takes it.
void write_thresholds(const Spread& s, const SpreadShares& shares, int64_t* to) {
  const Stream stream = stream_of(s.batch, s.base.task.r);
  const DrawQuery query = {(int64_t)stream.seed, (int64_t)stream.offset, s.base.row.head.rank,
                           s.ranks()};
  const float coin = s.top.probability;
  for (int32_t j = 0; j < s.out().num_samples; ++j) {
    const bool leaves = coin > 0 && xtc_excludes(stream.seed, stream.offset, (uint32_t)j, coin);
    const int64_t at =
        own_threshold(query, {shares.masses.first + leaves, shares.masses.stride}, j);
    to[j] = leaves && at >= 0 ? -2 - at : at;
  }
}

// The token of a draw, as the rank that has it has told it.
Place<float> token_of(const Spread& s, const Answered& keys, int32_t j) {
  int64_t key = kNoKey;
  for (int64_t rank = 0; rank < s.ranks(); ++rank) {
    const int64_t own = keys.first[rank * keys.stride + j];
    key = own > key ? own : key;
  }
  return place_of_key(key);
}

// How many tokens rank above each of the draws: if these are listed, all such tokens are.
bool write_spread_ranks(const Spread& s, const Answered& keys) {
  const int32_t n = s.out().num_samples;
  bool listed = true;
  for (int32_t j = 0; j < n; ++j) {
    const Place<float> token = token_of(s, keys, j);
    listed &= !ranks_before(s.base.prefix.last, token);
    if (s.base.missing.asked()) s.base.missing.details()[j] = bits_of(token.x);
  }
  if (listed) {
    write_ranks(s.batch, s.base.task.r, {0, n}, s.base.row);
    return true;
  }
  const Answered* above = s.base.hear(s.base.query_of(everything()), kAbove, 0, n, n, n);
  for (int32_t j = 0; above && j < n; ++j) {
    const uint64_t others = total_of({above->first, above->stride}, s.ranks(), j);
    s.out().ranks[s.slot(j)] = 1 + (int64_t)others;
  }
  return above;
}

// The first tokens of the set, if the list has as many of it.
bool write_spread_top(const Spread& s, const Shares& shares) {
  const ListedBase& base = s.base;
  const LogitWeigher& weigher = base.task.weigher;
  const Workspace& ws = base.task.ws;
  List all = gather(base.list, within_reach(s.kept, weigher), ws.list_x, ws.list_id);
  if (s.kept.floor) all = drop_light(all, Weighing(weigher, s.kept.floor), ws);
  s.base.require(all.n >= s.out().num_top);
  if (!s.base.decided) return false;
  const List top = take_head(all, s.out().num_top, kTiesFirst, ws).list;
  write_top(s.out(), base.task.r, ws, top.n,
            [&](Place<float> token) { return shares.log_of(weigher.mass(token.x), token); });
  return true;
}

// Each rank has the bits of its own tokens.
bool write_spread_bits(const Spread& s) {
  const int64_t vocab = s.base.row.vocab(), words = (vocab + 31) / 32, n = (vocab + 63) / 64;
  const Answered* bits = s.base.hear(s.base.query_of(s.kept), kBits, 0, n, n);
  if (!bits) return false;
  uint32_t* to = (uint32_t*)s.out().kept_bitmask + s.base.task.r * words;
  for (int64_t i = 0; i < words; ++i) {
    uint64_t all = 0;
    for (int64_t rank = 0; rank < s.ranks(); ++rank) {
      all |= (uint64_t)bits->first[rank * bits->stride + i / 2];
    }
    to[i] = (uint32_t)(all >> (i % 2 * 32));
  }
  return true;
}

// Stage 8 and the outputs, once ranks have told all that this takes.
bool finish_spread(const Spread& s) {
  const Outputs& out = s.out();
  const int32_t n = out.num_samples;
  const bool reports = out.mode == kProcessedLogprobs;
  SpreadShares parts;
  Shares shares;
  if (!hear_shares(s, &parts, &shares)) return false;
  PartQuery query = query_of(s);
  query.total = (int64_t)shares.total;
  query.rest = (int64_t)shares.rest;
  if (s.base.missing.asked()) write_thresholds(s, parts, s.base.missing.details());
  const int64_t words = 2 * n + 1;
  const Answered* keys = s.base.hear(query, kDraws, out.entropy ? (int64_t)kWantsEntropy : 0, words,
                                     out.entropy ? words : n, n);
  if (!keys) return false;
  double entropy = 0;
  for (int64_t rank = 0; out.entropy && rank < s.ranks(); ++rank) {
    double own;
    memcpy(&own, keys->first + rank * keys->stride + 2 * n, sizeof own);
    entropy += own;
  }
  for (int32_t j = 0; j < n; ++j) {
    const Place<float> token = token_of(s, *keys, j);
    out.tokens[s.slot(j)] = token.id;
    if (!reports || !out.logprobs) continue;
    out.logprobs[s.slot(j)] = shares.log_of(s.base.task.weigher.mass(token.x), token);
  }
  if (reports && out.num_top && !write_spread_top(s, shares)) return false;
  if (reports && out.ranks && !write_spread_ranks(s, *keys)) return false;
  if (out.kept_bitmask && !write_spread_bits(s)) return false;
  const int64_t r = s.base.task.r;
  if (out.entropy) out.entropy[r] = (float)entropy;
  if (out.kept_count) out.kept_count[r] = (int32_t)total_of(parts.tokens, s.ranks());
  if (out.log_kept_mass) out.log_kept_mass[r] = (float)log_share(shares.total, s.base.row.sum(0));
  return true;
}

}  // namespace
}  // namespace fastsample

// Stage 8 and the outputs of a row.
#pragma once

#include "cpu/keep.h"
#include "cpu/law.h"

namespace fastsample {
namespace {

// A row whose outputs are wanted.
template <class T, class W>
struct Task {
  const Batch& batch;
  int64_t r;
  Draws draws;
  const Workspace& ws;
  Dense<T> dense;  // the processed row
  W weigher;
  float divisor;         // temperature, 1 for greedy rows
  bool alone = false;    // whether only one token is left to look at
  bool counted = false;  // whether what is kept is counted already, and that is all to tell of it
};

void write_invalid(const Outputs& out, int64_t r, Draws draws, int32_t vocab) {
  for (int32_t j = draws.begin; j < draws.end; ++j) {
    const int64_t at = r * out.num_samples + j;
    if (out.tokens) out.tokens[at] = -1;
    if (out.logprobs) out.logprobs[at] = NAN;
    if (out.ranks) out.ranks[at] = 0;
  }
  write_no_law(out, r, vocab);
  if (draws.begin) return;
  write_no_top(out, r);
  write_nothing_kept(out, r, vocab);
  for (int i = 0; i < vocab; ++i) {
    if (out.filtered) out.filtered[r * vocab + i] = -INFINITY;
    if (out.probabilities) out.probabilities[r * vocab + i] = 0.0f;
  }
}

template <class T, class W>
void write_filtered(const Task<T, W>& t, const Kept<float>& kept) {
  const int32_t vocab = t.dense.row.vocab;
  const Weighing weight(t.weigher, kept.floor);
  float buffer[kBlock], out[kBlock];
  for (int b = 0; b < blocks(t.dense); ++b) {
    const bool live = may_keep(t.dense, b, kept);
    const float* x = live ? values(t.dense, b, buffer) : nullptr;
    for (int i = 0; i < kBlock; i += kLanes) {
      vf v = splat(-INFINITY);
      if (live) {
        const vf own = load(x + i);
        const Mask stays = weight.keep(own, ranks_within(kept, own, ids(t.dense, b, i)));
        v = select(stays, own / t.divisor, v);
      }
      store(out + i, v);
    }
    const int n = vocab - b * kBlock < kBlock ? vocab - b * kBlock : kBlock;
    memcpy(t.batch.out.filtered + t.r * vocab + b * kBlock, out, (size_t)n * sizeof(float));
  }
}

template <class T, class W>
void write_probabilities(const Task<T, W>& t, const Kept<float>& kept, const Shares& shares) {
  const int32_t vocab = t.dense.row.vocab;
  const Weighing weight(t.weigher, kept.floor);
  float buffer[kBlock];
  uint64_t mass[kBlock];
  for (int b = 0; b < blocks(t.dense); ++b) {
    float* out = t.batch.out.probabilities + t.r * vocab + b * kBlock;
    const int n = vocab - b * kBlock < kBlock ? vocab - b * kBlock : kBlock;
    memset(out, 0, (size_t)n * sizeof(float));
    if (!may_keep(t.dense, b, kept)) continue;
    const float* x = values(t.dense, b, buffer);
    weigh_each(t.dense, b, x, kept, weight, mass);
    for (int i = 0; i < n; ++i) {
      out[i] = (float)shares.of(mass[i], Place<float>{x[i], b * kBlock + i});
    }
  }
}

// The row's draws, one by one, from all that is kept or without XTC's top choices.
template <class T, class W, class Domain>
void draw_few(const Task<T, W>& t, const Domain& d, const Source (&sources)[2],
              const Shares& shares) {
  const Outputs& out = t.batch.out;
  const auto [seed, offset] = stream_of(t.batch, t.r);
  const float coin = shares.top.probability;
  for (int32_t j = t.draws.begin; j < t.draws.end; ++j) {
    const bool leaves = coin > 0 && xtc_excludes(seed, offset, (uint32_t)j, coin);
    const Source& from = sources[leaves];
    const uint64_t threshold = draw_threshold(seed, offset, (uint32_t)j, from.total);
    const Drawn lone = {next_after(shares.top).id, shares.top.last.x, 0};
    Drawn token = from.total ? draw(d, from.kept, t.weigher, from.running, threshold) : lone;
    if (out.weights) {
      token = write_law(out, t.r, t.dense, t.weigher, sources[0].kept, from, lone, token);
    }
    const int64_t slot = t.r * out.num_samples + j;
    out.tokens[slot] = token.id;
    if (out.mode != kProcessedLogprobs) continue;
    if (out.logprobs) out.logprobs[slot] = shares.log_of(token.mass, {token.x, token.id});
    if (out.ranks) out.ranks[slot] = rank_of(t.dense, token.x);
  }
}

// The same by tables of the kept tokens. Logprob and rank of a token are found once for all its
// draws.
template <class T, class W, class Domain>
void draw_many(const Task<T, W>& t, const Domain& d, const Source (&sources)[2],
               const Shares& shares) {
  const Outputs& out = t.batch.out;
  const Stream stream = stream_of(t.batch, t.r);
  const int32_t draws = t.draws.end - t.draws.begin;
  const float coin = shares.top.probability;
  Table tables[2] = {};
  for (int i = 0; i < (coin > 0 ? 2 : 1); ++i) {
    tables[i] = make_table(d, sources[i].kept, t.weigher, sources[i].total, draws, t.ws.table[i]);
  }
  const int64_t row = t.r * out.num_samples;
  const int32_t lone = next_after(shares.top).id;  // drawn where the rest has no mass
  if (out.mode != kProcessedLogprobs) {
    each_draw(tables, coin, stream, t.draws, [&](int32_t j, int which, int32_t i) {
      out.tokens[row + j] = i < 0 ? lone : tables[which].space.id[i];
    });
    return;
  }
  const int32_t drawn = draws < tables[0].n ? draws : tables[0].n;
  const Ranking<T> ranking = rank_tokens(t.dense, out.ranks ? drawn : 0, t.ws);
  for (const Table& table : tables) {
    if (table.n) memset(table.space.rank, 0, (size_t)table.n * sizeof *table.space.rank);
  }
  each_draw(tables, coin, stream, t.draws, [&](int32_t j, int which, int32_t i) {
    int32_t none = 0;
    float unknown;
    const Table& table = tables[which];
    int32_t& rank = i < 0 ? none : table.space.rank[i];
    float& logprob = i < 0 ? unknown : table.space.logprob[i];
    const int32_t id = i < 0 ? lone : table.space.id[i];
    if (!rank) {  // not yet drawn
      const float x = logit_of(t.dense, id);
      rank = out.ranks ? ranking.of(x) : 1;
      logprob = shares.log_of(i < 0 ? 0 : table.mass(i), {x, id});
    }
    out.tokens[row + j] = id;
    if (out.logprobs) out.logprobs[row + j] = logprob;
    if (out.ranks) out.ranks[row + j] = rank;
  });
}

// The mass of what is kept but for XTC's top choices, in all and in each group. These are few, so
// that it is theirs that are weighed.
template <class T, class W, class Domain>
uint64_t weigh_rest(const Task<T, W>& t, const Domain& d, const Kept<float>& kept, uint64_t total,
                    const TopChoices& top) {
  uint64_t* rest = t.ws.rest_mass;
  const uint64_t left_out = weigh_groups(d, only(kept, top), t.weigher, t.ws, rest);
  for (int g = 0; g < groups(d); ++g) rest[g] = t.ws.group_mass[g] - rest[g];
  return total - left_out;
}

FS_INLINE void add_up(uint64_t* group_mass, int groups) {
  for (int g = 1; g < groups; ++g) group_mass[g] += group_mass[g - 1];
}

// How much of all mass is kept.
template <class T, class W>
void write_kept_mass(const Task<T, W>& t, const Kept<float>& kept, uint64_t total) {
  const Kept<float> all = alive(t.weigher);
  const uint64_t mass =
      equal(kept, all) ? total : weigh_groups(t.dense, all, t.weigher, t.ws, t.ws.rest_mass);
  t.batch.out.log_kept_mass[t.r] = (float)log_share(total, mass);
}

// Stage 8 and the outputs: what is kept of a domain. `total` is its mass, where ws.group_mass holds
// that group by group, else 0. `top` are the tokens that XTC may leave out.
template <class T, class W, class Domain>
void finish(const Task<T, W>& t, const Domain& d, const Kept<float>& kept, uint64_t total,
            const TopChoices& top = kNoTopChoices) {
  const Outputs& out = t.batch.out;
  const bool first = t.draws.begin == 0, mixes = top.probability > 0;
  if (out.filtered && first) write_filtered(t, kept);
  if (!out.tokens && !out.probabilities) return;
  if (!total) total = weigh_groups(d, kept, t.weigher, t.ws);
  const uint64_t rest = mixes ? weigh_rest(t, d, kept, total, top) : total;
  const Shares shares = {total, rest, top};
  if (out.probabilities && first) write_probabilities(t, kept, shares);
  if (!out.tokens) return;
  const Source sources[2] = {{kept, t.ws.group_mass, total},
                             {without(kept, top), t.ws.rest_mass, rest}};
  if (first && !t.counted) write_kept_set(t.batch, t.r, t.dense, d, kept, t.weigher);
  if (first && out.entropy) write_entropy(t.batch, t.r, d, kept, t.weigher, shares, t.ws);
  if (draws_by_table(out, t.ws, blocks(d) * kBlock)) {
    draw_many(t, d, sources, shares);
  } else {
    add_up(t.ws.group_mass, groups(d));
    if (mixes) add_up(t.ws.rest_mass, groups(d));
    draw_few(t, d, sources, shares);
  }
  if (out.mode == kProcessedLogprobs && out.num_top && first) {
    write_processed_top(t.batch, t.r, t.ws, t.dense, d, kept, t.weigher, shares);
  }
  if (out.log_kept_mass && first && !t.alone) write_kept_mass(t, kept, total);
}

// The one token that stays, which makes all the mass.
template <class T, class W>
void finish_alone(const Task<T, W>& t, Place<float> token) {
  t.ws.list_x[0] = token.x;
  t.ws.list_id[0] = token.id;
  const Task<T, W> own = {t.batch,   t.r, t.draws, t.ws, t.dense, t.weigher.below(token.x),
                          t.divisor, true};
  // Unless it is the row's maximum, of a greedy row, it weighs nothing beside that.
  float* const log_mass = t.batch.out.log_kept_mass;
  if (log_mass && t.draws.begin == 0) log_mass[t.r] = token.x == t.weigher.max ? 0 : -INFINITY;
  const Kept<float> only = narrow_below(narrow_above(everything(), token), {token.x, token.id - 1});
  finish(own, list_of(t.ws.list_x, t.ws.list_id, 1), only, 0);
}

}  // namespace
}  // namespace fastsample

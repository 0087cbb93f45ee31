// Stage 8 and the outputs of a row.
#pragma once

#include "cpu/draw.h"
#include "cpu/logprobs.h"

namespace fastsample {
namespace {

// A row whose outputs are wanted.
template <class T>
struct Task {
  const Batch& batch;
  int64_t r;
  Draws draws;
  const Workspace& ws;
  Dense<T> dense;  // the processed row
  Weigher weigher;
  float divisor;  // temperature, 1 for greedy rows
};

void write_invalid(const Outputs& out, int64_t r, Draws draws, int32_t vocab) {
  for (int32_t j = draws.begin; j < draws.end; ++j) {
    const int64_t at = r * out.num_samples + j;
    if (out.tokens) out.tokens[at] = -1;
    if (out.logprobs) out.logprobs[at] = NAN;
    if (out.ranks) out.ranks[at] = 0;
  }
  if (draws.begin) return;
  write_no_top(out, r);
  for (int i = 0; i < vocab; ++i) {
    if (out.filtered) out.filtered[r * vocab + i] = -INFINITY;
    if (out.probabilities) out.probabilities[r * vocab + i] = 0.0f;
  }
}

template <class T>
void write_filtered(const Task<T>& t, const Kept<float>& kept) {
  const int32_t vocab = t.dense.row.vocab;
  const Weighing weight(t.weigher, kept.floor);
  float buffer[kBlock], out[kBlock];
  for (int b = 0; b < blocks(t.dense); ++b) {
    const bool live = may_keep(t.dense, b, kept);
    const float* x = live ? values(t.dense, b, buffer) : nullptr;
    for (int i = 0; i < kBlock; i += kLanes) {
      vf v = splat(-INFINITY);
      if (live) {
        Mask stays = ranks_within(kept, load(x + i), ids(t.dense, b, i));
        if (kept.floor) {
          const Halves w = weight.of(load(x + i), stays);
          stays = both(stays, nonzero((vi)(w.hi | w.lo)));
        }
        v = select(stays, load(x + i) / t.divisor, v);
      }
      store(out + i, v);
    }
    const int n = vocab - b * kBlock < kBlock ? vocab - b * kBlock : kBlock;
    memcpy(t.batch.out.filtered + t.r * vocab + b * kBlock, out, (size_t)n * sizeof(float));
  }
}

template <class T>
void write_probabilities(const Task<T>& t, const Kept<float>& kept, uint64_t total) {
  const int32_t vocab = t.dense.row.vocab;
  const Weighing weight(t.weigher, kept.floor);
  float buffer[kBlock];
  uint32_t hi[kBlock], lo[kBlock];
  for (int b = 0; b < blocks(t.dense); ++b) {
    float* out = t.batch.out.probabilities + t.r * vocab + b * kBlock;
    const int n = vocab - b * kBlock < kBlock ? vocab - b * kBlock : kBlock;
    memset(out, 0, (size_t)n * sizeof(float));
    if (!may_keep(t.dense, b, kept)) continue;
    const float* x = values(t.dense, b, buffer);
    for (int i = 0; i < kBlock; i += kLanes) {
      const vf v = load(x + i);
      const Halves w = weight.of(v, ranks_within(kept, v, ids(t.dense, b, i)));
      store(hi + i, w.hi);
      store(lo + i, w.lo);
    }
    for (int i = 0; i < n; ++i) {
      const uint64_t w = ((uint64_t)hi[i] << kHalfBits) + lo[i];
      out[i] = (float)((double)w / (double)total);
    }
  }
}

// The row's draws, one by one; `running` holds running sums, group by group.
template <class T, class Domain>
void draw_few(const Task<T>& t, const Domain& d, const Kept<float>& kept, const uint64_t* running,
              uint64_t total) {
  const Outputs& out = t.batch.out;
  const auto [seed, offset] = stream_of(t.batch, t.r);
  for (int32_t j = t.draws.begin; j < t.draws.end; ++j) {
    const uint64_t threshold = draw_threshold(seed, offset, (uint32_t)j, total);
    const Drawn token = draw(d, kept, t.weigher, running, threshold);
    const int64_t slot = t.r * out.num_samples + j;
    out.tokens[slot] = token.id;
    if (out.mode != kProcessedLogprobs) continue;
    if (out.logprobs) out.logprobs[slot] = log_ratio(token.mass, total);
    if (out.ranks) out.ranks[slot] = rank_of(t.dense, token.x);
  }
}

// The same by a table of the kept tokens. Logprob and rank of a token are found once for all its
// draws.
template <class T, class Domain>
void draw_many(const Task<T>& t, const Domain& d, const Kept<float>& kept, uint64_t total) {
  const Outputs& out = t.batch.out;
  const Stream stream = stream_of(t.batch, t.r);
  const int32_t draws = t.draws.end - t.draws.begin;
  const Table table = make_table(d, kept, t.weigher, total, draws, t.ws);
  const int64_t row = t.r * out.num_samples;
  if (out.mode != kProcessedLogprobs) {
    each_draw(table, stream, t.draws,
              [&](int32_t j, int32_t i) { out.tokens[row + j] = table.ids[i]; });
    return;
  }
  const int32_t drawn = draws < table.n ? draws : table.n;
  const Ranking<T> ranking = rank_tokens(t.dense, out.ranks ? drawn : 0, t.ws);
  memset(t.ws.end_rank, 0, (size_t)table.n * sizeof *t.ws.end_rank);
  each_draw(table, stream, t.draws, [&](int32_t j, int32_t i) {
    int32_t& rank = t.ws.end_rank[i];
    if (!rank) {  // not yet drawn
      rank = out.ranks ? ranking.of(logit_of(t.dense, table.ids[i])) : 1;
      t.ws.end_logprob[i] = log_ratio(table.mass(i), total);
    }
    out.tokens[row + j] = table.ids[i];
    if (out.logprobs) out.logprobs[row + j] = t.ws.end_logprob[i];
    if (out.ranks) out.ranks[row + j] = rank;
  });
}

// Stage 8 and the outputs: what is kept of a domain. `total` is its mass, where ws.group_mass holds
// that group by group, else 0.
template <class T, class Domain>
void finish(const Task<T>& t, const Domain& d, const Kept<float>& kept, uint64_t total) {
  const Outputs& out = t.batch.out;
  const bool first = t.draws.begin == 0;
  if (out.filtered && first) write_filtered(t, kept);
  if (!out.tokens && !out.probabilities) return;
  uint64_t* running = t.ws.group_mass;
  if (!total) total = weigh_groups(d, kept, t.weigher, t.ws);
  if (out.probabilities && first) write_probabilities(t, kept, total);
  if (!out.tokens) return;
  if (draws_by_table(out, t.ws, blocks(d) * kBlock)) {
    draw_many(t, d, kept, total);
  } else {
    for (int g = 1; g < groups(d); ++g) running[g] += running[g - 1];
    draw_few(t, d, kept, running, total);
  }
  if (out.mode == kProcessedLogprobs && out.num_top && first) {
    write_processed_top(t.batch, t.r, t.ws, t.dense, d, kept, t.weigher, total);
  }
}

}  // namespace
}  // namespace fastsample

// Log-probabilities and top-n of the sampled tokens, from integer masses in float64.
#pragma once

#include <type_traits>

#include "cpu/draw.h"
#include "cpu/probs.h"
#include "cpu/ranks.h"
#include "cpu/top_k.h"
#include "cpu/xtc.h"

namespace fastsample {
namespace {

// The probabilities of a row's tokens, those that are not kept having no mass: as they are drawn
// with and without XTC's top choices.
struct Shares {
  uint64_t total, rest;  // of what is kept; without the top choices, where 0 is the first token's
  TopChoices top;

  FS_MEMBER bool mixed() const { return rest != total; }
  FS_MEMBER double of(uint64_t mass, Place<float> token) const {
    if (!mixed()) return part(1.0, mass, total);
    const double coin = (double)top.probability, plain = part(1 - coin, mass, total);
    if (!rest) return token.id == next_after(top).id ? plain + coin : plain;
    return plain + part(coin, ranks_before(top.last, token) ? mass : 0, rest);
  }
  FS_MEMBER float log_of(uint64_t mass, Place<float> token) const {
    return (float)log(of(mass, token));
  }

 private:
  static FS_MEMBER double part(double times, uint64_t mass, uint64_t of) {
    return times * (double)mass / (double)of;
  }
};

FS_INLINE void write_no_top(const Outputs& out, int64_t r) {
  for (int64_t i = r * out.num_top; i < (r + 1) * out.num_top; ++i) {
    if (out.top_ids) out.top_ids[i] = -1;
    if (out.top_logprobs) out.top_logprobs[i] = NAN;
  }
}

// Whether token i ranks below token j.
FS_INLINE bool ranks_below(const float* x, const int32_t* id, int i, int j) {
  return x[i] < x[j] || (x[i] == x[j] && id[i] > id[j]);
}

FS_INLINE void swap_tokens(float* x, int32_t* id, int i, int j) {
  const float xi = x[i];
  const int32_t idi = id[i];
  x[i] = x[j];
  id[i] = id[j];
  x[j] = xi;
  id[j] = idi;
}

// Heap sort into rank order: in place, no allocation, no worst case.
FS_INLINE void sort_by_rank(float* x, int32_t* id, int n) {
  const auto sift_down = [&](int root, int end) {
    for (int child = 2 * root + 1; child < end; child = 2 * root + 1) {
      if (child + 1 < end && ranks_below(x, id, child + 1, child)) ++child;
      if (!ranks_below(x, id, child, root)) return;
      swap_tokens(x, id, root, child);
      root = child;
    }
  };
  for (int root = n / 2 - 1; root >= 0; --root) sift_down(root, n);
  for (int end = n - 1; end > 0; --end) {
    swap_tokens(x, id, 0, end);
    sift_down(0, end);
  }
}

// The first num_top of a gathered list in rank order; -1 and -inf past its end.
template <class Logprob>
void write_top(const Outputs& out, int64_t r, const Workspace& ws, int32_t n, Logprob logprob) {
  sort_by_rank(ws.list_x, ws.list_id, n);
  for (int i = 0; i < out.num_top; ++i) {
    const int64_t slot = r * out.num_top + i;
    out.top_ids[slot] = i < n ? ws.list_id[i] : -1;
    out.top_logprobs[slot] = i < n ? logprob(Place<float>{ws.list_x[i], ws.list_id[i]}) : -INFINITY;
  }
}

// Drops the tokens that are below the floor.
template <class Weight>
List drop_light(const List& list, const Weight& weight, const Workspace& ws) {
  int n = 0;
  for (int i = 0; i < list.n; ++i) {
    if (!weight.keeps(list.x[i])) continue;
    ws.list_x[n] = list.x[i];
    ws.list_id[n++] = list.id[i];
  }
  return list_of(ws.list_x, ws.list_id, n);
}

// The top tokens of what is kept of a domain.
template <class T, class Domain, class W>
void write_processed_top(const Batch& batch, int64_t r, const Workspace& ws, const Dense<T>& dense,
                         const Domain& d, const Kept<float>& kept, const W& weigher,
                         const Shares& shares) {
  const int32_t n = batch.out.num_top;
  const Weighing weight(weigher, kept.floor);
  List top;
  if (std::is_same<Domain, List>::value || kept.floor || kept.high.x < INFINITY) {
    // The first n of the row need not be kept, and mass is not quite monotone in x, so that the
    // floor may leave gaps in the rank order: count without those.
    List all = gather(d, within_reach(kept, weigher), ws.list_x, ws.list_id);
    if (kept.floor) all = drop_light(all, weight, ws);
    top = take_head(all, n, kTiesFirst, ws).list;
  } else {
    top = gather(take_head(dense, n, kTiesFirst, ws).list, kept, ws.list_x, ws.list_id);
  }
  write_top(batch.out, r, ws, top.n,
            [&](Place<float> token) { return shares.log_of(weight.one(token.x), token); });
}

// What the log-probability of a value needs beside it, in a row whose masses add up to `total`.
FS_INLINE double normaliser(const LogitWeigher&, uint64_t total) {
  return log((double)total / (double)kMassUnit);
}
FS_INLINE double normaliser(const ProbabilityWeigher&, uint64_t total) { return (double)total; }

FS_INLINE float raw_logprob(const LogitWeigher& weigher, double normaliser, float x) {
  return (float)(((double)x - (double)weigher.max) - normaliser);
}
FS_INLINE float raw_logprob(const ProbabilityWeigher& weigher, double normaliser, float x) {
  return (float)log((double)weigher.mass(x) / normaliser);
}

// log-softmax of the row as given, or the logarithms of its probabilities. Where nothing was
// changed, the block maxima are `processed`'s.
template <class T, class W>
void write_raw(const Batch& batch, int64_t r, Draws draws, const Workspace& ws,
               const Dense<T>& processed, Peak peak) {
  const Outputs& out = batch.out;
  const Row<T> row = raw_row<T>(batch, r);
  bool sound = true;
  if (processed.row.mask || processed.row.edits) {
    peak = peak_of<W>(row, ws.block_max);
    sound = peak.status == kValid;
    // Block maxima say nothing beside a NaN: look everywhere.
    for (int b = 0; !sound && b < row.blocks; ++b) ws.block_max[b] = INFINITY;
  }
  const W weigher = weigher_of<W>(peak.max);
  const Dense<T> raw = {row, ws.block_max, is_near(peak.low, peak.max, mass_scale(1.0f))};
  const double all =
      sound ? normaliser(weigher, weigh_groups(raw, alive(weigher), weigher, ws)) : (double)NAN;
  const auto logprob = [&](float x) { return sound ? raw_logprob(weigher, all, x) : NAN; };
  const int32_t wanted = out.ranks ? draws.end - draws.begin : 0;
  const Ranking<T> ranking = rank_tokens(raw, wanted < row.vocab ? wanted : row.vocab, ws);
  // The lists are no longer needed: one holds the ranks that are known.
  if (ranking.sorted) memset(ws.list_id, 0, (size_t)row.vocab * sizeof *ws.list_id);
  for (int32_t j = draws.begin; j < draws.end; ++j) {
    const int64_t slot = r * out.num_samples + j;
    const int32_t token = (int32_t)out.tokens[slot];
    const float x = allowed_logit(row, token);
    if (out.logprobs) out.logprobs[slot] = logprob(x);
    if (!out.ranks) continue;
    int32_t once = 0;
    int32_t& rank = ranking.sorted ? ws.list_id[token] : once;
    if (!rank) rank = ranking.of(x);
    out.ranks[slot] = rank;
  }
  if (!out.num_top || draws.begin) return;
  if (!sound) return write_no_top(out, r);
  List top = take_head(raw, out.num_top, kTiesFirst, ws).list;
  if (!W::kOfLogits) top = gather(top, alive(weigher), ws.list_x, ws.list_id);
  write_top(out, r, ws, top.n, [&](Place<float> token) { return logprob(token.x); });
}

}  // namespace
}  // namespace fastsample

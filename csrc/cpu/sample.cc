// The pipeline for one row, from logits to token. Compiled once per ISA; exports nothing but that
// ISA's Kernel.
#include "cpu/draw.h"
#include "cpu/logprobs.h"
#include "cpu/mass.h"
#include "cpu/min_p.h"
#include "cpu/process.h"

#define FASTSAMPLE_STRING_(x) #x
#define FASTSAMPLE_STRING(x) FASTSAMPLE_STRING_(x)
#define FASTSAMPLE_KERNEL_(isa) kernel_##isa
#define FASTSAMPLE_KERNEL(isa) FASTSAMPLE_KERNEL_(isa)

namespace fastsample {
namespace {

// Everything about one row that its outputs are computed from.
template <class T>
struct Task {
  const Batch& batch;
  int64_t r;
  Draws draws;
  const Workspace& ws;
  Dense<T> dense;   // the processed row
  Weigher weigher;  // with min-p's floor
  float divisor;    // temperature, 1 for greedy rows
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
void write_filtered(const Task<T>& t, Cutoff cut) {
  const int32_t vocab = t.dense.row.vocab;
  float buffer[kBlock], out[kBlock];
  for (int b = 0; b < blocks(t.dense); ++b) {
    const bool live = upper_bound(t.dense, b) >= cut.x;
    const float* x = live ? values(t.dense, b, buffer) : nullptr;
    for (int i = 0; i < kBlock; i += kLanes) {
      vf v = splat(-INFINITY);
      if (live) {
        Mask kept = keeps(cut, load(x + i), ids(t.dense, b, i));
        if (t.weigher.floor) {
          const Halves w = weigh(t.weigher, load(x + i), kept);
          kept = both(kept, nonzero((vi)(w.hi | w.lo)));
        }
        v = select(kept, load(x + i) / t.divisor, v);
      }
      store(out + i, v);
    }
    const int n = vocab - b * kBlock < kBlock ? vocab - b * kBlock : kBlock;
    memcpy(t.batch.out.filtered + t.r * vocab + b * kBlock, out, (size_t)n * sizeof(float));
  }
}

template <class T>
void write_probabilities(const Task<T>& t, Cutoff cut, uint64_t total) {
  const int32_t vocab = t.dense.row.vocab;
  float buffer[kBlock];
  uint32_t hi[kBlock], lo[kBlock];
  for (int b = 0; b < blocks(t.dense); ++b) {
    float* out = t.batch.out.probabilities + t.r * vocab + b * kBlock;
    const int n = vocab - b * kBlock < kBlock ? vocab - b * kBlock : kBlock;
    memset(out, 0, (size_t)n * sizeof(float));
    if (!(upper_bound(t.dense, b) >= cut.x)) continue;
    const float* x = values(t.dense, b, buffer);
    for (int i = 0; i < kBlock; i += kLanes) {
      const vf v = load(x + i);
      const Halves w = weigh(t.weigher, v, keeps(cut, v, ids(t.dense, b, i)));
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
void draw_few(const Task<T>& t, const Domain& d, Cutoff cut, const uint64_t* running,
              uint64_t total) {
  const Outputs& out = t.batch.out;
  const auto [seed, offset] = stream_of(t.batch, t.r);
  for (int32_t j = t.draws.begin; j < t.draws.end; ++j) {
    const uint64_t threshold = draw_threshold(seed, offset, (uint32_t)j, total);
    const Drawn token = draw(d, cut, t.weigher, running, threshold);
    const int64_t slot = t.r * out.num_samples + j;
    out.tokens[slot] = token.id;
    if (out.mode != kProcessedLogprobs) continue;
    if (out.logprobs) out.logprobs[slot] = log_ratio(token.mass, total);
    if (out.ranks) out.ranks[slot] = rank_of(t.dense, token.x);
  }
}

// The same by a table of the kept tokens. What is known of a token is known of all its draws.
template <class T, class Domain>
void draw_many(const Task<T>& t, const Domain& d, Cutoff cut, uint64_t total) {
  const Outputs& out = t.batch.out;
  const Stream stream = stream_of(t.batch, t.r);
  const int32_t draws = t.draws.end - t.draws.begin;
  const Table table = make_table(d, cut, t.weigher, total, draws, t.ws);
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

// Outputs from the kept set: what a cutoff and min-p's floor leave of a domain.
template <class T, class Domain>
void finish(const Task<T>& t, const Domain& d, const Found& kept) {
  const Outputs& out = t.batch.out;
  const bool first = t.draws.begin == 0;
  if (out.filtered && first) write_filtered(t, kept.cut);
  if (!out.tokens && !out.probabilities) return;
  uint64_t* running = t.ws.group_mass;
  const uint64_t total = kept.total ? kept.total : weigh_groups(d, kept.cut, t.weigher, t.ws);
  if (out.probabilities && first) write_probabilities(t, kept.cut, total);
  if (!out.tokens) return;
  if (pays_table(out, t.ws, blocks(d) * kBlock)) {
    draw_many(t, d, kept.cut, total);
  } else {
    for (int g = 1; g < groups(d); ++g) running[g] += running[g - 1];
    draw_few(t, d, kept.cut, running, total);
  }
  if (out.mode == kProcessedLogprobs && out.num_top && first) {
    write_processed_top(t.batch, t.r, t.ws, t.dense, d, kept.cut, t.weigher, total);
  }
}

// Stage 5: a greedy row is done with its lowest maximum, whose mass is all there is.
template <class T>
void sample_greedy(const Task<T>& t) {
  const Cutoff argmax = {t.weigher.max, nth_equal(t.dense, t.weigher.max, 1)};
  t.ws.list_x[0] = argmax.x;
  t.ws.list_id[0] = argmax.id;
  finish(t, list_of(t.ws.list_x, t.ws.list_id, 1), Found{argmax, 0});
}

// Stage 7's last filter and stage 8, on the row or on the list that holds all that can still be
// kept.
template <class T, class Domain>
void filter_and_finish(const Task<T>& t, const Domain& d, Cutoff cut, bool top_p,
                       const RowParams& p) {
  Found kept = {cut, 0};
  if (top_p) {
    Weigher base = t.weigher;
    if (p.order != kMinPFirst) base.floor = 0;
    kept = top_p_cutoff(d, base, p.top_p, t.ws);
    kept.cut = stricter(cut, kept.cut);
    // Its masses serve the draw only where min-p, too, was counted in.
    if (base.floor != t.weigher.floor) kept.total = 0;
  }
  finish(t, d, kept);
}

template <class T>
void sample_random(const Task<T>& t, const RowParams& p) {
  Cutoff cut = kKeepAlive;
  bool top_p = uses_top_p(p);
  if (top_p && p.order == kJoint) {
    Weigher all = t.weigher;
    all.floor = 0;
    cut = top_p_cutoff(t.dense, all, p.top_p, t.ws).cut;
    top_p = false;
  }
  // What lies below min-p's reach can be left out already, unless top-p is to count it.
  Cutoff reach = cut;
  if (t.weigher.floor && (!top_p || p.order == kMinPFirst)) {
    reach = stricter(cut, Cutoff{lowest_x(t.weigher, t.weigher.floor), INT32_MAX});
  }
  // The lowest finite logit can be a cutoff too: then only some of its ties are kept.
  const bool all = reach.x == -FLT_MAX && reach.id == INT32_MAX;
  if (uses_top_k(p, t.dense.row.vocab)) {
    const TopK top = top_k(t.dense, p.top_k, p.ties, t.ws);
    const List list = all ? top.list : gather(top.list, reach, t.ws.list_x, t.ws.list_id);
    filter_and_finish(t, list, stricter(cut, top.cut), top_p, p);
  } else if (all) {
    filter_and_finish(t, t.dense, cut, top_p, p);
  } else {
    const List list = gather(t.dense, reach, t.ws.list_x, t.ws.list_id);
    filter_and_finish(t, list, cut, top_p, p);
  }
}

template <class T>
Status sample_row_of(const Batch& batch, int64_t r, Draws draws, const Workspace& ws) {
  const RowParams& p = at(batch.rows.params, r);
  Row<T> row = masked_row<T>(batch, r);
  const int changes = has_changes(batch.rows) ? sort_changes(batch, r, p, row, ws) : 0;
  const float temperature = is_greedy(p) ? 1.0f : p.temperature;
  const float scale = mass_scale(temperature);
  const uint64_t floor = is_greedy(p) ? 0 : min_p_threshold(p.min_p);
  const bool min_p = min_p_alone(p, row.vocab) && !changes;
  const float bound = near_bound(scale);
  const bool watch = min_p && sizeof(T) == sizeof(float);
  Peak peak =
      watch ? scan(row, ws.block_max, bound, Watcher{Reach(scale, floor), ws.values, ws.segment})
            : scan(row, ws.block_max, bound, Nothing());
  if (changes) apply_changes(p, changes, ws, &row, &peak);
  const Status status = status_of(peak);
  if (status != kValid) {
    write_invalid(batch.out, r, draws, row.vocab);
    return status;
  }
  const Weigher weigher = {peak.max, scale, floor};
  const Dense<T> dense = {row, ws.block_max, is_near(weigher, peak.low)};
  const Task<T> task = {batch, r, draws, ws, dense, weigher, temperature};
  if (is_greedy(p)) {
    sample_greedy(task);
  } else if (min_p) {
    finish(task, task.dense, weigh_candidates(task.dense, weigher, ws));
  } else {
    sample_random(task, p);
  }
  if (batch.out.mode == kRawLogprobs) write_raw(batch, r, draws, ws, task.dense, peak);
  return kValid;
}

Status sample_row(const Batch& batch, int64_t r, Draws draws, const Workspace& ws) {
  switch (batch.logits.dtype) {
    case kFloat16:
      return sample_row_of<Half>(batch, r, draws, ws);
    case kBFloat16:
      return sample_row_of<BFloat>(batch, r, draws, ws);
    default:
      return sample_row_of<float>(batch, r, draws, ws);
  }
}

}  // namespace

extern const Kernel FASTSAMPLE_KERNEL(FASTSAMPLE_ISA);
const Kernel FASTSAMPLE_KERNEL(FASTSAMPLE_ISA) = {FASTSAMPLE_STRING(FASTSAMPLE_ISA),
                                                  FASTSAMPLE_VECTOR_BYTES, sample_row};

}  // namespace fastsample

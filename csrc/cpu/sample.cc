// The pipeline for one row, from logits to token. Compiled once for each instruction set; exports
// nothing but its Kernel.
#include "cpu/answer.h"
#include "cpu/candidates.h"
#include "cpu/filters.h"
#include "cpu/listed.h"
#include "cpu/outputs.h"
#include "cpu/plan.h"
#include "cpu/process.h"

#define FASTSAMPLE_STRING_(x) #x
#define FASTSAMPLE_STRING(x) FASTSAMPLE_STRING_(x)
#define FASTSAMPLE_KERNEL_(isa) kernel_##isa
#define FASTSAMPLE_KERNEL(isa) FASTSAMPLE_KERNEL_(isa)

namespace fastsample {
namespace {

// Stage 5: a greedy row is done with its lowest maximum, whose mass is all there is.
template <class T, class W>
void sample_greedy(const Task<T, W>& t) {
  finish_alone(t, Place<float>{t.weigher.max, nth_equal(t.dense, t.weigher.max, 1)});
}

// Stages 7 and 8 where a floor of the mass is the only filter. `watched`: the candidates are copied
// already.
template <class T>
void sample_candidates(Task<T, LogitWeigher> t, uint64_t floor, bool watched) {
  const Kept<float> kept = narrow_to_mass(everything(), floor);
  Kept<float> reach = within_reach(kept, t.weigher);
  reach.floor = 0;  // gathering does not weigh
  const Outputs& out = t.batch.out;
  const int reached = count_reached(t.dense, reach.low.x);
  *t.ws.crowded = is_crowded(blocks(t.dense), reached);
  if (gathers_candidates(out, blocks(t.dense), reached)) {
    finish(t, gather(t.dense, reach, t.ws.list_x, t.ws.list_id), kept, 0);
  } else if (out.kept_count && !out.kept_bitmask && t.draws.begin == 0) {
    int32_t& count = out.kept_count[t.r] = 0;
    t.counted = true;
    const CountedWeighing weight(t.weigher, floor, count);
    finish(t, t.dense, kept, weigh_candidates(t.dense, weight, watched, t.ws));
  } else {
    finish(t, t.dense, kept, weigh_candidates(t.dense, Weighing(t.weigher, floor), watched, t.ws));
  }
}

// Stages 5 to 8 of a valid row, other than by its candidates.
template <class T, class W>
void sample_valid(const Task<T, W>& t, const RowParams& p, Path path) {
  if (path == kArgmax) {
    sample_greedy(t);
  } else {
    filter_and_finish(t, p);
  }
}

template <class T>
Status sample_probabilities(const Batch& batch, int64_t r, Draws draws, const Workspace& ws) {
  const RowParams& p = at(batch.rows.params, r);
  const Row<T> row = masked_row<T>(batch, r);
  const Plan plan =
      plan_of(p, RowKind{row.vocab, sizeof(T) < sizeof(float), false, kProbabilities});
  const Peak peak = scan_probabilities(row, ws.block_max);
  if (peak.status != kValid) {
    write_invalid(batch.out, r, draws, row.vocab);
    return peak.status;
  }
  const ProbabilityWeigher weigher(peak.max);
  const Dense<T> dense = {row, ws.block_max, false};
  sample_valid(Task<T, ProbabilityWeigher>{batch, r, draws, ws, dense, weigher, 1.0f}, p,
               plan.path);
  if (batch.out.mode == kRawLogprobs) {
    write_raw<T, ProbabilityWeigher>(batch, r, draws, ws, dense, peak);
  }
  return kValid;
}

// Stages 0, 1 and 4, with the moments of what lies above -inf.
template <class T>
Peak scan_spread(const Row<T>& row, const Workspace& ws, float bound, Deviation* spread) {
  Moments moments = {center_of(row)};
  const Peak peak = scan(row, ws.block_max, bound, MomentsWatcher{&moments, row.blocks - 1});
  if (peak.status != kValid) return peak;
  add_left(row, &moments);
  *spread = moments.deviation(peak.max);
  return peak;
}

template <class T>
Peak scan_as_planned(const Row<T>& row, const Workspace& ws, Plan plan, Watcher watcher,
                     float bound, Deviation* spread) {
  if (plan.moments) return scan_spread(row, ws, bound, spread);
  if (plan.watch) return scan(row, ws.block_max, bound, watcher);
  return scan(row, ws.block_max, bound, Nothing());
}

template <class T>
Status sample_logits(const Batch& batch, int64_t r, Draws draws, const Workspace& ws) {
  const RowParams& p = at(batch.rows.params, r);
  Row<T> row = masked_row<T>(batch, r);
  const int edits = has_edits(batch.rows) ? sort_edits(batch, r, p, row, ws) : 0;
  const float temperature = is_greedy(p) ? 1.0f : p.temperature;
  const float scale = mass_scale(temperature);
  const float judged_scale = is_greedy(p) ? scale : mass_scale(judging_temperature(p));
  // Values that are near by the steeper scale are near by both.
  const float steeper = scale > judged_scale ? scale : judged_scale, bound = near_bound(steeper);
  const uint64_t floor = mass_floor(p, kMassUnit);
  const Plan plan =
      plan_of(p, RowKind{row.vocab, sizeof(T) < sizeof(float), edits > 0, kLogits, *ws.crowded});
  const Watcher watcher = {Reach(scale, floor), ws.values, ws.segment};
  Deviation spread = kAnyDeviation;
  Peak peak = scan_as_planned(row, ws, plan, watcher, bound, &spread);
  if (edits) apply_edits(p, edits, ws, &row, &peak);
  if (peak.status != kValid) {
    write_invalid(batch.out, r, draws, row.vocab);
    return peak.status;
  }
  const LogitWeigher weigher = {peak.max, scale, judged_scale};
  const Dense<T> dense = {row, ws.block_max, is_near(peak.low, peak.max, steeper), spread};
  const Task<T, LogitWeigher> task = {batch, r, draws, ws, dense, weigher, temperature};
  if (plan.path == kCandidates) {
    sample_candidates(task, floor, plan.watch);
  } else {
    sample_valid(task, p, plan.path);
  }
  if (batch.out.mode == kRawLogprobs) {
    write_raw<T, LogitWeigher>(batch, r, draws, ws, dense, peak);
  }
  return kValid;
}

template <class T>
Status sample_row_of(const Batch& batch, int64_t r, Draws draws, const Workspace& ws) {
  return batch.logits.input == kProbabilities ? sample_probabilities<T>(batch, r, draws, ws)
                                              : sample_logits<T>(batch, r, draws, ws);
}

Status sample_row(const Batch& batch, int64_t r, Draws draws, const Workspace& ws) {
  if (batch.logits.input == kListed) return sample_listed(batch, r, draws, ws);
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
const Kernel FASTSAMPLE_KERNEL(FASTSAMPLE_ISA) = {
    FASTSAMPLE_STRING(FASTSAMPLE_ISA), FASTSAMPLE_VECTOR_BYTES, sample_row, list_bits, answer_part};

}  // namespace fastsample

// What a rank is asked of each of its rows.
#pragma once

#include "cpu/owner.h"

namespace fastsample {
namespace {

template <class T>
void answer_row_of(const Part& part, int64_t r, const Workspace& ws) {
  const PartArguments& ask = part.ask;
  const PartQuery& q = ((const PartQuery*)ask.queries)[r];
  Batch batch = {};
  batch.logits = part.logits;
  const Row<T> row = raw_row<T>(batch, r);
  const bool scans = ask.question != kGiven || ask.wants;
  const Peak peak = scans ? scan(row, ws.block_max, 0.0f, Nothing()) : Peak();
  Kept<float> kept = everything();
  if (q.high != kHighestKey) kept = narrow_below(kept, place_of_key(q.high, ask.start));
  kept = narrow_above(kept, place_of_key(q.low, ask.start));
  kept = narrow_to_mass(kept, (uint64_t)q.floor);
  TopChoices top = kNoTopChoices;
  if (q.top != kHighestKey) {
    top = top_choices({2, place_of_key(q.top, ask.start)}, float_of(q.coin));
  }
  const LogitWeigher weigher = {float_of(q.peak), float_of(q.scale), float_of(q.judged_scale)};
  const PartRow<T> p = {ask, q, r, ws, {row, ws.block_max, false}, weigher, kept, top};
  switch ((PartQuestion)ask.question) {
    case kFirst:
      return answer_first(p, peak);
    case kWhole:
      return answer_whole(p);
    case kSums:
      return answer_sums(p);
    case kTotals:
      return answer_totals(p);
    case kDraws:
      return answer_draws(p);
    case kAbove:
      // Block maxima say nothing beside a NaN: look everywhere.
      for (int b = 0; peak.status != kValid && b < row.blocks; ++b) ws.block_max[b] = INFINITY;
      return answer_above(p);
    case kMassOfBins:
      return answer_bins(p);
    case kWithin:
      return answer_within(p);
    case kOwned:
      return answer_owned(p);
    case kGiven:
      tell_first(p, peak.status, ask.wants, p.answers());
      return tell_logits(p, p.answers() + ask.wants);
    case kBits:
      return answer_bits(p);
    case kEnds:
      return answer_ends(p);
  }
}

void answer_part(const Part& part, int64_t r, const Workspace& ws) {
  switch (part.logits.dtype) {
    case kFloat16:
      return answer_row_of<Half>(part, r, ws);
    case kBFloat16:
      return answer_row_of<BFloat>(part, r, ws);
    default:
      return answer_row_of<float>(part, r, ws);
  }
}

}  // namespace
}  // namespace fastsample

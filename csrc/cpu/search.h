// What ranks make of each other's answers about a row that is split over them: all have the same
// answers, and come to the same.
//
// A search is for the place at which a set's tokens reach a target, in rank order or outward from a
// mean. Ranks first tell how much they have in each bin of logits (kMassOfBins of cpu/part.h). That
// leaves a few bins in which the place may be, and they tell which tokens they have there
// (kWithin).
#pragma once

#include "core/arguments.h"

namespace fastsample {

// Bins are of (peak - x) * per: the fine ones are 1 wide, those below kCoarse times as wide, and
// the last has all that is lower.
constexpr int kBins = 2048, kFineBins = 1792, kCoarse = 64;

struct BinMass {
  uint64_t mass, tokens;
};

enum SearchQuestion : int64_t {
  kUncertain,  // the bins that the place may be in: from `begin` to `in` and from `out` to `end`;
               // the most tokens that a rank has there
  kBounds,     // of what is on the place's near side, as keys: `high`, `low`; the mass of that on
               // each rank, and the number of tokens
  kThresholds  // where draws fall in a rank's running mass, as kDraws of cpu/part.h takes them, and
               // which of them leave out what XTC excludes
};

enum SearchBy : int64_t { kByMass, kByNumber, kByDistance };  // the last is by mass

// What `ask` is about needs no more of `rows` rows than their queries and details. These are, of
// kUncertain: SearchQuery, then BinMass [ranks, kBins]; of kBounds: the same, then each rank's
// tokens as words [ranks, n]; of kThresholds: DrawQuery, then int64 [ranks, 2], the mass of the
// set, and without what XTC may exclude.
void search(const PartArguments& ask, int64_t rows);

}  // namespace fastsample

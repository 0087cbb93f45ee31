// Which way a row goes through the engine. Every choice between two ways to the same tokens that
// depends on parameters is made here, so that a new filter meets all of them.
#pragma once

#include <float.h>
#include <math.h>

#include "core/filters.h"
#include "cpu/kernel.h"

namespace fastsample {

enum Path : int32_t {
  kArgmax,      // greedy: the lowest maximum is all there is
  kCandidates,  // only a floor of the mass: copies the few tokens that may reach it, and weighs
                // them
  kFilters,     // any filters
};

struct Plan {
  Path path;
  bool watch;            // whether candidates are copied in the streaming pass already
  bool moments = false;  // whether that pass measures the spread of the logits
};

// A row's vocabulary, whether its values have 16 bits, whether bias or penalties change it, what it
// is made of, and whether it is likely to be crowded.
struct RowKind {
  int32_t vocab;
  bool narrow;
  bool edited;
  InputKind input;
  bool crowded = false;
};

// Whether a row has candidates in so many of its blocks that to copy them in the streaming pass,
// which slows that down, costs less than to read these blocks again. A row is taken to be like the
// one before.
FS_HD bool is_crowded(int32_t blocks, int32_t reached) { return reached > blocks / 8; }

// Whether the candidates, in so many of a row's blocks, are gathered with their ids, not as values
// alone. To find the ids of a kept set again takes longer.
FS_HD bool gathers_candidates(const Outputs& out, int32_t blocks, int32_t reached) {
  return !is_crowded(blocks, reached) || (out.kept_bitmask && reached <= blocks / 2);
}

// Edits would lower a maximum that candidates were chosen by. In 16 bits, the streaming pass
// costs half as much, and most blocks need no second look once the maximum is known.
FS_HD Plan plan_of(const RowParams& p, RowKind row) {
  if (is_greedy(p)) return Plan{kArgmax, false};
  if (filters_of(p, row.vocab) != kUsesMassFloor || row.edited) {
    const bool spreads = uses_top_n_sigma(p) && row.input == kLogits;
    return Plan{kFilters, false, spreads && !row.edited};
  }
  // Candidates are judged by the masses that are drawn from.
  if (row.input != kLogits || judging_temperature(p) != p.temperature) {
    return Plan{kFilters, false};
  }
  return Plan{kCandidates, row.crowded && !row.narrow};
}

// From here up, no step from y to the mass leaves the normal floats.
constexpr float kLowestY = -140.0f;

// All values of up to this magnitude are near each other: the streaming pass need not look for the
// lowest one.
FS_HD float near_bound(float scale) { return -kLowestY / 2 / scale; }

// Whether a row's lowest value is near enough to its maximum for the arithmetic without a clamp.
FS_HD bool is_near(float low, float max, float scale) { return (low - max) * scale >= kLowestY; }

// Whether a filter judges a list of tokens gathered from its base set, rather than that set: where
// less is within reach than the set holds.
FS_HD bool gathers(const Kept<float>& reach, const Kept<float>& base) {
  return !equal(reach, base);
}

// Whether to weigh a row as a whole costs less than to gather what lies above a floor, this share
// of it, and to weigh that.
FS_HD bool weighs_rather(double share) { return share > 0.15; }

// Whether to weigh a row and then gather this share of it, which a floor keeps, costs less than one
// pass that weighs it and what is above an estimate of the floor.
FS_HD bool gathers_few(double share) { return share < 0.01; }

// What it takes to tell whether a token ranks within the interval of a kept set.
enum Bounds : int32_t {
  kUnbounded,  // nothing: all tokens above -inf do
  kByValue,    // one comparison of its logit
  kByPlace,    // comparisons of logits and ids
};

// `lowest` is the lowest value that any token can be kept with.
FS_HD Bounds bounds_of(const Kept<float>& kept, float lowest = -FLT_MAX) {
  const bool open = kept.high.x == INFINITY;
  if (!open || kept.low.id != INT32_MAX) return kByPlace;
  return kept.low.x == lowest ? kUnbounded : kByValue;
}

// Whether a table of a row's kept tokens costs less than to search for every draw. `ends` tells
// whether there is memory for one.
FS_HD bool draws_by_table(const Outputs& out, const Workspace& ws, int32_t tokens) {
  constexpr int64_t kTokensPerDraw = 200, kManyRanks = 128;
  if (!ws.table[0].ends) return false;
  if (out.ranks && out.num_samples >= kManyRanks) return true;
  return out.num_samples * kTokensPerDraw >= tokens;
}

// Whether to sort a row costs less than to count, for so many tokens, those that rank above.
FS_HD bool ranks_by_sorting(int32_t tokens) {
  constexpr int32_t kFew = 256;
  static_assert(kFew >= kManyDraws, "ws.keys has memory only where there are many draws");
  return tokens > kFew;
}

}  // namespace fastsample

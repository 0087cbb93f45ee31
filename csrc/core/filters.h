// Stage 7: what top-k, top-p and min-p keep, as thresholds on counts and masses.
#pragma once

#include "core/mass.h"
#include "core/rows.h"

namespace fastsample {

FS_HD bool is_greedy(const RowParams& p) { return p.temperature < kGreedyBelow; }

FS_HD bool uses_top_k(const RowParams& p, int32_t vocab) { return p.top_k > 0 && p.top_k < vocab; }

FS_HD bool uses_top_p(const RowParams& p) { return p.top_p < 1.0f; }

// Tokens of at least this mass survive min-p; 0 keeps all.
FS_HD uint64_t min_p_threshold(float min_p) { return (uint64_t)(min_p * 0x1p40f); }

// The mass that top-p's prefix must reach: max(1, floor(trunc(p * 2^30) * total / 2^30)), total <=
// 2^60.
FS_HD uint64_t top_p_target(float top_p, uint64_t total) {
  const uint64_t low = ((uint64_t)1 << 30) - 1;
  const uint64_t p30 = (uint64_t)(top_p * 0x1p30f);
  const uint64_t target = p30 * (total >> 30) + (p30 * (total & low) >> 30);
  return target > 0 ? target : 1;
}

// Where a filter cuts the rank order (x descending, then id ascending): the last token it keeps.
struct Cutoff {
  float x;
  int32_t id;  // of the last kept token among those equal to x; INT32_MAX keeps them all
};

FS_HD bool keeps(Cutoff c, float x, int32_t id) { return x > c.x || (x == c.x && id <= c.id); }

FS_HD Cutoff stricter(Cutoff a, Cutoff b) {
  if (a.x != b.x) return a.x > b.x ? a : b;
  return a.id < b.id ? a : b;
}

}  // namespace fastsample

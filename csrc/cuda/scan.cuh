// Stages 0 and 4: the first pass over a row, for its maximum and whether it is valid.
#pragma once

#include <limits.h>

#include "core/filters.h"
#include "cuda/process.cuh"

namespace fastsample {

// A row's parameters, and its distribution once the scan has found the maximum.
struct RowTask {
  const RowParams* params;
  bool greedy;
  int32_t peak_key;
  int32_t argmax;
  Status status;
  float peak;
  float scale;        // of the masses that filters judge by
  float drawn_scale;  // of those that draws are made by
  float factor;       // of probabilities, which weigh p * scale * factor; 0 for logits
  int32_t lowest;     // the key of the lowest token that can be kept at all
  int32_t k_bound;    // top-k's last key is no lower
};

FS_DEVICE RowTask make_task(const RowParams& params, InputKind input) {
  RowTask t = {};
  t.params = &params;
  t.lowest = input == kProbabilities ? kKeyAboveZero : kKeyLowest;
  return t;
}

FS_DEVICE bool of_probabilities(const RowTask& t) { return t.lowest == kKeyAboveZero; }

FS_DEVICE Status status_of(int32_t peak_key, int32_t lowest) {
  if (peak_key == kKeyNaN) return kNaN;
  if (peak_key == kKeyInfinity) return kPositiveInfinity;
  return peak_key < lowest ? kNothingLeft : kValid;
}

FS_DEVICE float power_of_two(int32_t exponent) {
  return from_bits((uint32_t)(exponent + 127) << 23);
}

// From logits or probabilities to masses.
FS_DEVICE void set_scales(RowTask& t, float temperature) {
  t.scale = mass_scale(temperature);
  if (!of_probabilities(t) || t.status != kValid) return;
  // A power of two that brings the peak to a mass may lie beyond the largest float; two do not.
  const int32_t exponent = probability_shift(t.peak) + 150;
  t.scale = power_of_two(exponent / 2);
  t.factor = power_of_two(exponent - exponent / 2);
}

// What follows from the maximum and from the parameters, which are read late to save registers.
FS_DEVICE void set_peak(RowTask& t, KeyPlace best) {
  t.peak_key = best.x;
  t.argmax = best.id;
  t.status = status_of(best.x, t.lowest);
  t.peak = from_key(best.x);
  t.greedy = is_greedy(*t.params);
  set_scales(t, t.greedy ? 1.0f : judging_temperature(*t.params));
}

// After the filters, so that they have a register more.
FS_DEVICE void set_drawn_scale(RowTask& t) {
  const bool last = !t.greedy && !t.factor && t.params->order == kTemperatureLast;
  t.drawn_scale = last ? mass_scale(t.params->temperature) : t.scale;
}

// Of some threads' tokens: the first in rank order, and the lowest of the warps' and of the lanes'
// maxima.
struct Peaks {
  long long best;
  int32_t warp_low, lane_low;
};

// The calling warp's; every lane gets them.
template <class S>
FS_DEVICE Peaks scan_segment(const S& slice) {
  int32_t key = kKeyMinusInfinity, at = 0;
  each_first(slice, [&](float x, int32_t id) {
    int32_t k = key_of(x);
    if (!(x >= slice.nothing)) k = x != x ? kKeyNaN : kKeyInfinity;
    if (k > key) {
      key = k;
      at = id;
    }
  });
  // A lane sees ascending ids, so the first of its maxima has the lowest.
  const bool any = slice.begin() + lane() < slice.end();
  const long long best = warp_max(any ? ranked({key, at}) : LLONG_MIN);
  const int32_t warp_low = slice.begin() < slice.end() ? place_of(best).x : INT32_MAX;
  return Peaks{best, warp_low, warp_min(any ? key : INT32_MAX)};
}

// Those of n warps or blocks, as the calling warp finds them in shared or device memory.
FS_DEVICE Peaks combine(const long long* best, const int32_t* warp_low, const int32_t* lane_low,
                        int n) {
  const bool has = lane() < n;
  const int32_t warps_low = warp_min(has ? warp_low[lane()] : INT32_MAX);
  const int32_t lanes_low = warp_min(has ? lane_low[lane()] : INT32_MAX);
  return Peaks{warp_max(has ? best[lane()] : LLONG_MIN), warps_low, lanes_low};
}

// A key that at least k tokens reach: the lowest of k or more maxima of disjoint parts of the row.
template <class S>
FS_DEVICE int32_t key_reached_by(int32_t k, const S& slice, const Peaks& peaks) {
  const int32_t busy_warps = (slice.vectors + slice.per_warp - 1) / slice.per_warp;
  const int32_t rest = slice.vectors - (busy_warps - 1) * slice.per_warp;
  const int32_t busy_lanes = (busy_warps - 1) * 32 + (rest < 32 ? rest : 32);
  return k <= busy_warps ? peaks.warp_low : k <= busy_lanes ? peaks.lane_low : kKeyMinusInfinity;
}

template <Policy kPolicy, class S>
FS_DEVICE void scan(const Team<kPolicy>& team, const S& slice, int32_t top_k, RowTask& t) {
  Shared& own = *team.own;
  Peaks peaks = scan_segment(slice);
  if (lane() == 0) {
    own.best[warp()] = peaks.best;
    own.warp_low[warp()] = peaks.warp_low;
    own.lane_low[warp()] = peaks.lane_low;
  }
  __syncthreads();
  if (warp() == 0) {
    peaks = combine(own.best, own.warp_low, own.lane_low, warps());
    Board& board = team.board();
    team.publish(&board.best[team.rank], peaks.best);
    team.publish(&board.warp_low[team.rank], peaks.warp_low);
    team.publish(&board.lane_low[team.rank], peaks.lane_low);
  }
  team.sync();
  const Board& board = team.board();
  peaks = combine(board.best, board.warp_low, board.lane_low, team.parts);
  set_peak(t, place_of(peaks.best));
  t.k_bound = key_reached_by(top_k, slice, peaks);
}

}  // namespace fastsample

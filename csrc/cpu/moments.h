// The spread of a row's logits, which stage 6b measures exactly, from below and above: float sums
// that the streaming pass makes on its way.
#pragma once

#include "cpu/scan.h"

namespace fastsample {
namespace {

// The standard deviation of the logits.
struct Deviation {
  double low, high;
};

constexpr Deviation kAnyDeviation = {0, INFINITY};

// Sums of the distances from a value near their mean, and of the squares.
struct Moments {
  static constexpr int kMostGroups = kMaxBlocks / kGroup;

  float center;
  vd sum = {}, squares = {};
  int64_t count = 0;
  // Groups to be added up once more, as they hold -inf or, perhaps, a distance that is too far.
  uint64_t left[kMostGroups / 64] = {};
  bool known = true;

  // One vector of each, for at most a group. A square is at most the sum that it is part of, since
  // a float sum of numbers above 0 never falls: so no distance is beyond kFar.
  FS_MEMBER bool add(vf distances, vf products) {
    if (!all(gt(splat(kFar * kFar), products))) return false;
    sum = sum + widen(distances, 0) + widen(distances, 1);
    squares = squares + widen(products, 0) + widen(products, 1);
    return true;
  }

  // What the contract's deviation lies between, given the maximum.
  //  - Float sums: each term and sum is rounded kRoundings times at most, so both are off by r of
  //    what the magnitudes add up to, r = kRoundings * 2^-24. That of the distances is at most the
  //    root of the mean square q, so the variance is off by less than 5 r q.
  //  - Whole steps of 2^-11: no distance from the maximum is cut off, as all are below 512. A cut
  //    to a whole step takes from -2^-5 to 1 + 2^-5 steps, with the rounding of the difference; the
  //    deviation of what is taken is at most half of that range, and deviations of sums differ by
  //    no more than that.
  //  - The exact variance's own roundings are far below 2^-46 of the mean square of the distances
  //    from the maximum.
  FS_MEMBER Deviation deviation(float max) const {
    constexpr double kMostBelow = 200, kStep = 0x1.1p-1 * 0x1p-11;
    const double below = (double)max - (double)center;
    if (!known || !(below <= kMostBelow)) return kAnyDeviation;
    double one = 0, two = 0;
    for (int i = 0; i < kWideLanes; ++i) {
      one += sum[i];
      two += squares[i];
    }
    const double mean = one / (double)count, square = two / (double)count;
    const double error = square * (5 * kRoundings * 0x1p-24);
    const double variance = square - mean * mean;
    const double most = sqrt(variance + error) + kStep;
    const double least = sqrt(variance > error ? variance - error : 0) - kStep;
    const double whole = square + (fabs(mean) + below) * (fabs(mean) + below);
    const double slack = whole * 0x1p-46;
    const bool any = least > 0 && least * least > slack;
    return Deviation{any ? sqrt(least * least - slack) : 0, sqrt(most * most + slack)};
  }

  static constexpr float kFar = 300;

 private:
  static constexpr double kRoundings = kGroup * kBlock / (kLanes * kStreams) + 8;
};

// Watches the streaming pass for the moments of what it reads.
struct MomentsWatcher {
  static constexpr bool kSeesNarrow = true;

  Moments* moments;
  int last;  // block
  float center = moments->center;
  int64_t count = 0;
  vf sum = {}, squares[kStreams] = {};

  FS_MEMBER void see(const vf (&v)[kStreams]) {
    static_assert(kStreams == 4, "adds up pairs of pairs");
    vf distance[kStreams];
    for (int u = 0; u < kStreams; ++u) {
      distance[u] = v[u] - splat(center);
      squares[u] = multiply_add(distance[u], distance[u], squares[u]);
    }
    sum = sum + ((distance[0] + distance[1]) + (distance[2] + distance[3]));
  }
  FS_MEMBER void end(int b, float block_max) {
    if (block_max > -INFINITY) count += kBlock;
    if (b % kGroup == kGroup - 1 || b == last) end_group(b / kGroup);
  }

 private:
  FS_MEMBER void end_group(int g) {
    const vf all = (squares[0] + squares[1]) + (squares[2] + squares[3]);
    if (moments->add(sum, all)) {
      moments->count += count;
    } else {
      moments->left[g / 64] |= (uint64_t)1 << g % 64;
    }
    count = 0;
    sum = vf{};
    for (vf& s : squares) s = vf{};
  }
};

// A value to measure distances from: the mean of a few logits.
template <class T>
float center_of(const Row<T>& row) {
  constexpr int kSome = 32;
  double sum = 0;
  int n = 0;
  for (int i = 0; i < kBlock && i < row.vocab; i += kBlock / kSome) {
    const float x = upcast(row.logits[i]);
    if (!(fabsf(x) <= FLT_MAX)) continue;
    sum += (double)x;
    ++n;
  }
  return n ? (float)(sum / n) : 0.0f;
}

// Adds up the groups that the streaming pass has left out, without what is at -inf.
template <class T>
void add_left(const Row<T>& row, Moments* moments) {
  float buffer[kBlock];
  for (int b = 0; b < row.blocks && moments->known; ++b) {
    const int g = b / kGroup;
    if (!(moments->left[g / 64] >> g % 64 & 1)) continue;
    const float* x = block(row, b, buffer);
    vf sum = {}, squares = {};
    for (int i = 0; i < kBlock; i += kLanes) {
      const vf v = load(x + i);
      const Mask alive = gt(v, splat(-INFINITY));
      const vf distance = select(alive, v - splat(moments->center), splat(0.0f));
      sum = sum + distance;
      squares = multiply_add(distance, distance, squares);
      moments->count += count(alive);
    }
    moments->known = moments->add(sum, squares);
  }
}

}  // namespace
}  // namespace fastsample

// Stage 6b: statistics of a set of tokens. The sums are of integers, in any order; what is made of
// them takes a few binary64 operations per row, each rounded by itself.
#pragma once

#include <math.h>

#include "core/mass.h"

namespace fastsample {

constexpr int kHalfMass = 20;  // a mass is h * 2^20 + l
constexpr uint64_t kLowHalf = ((uint64_t)1 << kHalfMass) - 1;

// Like quotient(), GPUs call it.
FS_HD_CALLED double square_root(double x) { return sqrt(x); }

// How far y lies below 0, in units of 2^-14; below 2^20 where there is mass.
FS_HD uint32_t depth_at(float y) { return (uint32_t)(-y * 0x1p14f); }

// Z, and the sums of each half of the mass times the depth.
struct DepthSums {
  uint64_t mass, high, low;

  FS_HD_MEMBER void add(uint64_t w, uint32_t depth) {
    const uint32_t h = (uint32_t)(w >> kHalfMass), l = (uint32_t)(w & kLowHalf);
    mass += w;
    high += (uint64_t)h * depth;
    low += (uint64_t)l * depth;
  }
};

// E.
FS_HD double mean_depth(const DepthSums& s) {
  return quotient((double)s.high * 0x1p20 + (double)s.low, (double)s.mass);
}

// mu, the mean logit by mass.
FS_HD float mean_logit(double depth, float max, float scale) {
  return (float)((double)max - quotient(depth * 0x1p-14, (double)scale));
}

// Z, and what makes up the sum of the squares of the masses.
struct SquareSums {
  uint64_t mass, high, cross, low;

  FS_HD_MEMBER void add(uint64_t w) {
    const uint32_t h = (uint32_t)(w >> kHalfMass), l = (uint32_t)(w & kLowHalf);
    mass += w;
    high += (uint64_t)h * h;
    cross += (uint64_t)h * l;
    low += (uint64_t)l * l;
  }
};

// Q.
FS_HD double sum_of_squares(const SquareSums& s) {
  return ((double)s.high * 0x1p20 + (double)(2 * s.cross)) * 0x1p20 + (double)s.low;
}

// How far a logit lies below the maximum, in units of 2^-11, at most 2^20 - 1.
FS_HD uint32_t distance_below(float x, float max) {
  const float d = (max - x) * 0x1p11f;
  return d < 0x1.ffffep19f ? (uint32_t)d : 0xfffff;
}

// Of all tokens above -inf.
struct SpreadSums {
  uint64_t count, sum, squares;

  FS_HD_MEMBER void add(uint32_t distance) {
    count += 1;
    sum += distance;
    squares += (uint64_t)distance * distance;
  }
};

// sigma, the standard deviation of the logits.
FS_HD double deviation(const SpreadSums& s) {
  const double mean = quotient((double)s.sum, (double)s.count);
  const double variance = quotient((double)s.squares, (double)s.count) - mean * mean;
  return square_root(variance > 0 ? variance : 0) * 0x1p-11;
}

}  // namespace fastsample

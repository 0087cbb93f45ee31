// Stage 6: integer probability mass, and exact arithmetic on sums of it.
#pragma once

#include <string.h>

#include "core/rows.h"

namespace fastsample {

constexpr float kLog2E = 0x1.715476p+0f;
constexpr float kGreedyBelow = 1e-5f;
constexpr float kRoundMagic =
    12582912.0f;                      // 1.5 * 2^23: adding it rounds a small float to an integer
constexpr float kMassFloor = -60.0f;  // below this y there is no mass (in fact from -41 on)
constexpr int kMassBits = 40;         // the maximum weighs 2^40
constexpr uint64_t kMassUnit = (uint64_t)1 << kMassBits;

// Divisions that a row needs few of. On GPUs each is many instructions, which are there once.
FS_HD_CALLED float quotient(float a, float b) { return a / b; }
FS_HD_CALLED double quotient(double a, double b) { return a / b; }

FS_HD float mass_scale(float temperature) { return quotient(kLog2E, temperature); }

// unit * exp2(f) for |f| <= 1/2. Scalar or vector: the same operations, each rounded by itself. The
// unit is a power of two, so it changes nothing but the exponents.
template <class F>
FS_HD F exp2_polynomial(F f, float unit = 1.0f) {
  F p = f * (0x1.5bba14p-10f * unit) + 0x1.3cea88p-7f * unit;
  p = p * f + 0x1.c6b752p-5f * unit;
  p = p * f + 0x1.ebf9bcp-3f * unit;
  p = p * f + 0x1.62e42ap-1f * unit;
  return p * f + unit;
}

// w = trunc(2^40 * exp2(y)) for y <= 0, which may be -inf.
FS_HD uint64_t mass_at(float y) {
  if (!(y >= kMassFloor)) return 0;
  const float n = (y + kRoundMagic) - kRoundMagic;
  const float p = exp2_polynomial(y - n);
  // p * 2^(n + 40) from its bits: p is in [0.7, 1.42], so the exponent stays normal.
  uint32_t bits;
  memcpy(&bits, &p, sizeof bits);
  bits += (uint32_t)((int32_t)n + kMassBits) << 23;
  float scaled;
  memcpy(&scaled, &bits, sizeof scaled);
  return (uint64_t)scaled;
}

FS_HD uint64_t mass_of(float x, float max, float scale) { return mass_at((x - max) * scale); }

// Probabilities as input: p = significand * 2^(exponent - 150), for p >= 0.
struct Binary {
  uint32_t significand;
  int32_t exponent;
};

FS_HD Binary binary_of(float p) {
  uint32_t bits;
  memcpy(&bits, &p, sizeof bits);
  const uint32_t exponent = bits >> 23 & 0xff, fraction = bits & 0x7fffff;
  return exponent ? Binary{fraction | 0x800000, (int32_t)exponent} : Binary{fraction, 1};
}

// What brings the mass of the largest probability of a row to [2^39, 2^40).
FS_HD int32_t probability_shift(float largest) {
  const Binary b = binary_of(largest);
  int32_t width = 0;
  while (b.significand >> width) ++width;
  return kMassBits - width - b.exponent;
}

// w = trunc(p * 2^s). In integers, so that subnormal numbers are like others.
FS_HD uint64_t mass_of_probability(float p, int32_t shift) {
  const Binary b = binary_of(p);
  const int32_t by = b.exponent + shift;
  if (by >= 0) return (uint64_t)b.significand << by;
  return by > -32 ? b.significand >> -by : 0;
}

// floor(a * b / 2^60) for a < 2^60, b <= 2^60, in halves of 30 bits.
FS_HD uint64_t multiply_high60(uint64_t a, uint64_t b) {
  const uint64_t low = ((uint64_t)1 << 30) - 1;
  const uint64_t a1 = a >> 30, a0 = a & low, b1 = b >> 30, b0 = b & low;
  return a1 * b1 + ((a1 * b0 + a0 * b1 + (a0 * b0 >> 30)) >> 30);
}

}  // namespace fastsample

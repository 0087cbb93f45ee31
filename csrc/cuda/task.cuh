// What a row is drawn by: its parameters, and its distribution once the scan has found the maximum.
#pragma once

#include "core/filters.h"
#include "cuda/device.cuh"

namespace fastsample {

// How logits, or probabilities, become masses.
struct Masses {
  float peak;
  float scale;        // of the masses that filters judge by
  float drawn_scale;  // of those that draws are made by
  float factor;       // of probabilities, which weigh p * scale * factor; 0 for logits
};

struct RowTask : Masses {
  const RowParams* params;
  bool greedy;
  int32_t peak_key;
  int32_t argmax;
  Status status;
  int32_t lowest;   // the key of the lowest token that can be kept at all
  bool bounded;     // whether k_bound says more than that; not where k is large
  int32_t k_bound;  // top-k's last key is no lower; kKeyMinusInfinity where few tokens are left
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
  const bool last = !t.greedy && !t.factor && t.params->order == kTemperatureLast;
  t.drawn_scale = last ? mass_scale(t.params->temperature) : t.scale;
}

}  // namespace fastsample

// Probabilities as input: the streaming pass over them, and what makes masses of either input.
#pragma once

#include "cpu/mass.h"
#include "cpu/scan.h"

namespace fastsample {
namespace {

// The status of a row, token by token: for rows in which something is wrong.
template <class T>
Status inspect(const Row<T>& row) {
  bool nan = false, wrong = false, something = false;
  for (int32_t i = 0; i < row.vocab; ++i) {
    if (row.mask && !allowed(row.mask, row.mask_words, i)) continue;
    const float p = upcast(row.logits[i]);
    nan |= p != p;
    wrong |= p < 0 || p == INFINITY;
    something |= p > 0;
  }
  return nan ? kNaN : wrong ? kPositiveInfinity : something ? kValid : kNothingLeft;
}

// What the streaming pass has seen of a row.
struct Range {
  Sound sound;
  vf low = splat(0.0f);
  bool wrong = false;
};

// The highest of kBlock probabilities.
FS_INLINE float block_peak(const float* x, Range& range) {
  vf high[2] = {load(x), load(x)};
  for (int i = 0; i < kBlock; i += 2 * kLanes) {
    const vf a = load(x + i), b = load(x + i + kLanes);
    range.sound.test(i / kLanes / 2, a, b);
    high[0] = max(high[0], a);
    high[1] = max(high[1], b);
    range.low = min(range.low, min(a, b));
  }
  return reduce_max(max(high[0], high[1]));
}

// The same for 16-bit values: as numbers, positive ones are in order, and only what is negative, or
// not a number, is beyond a zero's sign or infinity.
template <class T>
FS_INLINE float block_peak(const T* x, Range& range) {
  vs high = load_as<vs>(x);
  AtMost within = {kSign};
  for (int i = 0; i < kBlock; i += 2 * kLanes) {
    const vs v = load_as<vs>(x + i);
    high = max(high, v);
    within.test(v);
  }
  const int16_t best = reduce_max(high);
  range.wrong |= !within.all() || best >= T::kInfinity;
  return upcast(T{(uint16_t)best});
}

// A block, with 0 for what is not allowed or lies past the end.
template <class T>
FS_INLINE void allowed_block(const Row<T>& row, int b, float* buffer) {
  const int begin = b * kBlock, n = row.vocab - begin < kBlock ? row.vocab - begin : kBlock;
  upcast(row, begin, n, buffer);
  for (int i = 0; i < kBlock; i += 32) {
    const int64_t word = ((int64_t)begin + i) / 32;
    uint32_t in = !row.mask ? ~0u : word < row.mask_words ? (uint32_t)row.mask[word] : 0;
    if (n - i < 32) in &= n > i ? (1u << (n - i)) - 1 : 0;
    for (int j = 0; j < 32; j += kLanes) {
      const Mask m = from_bits(in >> j & kAllLanes);
      store(buffer + i + j, select(m, load(buffer + i + j), splat(0.0f)));
    }
  }
}

// The maxima of a row of probabilities and of its blocks.
template <class T>
Peak scan_probabilities(const Row<T>& row, float* block_max) {
  constexpr int kSoon = 8192 / (int)sizeof(T);
  Range range;
  float buffer[kBlock];
  for (int b = 0; b < row.blocks; ++b) {
    if (is_allowed(row, b)) {
      prefetch_block(row.logits + b * kBlock + kSoon);
      block_max[b] = block_peak(row.logits + b * kBlock, range);
    } else if (is_ruled_out(row, b)) {
      block_max[b] = -INFINITY;
    } else {
      allowed_block(row, b, buffer);
      block_max[b] = block_peak(buffer, range);
    }
  }
  const float max = row_max(block_max, row.blocks);
  const bool right =
      !range.wrong && range.sound.all() && reduce_min(range.low) >= 0 && max > 0 && max < INFINITY;
  return Peak{max, right ? kValid : inspect(row), -INFINITY};
}

// The streaming pass over a row that nothing has changed.
template <class W, class T>
Peak peak_of(const Row<T>& row, float* block_max) {
  if constexpr (W::kOfLogits) {
    return scan(row, block_max, near_bound(mass_scale(1.0f)), Nothing());
  } else {
    return scan_probabilities(row, block_max);
  }
}

// What weighs at T = 1.
template <class W>
W weigher_of(float max) {
  if constexpr (W::kOfLogits) {
    return W{max, mass_scale(1.0f), mass_scale(1.0f)};
  } else {
    return W(max);
  }
}

}  // namespace
}  // namespace fastsample

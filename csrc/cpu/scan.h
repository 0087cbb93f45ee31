// Stages 0, 1 and 4: the one streaming pass over a row.
#pragma once

#include "cpu/row.h"

namespace fastsample {
namespace {

struct Peak {
  float max;
  Status status;
  float low;  // lower bound of the 16-bit values in blocks that nothing changes
};

// Of a row of logits.
FS_INLINE Status status_of(float max, bool nan) {
  if (nan) return kNaN;
  if (max == INFINITY) return kPositiveInfinity;
  return max == -INFINITY ? kNothingLeft : kValid;
}

constexpr int kStreams = 4;  // vectors that the streaming pass looks at side by side

// Watches nothing of the streaming pass.
struct Nothing {
  static constexpr bool kSeesNarrow = false;  // 16-bit values too, as floats in any order
  FS_MEMBER void see(const vf (&)[kStreams]) {}
  FS_MEMBER void end(int, float) {}
};

// Lanes in which every test so far has held. With several masks, a test need not wait for the one
// before it.
struct Held {
  Mask m[kMaskChains];

  FS_MEMBER Held() {
    for (Mask& lanes : m) set_all(lanes);
  }
  FS_MEMBER Mask& operator[](int i) { return m[i % kMaskChains]; }
  FS_MEMBER bool all() const {
    Mask every = m[0];
    for (const Mask& lanes : m) every = both(every, lanes);
    return fastsample::all(every);
  }
};

// What the streaming pass notes besides maxima.
struct Sound {
  Held floats;              // lanes that had no NaN
  bool nan = false;         // among 16-bit values
  bool below_zero = false;  // whether a block of them had none from zero up
  int16_t edge;             // the bits of what bounds the magnitudes of 16-bit values

  FS_MEMBER explicit Sound(int16_t bound = 0) : edge(bound) {}
  FS_MEMBER void test(int i, vf a, vf b) { floats[i] = ordered_where(floats[i], a, b); }
  FS_MEMBER bool all() const { return floats.all() && !nan; }
  template <class T>
  FS_MEMBER float low() const {
    if constexpr (sizeof(T) < sizeof(float)) return -upcast(T{(uint16_t)edge});
    return -INFINITY;
  }
};

// Maximum of kBlock values; notes NaNs, two vectors at a time.
template <class Watch>
FS_INLINE float block_peak(const float* x, Sound& sound, Watch& watch) {
  vf m[kStreams / 2];
  for (vf& high : m) high = splat(-INFINITY);
  for (int i = 0; i < kBlock; i += kStreams * kLanes) {
    vf v[kStreams];
    for (int u = 0; u < kStreams; ++u) v[u] = load(x + i + u * kLanes);
    for (int u = 0; u < kStreams; u += 2) {
      sound.test((i / kLanes + u) / 2, v[u], v[u + 1]);
      m[u / 2] = max(m[u / 2], max(v[u], v[u + 1]));
    }
    watch.see(v);
  }
  return reduce_max(max(m[0], m[1]));
}

// Whether a block's 16-bit floats all lie within +-edge; `highest` gets the bits of their highest:
// of the highest number, or where all are negative of the lowest, if kBelowZero, else any negative
// one. As unsigned numbers, only the bits of what lies below -edge, or of negative NaNs, are above
// its own.
template <bool kBelowZero, class T>
FS_INLINE bool highest_within(const T* x, int16_t edge, int16_t* highest) {
  constexpr int16_t kTurn = ~kSign;  // makes negative floats rise as numbers, too, and back
  vs high = load_as<vs>(x), low = high;
  AtMost within = {(int16_t)(edge | kSign)};
  for (int i = 0; i < kBlock; i += 2 * kLanes) {
    const vs v = load_as<vs>(x + i);
    high = max(high, v);
    if (kBelowZero) low = min(low, v);
    within.test(v);
  }
  if (kBelowZero) high = high < 0 ? low ^ kTurn : high;
  const int16_t best = reduce_max(high);
  *highest = kBelowZero && best < 0 ? (int16_t)(best ^ kTurn) : best;
  return within.all() && best <= edge;
}

// The bits of the highest of a block's 16-bit floats. From the row's first block on in which all
// are negative, the lowest numbers are looked for too: a branch for each block would be
// mispredicted where the sign changes from block to block.
template <class T>
FS_INLINE int16_t highest(const T* x, Sound& sound) {
  int16_t bits;
  const auto look = [&] {
    return sound.below_zero ? highest_within<true>(x, sound.edge, &bits)
                            : highest_within<false>(x, sound.edge, &bits);
  };
  bool within = look();
  if (bits < 0 && !sound.below_zero) {
    sound.below_zero = true;
    within = look();
  }
  if (!within) {
    sound.edge = T::kInfinity;
    sound.nan |= !look();
  }
  return bits;
}

// The same for 16-bit values, twice as many at a time.
template <class T, class Watch>
FS_INLINE float block_peak(const T* x, Sound& sound, Watch& watch) {
  const float peak = upcast(T{(uint16_t)highest(x, sound)});
  if constexpr (Watch::kSeesNarrow) {
    for (int i = 0; i < kBlock; i += kStreams * kLanes) {
      vf v[kStreams];
      for (int u = 0; u < kStreams; u += 2) load_pair(x + i + u * kLanes, v[u], v[u + 1]);
      watch.see(v);
    }
  }
  return peak;
}

template <class T>
FS_INLINE float block_peak(const T* x, Sound& sound) {
  Nothing nothing;
  return block_peak(x, sound, nothing);
}

// Asks for every line of a block that will be read soon: on Zen a line does not bring its
// neighbour.
template <class T>
FS_INLINE void prefetch_block(const T* x) {
  for (int i = 0; i < kBlock; i += 64 / (int)sizeof(T)) __builtin_prefetch(x + i);
}

FS_INLINE float row_max(float* block_max, int blocks) {
  for (int i = 0; i < kPad; ++i) block_max[blocks + i] = -INFINITY;
  vf peak = splat(-INFINITY);
  for (int b = 0; b < blocks; b += kLanes) peak = max(peak, load(block_max + b));
  return reduce_max(peak);
}

// The streaming pass over a row without edits: the maximum of every block and of the row. `watch`
// sees every four vectors of a block, then the block's maximum. To learn whether 16-bit values
// exceed `bound` in magnitude costs nothing more.
template <class T, class Watch>
FS_INLINE Peak scan(const Row<T>& row, float* block_max, float bound, Watch watch) {
  float buffer[kBlock];
  Sound sound(edge_at<T>(bound));
  const auto look = [&](int b, const auto* x) {
    block_max[b] = block_peak(x, sound, watch);
    watch.end(b, block_max[b]);
  };
  const auto look_at_logits = [&](int b) {
    constexpr int kSoon = 8192 / (int)sizeof(T);
    prefetch_block(row.logits + b * kBlock + kSoon);
    look(b, row.logits + b * kBlock);
  };
  const int untouched = row.mask ? 0 : row.vocab / kBlock;
  for (int b = 0; b < untouched; ++b) look_at_logits(b);
  for (int b = untouched; b < row.blocks; ++b) {
    if (is_allowed(row, b)) {
      look_at_logits(b);
    } else if (is_ruled_out(row, b)) {
      block_max[b] = -INFINITY;
      watch.end(b, -INFINITY);
    } else {
      look(b, block(row, b, buffer));
    }
  }
  const float max = row_max(block_max, row.blocks);
  return Peak{max, status_of(max, !sound.all()), sound.low<T>()};
}

}  // namespace
}  // namespace fastsample

// Ranks of sampled tokens: a few are counted in the row, many are looked up in the sorted row.
#pragma once

#include "cpu/domain.h"

namespace fastsample {
namespace {

// 1 + number of tokens strictly above x.
template <class T>
int32_t rank_of(const Dense<T>& d, float x) {
  float buffer[kBlock];
  int32_t above = 0;
  for (int b = 0; b < blocks(d); ++b) {
    if (!(upper_bound(d, b) > x)) continue;
    above += (int32_t)weigh_block(Counting{}, values(d, b, buffer),
                                  [&](vf v, int) { return gt(v, splat(x)); });
  }
  return 1 + above;
}

// Rises with x, the same for both zeros; least for a NaN, which is above nothing.
FS_INLINE uint32_t rank_key(float x) { return x != x ? 0 : (uint32_t)key_of(x) ^ 0x80000000u; }

// Radix sort of n keys, one pass from buffer to buffer for each digit; returns the buffer that
// holds them in the end.
inline uint32_t* sort_keys(uint32_t* from, uint32_t* to, int n) {
  constexpr int kDigit = 11, kDigits = 3, kValues = 1 << kDigit;
  static_assert(kDigit * kDigits >= 32, "all bits are sorted by");
  int32_t next[kDigits][kValues] = {};
  const auto digit = [](uint32_t key, int d) { return key >> (d * kDigit) & (kValues - 1); };
  for (int i = 0; i < n; ++i) {
    for (int d = 0; d < kDigits; ++d) ++next[d][digit(from[i], d)];
  }
  for (int d = 0; d < kDigits; ++d) {
    for (int32_t value = 0, before = 0; value < kValues; ++value) {
      const int32_t count = next[d][value];
      next[d][value] = before;
      before += count;
    }
    for (int i = 0; i < n; ++i) to[next[d][digit(from[i], d)]++] = from[i];
    uint32_t* const swapped = from;
    from = to;
    to = swapped;
  }
  return from;
}

template <class T>
struct Ranking {
  const Dense<T>* row;
  const uint32_t* sorted;  // the row's keys, ascending; null: the row itself is searched
  int32_t n;

  FS_MEMBER int32_t of(float x) const {
    if (!sorted) return rank_of(*row, x);
    const uint32_t key = rank_key(x);
    int32_t low = 0, high = n;  // the first key above it
    while (low < high) {
      const int32_t middle = (low + high) / 2;
      if (sorted[middle] > key) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return 1 + n - low;
  }
};

// The means to find the ranks of so many tokens.
template <class T>
Ranking<T> rank_tokens(const Dense<T>& d, int32_t tokens, const Workspace& ws) {
  if (!ranks_by_sorting(tokens)) return Ranking<T>{&d, nullptr, 0};
  float buffer[kBlock];
  for (int b = 0; b < blocks(d); ++b) {
    const float* x = values(d, b, buffer);
    for (int i = 0; i < kBlock; ++i) ws.keys[0][b * kBlock + i] = rank_key(x[i]);
  }
  const int n = blocks(d) * kBlock;  // what lies past the row's end is above nothing
  return Ranking<T>{&d, sort_keys(ws.keys[0], ws.keys[1], n), n};
}

}  // namespace
}  // namespace fastsample

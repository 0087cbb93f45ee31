// What is kept of a row: how many tokens, which, their share of all mass, and the entropy of what
// is drawn from.
#pragma once

#include <limits.h>

#include "cpu/logprobs.h"

namespace fastsample {
namespace {

// Which tokens may be kept, and the value from which they are: mass is not quite monotone in x, so
// that near a floor only the masses themselves can tell.
struct Reachable {
  Kept<float> maybe;
  float surely;

  template <class W>
  Reachable(const Kept<float>& kept, const W& weigher)
      : maybe(within_reach(kept, weigher)),
        surely(kept.floor ? weigher.judge().surely(kept.floor) : -INFINITY) {}
};

// Takes those out of a block's set that weigh less than the floor.
template <class T, class Weight>
FS_INLINE void leave_out_light(const T* x, float surely, const Weight& weight, BlockBits& set) {
  constexpr int kFew = 16;
  const auto look_at = [&](int i) __attribute__((always_inline)) {
    const float value = upcast(x[i]);
    if (value < surely && !weight.keeps(value)) set.clear(i);
  };
  if (count(set) <= kFew) return each_bit(set, look_at);
  const BlockBits sure = bits_at_least(x, surely);
  BlockBits unsure;
  for (int k = 0; k < kBlock / 64; ++k) unsure.word[k] = set.word[k] & ~sure.word[k];
  each_bit(unsure, look_at);
}

// f(block) for the blocks with a value that is not below x; of a list, for all.
template <class T, class F>
FS_INLINE void each_block_from(const Dense<T>& d, float x, F f) {
  for (int first = 0; first < blocks(d); first += kBlock) {  // maxima past the last are -inf
    each_bit(bits_at_least(d.block_max + first, x), [&](int i) { f(first + i); });
  }
}
template <class F>
FS_INLINE void each_block_from(const List& l, float, F f) {
  for (int b = 0; b < blocks(l); ++b) f(b);
}

// f(block, its bits) for the blocks that may keep tokens. The bits are used where they are made: a
// copy would be a vector, loaded just after its words were stored one by one.
template <class Domain, class W, class F>
void each_kept(const Domain& d, const Kept<float>& kept, const W& weigher, F f) {
  const Weighing weight(weigher, kept.floor);
  const Reachable reachable(kept, weigher);
  each_block_from(d, reachable.maybe.low.x, [&](int b) __attribute__((always_inline)) {
    if (!may_keep(d, b, reachable.maybe)) return;
    with_values(d, b, [&](const auto* x, auto) __attribute__((always_inline)) {
      BlockBits set = bits_within(d, b, x, reachable.maybe);
      if (kept.floor) leave_out_light(x, reachable.surely, weight, set);
      f(b, set);
    });
  });
}

// Where a row's set goes: its ids while they fit, or its bits.
struct KeptWriter {
  int32_t* ids;
  int32_t room;
  uint32_t* words;  // zeros, or null
  int32_t n = 0;

  template <class Domain>
  FS_MEMBER void add(const Domain& d, int b, const BlockBits& set) {
    int32_t at = n;
    n += count(set);
    if (n <= room) each_bit(set, [&](int i) { ids[at++] = id_at(d, b, i); });
    if (words) add_bits(d, b, set);
  }

 private:
  template <class T>
  FS_MEMBER void add_bits(const Dense<T>& d, int b, const BlockBits& set) {
    const int left = (d.row.vocab + 31) / 32 - b * (kBlock / 32);
    memcpy(words + b * (kBlock / 32), set.word,
           (size_t)(left < kBlock / 32 ? left : kBlock / 32) * sizeof *words);
  }
  FS_MEMBER void add_bits(const List& list, int b, const BlockBits& set) {
    each_bit(set, [&](int i) {
      const int32_t id = id_at(list, b, i);
      words[id / 32] |= 1u << id % 32;
    });
  }
};

template <class T, class W, class Domain>
void write_kept_set(const Batch& batch, int64_t r, const Dense<T>& dense, const Domain& d,
                    const Kept<float>& kept, const W& weigher) {
  const Outputs& out = batch.out;
  if (!out.kept_count && !out.kept_bitmask) return;
  const int64_t words = (dense.row.vocab + 31) / 32;
  uint32_t* bitmask = out.kept_bitmask ? (uint32_t*)out.kept_bitmask + r * words : nullptr;
  KeptWriter writer = {nullptr, 0, bitmask};
  const auto write = [&] {
    if (writer.words) memset(bitmask, 0, (size_t)words * sizeof *bitmask);
    each_kept(d, kept, weigher, [&](int b, const BlockBits& set) { writer.add(d, b, set); });
  };
  if (out.kept_slots) {
    writer = {out.kept_slots + r * out.num_slots, out.num_slots, nullptr};
    write();
    if (writer.n > out.num_slots) {
      writer = {nullptr, 0, bitmask};
      write();
    }
  } else {
    write();
  }
  if (out.kept_count) out.kept_count[r] = writer.n;
}

// The natural logarithms of masses, to 1e-9; of 0 any finite number.
FS_INLINE vd log_of_masses(vd w) {
  constexpr double kLn2 = 0x1.62e42fefa39efp-1, kRoot = 0x1.6a09e667f3bcdp+0;
  const vq bits = (vq)w, lowest = splat((uint64_t)0xFFFFFFFFFFFFF), one = splat((uint64_t)1023);
  const vd exponent = to_double(bits >> 52) - 1023;
  const vd m = (vd)((bits & lowest) | (one << 52));  // from 1 to 2
  // 2 atanh(s), s at most 0.172.
  const vd s = (m - kRoot) / (m + kRoot), z = s * s;
  const vd series = (((z * (2 / 9.0) + 2 / 7.0) * z + 2 / 5.0) * z + 2 / 3.0) * z + 2.0;
  return exponent * kLn2 + (kLn2 / 2 + s * series);
}

// The entropy of draws by mass, in nats. A token with more than half of all mass is left to the
// end: of its probability, what it lacks of 1 matters.
template <class Domain, class W>
double entropy_by_mass(const Domain& d, const Kept<float>& kept, const W& weigher, uint64_t total,
                       const Workspace& ws) {
  const Weighing weight(weigher, kept.floor);
  const float lowest = weight.lowest();
  const vd log_total = vd{} + log((double)total), half = vd{} + (double)total / 2;
  vd sum = {};
  uint64_t heaviest = 0;
  float buffer[kBlock];
  uint64_t mass[kBlock];
  for (int g = 0; g < groups(d); ++g) {
    if (!ws.group_mass[g]) continue;
    for (int b = g * kGroup; b < group_end(d, g); ++b) {
      if (!may_keep(d, b, kept) || upper_bound(d, b) < lowest) continue;
      weigh_each(d, b, values(d, b, buffer), kept, weight, mass);
      for (int i = 0; i < kBlock; i += kWideLanes) {
        const vd w = to_double(load_as<vq>(mass + i));
        const vd light = (vd)((vq)(w <= half) & (vq)w);
        sum = sum + light * (log_total - log_of_masses(w));
      }
      for (int i = 0; i < kBlock; ++i) heaviest = mass[i] > heaviest ? mass[i] : heaviest;
    }
  }
  double all = 0;
  for (int i = 0; i < kWideLanes; ++i) all += sum[i];
  if (2 * heaviest > total) {
    all += (double)heaviest * log1p((double)(total - heaviest) / (double)heaviest);
  }
  return all / (double)total;
}

// The same of a mixture of draws.
template <class Domain, class W>
double entropy_of_mixture(const Domain& d, const Kept<float>& kept, const W& weigher,
                          const Shares& shares) {
  const Weighing weight(weigher, kept.floor);
  double sum = 0;
  float buffer[kBlock];
  uint64_t mass[kBlock];
  for (int b = 0; b < blocks(d); ++b) {
    if (!may_keep(d, b, kept)) continue;
    const float* x = values(d, b, buffer);
    weigh_each(d, b, x, kept, weight, mass);
    for (int i = 0; i < kBlock; ++i) {
      const double p = shares.of(mass[i], Place<float>{x[i], id_at(d, b, i)});
      if (p > 0) sum -= p * log(p);
    }
  }
  return sum;
}

// log(kept / all); where little is left out, by that.
FS_INLINE double log_share(uint64_t kept, uint64_t all) {
  const uint64_t out = all - kept;
  return 2 * out < all ? log1p((0.0 - (double)out) / (double)all) : log((double)kept / (double)all);
}

// Before ws.group_mass becomes running sums.
template <class W, class Domain>
void write_entropy(const Batch& batch, int64_t r, const Domain& d, const Kept<float>& kept,
                   const W& weigher, const Shares& shares, const Workspace& ws) {
  const double entropy = shares.mixed() ? entropy_of_mixture(d, kept, weigher, shares)
                                        : entropy_by_mass(d, kept, weigher, shares.total, ws);
  batch.out.entropy[r] = (float)entropy;
}

void write_nothing_kept(const Outputs& out, int64_t r, int32_t vocab) {
  const int64_t words = (vocab + 31) / 32;
  if (out.kept_count) out.kept_count[r] = 0;
  if (out.kept_bitmask && !out.kept_slots) {
    memset(out.kept_bitmask + r * words, 0, (size_t)words * sizeof *out.kept_bitmask);
  }
  if (out.log_kept_mass) out.log_kept_mass[r] = NAN;
  if (out.entropy) out.entropy[r] = NAN;
}

// Lists the bits of n words, of which `total` are set.
void list_bits(const int32_t* words, int64_t n, int32_t* ids, int64_t total) {
  constexpr int kFew = 6;
  int64_t at = 0;
  for (int64_t k = 0; k < n; ++k) {
    uint32_t word = (uint32_t)words[k];
    if (!word) {  // most sets are few bits of many words
      while (k + kLanes < n && !any(nonzero(load_as<vi>(words + k)))) k += kLanes;
      word = (uint32_t)words[k];
    }
    if (__builtin_popcount(word) > kFew && total - at >= 32 + kLanes) {  // whole vectors fit
      for (int i = 0; i < 32; i += kLanes) {
        const Mask set = from_bits(word >> i & kAllLanes);
        at += compress_store(ids + at, iota() + (int32_t)(k * 32 + i), set);
      }
      continue;
    }
    for (; word; word &= word - 1) ids[at++] = (int32_t)(k * 32 + __builtin_ctz(word));
  }
}

}  // namespace
}  // namespace fastsample

// Weighted selection: the value at which a running weight, from the highest value down, reaches a
// target.
#pragma once

#include "core/filters.h"
#include "cpu/mass.h"

namespace fastsample {
namespace {

// What top-k and top-p weigh tokens by: one each, or their mass. A Sum holds a group's at most.
struct Counting {
  uint64_t k;

  struct Sum {
    vu lanes = {};
  };
  static constexpr bool kHeavyHeads = false;  // whether a few tokens can be most of the weight
  // How many neighbours a sample takes at a time: few, so that many blocks are sampled, since a
  // sorted row has its highest tokens in few of them.
  static constexpr int kSampleRun = 4;

  template <int N>
  FS_MEMBER Where<N> of(const Pack<N>&, const Where<N>& where, bool) const {
    return where;
  }
  template <int N>
  FS_MEMBER void add(Sum& s, const Where<N>& ones) const {
    FS_EACH(N) s.lanes = fastsample::add_where(ones.m[u], s.lanes, (vu)splat(1));
  }
  FS_MEMBER uint64_t total(const Sum& s) const { return reduce_add(s.lanes); }
  FS_MEMBER uint64_t one(float) const { return 1; }
  FS_MEMBER double estimate_target(double) const { return (double)k; }
  FS_MEMBER double share() const { return 0; }
  FS_MEMBER float certain_low(double, double) const { return -INFINITY; }
  FS_MEMBER float lowest() const { return -INFINITY; }
  void roughly(const float*, int n, float* to) const {
    for (int i = 0; i < n; i += kLanes) store(to + i, splat(1.0f));
  }
};

// Masses below the floor count as 0.
template <class W>
struct Weighing {
  W weigher;
  uint64_t floor;
  float rough;  // the floor in kRoughUnit
  float top_p;

  FS_MEMBER Weighing(const W& w, uint64_t least, float p = 1.0f)
      : weigher(w), floor(least), rough(rough_floor(least)), top_p(p) {}

  typedef MassSum Sum;
  static constexpr bool kHeavyHeads = true;
  static constexpr int kSampleRun = 32;  // fewer cache lines; block maxima show the highest tokens

  template <int N>
  FS_MEMBER Pack<N> of(const Pack<N>& x, const Where<N>& where, bool near = false) const {
    return weigh(weigher, rough, x, where, near);
  }
  FS_MEMBER Halves of(vf x, Mask where) const {
    return to_fixed(of(Pack<1>{{x}}, Where<1>{{where}}).v[0]);
  }
  template <int N>
  FS_MEMBER void add(Sum& s, const Pack<N>& mass) const {
    fastsample::add(s, mass);
  }
  FS_MEMBER uint64_t total(const Sum& s) const { return fastsample::total(s); }
  FS_MEMBER uint64_t one(float x) const { return keeps(x) ? weigher.mass(x) : 0; }
  FS_MEMBER uint64_t equal(int32_t n, float x) const { return (uint64_t)n * one(x); }
  // Whether a token is not below the floor.
  FS_MEMBER bool keeps(float x) const { return !floor || weigher.judge().mass(x) >= floor; }
  FS_MEMBER Mask keep(vf x, Mask where) const {
    return floor ? heavy(weigher.judge(), rough, x, where) : where;
  }
  FS_MEMBER uint64_t target(uint64_t total) const { return top_p_target(top_p, total); }
  FS_MEMBER double estimate_target(double total) const { return (double)top_p * total; }
  FS_MEMBER double share() const { return top_p; }
  // A value that the boundary does not lie below: all tokens below it together weigh less than what
  // top-p leaves out of `part`, the weight of some of the tokens.
  FS_MEMBER float certain_low(double part, double tokens) const {
    const double mass = (1 - (double)top_p) * part / tokens;
    return mass > 1 ? nextafterf(weigher.lowest((uint64_t)mass), -INFINITY) : lowest();
  }
  // A value that every token with a mass exceeds.
  FS_MEMBER float lowest() const {
    return floor ? weigher.judge().lowest(floor) : weigher.lowest(1);
  }
  // Not quite the masses of n values; for estimates.
  void roughly(const float* x, int n, float* to) const {
    for (int i = 0; i < n; i += kAbreast * kLanes) {
      const auto q = weigh_roughly(weigher, load_pack<kAbreast>(x + i), everywhere<kAbreast>());
      FS_EACH(kAbreast) store(to + i + u * kLanes, q.v[u] * (0x1p40f / kRoughUnit));
    }
  }
};

// A bit for every token of a block.
struct BlockBits {
  uint64_t word[kBlock / 64];

  FS_MEMBER void set(int i, Mask m) { word[i / 64] |= (uint64_t)bits(m) << (i % 64); }
  FS_MEMBER Mask at(int i) const { return from_bits(word[i / 64] >> (i % 64) & kAllLanes); }
  FS_MEMBER void clear(int i) { word[i / 64] &= ~((uint64_t)1 << (i % 64)); }
};

FS_INLINE int count(const BlockBits& set) {
  int n = 0;
  for (const uint64_t word : set.word) n += __builtin_popcountll(word);
  return n;
}

// f(position) for each bit that is set, the lowest first.
template <class F>
FS_INLINE void each_bit(const BlockBits& set, F f) {
  for (int k = 0; k < kBlock; k += 64) {
    for (uint64_t rest = set.word[k / 64]; rest; rest &= rest - 1) f(k + __builtin_ctzll(rest));
  }
}

template <class T, class Keep>
FS_INLINE BlockBits block_bits(const T* x, Keep keep) {
  BlockBits set;
  for (int k = 0; k < kBlock; k += 64) {
    uint64_t word = 0;
    for (int i = 0; i < 64; i += kLanes) {
      word |= (uint64_t)bits(keep(load(x + k + i), k + i)) << i;
    }
    asm("" : "+r"(word));  // else GCC makes the words in a vector, to take each out again
    set.word[k / 64] = word;
  }
  return set;
}

// The values of a block that are at least `low`.
template <class T>
FS_INLINE BlockBits bits_at_least(const T* x, float low) {
  if constexpr (sizeof(T) < sizeof(float) && kCompresses) {
    const auto least = AtLeast<T>::exactly(low);
    BlockBits set = {};
    for (int i = 0; i < kBlock; i += 32) {
      set.word[i / 64] |= (uint64_t)least.among(x + i) << (i % 64);
    }
    return set;
  } else {
    return block_bits(x, [&](vf v, int) { return ge(v, splat(low)); });
  }
}

// Calls few(n, positions) for kGuess set bits at a time, the last ones of a word to be overwritten,
// or many(n, position, mask) for a vector, and counts in n.
constexpr int kGuess = 4;

template <class Few, class Many>
FS_INLINE void each_set(const BlockBits& set, int* n, Few few, Many many) {
  constexpr int kDense = 16;  // of 64: from there on vectors are faster than bits
  for (int k = 0; k < kBlock; k += 64) {
    uint64_t word = set.word[k / 64];
    const int here = __builtin_popcountll(word);
    if (here >= kDense) {
      for (int i = k; i < k + 64; i += kLanes) {
        const Mask m = from_bits((uint32_t)(word >> (i - k)) & kAllLanes);
        many(*n, i, m);
        *n += count(m);
      }
      continue;
    }
    // kGuess at a time, wanted or not: a branch for each bit would be mispredicted.
    for (int done = 0; done < here; done += kGuess) {
      int at[kGuess];
      FS_EACH(kGuess) {
        at[u] = k + __builtin_ctzll(word | 1ull << 63);
        asm("" : "+r"(at[u]));  // else GCC keeps the positions in a vector, to take each out again
        word &= word - 1;
      }
      few(*n + done, at);
    }
    *n += here;
  }
}

// Copies the values of a block whose bits are set; returns how many.
FS_INLINE int append(const float* x, const BlockBits& set, float* to) {
  int n = 0;
  each_set(
      set, &n,
      [&](int first, const int (&at)[kGuess]) {
        FS_EACH(kGuess)
        to[first + u] = x[at[u]];
      },
      [&](int first, int i, Mask m) { compress_store(to + first, load(x + i), m); });
  return n;
}

// Adds the weight of those of n values for which keep(x, position) holds; n is rounded up to whole
// packs of N vectors. A pack is added up after the next one is weighed: the chain of operations of
// a single pack would leave the processor idle.
template <int N = kAbreast, class Weight, class T, class Keep>
FS_INLINE void add_kept(const Weight& weight, const T* x, int n, Keep keep,
                        typename Weight::Sum& sum, bool near = false) {
  const auto weights = [&](int i) __attribute__((always_inline)) {
    const Pack<N> p = load_pack<N>(x + i);
    Where<N> kept;
    FS_EACH(N) kept.m[u] = keep(p.v[u], i + u * kLanes);
    return weight.of(p, kept, near);
  };
  if (n <= 0) return;
  auto last = weights(0);
  for (int i = N * kLanes; i < n; i += N * kLanes) {
    const auto next = weights(i);
    weight.add(sum, last);
    last = next;
  }
  weight.add(sum, last);
}

// Whether n values, an even number where they have 16 bits, have the same bits.
template <class T>
FS_INLINE bool all_equal(const T* x, int n) {
  constexpr int kStep = FASTSAMPLE_VECTOR_BYTES / (int)sizeof(T);
  const vi one = splat(load_as<int32_t>(x));
  if (sizeof(T) < sizeof(float) && one[0] >> 16 != (int16_t)one[0]) return false;
  constexpr int kAtOnce = 4;
  int i = 0;
  for (; i + kAtOnce * kStep <= n; i += kAtOnce * kStep) {
    vi other = {};
    FS_EACH(kAtOnce) other |= load_as<vi>(x + i + u * kStep) ^ one;
    if (any(nonzero(other))) return false;
  }
  for (; i < n; i += kStep) {
    const Mask other = nonzero(load_as<vi>(x + i) ^ one);
    if (any(both(first((n - i) * kLanes / kStep), other))) return false;
  }
  return true;
}

// Weight of the values of a block for which keep(x, position) holds.
template <class Weight, class Keep>
FS_INLINE uint64_t weigh_block(const Weight& weight, const float* x, Keep keep) {
  typename Weight::Sum sum;
  add_kept(weight, x, kBlock, keep, sum);
  return weight.total(sum);
}

// Adds the weight of those of n values, a pack of N vectors at most, for which keep(x, position)
// holds.
template <int N, class Weight, class T, class Keep>
FS_INLINE void add_rest(const Weight& weight, const T* x, int n, Keep keep,
                        typename Weight::Sum& sum) {
  constexpr int kStep = FASTSAMPLE_VECTOR_BYTES / (int)sizeof(T);
  alignas(FASTSAMPLE_VECTOR_BYTES) T rest[N * kLanes];
  for (int i = 0; i < N * kLanes; i += kStep) {
    const Mask m = first((n - i) * kLanes / kStep);
    const vf v = select(m, load_as<vf>(x + i), all_masked<T>());
    memcpy(rest + i, &v, sizeof v);
  }
  add_kept<N>(weight, (const T*)rest, N * kLanes, keep, sum);
}

// Weight of those of n values, a group's at most, for which keep(x) holds; n is even where they
// have 16 bits. Packs have half the size: groups have few values, and the next group's operations
// fill the gaps.
template <class Weight, class T, class Keep>
FS_INLINE uint64_t weigh_some(const Weight& weight, const T* x, int n, Keep keep) {
  constexpr int N = kAbreast * 2 / (int)sizeof(T), kFew = 2;
  const int whole = n / (N * kLanes) * (N * kLanes);
  const auto kept = [&](vf v, int) { return keep(v); };
  typename Weight::Sum sum;
  add_kept<N>(weight, x, whole, kept, sum);
  if (n - whole > kFew * kLanes) {
    add_rest<N>(weight, x + whole, n - whole, kept, sum);
  } else if (n > whole) {
    add_rest<kFew>(weight, x + whole, n - whole, kept, sum);
  }
  return weight.total(sum);
}

// Values in no order, filled up with -inf to a whole block, and their range.
struct Span {
  float* x;
  int n;
  float low, high;
};

FS_INLINE void fill_up(float* x, int n) {
  for (int i = 0; i < kBlock; i += kLanes) store(x + n + i, splat(-INFINITY));
}

template <class Weight>
uint64_t weight_above(const Weight& weight, const Span& s, float pivot) {
  constexpr int kMost = kGroup * kBlock;  // that a Sum can hold
  const auto above = [&](vf v, int) { return gt(v, splat(pivot)); };
  uint64_t weighed = 0;
  for (int begin = 0; begin < s.n; begin += kMost) {
    typename Weight::Sum sum;
    add_kept(weight, s.x + begin, s.n - begin < kMost ? s.n - begin : kMost, above, sum);
    weighed += weight.total(sum);
  }
  return weighed;
}

FS_INLINE int count_above(const float* x, int n, float edge) {
  int above = 0;
  for (int i = 0; i < n; i += kLanes)
    above += count(both(first(n - i), gt(load(x + i), splat(edge))));
  return above;
}

// Copies the n values for which keep(x) holds to `to` (which may be x itself) and finds their
// range.
template <class Keep>
FS_INLINE Span filter(const float* x, int n, float* to, Keep keep) {
  Span kept = {to, 0, 0, 0};
  vf low = splat(INFINITY), high = splat(-INFINITY);
  const auto take = [&](int i, Mask valid) {
    const vf v = load(x + i);
    const Mask m = both(valid, keep(v));
    low = select(m, min(low, v), low);
    high = select(m, max(high, v), high);
    kept.n += compress_store(to + kept.n, v, m);
  };
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) take(i, from_bits(kAllLanes));
  if (i < n) take(i, first(n - i));
  fill_up(to, kept.n);
  kept.low = reduce_min(low);
  kept.high = reduce_max(high);
  return kept;
}

FS_INLINE uint64_t count_equal(const float* x, int n, float value) {
  uint64_t equal = 0;
  for (int i = 0; i < n; i += kLanes) {
    equal += (uint64_t)count(both(first(n - i), eq(load(x + i), splat(value))));
  }
  return equal;
}

// n values where they are, filled up already.
FS_INLINE Span span_of(float* x, int n) {
  vf low = splat(INFINITY), high = splat(-INFINITY);
  for (int i = 0; i < n; i += kLanes) {
    const vf v = load(x + i);
    low = min(low, select(first(n - i), v, low));
    high = max(high, v);
  }
  return Span{x, n, reduce_min(low), reduce_max(high)};
}

FS_INLINE Span copy(const float* x, int n, float* to) {
  return filter(x, n, to, [](vf v) { return gt(v, splat(-INFINITY)); });
}

struct Boundary {
  float x;
  int equal;       // values of the span that equal x
  uint64_t above;  // weight strictly above x: below the target
};

FS_INLINE float middle_key(float low, float high) {
  return from_key((int32_t)(((int64_t)key_of(low) + key_of(high)) >> 1));
}

// A value from low to just below high, of which about `share` of the range lies above.
FS_INLINE float value_below(float low, float high, double share) {
  const float x = (float)((double)high - share * ((double)high - (double)low));
  return low <= x && x < high ? x : share < 0.5 ? nextafterf(high, low) : low;
}

// The value at which `above` plus the weight of s, from its highest value down, reaches `target`,
// or the lowest value where it never does. To halve the range of values leaves few of them soon.
// Where the weight is spread evenly over the range (`even`), as in an estimated bracket, pivots
// just below and just above the expected place leave fewer. Every third time the range of keys is
// halved, which bounds the rounds by 96 whatever the values are. s stays as it is where `to` is
// another buffer.
template <class Weight>
Boundary narrow(const Weight& weight, Span s, uint64_t above, uint64_t target, float* to,
                bool even = false) {
  // Nothing at all has no middle.
  double inside = even && s.n ? s.n * (double)weight.one(value_below(s.low, s.high, 0.5)) : 0;
  for (int round = 0; key_of(s.low) < key_of(s.high); ++round) {
    double share = 0.5;
    if (inside > 0) {
      // Beyond the expected place, on the side that leaves less if it is the right one.
      share = (double)(target - above) / inside;
      share += (share > 0.5 ? -1.5 : 1.5) / sqrt((double)s.n);
    }
    const float pivot =
        round % 3 == 2 ? middle_key(s.low, s.high) : value_below(s.low, s.high, share);
    const uint64_t upper = weight_above(weight, s, pivot);
    if (above + upper >= target) {
      s = filter(s.x, s.n, to, [&](vf v) { return gt(v, splat(pivot)); });
      if (even) inside = (double)upper;
    } else {
      above += upper;
      s = filter(s.x, s.n, to, [&](vf v) { return ge(splat(pivot), v); });
      inside -= (double)upper;
    }
  }
  return Boundary{s.high, s.n, above};
}

// The weight from the boundary up.
template <class Weight>
FS_INLINE uint64_t reached(const Weight& weight, const Boundary& edge) {
  return edge.above + (edge.equal ? edge.equal * weight.one(edge.x) : 0);
}

// How many of the values equal to the boundary the target needs.
template <class Weight>
FS_INLINE uint64_t ties_needed(const Weight& weight, const Boundary& edge, uint64_t target) {
  const uint64_t each = weight.one(edge.x);
  return (target - edge.above + each - 1) / each;
}

}  // namespace
}  // namespace fastsample

// Stage 7: the cutoffs of top-k and top-p, found by narrowing a set of candidate values.
#pragma once

#include "core/filters.h"
#include "cpu/mass.h"
#include "cpu/process.h"

namespace fastsample {
namespace {

// A domain is a set of tokens in id order, in blocks of kBlock: a whole row, or a list gathered from it.
template <class T>
struct Dense {
  Row<T> row;
  const float* block_max;
};

struct List {
  const float* x;     // [n + kPad], -inf past n
  const int32_t* id;  // [n + kPad], ascending
  int32_t n;
};

template <class T>
FS_INLINE int blocks(const Dense<T>& d) {
  return d.row.blocks;
}
template <class T>
FS_INLINE float upper_bound(const Dense<T>& d, int b) {
  return d.block_max[b];
}
template <class T>
FS_INLINE const float* values(const Dense<T>& d, int b, float* buffer) {
  return block(d.row, b, buffer);
}
template <class T>
FS_INLINE vi ids(const Dense<T>&, int b, int i) {
  return iota() + (b * kBlock + i);
}

FS_INLINE int blocks(const List& l) { return (l.n + kBlock - 1) / kBlock; }
FS_INLINE float upper_bound(const List&, int) { return INFINITY; }
FS_INLINE const float* values(const List& l, int b, float*) { return l.x + b * kBlock; }
FS_INLINE vi ids(const List& l, int b, int i) { return load(l.id + b * kBlock + i); }

FS_INLINE Mask keeps(Cutoff c, vf x, vi id) {
  return either(gt(x, splat(c.x)), both(eq(x, splat(c.x)), le(id, splat(c.id))));
}

constexpr Cutoff kKeepAlive = {-FLT_MAX, INT32_MAX};  // everything above -inf

// Weights of values: one each, or their mass. A `Sum` holds at most kBlock of them.
struct Counting {
  struct Sum {
    vu lanes = {};
  };
  void add(Sum& s, Mask where, vf) const {
    s.lanes = add_where(where, s.lanes, (vu)splat(1));
  }
  uint64_t total(const Sum& s) const { return reduce_add(s.lanes); }
  uint64_t one(float) const { return 1; }
};

struct Weighing {
  Weigher weigher;
  typedef MassSum Sum;
  void add(Sum& s, Mask where, vf x) const { add_where(s, where, weigh(weigher, x)); }
  uint64_t total(const Sum& s) const { return fastsample::total(s); }
  uint64_t one(float x) const { return weigh(weigher, x); }
};

// Calls f(i, valid lanes) for each vector of n values.
template <class F>
FS_INLINE void each_vector(int begin, int end, F f) {
  int i = begin;
  for (; i + kLanes <= end; i += kLanes) f(i, from_bits(kAllLanes));
  if (i < end) f(i, from_bits((1u << (end - i)) - 1));
}

template <class Weight>
uint64_t weight_above(const Weight& weight, const float* x, int n, float pivot) {
  uint64_t sum = 0;
  for (int begin = 0; begin < n; begin += kBlock) {
    typename Weight::Sum part;
    each_vector(begin, begin + kBlock < n ? begin + kBlock : n, [&](int i, Mask valid) {
      const vf v = load(x + i);
      weight.add(part, both(valid, gt(v, splat(pivot))), v);
    });
    sum += weight.total(part);
  }
  return sum;
}

struct Span {
  float* x;
  int n;
  float low, high;  // of the values, when n > 0
};

// Keeps the values above (or not above) the pivot, in place, and their range.
FS_INLINE void partition(Span& s, float pivot, bool above) {
  vf low = splat(INFINITY), high = splat(-INFINITY);
  int kept = 0;
  each_vector(0, s.n, [&](int i, Mask valid) {
    const vf v = load(s.x + i);
    const Mask up = gt(v, splat(pivot));
    const Mask m = above ? both(valid, up) : from_bits(bits(valid) & ~bits(up));
    low = select(m, min(low, v), low);
    high = select(m, max(high, v), high);
    kept += compress_store(s.x + kept, v, m);
  });
  s.n = kept;
  s.low = reduce_min(low);
  s.high = reduce_max(high);
}

// Order-preserving integers: -0.0 and +0.0 share key 0, and no key between two finite floats is a NaN.
FS_INLINE int64_t key_of(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits < 0 ? -(int64_t)(bits & INT32_MAX) : bits;
}

FS_INLINE float from_key(int64_t key) {
  const uint32_t bits = key < 0 ? 0x80000000u | (uint32_t)-key : (uint32_t)key;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Where a running weight over descending values reaches a target.
struct Boundary {
  float x;
  uint64_t above;  // weight strictly above x: below the target
};

// The value at which `above` plus the weight of `s`, from its highest value down, reaches `target`; the values must
// suffice. Halving the range of keys bounds the rounds by 32 whatever the values are. Reorders s.
template <class Weight>
Boundary narrow(const Weight& weight, Span s, uint64_t above, uint64_t target) {
  while (key_of(s.low) < key_of(s.high)) {
    const float pivot = from_key((key_of(s.low) + key_of(s.high)) >> 1);
    const uint64_t upper = weight_above(weight, s.x, s.n, pivot);
    const bool in_upper = above + upper >= target;
    if (!in_upper) above += upper;
    partition(s, pivot, in_upper);
  }
  return Boundary{s.high, above};
}

// The values of a domain above a bound.
template <class Domain>
Span collect(const Domain& d, float bound, float* to) {
  float buffer[kBlock];
  Span s = {to, 0, 0, 0};
  vf low = splat(INFINITY), high = splat(-INFINITY);
  for (int b = 0; b < blocks(d); ++b) {
    if (!(upper_bound(d, b) > bound)) continue;
    const float* x = values(d, b, buffer);
    for (int i = 0; i < kBlock; i += kLanes) {
      const vf v = load(x + i);
      const Mask m = gt(v, splat(bound));
      low = select(m, min(low, v), low);
      high = select(m, max(high, v), high);
      s.n += compress_store(to + s.n, v, m);
    }
  }
  s.low = reduce_min(low);
  s.high = reduce_max(high);
  return s;
}

// The id of the m-th token (from 1) whose logit equals x, in id order; INT32_MAX where there are fewer.
template <class Domain>
int32_t nth_equal(const Domain& d, float x, uint64_t m) {
  float buffer[kBlock];
  for (int b = 0; b < blocks(d); ++b) {
    if (!(upper_bound(d, b) >= x)) continue;
    const float* v = values(d, b, buffer);
    for (int i = 0; i < kBlock; i += kLanes) {
      uint32_t equal = bits(eq(load(v + i), splat(x)));
      const uint64_t here = (uint64_t)__builtin_popcount(equal);
      if (here < m) {
        m -= here;
        continue;
      }
      for (; m > 1; --m) equal &= equal - 1;
      return ids(d, b, i)[__builtin_ctz(equal)];
    }
  }
  return INT32_MAX;
}

// A value that at least k tokens of the row are not below: the k-th largest block maximum. -inf where k is too large.
template <class T>
float kth_bound(const Dense<T>& d, int k, float* scratch) {
  if (k > d.row.blocks) return -INFINITY;
  Span s = {scratch, d.row.blocks, 0, 0};
  memcpy(scratch, d.block_max, (size_t)s.n * sizeof(float));
  partition(s, -INFINITY, true);
  return s.n < k ? -INFINITY : narrow(Counting{}, s, 0, (uint64_t)k).x;
}

FS_INLINE float kth_bound(const List&, int, float*) { return -INFINITY; }

template <class Domain>
Cutoff top_k_cutoff(const Domain& d, int32_t k, int32_t ties, float* scratch) {
  const float bound = kth_bound(d, k, scratch);
  const Span s = collect(d, bound, scratch);
  Boundary edge = {bound, (uint64_t)s.n};  // where too few lie above the bound, the k-th equals it
  if (s.n >= k) {
    edge = narrow(Counting{}, s, 0, (uint64_t)k);
  } else if (bound == -INFINITY) {
    return kKeepAlive;
  }
  if (ties == kTiesAll) return Cutoff{edge.x, INT32_MAX};
  return Cutoff{edge.x, nth_equal(d, edge.x, (uint64_t)k - edge.above)};
}

// Sum of the masses a cutoff keeps, block by block (0 for skipped blocks).
template <class Domain>
uint64_t weigh_blocks(const Domain& d, Cutoff cut, const Weigher& weigher, uint64_t* block_mass) {
  float buffer[kBlock];
  uint64_t sum = 0;
  for (int b = 0; b < blocks(d); ++b) {
    block_mass[b] = 0;
    if (!(upper_bound(d, b) >= cut.x)) continue;
    const float* x = values(d, b, buffer);
    MassSum part;
    for (int i = 0; i < kBlock; i += kLanes) {
      const vf v = load(x + i);
      add_where(part, keeps(cut, v, ids(d, b, i)), weigh(weigher, v));
    }
    block_mass[b] = total(part);
    sum += block_mass[b];
  }
  return sum;
}

// top-p over the whole domain; `weigher.floor` leaves out what min-p dropped before.
template <class Domain>
Cutoff top_p_cutoff(const Domain& d, const Weigher& weigher, float top_p, const Workspace& ws) {
  const uint64_t total = weigh_blocks(d, kKeepAlive, weigher, ws.block_mass);
  const uint64_t target = top_p_target(top_p, total);
  // Only tokens with mass can reach the target.
  const float bound = lowest_x(weigher, weigher.floor ? weigher.floor : 1);
  const Span s = collect(d, bound > -FLT_MAX ? nextafterf(bound, -INFINITY) : -INFINITY, ws.values);
  const Boundary edge = narrow(Weighing{weigher}, s, 0, target);
  const uint64_t each = weigh(weigher, edge.x);
  return Cutoff{edge.x, nth_equal(d, edge.x, (target - edge.above + each - 1) / each)};
}

// The tokens a cutoff keeps, in id order.
template <class Domain>
List gather(const Domain& d, Cutoff cut, float* x, int32_t* id) {
  float buffer[kBlock];
  int n = 0;
  for (int b = 0; b < blocks(d); ++b) {
    if (!(upper_bound(d, b) >= cut.x)) continue;
    const float* v = values(d, b, buffer);
    for (int i = 0; i < kBlock; i += kLanes) {
      const vf value = load(v + i);
      const vi token = ids(d, b, i);
      const Mask m = keeps(cut, value, token);
      compress_store(id + n, token, m);
      n += compress_store(x + n, value, m);
    }
  }
  for (int i = 0; i < kPad; ++i) {
    x[n + i] = -INFINITY;
    id[n + i] = INT32_MAX;
  }
  return List{x, id, n};
}

}  // namespace
}  // namespace fastsample

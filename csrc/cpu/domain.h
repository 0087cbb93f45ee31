// What the filters and the draw run over: a whole row, or a list of tokens gathered from it.
#pragma once

#include <type_traits>

#include "cpu/moments.h"
#include "cpu/plan.h"
#include "cpu/process.h"
#include "cpu/select.h"

namespace fastsample {
namespace {

// A domain is a set of tokens in id order, in blocks of kBlock: a whole row, or a list gathered
// from it.
template <class T>
struct Dense {
  Row<T> row;
  const float* block_max;
  bool near;  // whether no 16-bit value that nothing changes has a y below kLowestY
  Deviation spread = kAnyDeviation;
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

template <class T>
FS_INLINE int32_t id_at(const Dense<T>&, int b, int i) {
  return b * kBlock + i;
}

// Whether values are near enough to the maximum to need no clamp; a type of its own for each, as
// the code differs.
typedef std::true_type Near;
typedef std::false_type Anywhere;

// f(values of block b, how near they are), in the logits' own type where nothing changes them.
template <class T, class F>
FS_INLINE void with_values(const Dense<T>& d, int b, F f) {
  if constexpr (sizeof(T) < sizeof(float) && kCompresses) {
    const T* x = d.row.logits + b * kBlock;
    if (is_clean(d.row, b)) return d.near ? f(x, Near()) : f(x, Anywhere());
  }
  float buffer[kBlock];
  f(values(d, b, buffer), Anywhere());
}
template <class F>
FS_INLINE void with_values(const List& l, int b, F f) {
  f(l.x + b * kBlock, Anywhere());
}

// Copies the kRun values of block b from place i on, without its edits, and without making the rest
// of the block; writes whole vectors.
template <int kRun, class T>
FS_INLINE void copy_run(const Dense<T>& d, int b, int i, float* to) {
  const int32_t id = b * kBlock + i;
  if (!d.row.mask && id + (kRun > kLanes ? kRun : kLanes) <= d.row.vocab) {
    for (int j = 0; j < kRun; j += kLanes) store(to + j, load(d.row.logits + id + j));
    return;
  }
  for (int j = 0; j < kRun; ++j) {
    to[j] = id + j < d.row.vocab ? allowed_logit(d.row, id + j) : -INFINITY;
  }
}
template <int kRun>
FS_INLINE void copy_run(const List& l, int b, int i, float* to) {
  memcpy(to, l.x + b * kBlock + i, kRun * sizeof *to);
}
template <class T, class F>
FS_INLINE void each_edit(const Dense<T>& d, int b, F f) {
  each_edit(d.row, b, f);
}
template <class F>
FS_INLINE void each_edit(const List&, int, F) {}  // its values hold them

// Blocks stand in groups of kGroup.
template <class Domain>
FS_INLINE int groups(const Domain& d) {
  return (blocks(d) + kGroup - 1) / kGroup;
}
template <class Domain>
FS_INLINE int group_end(const Domain& d, int g) {
  return (g + 1) * kGroup < blocks(d) ? (g + 1) * kGroup : blocks(d);
}

FS_INLINE int blocks(const List& l) { return (l.n + kBlock - 1) / kBlock; }
FS_INLINE float upper_bound(const List&, int) { return INFINITY; }
FS_INLINE const float* values(const List& l, int b, float*) { return l.x + b * kBlock; }
FS_INLINE vi ids(const List& l, int b, int i) { return load(l.id + b * kBlock + i); }
FS_INLINE int32_t id_at(const List& l, int b, int i) { return l.id[b * kBlock + i]; }

// While a row's masses keep the arithmetic busy, the next row can come from memory.
template <class T>
FS_INLINE void fetch_ahead(const Dense<T>&, int b, const Workspace& ws) {
  if (ws.ahead) prefetch_block((const T*)ws.ahead + b * kBlock);
}
FS_INLINE void fetch_ahead(const List&, int, const Workspace&) {}

// Values as floats, for the arithmetic of masses.
template <class T>
FS_INLINE const float* unpack(const T* x, int n, float* buffer) {
  // By blocks, which are unrolled: the end of a loop of 128 turns is mispredicted.
  for (int i = 0; i < n; i += kBlock) {
    _Pragma("GCC unroll 16") for (int j = 0; j < kBlock; j += kLanes) {
      store(buffer + i + j, load(x + i + j));
    }
  }
  return buffer;
}

// Whether values are unpacked before the arithmetic rather than amid it.
template <class T>
constexpr bool kUnpacksBefore = sizeof(T) < sizeof(float) && !kCompresses;

// The values of blocks begin to end - 1, one behind the other.
template <class T>
struct Run {
  int begin, end;
  const T* x;
};
template <class T>
Run(int, int, const T*) -> Run<T>;

// f(run, how near its values are) for the blocks of group g for which want(b) holds: for all at
// once where nothing changes them.
template <class T, class Want, class F>
FS_INLINE void each_run(const Dense<T>& d, int g, Want want, F f) {
  const int begin = g * kGroup, end = group_end(d, g);
  alignas(FASTSAMPLE_VECTOR_BYTES) float buffer[kGroup * kBlock];
  const auto pass = [&](int from, int to, const auto* x, auto near) __attribute__((always_inline)) {
    if constexpr (kUnpacksBefore<std::decay_t<decltype(*x)>>) {
      f(Run{from, to, unpack(x, (to - from) * kBlock, buffer)}, near);
    } else {
      f(Run{from, to, x}, near);
    }
  };
  bool whole = true;
  for (int b = begin; b < end; ++b) whole = whole && want(b) && is_clean(d.row, b);
  if (whole) {
    const T* x = d.row.logits + begin * kBlock;
    if constexpr (sizeof(T) < sizeof(float)) {
      if (d.near) return pass(begin, end, x, Near());
    }
    return pass(begin, end, x, Anywhere());
  }
  for (int b = begin; b < end; ++b) {
    if (!want(b)) continue;
    with_values(d, b, [&](const auto* x, auto near) { pass(b, b + 1, x, near); });
  }
}
template <class Want, class F>
FS_INLINE void each_run(const List& l, int g, Want, F f) {
  f(Run{g * kGroup, group_end(l, g), l.x + g * kGroup * kBlock}, Anywhere());
}

// Every token above -inf, which for logits is all that may be kept.
FS_INLINE Kept<float> everything() { return all_between(INFINITY, -FLT_MAX); }

// What may be kept at all.
template <class W>
FS_INLINE Kept<float> alive(const W&) {
  return all_between(INFINITY, W::kLowestAlive);
}

// All tokens of this logit or a higher one.
FS_INLINE Kept<float> keep_from(float x) {
  return narrow_above(everything(), Place<float>{x, INT32_MAX});
}

// A kept set's interval, less the tokens that are certainly too light for its floor.
template <class W>
FS_INLINE Kept<float> within_reach(Kept<float> kept, const W& weigher) {
  if (!kept.floor) return kept;
  return narrow_above(kept, Place<float>{weigher.judge().lowest(kept.floor), INT32_MAX});
}

// Which tokens rank at a place or before it.
FS_INLINE Mask ranks_until(Place<float> place, vf x, vi id) {
  return either(gt(x, splat(place.x)), both(eq(x, splat(place.x)), le(id, splat(place.id))));
}

FS_INLINE Mask ranks_within(const Kept<float>& kept, vf x, vi id) {
  const Mask until_low = ranks_until(kept.low, x, id);
  if (kept.high.x == INFINITY) return until_low;
  return but_not(until_low, ranks_until(kept.high, x, id));
}

// Whether a token of block b may rank within the interval.
template <class Domain>
FS_INLINE bool may_keep(const Domain& d, int b, const Kept<float>& kept) {
  return !ranks_before(kept.low, Place<float>{upper_bound(d, b), id_at(d, b, 0)});
}

// The values x of a domain with low < x < high.
template <class Domain>
Span collect(const Domain& d, float low, float high, float* to) {
  float buffer[kBlock];
  int n = 0;
  for (int b = 0; b < blocks(d); ++b) {
    if (!(upper_bound(d, b) > low)) continue;
    const float* x = values(d, b, buffer);
    n += append(
        x, block_bits(x, [&](vf v, int) { return both(gt(v, splat(low)), gt(splat(high), v)); }),
        to + n);
  }
  return copy(to, n, to);
}

// The id of the m-th token (from 1) whose logit equals x, in id order from a block on; INT32_MAX
// where there are fewer.
template <class Domain>
int32_t nth_equal(const Domain& d, float x, uint64_t m, int from = 0) {
  float buffer[kBlock];
  for (int b = from; b < blocks(d); ++b) {
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

// The place of the last of the first m tokens at x, of `equal` ones; all that equal x where m of
// them are all.
template <class Domain>
Place<float> place_of(const Domain& d, float x, uint64_t m, int equal) {
  return Place<float>{x, m == (uint64_t)equal ? INT32_MAX : nth_equal(d, x, m)};
}

// The first n tokens of a pair of buffers as a domain.
FS_INLINE List list_of(float* x, int32_t* id, int n) {
  fill_up(x, n);
  for (int i = 0; i < kPad; i += kLanes) store(id + n + i, splat(INT32_MAX));
  return List{x, id, n};
}

// Which of block b's values rank within the interval. What ranks above it is taken out afterwards,
// so that the usual case costs nothing more.
template <class Domain, class T>
FS_INLINE BlockBits bits_within(const Domain& d, int b, const T* x, const Kept<float>& kept) {
  const auto until = [&](Place<float> place) __attribute__((always_inline)) {
    return block_bits(x, [&](vf v, int i) { return ranks_until(place, v, ids(d, b, i)); });
  };
  BlockBits set = kept.low.id == INT32_MAX ? bits_at_least(x, kept.low.x) : until(kept.low);
  if (__builtin_expect(kept.high.x < INFINITY, false)) {
    const BlockBits above = until(kept.high);
    for (int k = 0; k < kBlock / 64; ++k) set.word[k] &= ~above.word[k];
  }
  return set;
}

// The tokens that rank within the interval, in id order. x and id may be the domain's own.
template <class Domain>
List gather(const Domain& d, const Kept<float>& kept, float* x, int32_t* id) {
  const Kept<float> within = kept;  // of its own: to the compiler, a store might change it
  int n = 0;
  for (int b = 0; b < blocks(d); ++b) {
    if (!may_keep(d, b, within)) continue;
    with_values(d, b, [&](const auto* v, auto) __attribute__((always_inline)) {
      const BlockBits set = bits_within(d, b, v, within);
      each_set(
          set, &n,
          [&](int to, const int (&at)[kGuess]) {  // reads, then writes
            const Four value = values_at(v, at);
            int32_t token[kGuess];
            FS_EACH(kGuess) token[u] = id_at(d, b, at[u]);
            memcpy(x + to, &value, sizeof value);
            memcpy(id + to, token, sizeof token);
          },
          [&](int to, int i, Mask m) {
            const vf value = load(v + i);
            compress_store(id + to, ids(d, b, i), m);
            compress_store(x + to, value, m);
          });
    });
  }
  return list_of(x, id, n);
}

// Adds the mass of a block's values.
template <class Weight, class T>
FS_INLINE void add_whole(const Weight& weight, const T* x, bool near, MassSum& sum) {
  const auto every = [](vf, int) { return from_bits(kAllLanes); };
  add_kept(weight, x, kBlock, every, sum, near);
}

// Adds the mass of what is kept of block b.
template <class Domain, class Weight>
FS_INLINE void add_block(const Domain& d, int b, const Kept<float>& kept, const Weight& weight,
                         float lowest, MassSum& sum) {
  if (!may_keep(d, b, kept) || upper_bound(d, b) < lowest) return;
  const Bounds bounds = bounds_of(kept);
  if (bounds == kUnbounded) {
    with_values(d, b, [&](const auto* x, auto near) { add_whole(weight, x, near, sum); });
  } else if (bounds == kByValue) {
    const auto above = [&](vf v, int) { return ge(v, splat(kept.low.x)); };
    with_values(d, b,
                [&](const auto* x, auto near) { add_kept(weight, x, kBlock, above, sum, near); });
  } else {
    float buffer[kBlock];
    const auto within = [&](vf v, int i) { return ranks_within(kept, v, ids(d, b, i)); };
    add_kept(weight, values(d, b, buffer), kBlock, within, sum);
  }
}

// The mass of each token of block b, whose values are x; 0 where it is not kept.
template <class Domain, class Weight>
FS_INLINE void weigh_each(const Domain& d, int b, const float* x, const Kept<float>& kept,
                          const Weight& weight, uint64_t* mass) {
  uint32_t hi[kBlock], lo[kBlock];
  for (int i = 0; i < kBlock; i += kAbreast * kLanes) {
    const auto p = load_pack<kAbreast>(x + i);
    Where<kAbreast> where;
    FS_EACH(kAbreast) where.m[u] = ranks_within(kept, p.v[u], ids(d, b, i + u * kLanes));
    const auto q = weight.of(p, where);
    FS_EACH(kAbreast) {
      const Halves w = to_fixed(q.v[u]);
      store(hi + i + u * kLanes, w.hi);
      store(lo + i + u * kLanes, w.lo);
    }
  }
  for (int i = 0; i < kBlock; ++i) mass[i] = ((uint64_t)hi[i] << kHalfBits) + lo[i];
}

// The mass of what is kept, in all and in each group, which `group_mass` gets.
template <class Domain, class W>
uint64_t weigh_groups(const Domain& d, const Kept<float>& kept, const W& weigher,
                      const Workspace& ws, uint64_t* group_mass) {
  const Weighing weight(weigher, kept.floor);
  const float lowest = weight.lowest();
  const bool all = bounds_of(kept, W::kLowestAlive) == kUnbounded;
  uint64_t total = 0;
  for (int g = 0; g < groups(d); ++g) {
    MassSum sum;
    if (all) {
      const auto has_mass = [&](int b) { return upper_bound(d, b) >= lowest; };
      each_run(d, g, has_mass, [&](auto run, auto near) {
        for (int b = run.begin; b < run.end; ++b) {
          fetch_ahead(d, b, ws);
          add_whole(weight, run.x + (b - run.begin) * kBlock, near, sum);
        }
      });
    } else {
      for (int b = g * kGroup; b < group_end(d, g); ++b) {
        fetch_ahead(d, b, ws);
        add_block(d, b, kept, weight, lowest, sum);
      }
    }
    group_mass[g] = weight.total(sum);
    total += group_mass[g];
  }
  return total;
}

template <class Domain, class W>
uint64_t weigh_groups(const Domain& d, const Kept<float>& kept, const W& weigher,
                      const Workspace& ws) {
  return weigh_groups(d, kept, weigher, ws, ws.group_mass);
}

}  // namespace
}  // namespace fastsample

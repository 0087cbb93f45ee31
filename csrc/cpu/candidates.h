// A floor of the mass alone: the few candidates are copied, and only they are weighed. They are
// copied once the maximum is known; those of crowded float32 rows already in the streaming pass:
// what lies too far below the maximum so far lies too far below the row's.
#pragma once

#include <type_traits>

#include "cpu/top_p.h"

namespace fastsample {
namespace {

// What is copied of a row: values, or pairs of 16-bit values one of which is a candidate.
template <class T>
struct Candidates {
  typedef std::conditional_t<kCompresses, T, float> Value;
  typedef std::conditional_t<sizeof(Value) < sizeof(float), AtLeast<Value>, float> Edge;

  const Value* x;
  int n;
};

FS_INLINE float* copy_candidates(float* to, const vf (&v)[kStreams], float edge) {
  return append_at_least(to, v, splat(edge));
}

template <class T>
FS_INLINE float* copy_candidates(float* to, const vf (&v)[kStreams], AtLeast<T> edge) {
  for (int u = 0; u < kStreams; u += 2) {
    to += copy_pairs(to, bits_of_pair(T{}, v[u], v[u + 1]), edge);
  }
  return to;
}

// Copies the candidates of a block; returns their end.
template <class T, class Edge>
FS_INLINE float* copy_block(float* to, const T* x, Edge edge) {
  if constexpr (sizeof(T) < sizeof(float) && kCompresses) {
    for (int i = 0; i < kBlock; i += 2 * kLanes) to += copy_pairs(to, load_as<vs>(x + i), edge);
  } else {
    for (int i = 0; i < kBlock; i += kStreams * kLanes) {
      vf v[kStreams];
      for (int u = 0; u < kStreams; u += 2) load_pair(x + i + u * kLanes, v[u], v[u + 1]);
      to = copy_candidates(to, v, edge);
    }
  }
  return to;
}

// Watches the streaming pass over float32 values and copies what is a candidate so far; a group's
// values are in no order.
struct Watcher {
  static constexpr bool kSeesNarrow = false;

  Reach reach;
  float* values;
  int32_t* segment;  // group g's candidates begin at values[segment[g]]
  float* next = values;
  float max = -INFINITY, lowest = -FLT_MAX;

  FS_MEMBER void see(const vf (&v)[kStreams]) { next = copy_candidates(next, v, lowest); }
  FS_MEMBER void end(int b, float block_max) {
    if (block_max > max) {
      max = block_max;
      lowest = reach.below(max);
      if (!(lowest >= -FLT_MAX)) lowest = -FLT_MAX;
    }
    segment[b / kGroup + 1] = (int32_t)(next - values);
  }
};

// Whether a group has a token that is not below x. The maxima past the row's last block are -inf.
template <class T>
FS_INLINE bool reaches(const Dense<T>& d, int g, float x) {
  Mask blocks = from_bits(0);
  for (int i = 0; i < kGroup; i += kLanes) {
    const Mask m = ge(load(d.block_max + g * kGroup + i), splat(x));
    blocks = either(blocks, both(first(kGroup - i), m));
  }
  return any(blocks);
}

// A group's candidates, copied to `to`.
template <class T>
FS_INLINE Candidates<T> pick(const Dense<T>& d, int g, typename Candidates<T>::Edge edge,
                             float lowest, float* to, const Workspace& ws) {
  typedef typename Candidates<T>::Value Value;
  float buffer[kBlock];
  float* next = to;
  for (int b = g * kGroup; b < group_end(d, g); ++b) {
    if (!(upper_bound(d, b) >= lowest)) continue;
    constexpr int kSoon = 8;  // blocks
    fetch_ahead(d, b, ws);
    const T* x = d.row.logits + b * kBlock;
    prefetch_block(x + kSoon * kBlock);
    next = is_clean(d.row, b) ? copy_block(next, x, edge)
                              : copy_block(next, values(d, b, buffer), edge);
  }
  return {(const Value*)to, (int)((next - to) * (sizeof(float) / sizeof(Value)))};
}

// Weighs tokens and counts those that have a mass.
struct CountedWeighing : Weighing<LogitWeigher> {
  int32_t& tokens;

  CountedWeighing(const LogitWeigher& w, uint64_t floor, int32_t& n)
      : Weighing(w, floor), tokens(n) {}

  struct Sum {
    MassSum mass;
    vu tokens = {};
  };

  template <int N>
  FS_MEMBER void add(Sum& s, const Pack<N>& q) const {
    fastsample::add(s.mass, q);
    FS_EACH(N) s.tokens = add_where(gt(q.v[u], splat(0.0f)), s.tokens, (vu)splat(1));
  }
  FS_MEMBER uint64_t total(const Sum& s) const {
    tokens += (int32_t)reduce_add(s.tokens);
    return fastsample::total(s.mass);
  }
  FS_MEMBER uint64_t equal(int32_t n, float x) const {
    const uint64_t each = one(x);
    tokens += each ? n : 0;
    return (uint64_t)n * each;
  }
};

// How many blocks have a token that is not below x.
template <class T>
FS_INLINE int count_reached(const Dense<T>& d, float x) {
  int n = 0;  // the maxima past the last are -inf
  for (int b = 0; b < blocks(d); b += kLanes) n += count(ge(load(d.block_max + b), splat(x)));
  return n;
}

// The mass of a row's tokens that are not below a floor, in all and in each group. `watched`: the
// candidates are copied already.
template <class T, class Weight>
uint64_t weigh_candidates(const Dense<T>& d, const Weight& weight, bool watched,
                          const Workspace& ws) {
  const float lowest = weight.lowest();
  uint64_t total = 0;
  const auto weigh = [&](int g, Candidates<T> c) {
    // Rows of equal values, all of which are kept, would take many times as long otherwise.
    ws.group_mass[g] = c.n && all_equal(c.x, c.n)
                           ? weight.equal(c.n, upcast(*c.x))
                           : weigh_some(weight, c.x, c.n, [](vf) { return from_bits(kAllLanes); });
    total += ws.group_mass[g];
  };
  if constexpr (sizeof(T) == sizeof(float)) {
    if (watched) {
      ws.segment[0] = 0;
      for (int g = 0; g < groups(d); ++g) {
        const int begin = ws.segment[g], n = ws.segment[g + 1] - begin;
        weigh(g, {ws.values + begin, reaches(d, g, lowest) ? n : 0});
      }
      return total;
    }
  }
  // A group is weighed after the next is picked: values just stored cannot be loaded at once.
  const auto edge = typename Candidates<T>::Edge(lowest);
  Candidates<T> last = {nullptr, 0};
  for (int g = 0; g < groups(d); ++g) {
    float* to = g % 2 ? ws.spare : ws.values;
    const Candidates<T> next =
        reaches(d, g, lowest) ? pick(d, g, edge, lowest, to, ws) : Candidates<T>{nullptr, 0};
    if (g) weigh(g - 1, last);
    last = next;
  }
  weigh(groups(d) - 1, last);
  return total;
}

}  // namespace
}  // namespace fastsample

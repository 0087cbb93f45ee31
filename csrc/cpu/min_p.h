// min-p alone, in the streaming pass: what lies too far below the maximum so far lies too far below
// the row's.
#pragma once

#include <type_traits>

#include "cpu/top_p.h"

namespace fastsample {
namespace {

// Whether min-p is the only filter.
FS_INLINE bool min_p_alone(const RowParams& p, int32_t vocab) {
  return min_p_threshold(p.min_p) && !is_greedy(p) && !uses_top_k(p, vocab) && !uses_top_p(p);
}

// Watches the streaming pass and copies the candidates, group by group, in no order within a group.
// 16-bit ones are copied in pairs of which either is a candidate.
template <class T>
struct Candidates {
  typedef std::conditional_t<kCompresses, T, float> Value;
  typedef std::conditional_t<sizeof(Value) < sizeof(float), AtLeast<Value>, float> Edge;

  Reach reach;
  float* values;     // as Values
  int32_t* segment;  // group g's candidates begin at Value segment[g]
  float* next = values;
  float max = -INFINITY, lowest = -FLT_MAX;
  Edge edge = Edge(lowest);

  FS_MEMBER void see(const vf (&v)[kStreams]) {
    if constexpr (sizeof(Value) < sizeof(float)) {
      for (int u = 0; u < kStreams; u += 2) {
        next += copy_pairs(next, bits_of_pair(Value{}, v[u], v[u + 1]), edge);
      }
    } else {
      next = append_at_least(next, v, splat(lowest));
    }
  }

  // A block.
  FS_MEMBER void see(const T* x) {
    if constexpr (sizeof(Value) < sizeof(float)) {
      float* to = next;  // to the compiler a store of values might change a member
      for (int i = 0; i < kBlock; i += 2 * kLanes) {
        to += copy_pairs(to, load_as<vs>(x + i), edge);
      }
      next = to;
    } else {
      for (int i = 0; i < kBlock; i += kStreams * kLanes) {
        vf v[kStreams];
        for (int u = 0; u < kStreams; u += 2) load_pair(x + i + u * kLanes, v[u], v[u + 1]);
        see(v);
      }
    }
  }

  FS_MEMBER bool wants(float block_max) const { return block_max >= lowest; }

  FS_MEMBER void end(int b, float block_max) {
    if (block_max > max) {
      max = block_max;
      lowest = reach.below(max);
      if (!(lowest >= -FLT_MAX)) lowest = -FLT_MAX;
      edge = Edge(lowest);
    }
    segment[b / kGroup + 1] = (int32_t)((next - values) * (sizeof(float) / sizeof(Value)));
  }
};

// Whether a group has a token that is not below x; behind the row's last block stands -inf.
template <class T>
FS_INLINE bool reaches(const Dense<T>& d, int g, float x) {
  Mask blocks = from_bits(0);
  for (int i = 0; i < kGroup; i += kLanes) {
    const Mask m = ge(load(d.block_max + g * kGroup + i), splat(x));
    blocks = either(blocks, both(first(kGroup - i), m));
  }
  return any(blocks);
}

// Mass of every group's kept tokens.
template <class T>
Found weigh_candidates(const Dense<T>& d, const Weigher& weigher, const Workspace& ws) {
  const Weighing weight = {weigher, 1.0f};
  const float lowest = weight.lowest();
  Found kept = {kKeepAlive, 0};
  ws.segment[0] = 0;
  for (int g = 0; g < groups(d); ++g) {
    const auto* x = (const typename Candidates<T>::Value*)ws.values + ws.segment[g];
    const int n = reaches(d, g, lowest) ? ws.segment[g + 1] - ws.segment[g] : 0;
    // Rows of equal values, of which min-p keeps all, would stand out by their time.
    ws.group_mass[g] = n && all_equal(x, n)
                           ? (uint64_t)n * weight.one(upcast(*x))
                           : weigh_some(weight, x, n, [](vf) { return from_bits(kAllLanes); });
    kept.total += ws.group_mass[g];
  }
  return kept;
}

}  // namespace
}  // namespace fastsample

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

// Candidates as they are copied, one group's behind the other's, in no order within a group: 16-bit
// ones in pairs of which either is a candidate.
template <class T>
struct Candidates {
  typedef std::conditional_t<kCompresses, T, float> Value;
  typedef std::conditional_t<sizeof(Value) < sizeof(float), AtLeast<Value>, float> Edge;

  float* values;     // as Values
  int32_t* segment;  // group g's candidates begin at Value segment[g]
  float* next = values;

  FS_MEMBER void add(const vf (&v)[kStreams], Edge edge) {
    if constexpr (sizeof(Value) < sizeof(float)) {
      for (int u = 0; u < kStreams; u += 2) {
        next += copy_pairs(next, bits_of_pair(Value{}, v[u], v[u + 1]), edge);
      }
    } else {
      next = append_at_least(next, v, splat(edge));
    }
  }

  // Those of a block.
  template <class U>
  FS_MEMBER void add_block(const U* x, Edge edge) {
    if constexpr (sizeof(U) < sizeof(float) && kCompresses) {
      float* to = next;  // to the compiler a store of values might change a member
      for (int i = 0; i < kBlock; i += 2 * kLanes) {
        to += copy_pairs(to, load_as<vs>(x + i), edge);
      }
      next = to;
    } else {
      for (int i = 0; i < kBlock; i += kStreams * kLanes) {
        vf v[kStreams];
        for (int u = 0; u < kStreams; u += 2) load_pair(x + i + u * kLanes, v[u], v[u + 1]);
        add(v, edge);
      }
    }
  }

  FS_MEMBER void end_block(int b) {
    segment[b / kGroup + 1] = (int32_t)((next - values) * (sizeof(float) / sizeof(Value)));
  }
};

// Watches the streaming pass over float32 values and copies what is a candidate so far.
struct Watcher {
  Reach reach;
  Candidates<float> found;
  float max = -INFINITY, lowest = -FLT_MAX;

  FS_MEMBER void see(const vf (&v)[kStreams]) { found.add(v, lowest); }
  FS_MEMBER void end(int b, float block_max) {
    if (block_max > max) {
      max = block_max;
      lowest = reach.below(max);
      if (!(lowest >= -FLT_MAX)) lowest = -FLT_MAX;
    }
    found.end_block(b);
  }
};

// The same for 16-bit values once the maximum is known: most blocks of theirs need no second look,
// and the first costs half as much.
template <class T>
void find_candidates(const Dense<T>& d, float lowest, const Workspace& ws) {
  Candidates<T> found = {ws.values, ws.segment};
  const auto edge = typename Candidates<T>::Edge(lowest);
  float buffer[kBlock];
  for (int b = 0; b < blocks(d); ++b) {
    if (upper_bound(d, b) >= lowest) {
      fetch_ahead(d, b, ws);
      if (is_clean(d.row, b)) {
        found.add_block(d.row.logits + b * kBlock, edge);
      } else {
        found.add_block(values(d, b, buffer), edge);
      }
    }
    found.end_block(b);
  }
}

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
  if (sizeof(T) < sizeof(float)) find_candidates(d, lowest, ws);
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

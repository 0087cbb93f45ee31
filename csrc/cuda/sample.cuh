// The pipeline for one row, from logits to token, run by a team of blocks; stem of
// csrc/cpu/sample.cc.
//
//   scan      stages 0 to 4; the maximum, its lowest id, and a bound for top-k's cutoff
//   top-k     up to 3 rounds of selection, and a place among equal tokens where not all are kept
//   top-p     likewise, by mass
//   weigh     kept mass of each warp's segment
//   draw      each draw's segment, then its token
//
// Sums and maxima are of integers, so nothing depends on the order of atomics or on how the row
// is cut up.
#pragma once

#include "core/mass.h"
#include "core/philox.h"
#include "cuda/filters.cuh"

namespace fastsample {

// A row's parameters, and its distribution once the scan has found the maximum.
struct RowTask {
  const RowParams* params;
  bool greedy;
  int32_t peak_key;
  int32_t argmax;
  Status status;
  float peak, scale;
  u64 floor;        // min-p's
  int32_t k_bound;  // key that top-k's cutoff cannot lie below
};

constexpr KeyCut kKeepAlive = {kKeyLowest, INT32_MAX};

FS_DEVICE Status status_of(int32_t peak_key) {
  if (peak_key == kKeyNaN) return kNaN;
  if (peak_key == kKeyInfinity) return kPositiveInfinity;
  return peak_key == kKeyMinusInfinity ? kNothingLeft : kValid;
}

FS_DEVICE void set_peak(RowTask& t, long long best) {
  t.peak_key = key_in(best);
  t.argmax = id_in(best);
  t.status = status_of(t.peak_key);
  t.peak = from_key(t.peak_key);
}

FS_DEVICE RowTask make_task(const RowParams& params) {
  RowTask t = {};
  t.params = &params;
  t.greedy = is_greedy(params);
  t.scale = mass_scale(t.greedy ? 1.0f : params.temperature);
  t.floor = t.greedy ? 0 : min_p_threshold(params.min_p);
  return t;
}

FS_DEVICE u64 mass_in(const RowTask& t, float x) { return mass_of(x, t.peak, t.scale); }

FS_DEVICE u64 kept_mass(const RowTask& t, KeyCut cut, int32_t reach, float x, int32_t id) {
  const int32_t key = key_of(x);
  if (key < reach || !keeps(cut, key, id)) return 0;
  const u64 w = mass_in(t, x);
  return w >= t.floor ? w : 0;
}

// Keys below this have no mass that min-p keeps.
FS_DEVICE int32_t reach_of(const RowTask& t, KeyCut cut) {
  const int32_t key = key_reaching(t.floor, t.peak, t.scale);
  return key > cut.key ? key : cut.key;
}

struct Lower {
  FS_METHOD int32_t operator()(int32_t a, int32_t b) const { return a < b ? a : b; }
};

// The first pass over the row: the best (key, lowest id), and the lowest of the warps' and of the
// lanes' maxima.
template <Policy kPolicy, class S>
FS_DEVICE void scan(const Team<kPolicy>& team, const S& slice, int32_t top_k, RowTask& t) {
  int32_t key = kKeyMinusInfinity, at = 0;
  each_first(slice, [&](float x, int32_t id) {
    const int32_t k = x != x ? kKeyNaN : key_of(x);
    if (k > key) {
      key = k;
      at = id;
    }
  });
  // A lane sees ascending ids, so the first of its maxima has the lowest.
  const bool any = slice.begin() + lane() < slice.end();
  long long best = any ? ranked(key, at) : LLONG_MIN;
  best = warp_max(best);
  const int32_t lane_low = warp_reduce(any ? key : INT32_MAX, Lower());
  Shared& own = *team.own;
  if (lane() == 0) {
    own.best[warp()] = best;
    own.lane_low[warp()] = lane_low;
    own.warp_low[warp()] = slice.begin() < slice.end() ? key_in(best) : INT32_MAX;
  }
  __syncthreads();
  const auto reduce = [&](const long long* b, const int32_t* w, const int32_t* l, int n,
                          int32_t& warp_low, int32_t& lane_low) {
    const bool has = lane() < n;
    warp_low = warp_reduce(has ? w[lane()] : INT32_MAX, Lower());
    lane_low = warp_reduce(has ? l[lane()] : INT32_MAX, Lower());
    return warp_max(has ? b[lane()] : LLONG_MIN);
  };
  int32_t low_w, low_l;
  if (warp() == 0) {
    best = reduce(own.best, own.warp_low, own.lane_low, warps(), low_w, low_l);
    if (lane() == 0) {
      team.board()->best[team.rank] = best;
      team.board()->warp_low[team.rank] = low_w;
      team.board()->lane_low[team.rank] = low_l;
    }
  }
  team.sync();
  const Board& board = *team.board();
  best = reduce(board.best, board.warp_low, board.lane_low, team.parts, low_w, low_l);
  set_peak(t, best);
  // At least k tokens reach the lowest of k maxima of disjoint parts of the row.
  const int64_t busy_warps = ceil_div(slice.vectors, slice.per_warp);
  const int64_t rest = slice.vectors - (busy_warps - 1) * slice.per_warp;
  const int64_t busy_lanes = (busy_warps - 1) * 32 + (rest < 32 ? rest : 32);
  t.k_bound = top_k <= busy_warps ? low_w : top_k <= busy_lanes ? low_l : kKeyMinusInfinity;
}

// The id of the nth (from 1) of the tokens with this key.
template <Policy kPolicy, class S>
FS_DEVICE int32_t nth_equal(const Team<kPolicy>& team, const S& slice, int32_t key, u64 nth) {
  const auto equal = [&](float x, int32_t id) -> u64 {
    return key_of(x) == key && id >= 0 && id < slice.vocab;
  };
  sum_segments(team, slice, equal);
  locate(team, slice, nth - 1, equal, [&](int32_t id) { team.board()->id = id; });
  team.sync();
  return team.board()->id;
}

template <class S>
FS_DEVICE int low_bits(const S& slice) {
  return slice.overlay && slice.overlay->edited ? 0 : S::kUnusedBits;
}

// The first n tokens of the rank order, or with `all` everything that equals the last of them.
template <Policy kPolicy, class S, class Counts>
FS_DEVICE KeyCut top_k_cut(const Team<kPolicy>& team, const S& slice, int32_t low, int32_t high,
                           u64 n, bool all, Counts counts) {
  const Bracket b =
      select<false>(team, slice, low, high, low_bits(slice), counts, [n](u64) { return n; });
  if (b.low <= kKeyMinusInfinity) return kKeepAlive;
  if (all || b.reached == n) return KeyCut{b.low, INT32_MAX};
  return KeyCut{b.low, nth_equal(team, slice, b.low, n - b.above)};
}

// The shortest prefix of the base set, which is what `base` and `floor` keep, with enough mass.
template <Policy kPolicy, class S>
FS_DEVICE KeyCut top_p_cut(const Team<kPolicy>& team, const S& slice, const RowTask& t, KeyCut base,
                           u64 floor) {
  // All tokens that weigh less than this together weigh less than what top-p leaves out.
  const u64 p30 = (u64)(t.params->top_p * 0x1p30f);
  const u64 light = ((((u64)1 << 30) - p30) << 10) / (u64)slice.vocab;
  const int32_t low = key_reaching(light > floor ? light : floor, t.peak, t.scale);
  const auto weight = [&](float x, int32_t key, int32_t id) -> u64 {
    if (!keeps(base, key, id)) return 0;
    const u64 w = mass_in(t, x);
    return w >= floor ? w : 0;
  };
  const float top_p = t.params->top_p;
  const auto target_of = [top_p](u64 total) -> u64 { return top_p_target(top_p, total); };
  const Bracket b = select<true>(team, slice, low > base.key ? low : base.key, t.peak_key,
                                 low_bits(slice), weight, target_of);
  const u64 w = mass_in(t, from_key(b.low));
  const u64 nth = (target_of(b.total) - b.above + w - 1) / w;
  if (b.above + nth * w >= b.reached) return KeyCut{b.low, INT32_MAX};
  return KeyCut{b.low, nth_equal(team, slice, b.low, nth)};
}

// Stage 7 but for min-p, which every later sum asks of the mass itself.
template <Policy kPolicy, class S>
FS_DEVICE KeyCut find_cut(const Team<kPolicy>& team, const S& slice, const RowTask& t) {
  const RowParams& p = *t.params;
  KeyCut cut = kKeepAlive;
  if (uses_top_k(p, slice.vocab)) {
    const auto one = [](float, int32_t, int32_t) -> u64 { return 1; };
    cut = top_k_cut(team, slice, t.k_bound, t.peak_key, (u64)p.top_k, p.ties == kTiesAll, one);
  }
  if (uses_top_p(p)) {
    const KeyCut base = p.order == kJoint ? kKeepAlive : cut;
    cut = stricter(cut, top_p_cut(team, slice, t, base, p.order == kMinPFirst ? t.floor : 0));
  }
  return cut;
}

// Stage 8.
template <Policy kPolicy, class S>
FS_DEVICE u64 draw(const Batch& batch, int64_t r, const Team<kPolicy>& team, const S& slice,
                   const RowTask& t, KeyCut cut) {
  const int32_t reach = reach_of(t, cut);
  const auto weight = [&](float x, int32_t id) { return kept_mass(t, cut, reach, x, id); };
  const u64 total = sum_segments(team, slice, weight);
  const Outputs& out = batch.out;
  if (!out.tokens) return total;
  // Seed, offset and total are looked up for each draw rather than held in registers all along.
  for (int32_t j = 0; j < out.num_samples; ++j) {
    const uint64_t seed = (uint64_t)at(batch.rows.seeds, r);
    const uint64_t offset = (uint64_t)at(batch.rows.offsets, r);
    const u64 sum = team.own->running[team.parts * warps() - 1];
    locate(team, slice, draw_threshold(seed, offset, (uint32_t)j, sum), weight,
           [&](int32_t id) { store_global(out.tokens + r * out.num_samples + j, (int64_t)id); });
  }
  return total;
}

// Stages 1 to 3. A block's shared memory holds Shared, the slice's logits in the resident case,
// and, where any row may have edits, their table and the marks.
template <class T, Policy kPolicy, bool kResident>
FS_DEVICE void process_row(const Batch& batch, const Workspace& ws, int64_t r, const RowParams& p,
                           const Team<kPolicy>& team, Slice<T, kResident>& slice) {
  slice.held = (Vec16*)(team.own + 1);
  const Bitmask& mask = batch.rows.bitmask;
  if (!mask.data && !has_edits(batch.rows)) return;
  Overlay& overlay = team.own->overlay;
  if (threadIdx.x == 0) {
    overlay = Overlay{mask.data ? mask.data + r * mask.stride : nullptr, mask.words, nullptr, {}};
  }
  __syncthreads();
  slice.overlay = &overlay;
  if (!has_edits(batch.rows)) return;
  Entry* near = (Entry*)(slice.held + (kResident ? warps() * slice.per_warp : 0));
  uint32_t* bitmap = (uint32_t*)((char*)near + kTableBytes);
  if (kPolicy == kBlockPolicy && ws.bitmaps) bitmap = ws.bitmaps + blockIdx.x * ws.bitmap_words;
  const auto sync_team = [&] { team.sync(); };
  apply_edits(batch, r, p, near, bitmap, ws.tables, team.rank, team.parts, sync_team, overlay,
              slice);
}

template <class T, Policy kPolicy>
FS_DEVICE void sample_row(const Batch& batch, const Workspace& ws, int64_t r,
                          const Team<kPolicy>& team) {
  constexpr bool kResident = kPolicy == kClusterPolicy;
  auto slice = make_slice<T, kResident>(batch, r, team.rank, team.parts);
  RowTask t = make_task(at(batch.rows.params, r));
  process_row(batch, ws, r, *t.params, team, slice);
  scan(team, slice, t.params->top_k, t);
  const bool first = team.leads() && threadIdx.x == 0;
  KeyCut cut = {t.peak_key, t.argmax};
  u64 total = kMassUnit;
  if (t.status == kValid && !t.greedy) {
    cut = find_cut(team, slice, t);
    total = draw(batch, r, team, slice, t, cut);
  } else if (batch.out.tokens && team.leads()) {
    const int64_t token = t.status == kValid ? t.argmax : -1;
    for (int32_t j = (int32_t)threadIdx.x; j < batch.out.num_samples; j += (int32_t)blockDim.x) {
      store_global(batch.out.tokens + r * batch.out.num_samples + j, token);
    }
  }
  if (first) {
    store_global(batch.out.status + r, (int32_t)t.status);
    if (ws.states) ws.states[r] = RowState{t.status, t.peak_key, cut, total};
  }
}

// Persistent over rows: team i takes rows i, i + teams, ...
template <class T, Policy kPolicy>
FS_DEVICE void sample_rows(const Batch& batch, const Workspace& ws, int32_t parts) {
  Shared* own = (Shared*)shared_memory();
  Team<kPolicy> team = {own, nullptr, nullptr, 0, parts};
  const uint32_t index = blockIdx.x / (uint32_t)parts, teams = gridDim.x / (uint32_t)parts;
  clear_bins(team);
  if constexpr (kPolicy == kClusterPolicy) {
    team.rank = cluster_rank();
    team.sync();  // the other blocks' shared memory is there from now on
  }
  if constexpr (kPolicy == kGridPolicy) {
    team.rank = (int)(blockIdx.x % (uint32_t)parts);
    team.grid_board = ws.boards + index;
    team.semaphore = ws.semaphores + index;
  }
  for (uint32_t r = index; r < (uint32_t)batch.logits.rows; r += teams) {
    sample_row<T>(batch, ws, r, team);
    team.sync();  // nobody reads this row's shared memory any more
  }
}

template <class T, Policy kPolicy>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    sample_kernel(const __grid_constant__ Batch batch, const __grid_constant__ Workspace ws,
                  int32_t parts) {
  if constexpr (kPolicy != kClusterPolicy || kHasClusters) {
    sample_rows<T, kPolicy>(batch, ws, parts);
  }
}

}  // namespace fastsample

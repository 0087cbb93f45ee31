// Which kernel a batch gets, and how its rows are split among blocks: decisions only, apart from
// the algorithm. No result depends on them.
#pragma once

#include "core/rows.h"
#include "cuda/tuned.h"

namespace fastsample {

// How many blocks share a row, and where they hold it.
enum Policy : int32_t {
  kClusterPolicy = 0,  // a cluster of blocks holds the row in shared memory; sm_90 and later
  kBlockPolicy = 1,    // one block reads the row from the L2 cache in every pass
  kGridPolicy = 2,     // so do several blocks, which meet in device memory; where rows are few
};
constexpr int kPolicies = 3;

constexpr int kThreads = 256;
constexpr int kBlocksPerSM = 2;
constexpr int kRegisters =
    128;                       // per thread, so that two blocks fit; with fewer some kernels spill
constexpr int kMaxParts = 32;  // blocks per row
constexpr int kPortableCluster = 8;  // blocks per cluster that every GPU with clusters can run
constexpr int kLargestCluster = 16;  // where the GPU allows more
constexpr int kDigitBits = 11;       // bits of a key that one round of selection resolves
constexpr int kBins = 1 << kDigitBits;
constexpr int kMaxSegments = kMaxParts * kThreads / 32;  // of a row, one per warp
constexpr int kMaxGroups = 256;           // of lanes, whose highest keys bound the k-th of a row
constexpr int kMaxListed = 512;           // candidates that one block sorts
constexpr int kPrivateEdits = 1024;       // edits that the table in shared memory has room for
constexpr int kMinLogitsPerBlock = 4096;  // fewer are not worth another block

// What the choice depends on. The host asks the driver once per device.
struct Device {
  int32_t arch;  // 80, 90, ...
  int32_t multiprocessors;
  int32_t shared_block;     // bytes of shared memory that a block may have
  int32_t shared_sm;        // bytes of shared memory in a multiprocessor
  int32_t largest_cluster;  // blocks; 1 without clusters
  int32_t parts;  // blocks per row that a sweep wants; 0: those of the table, or an estimate
};

struct Shape {
  int64_t rows;
  int32_t vocab;
  int32_t itemsize;  // bytes per logit
  bool edits;        // whether bias, prompt ids or output ids are given
};

struct Plan {
  Policy policy;
  int32_t parts;    // blocks per row
  int32_t threads;  // per block
  int32_t teams;    // rows in flight: what the GPU can hold, or fewer where that balances them
  int32_t shared;   // bytes of dynamic shared memory per block
  bool far_bitmap;  // the marks of edited tokens do not fit there
};

FS_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FS_HD constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// 16-byte vectors per warp, a multiple of 32. A row that does not begin at a multiple of 16 bytes
// may need one more. In 32 bits, since GPUs divide 64 bits in software.
FS_HD constexpr int32_t vectors_per_warp(int32_t vocab, int32_t itemsize, int32_t warps) {
  const int32_t vectors = (vocab * itemsize + 30) / 16;
  return (vectors + 32 * warps - 1) / (32 * warps) * 32;
}

constexpr int32_t vectors_per_block(const Shape& s, int32_t parts, int32_t threads) {
  return vectors_per_warp(s.vocab, s.itemsize, parts * threads / 32) * (threads / 32);
}

// The parts of a block's shared memory, in bytes: the marks of edited tokens, their table, and
// struct Shared, which every launch has.
FS_HD constexpr int64_t bitmap_bytes(int64_t vectors, int32_t itemsize) {
  return round_up(vectors * (16 / itemsize), 128) / 8;
}
constexpr int64_t kTableBytes = 2 * kPrivateEdits * 12;
constexpr int64_t kFixedShared = 36 * 1024;  // checked where Shared is defined

constexpr int64_t shared_bytes(const Shape& s, bool resident, int32_t parts, int32_t threads) {
  const int64_t vectors = vectors_per_block(s, parts, threads);
  return kFixedShared + (resident ? vectors * 16 : 0) +
         (s.edits ? kTableBytes + bitmap_bytes(vectors, s.itemsize) : 0);
}

constexpr int blocks_per_sm(const Device& d, int64_t shared) {
  const int64_t fit = d.shared_sm / (shared + 1024);  // the driver reserves 1 KiB per block
  return fit < kBlocksPerSM ? (int)fit : kBlocksPerSM;
}

constexpr int32_t at_most(int64_t value, int64_t limit) {
  return (int32_t)(value < limit ? value : limit);
}

constexpr int64_t kMaxTeams = 4096;  // more than there are multiprocessors by far

// A plan with as many teams as are resident at once, or fewer that all get the same number of rows,
// but for one.
constexpr Plan with_teams(Plan plan, int64_t rows, int64_t resident) {
  const int64_t most = resident < 1 ? 1 : resident < kMaxTeams ? resident : kMaxTeams;
  if (rows < 1) rows = 1;
  plan.teams = (int32_t)ceil_div(rows, ceil_div(rows, most));
  return plan;
}

// How many teams of a plan are resident at once if nothing but the size of multiprocessors limits
// it. Clusters have to lie in a group of multiprocessors each, which only the driver knows.
constexpr int64_t resident_teams(const Device& d, const Plan& plan) {
  return (int64_t)d.multiprocessors * blocks_per_sm(d, plan.shared) / plan.parts;
}

// The plan for a given policy and number of blocks per row.
constexpr Plan make_plan(const Device& d, const Shape& s, Policy policy, int32_t parts,
                         int32_t threads = kThreads) {
  const int64_t shared = shared_bytes(s, policy == kClusterPolicy, parts, threads);
  const Plan plan = {policy, parts, threads, 1, (int32_t)shared, false};
  return with_teams(plan, s.rows, resident_teams(d, plan));
}

// The plan of the second kernel, for filter_logits, probabilities and log-probabilities: one block
// per row.
constexpr Plan outputs_plan(const Device& d, const Shape& s) {
  Plan plan = make_plan(d, s, kBlockPolicy, 1);
  if (plan.shared > d.shared_block) {
    plan.far_bitmap = true;
    plan.shared = (int32_t)(kFixedShared + kTableBytes);
  }
  return plan;
}

// The smallest power of two, up to the limit, that `enough` accepts; 0 if there is none.
template <class Enough>
constexpr int32_t fewest(int32_t limit, Enough enough) {
  for (int32_t parts = 1; parts <= limit; parts *= 2) {
    if (enough(parts)) return parts;
  }
  return 0;
}

constexpr bool fits(const Device& d, const Shape& s, bool resident, int32_t parts) {
  return shared_bytes(s, resident, parts, kThreads) <= d.shared_block;
}

// Whether so many blocks may share a row; 0: as many as are estimated.
constexpr bool may_share(int32_t parts) {
  return parts >= 0 && parts <= kMaxParts && !(parts & (parts - 1));
}

constexpr bool may_share_all() {
  for (const Tuned& t : kTuned) {
    if (!may_share(t.parts)) return false;
  }
  return true;
}
static_assert(may_share_all(), "tuned.h: parts is 0 or a power of two up to kMaxParts");

// Blocks per row that have been measured to be fastest, or are asked for; 0 where there are none.
constexpr int32_t known_parts(const Device& d, const Shape& s) {
  if (d.parts) return d.parts;
  for (const Tuned& t : kTuned) {
    if (t.arch == d.arch && t.itemsize == s.itemsize && s.rows <= t.rows && s.vocab <= t.vocab) {
      return t.parts;
    }
  }
  return 0;
}

// Blocks per row that keep every multiprocessor busy, as long as each block has enough to do.
constexpr int32_t wanted_parts(const Device& d, const Shape& s, int32_t limit) {
  if (const int32_t known = known_parts(d, s)) return known < limit ? known : limit;
  const int64_t share = (int64_t)d.multiprocessors * kBlocksPerSM / (s.rows > 0 ? s.rows : 1);
  const int64_t work = ceil_div(s.vocab, kMinLogitsPerBlock);
  int32_t parts = 1;
  while (parts * 2 <= limit && parts * 2 <= share && parts < work) parts *= 2;
  return parts;
}

// A cluster that holds the row: portable, and with blocks so small that two share a multiprocessor.
// Failing that, any that holds it. 0 blocks if there is none.
constexpr int32_t cluster_parts(const Device& d, const Shape& s) {
  if (d.arch < 90) return 0;
  const int32_t small = fewest(kPortableCluster, [&](int32_t parts) {
    return blocks_per_sm(d, shared_bytes(s, true, parts, kThreads)) == kBlocksPerSM;
  });
  const int32_t holding =
      small ? small
            : fewest(d.largest_cluster, [&](int32_t parts) { return fits(d, s, true, parts); });
  const int32_t wanted = wanted_parts(d, s, kPortableCluster);
  return holding && wanted > holding ? wanted : holding;
}

constexpr Plan plan_without_clusters(const Device& d, const Shape& s) {
  const int32_t needed = fewest(kMaxParts, [&](int32_t parts) { return fits(d, s, false, parts); });
  const int32_t wanted = wanted_parts(d, s, kMaxParts);
  const int32_t parts = wanted > needed ? wanted : needed;
  return make_plan(d, s, parts > 1 ? kGridPolicy : kBlockPolicy, parts);
}

// resident(plan) is how many of its teams the GPU can hold at once; perhaps none, of a cluster that
// is larger than a group of multiprocessors has left.
template <class Resident>
constexpr Plan plan(const Device& d, const Shape& s, Resident resident) {
  if (const int32_t parts = cluster_parts(d, s)) {
    const Plan found = make_plan(d, s, kClusterPolicy, parts);
    const int64_t teams = resident(found);
    if (teams > 0) return with_teams(found, s.rows, teams);
  }
  const Plan found = plan_without_clusters(d, s);
  return found.policy == kGridPolicy ? with_teams(found, s.rows, resident(found)) : found;
}

// What to try where a grid does not fit after all, since others have a share of the GPU: half as
// many teams, then half as many blocks. False when nothing is left to try.
inline bool shrink(const Device& d, const Shape& s, Plan& plan) {
  if (plan.policy != kGridPolicy) return false;
  if (plan.teams > 1) {
    plan.teams /= 2;
    return true;
  }
  if (plan.parts == 1 || !fits(d, s, false, plan.parts / 2)) return false;
  plan = make_plan(d, s, kGridPolicy, plan.parts / 2);
  plan.teams = 1;
  return true;
}

}  // namespace fastsample

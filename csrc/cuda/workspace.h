// What lies in device memory during launches and between them, and where: plain data, for the host
// too.
#pragma once

#include "core/process.h"
#include "cuda/keys.h"
#include "cuda/tuning.h"

namespace fastsample {

// What one load reads: 4 or 8 logits.
struct alignas(16) Vec16 {
  uint32_t word[4];
};

// Keys among which a selection looks for one.
struct Bracket {
  int32_t low, high;
  u64 above, reached;  // the weight above `high`, and from `low` up
  u64 total;           // of all that was weighed in the first round
};

// What a pass measures of a set of tokens: sums, and after them maxima.
enum Measure : int32_t {
  kMassSum,
  kDepthHigh,  // the sums of stage 6b
  kDepthLow,
  kSquareHigh,
  kSquareCross,
  kSquareLow,
  kTokens,
  kHeaviest,
  kLastPlace,  // minus ranked() of the last in rank order
  kMeasures
};

// What the blocks of a row tell each other. A cluster has a board in every block: bins and total
// are the first one's, and what all blocks read is published to each. Rows take turns where one
// block may be a row ahead of another.
struct Board {
  // In the order of slot_of; or a cluster's candidates. 0 between selections.
  u64 bins[kBins];
  u64 total;                              // 0 between selections
  u64 sums[kMaxSegments];                 // of each warp's segment, in id order
  u64 measures[2][kMeasures][kMaxParts];  // of each block; passes take turns
  long long best[2][kMaxParts];
  alignas(16) int32_t groups[2][kMaxGroups];  // the highest key of each
  int32_t counts[kMaxParts];                  // of candidates that each block has found
  Bracket bracket;
  int32_t id;
};

// What stage 7 leaves of a row. Where XTC's coin says so, a draw is from what ranks after `top`.
struct Drawable {
  KeptKeys kept;
  KeyPlace top;
};

// What later kernels need to know of a sampled row.
struct RowState {
  Status status;
  int32_t peak_key;
  Drawable drawable;
  // The mass of all that is kept, and of what XTC leaves of it; 0 where the peak alone is kept.
  u64 total, rest;
};

// A token with a bias or a penalty, or that its history changes.
struct Edit {
  int32_t id;      // -1: a free slot
  uint32_t count;  // occurrences in the output, and the flags below; then the longest repetition
  float x;         // the bias; in the end the processed logit
};
constexpr uint32_t kInPrompt = 0x80000000u, kHasBias = 0x40000000u, kCount = 0x3fffffffu;
constexpr uint32_t kInOutput = 1;
constexpr int64_t kPrivateIds = 2 * kBins;  // of a history, which the bins of a block have room for
static_assert(sizeof(Edit) * 2 * kPrivateEdits == kTableBytes, "tuning.h plans with this size");

// Device memory lent to a launch.
struct Workspace {
  RowState* states;     // [B], null if there is no later kernel
  Edit* tables;         // for rows with more edits than shared memory holds
  int32_t* histories;   // [blocks, ids of a row], for more ids than shared memory holds
  long long* lists;     // [teams, list_length], for top-n
  int64_t list_length;  // a power of two
  uint32_t* bitmaps;    // [teams, bitmap_words], for the outputs where shared memory is too small
  int64_t bitmap_words;
  int64_t* offsets;      // [B], to advance by 1 once their rows are drawn; null if they stay
  u64* candidates;       // kGridPolicy only: [blocks, kMaxListed]
  Board* boards;         // kGridPolicy only: [teams], zero between launches
  uint32_t* semaphores;  // kGridPolicy only: [teams], the low 31 bits zero between launches
};

// Kept sets to list: row r's ids go to ids[row_ptr[r]] up to ids[row_ptr[r + 1] - 1], ascending; a
// row without a place lists none. Past the last row's come -1s.
struct Lists {
  const int32_t* bitmask;  // [rows, words]
  int64_t rows;
  int32_t words;
  const int64_t* row_ptr;  // [rows + 1]
  int32_t* ids;            // [size]
  int64_t size;
};
constexpr int kListShared = 32 * sizeof(u64);  // bytes of a block's shared memory

// How a batch is served, and the bytes of device memory that this takes.
struct Layout {
  Plan sample;
  Plan outputs;       // of the kernels after the first; 0 teams where none is wanted
  int64_t workspace;  // any contents
  int64_t boards;     // zero before the first launch
  int64_t table_slots;
};

// Whether anything is wanted that only `outputs` or only `keep` writes; and that any later kernel
// writes.
inline bool wants_outputs(const Outputs& out) {
  return out.filtered || out.probabilities || out.mode != kNoLogprobs;
}
inline bool wants_kept(const Outputs& out) {
  return out.tokens && (out.kept_count || out.kept_bitmask || out.log_kept_mass || out.entropy);
}
inline bool wants_more(const Outputs& out) {
  return wants_outputs(out) || wants_kept(out) || out.weights;
}

// Whether nothing lies over the logits of any row.
FS_HD bool is_plain(const Rows& rows) { return !rows.bitmask.data && !has_edits(rows); }

inline Shape shape_of(const Batch& batch) {
  const Logits& l = batch.logits;
  return Shape{l.rows, l.vocab, l.dtype == kFloat32 ? 4 : 2, has_edits(batch.rows)};
}

inline int64_t list_length(const Outputs& out) {
  int64_t length = 1;
  while (length < out.num_top) length *= 2;
  return out.num_top ? length : 0;
}

// The semaphores come first, so that a board lies at the same place whatever the number of teams: a
// launch leaves their signs as they are, and boards zero where they must be.
constexpr int64_t kSemaphoreBytes = kMaxTeams * (int64_t)sizeof(uint32_t);
static_assert(kSemaphoreBytes % 256 == 0, "boards are aligned");

// Sets the addresses of the workspace's parts, one after the other; returns its size.
inline int64_t lay_out(const Batch& batch, const Layout& layout, char* workspace, char* boards,
                       Workspace& ws) {
  int64_t size = 0;
  const auto part = [&](int64_t bytes) {
    const int64_t at = size;
    size += round_up(bytes, 256);
    return bytes && workspace ? workspace + at : nullptr;
  };
  const Plan& more = layout.outputs;
  ws.states = (RowState*)part(more.teams ? batch.logits.rows * (int64_t)sizeof(RowState) : 0);
  ws.tables = (Edit*)part(layout.table_slots * (int64_t)sizeof(Edit));
  const int64_t blocks = (int64_t)layout.sample.teams * layout.sample.parts,
                ids = ids_of_a_row(batch.rows);
  const int64_t histories =
      ids > kPrivateIds ? ids * (blocks > more.teams ? blocks : more.teams) : 0;
  ws.histories = (int32_t*)part(histories * 4);
  ws.list_length = list_length(batch.out);
  ws.lists = (long long*)part(more.teams * ws.list_length * 8);
  const Shape shape = shape_of(batch);
  const int64_t vectors = vectors_per_block(shape, 1, more.threads ? more.threads : kThreads);
  ws.bitmap_words = more.far_bitmap ? bitmap_bytes(vectors, shape.itemsize) / 4 : 0;
  ws.bitmaps = (uint32_t*)part(more.teams * ws.bitmap_words * 4);
  ws.offsets = nullptr;
  const bool grid = layout.sample.policy == kGridPolicy;
  ws.candidates = (u64*)part(grid ? blocks * kMaxListed * 8 : 0);
  ws.semaphores = grid ? (uint32_t*)boards : nullptr;
  ws.boards = grid ? (Board*)(boards + kSemaphoreBytes) : nullptr;
  return size;
}

// `bias_entries` counts those of all rows together.
inline Layout layout_for(const Device& device, const Batch& batch, int64_t bias_entries,
                         const Plan& sample) {
  const Rows& rows = batch.rows;
  Layout layout = {sample, Plan{}, 0, 0, 0};
  if (wants_more(batch.out)) layout.outputs = outputs_plan(device, shape_of(batch));
  const int64_t lists = ids_of_a_row(rows);
  if (bias_entries + lists > kPrivateEdits) {
    layout.table_slots = 2 * (bias_entries + batch.logits.rows * lists);
  }
  Workspace unused;
  layout.workspace = lay_out(batch, layout, nullptr, nullptr, unused);
  if (sample.policy == kGridPolicy) {
    layout.boards = kSemaphoreBytes + sample.teams * (int64_t)sizeof(Board);
  }
  return layout;
}

}  // namespace fastsample

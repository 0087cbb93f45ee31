// Stages 1 to 3: what lies over a row's logits, made by the blocks that read them; stem of
// csrc/core/process.h.
#pragma once

#include "core/process.h"
#include "cuda/history.cuh"

namespace fastsample {

// Calls f(id, flag, bias) for every bias, output id and prompt id of the row in this slice.
template <class S, class F>
FS_DEVICE void each_edit(const Batch& batch, int64_t r, const RowParams& p, const S& s, F f) {
  const Rows& rows = batch.rows;
  if (rows.bias.row_ptr) {
    const int64_t begin = rows.bias.row_ptr[r], end = rows.bias.row_ptr[r + 1];
    for (int64_t i = begin + threadIdx.x; i < end; i += threads()) {
      const int64_t id = load_global(rows.bias.ids + i);
      if (s.owns(id)) f((int32_t)id, kHasBias, load_global(rows.bias.values + i));
    }
  }
  const auto each_id = [&](const TokenIds& ids, uint32_t flag) {
    const int64_t* own = ids_of(ids, r);
    for (int64_t i = threadIdx.x; i < ids.length; i += threads()) {
      const int64_t id = load_global(own + i);
      if (s.owns(id)) f((int32_t)id, flag, 0.0f);
    }
  };
  if (penalises_output(p)) {
    if (rows.output.data) each_id(rows.output, kInOutput);
    if (rows.drafted.data) each_id(rows.drafted, kInOutput);
  }
  if (rows.prompt.data && penalises_prompt(p)) each_id(rows.prompt, kInPrompt);
}

// How many edits the row has at most, all slices together, given those of its history.
FS_DEVICE int64_t count_edits(const Batch& batch, int64_t r, const RowParams& p,
                              int64_t repetitions) {
  const Rows& rows = batch.rows;
  int64_t n = repetitions;
  if (penalises_output(p)) n += rows.output.length + rows.drafted.length;
  if (penalises_prompt(p)) n += rows.prompt.length;
  const int64_t all = ids_of_a_row(rows);  // whose tokens all those are
  if (n > all) n = all;
  return rows.bias.row_ptr ? n + rows.bias.row_ptr[r + 1] - rows.bias.row_ptr[r] : n;
}

// Where the row's table in device memory begins: every row has two slots per edit.
FS_DEVICE int64_t table_offset(const Batch& batch, int64_t r) {
  const Rows& rows = batch.rows;
  const int64_t before = rows.bias.row_ptr ? rows.bias.row_ptr[r] : 0;
  return 2 * (before + r * ids_of_a_row(rows));
}

// Turns what was collected about each token of the slice into its logit after the penalties, and
// marks it. Counts are 0 again, for the history's edits.
template <class S>
FS_DEVICE void settle_edits(const RowParams& p, const EditTable& table, uint32_t* bitmap,
                            const S& s) {
  for (uint32_t i = threadIdx.x; i < table.size; i += threads()) {
    Edit& edit = table.edits[i];
    const int32_t id = *(volatile int32_t*)&edit.id;
    if (id < 0 || !s.owns(id)) continue;
    float x = s.masked(id);
    if (edit.count & kHasBias) x = x + edit.x;
    const int32_t count = (int32_t)(edit.count & kCount);
    edit.x = penalise(x, p, count, count > 0 || (edit.count & kInPrompt));
    edit.count = 0;
    const int32_t position = s.position_of(id);
    atomicOr(bitmap + (position >> 5), 1u << (position & 31));
  }
}

// The same for repetitions, which are counts now.
template <class S>
FS_DEVICE void settle_repetitions(const RowParams& p, const EditTable& table, uint32_t* bitmap,
                                  const S& s) {
  for (uint32_t i = threadIdx.x; i < table.size; i += threads()) {
    Edit& edit = table.edits[i];
    const int32_t id = *(volatile int32_t*)&edit.id, length = (int32_t)edit.count;
    if (id < 0 || !s.owns(id) || length == 0) continue;
    const int32_t position = s.position_of(id);
    const uint32_t bit = 1u << (position & 31);
    const float x = bitmap[position >> 5] & bit ? edit.x : s.masked(id);
    const float power =
        length == kBanned ? 0.0f : power_of(p.dry_base, length - p.dry_allowed_length);
    edit.x = after_repetition(x, p, length, power);
    atomicOr(bitmap + (position >> 5), bit);
  }
}

// Where edits go: few to a table of the block's own, many to the row's table in device memory,
// which all blocks of the team share. Likewise the history, but that each block has its own.
struct EditMemory {
  Edit* near;
  Edit* far;  // of all rows
  uint32_t* bitmap;
  int32_t* histories;  // of all blocks
};

// Stages 2 and 3 of a row that has up to n edits, and perhaps a history to look at.
template <Policy kPolicy, class S>
FS_DEVICE void make_table(const Batch& batch, int64_t r, const RowParams& p, int64_t n,
                          const History& history, const Team<kPolicy>& team,
                          const EditMemory& memory, const S& s) {
  const bool own = n <= kPrivateEdits;
  Edit* edits = own ? memory.near : memory.far + table_offset(batch, r);
  const EditTable table = {edits, (uint32_t)(2 * n)};
  const int32_t words = warps() * s.per_warp * S::kWidth / 32;
  for (int32_t i = (int32_t)threadIdx.x; i < words; i += threads()) memory.bitmap[i] = 0;
  const uint32_t start = (own ? 0 : team.rank * threads()) + threadIdx.x;
  const uint32_t step = (own ? 1 : team.parts) * threads();
  for (uint32_t i = start; i < table.size; i += step) table.edits[i] = Edit{-1, 0, 0.0f};
  own ? __syncthreads() : team.sync();

  each_edit(batch, r, p, s, [&](int32_t id, uint32_t flag, float bias) {
    Edit& edit = table.claim(id);
    if (flag == kInOutput) {
      atomicAdd(&edit.count, kInOutput);
    } else {
      atomicOr(&edit.count, flag);
    }
    if (flag == kHasBias) edit.x = bias;
  });
  __syncthreads();
  settle_edits(p, table, memory.bitmap, s);
  if (history.returns) {
    __syncthreads();
    find_repetitions(history, p, table, s);
    __syncthreads();
    settle_repetitions(p, table, memory.bitmap, s);
  }
  if (threadIdx.x == 0) {
    team.own->overlay.edited = memory.bitmap;
    team.own->overlay.table = table;
  }
  __syncthreads();
}

template <Policy kPolicy, class S>
FS_DEVICE void make_edits(const Batch& batch, int64_t r, const RowParams& p,
                          const Team<kPolicy>& team, const EditMemory& memory, const S& s) {
  const int64_t ids = ids_of_a_row(batch.rows);
  const bool repeats = ids && uses_history(p), own = ids <= kPrivateIds;
  History history = {};
  if (repeats) {
    int32_t* to = own ? (int32_t*)team.own->board.bins : memory.histories + blockIdx.x * ids;
    history = collect_history(batch, r, p, *team.own, to, (uint32_t*)memory.near);
  }
  const int64_t n = count_edits(batch, r, p, history.returns);
  if (n) make_table(batch, r, p, n, history, team, memory, s);
  if (repeats && own) clear_bins(team);
}

// A block's shared memory holds Shared, then the slice's logits if they are resident, then, where
// any row may have edits, their table and the marks.
template <class T, Policy kPolicy, class How>
FS_DEVICE void process_row(const Batch& batch, const Workspace& ws, int64_t r, const RowParams& p,
                           const Team<kPolicy>& team, Slice<T, How>& slice) {
  slice.held = (Vec16*)(team.own + 1);
  if constexpr (How::kPlain) return;
  const Bitmask& mask = batch.rows.bitmask;
  if (is_plain(batch.rows)) return;
  Overlay& overlay = team.own->overlay;
  if (threadIdx.x == 0) {
    overlay = Overlay{mask.data ? mask.data + r * mask.stride : nullptr, mask.words, nullptr, {}};
  }
  __syncthreads();
  slice.lies_over = &overlay;
  if (!has_edits(batch.rows)) return;
  Edit* near = (Edit*)(slice.held + (How::kResident ? warps() * slice.per_warp : 0));
  uint32_t* bitmap = (uint32_t*)((char*)near + kTableBytes);
  if (kPolicy == kBlockPolicy && ws.bitmaps) bitmap = ws.bitmaps + blockIdx.x * ws.bitmap_words;
  make_edits(batch, r, p, team, EditMemory{near, ws.tables, bitmap, ws.histories}, slice);
}

}  // namespace fastsample

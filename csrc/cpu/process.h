// Stages 2 and 3: bias, penalties and history edits, as edits of a row whose maxima are known.
#pragma once

#include "cpu/history.h"
#include "cpu/scan.h"

namespace fastsample {
namespace {

// Calls f(id, kind, bias) for every edit that a row asks for, of a token whose logit is here; ids
// count from the first of these. Bias, output, prompt: the order in which a token needs them.
template <class F>
FS_INLINE void each_edit(const Batch& batch, int64_t r, const RowParams& params, F f) {
  const Rows& rows = batch.rows;
  const auto each = [&](int64_t id, EditKind kind, float bias) {
    const uint64_t own = (uint64_t)id - (uint64_t)rows.ids.first;
    if (own < (uint64_t)batch.logits.vocab) f((int32_t)own, kind, bias);
  };
  if (rows.bias.row_ptr) {
    for (int64_t i = rows.bias.row_ptr[r]; i < rows.bias.row_ptr[r + 1]; ++i) {
      each(rows.bias.ids[i], kBias, rows.bias.values[i]);
    }
  }
  const auto each_id = [&](const TokenIds& ids, EditKind kind) {
    const int64_t* id = ids_of(ids, r);
    for (int64_t i = 0; i < ids.length; ++i) each(id[i], kind, 0.0f);
  };
  if (penalises_output(params)) {
    if (rows.output.data) each_id(rows.output, kOutput);
    if (rows.drafted.data) each_id(rows.drafted, kOutput);
  }
  if (rows.prompt.data && penalises_prompt(params)) each_id(rows.prompt, kPrompt);
}

// Sorts a row's edits by block (a stable counting sort), each with its kind and bias or repetition;
// returns how many there are.
template <class T>
int sort_edits(const Batch& batch, int64_t r, const RowParams& params, const Row<T>& row,
               const Workspace& ws) {
  const int repetitions = uses_history(params) ? find_repetitions(batch, r, params, ws) : 0;
  int32_t* start = ws.edit_start;
  memset(start, 0, (size_t)(row.blocks + 1) * sizeof *start);
  each_edit(batch, r, params, [&](int32_t id, EditKind, float) { ++start[id / kBlock]; });
  for (int i = 0; i < repetitions; ++i) ++start[ws.repetitions[i].id / kBlock];
  int32_t total = 0;
  for (int b = 0; b <= row.blocks; ++b) {
    total += start[b];
    start[b] = total - start[b];
  }
  if (!total) return 0;
  each_edit(batch, r, params, [&](int32_t id, EditKind kind, float bias) {
    ws.edits[start[id / kBlock]++] = Edit{id, kind, {bias}};
  });
  for (int i = 0; i < repetitions; ++i) {
    ws.edits[start[ws.repetitions[i].id / kBlock]++] = ws.repetitions[i];
  }
  // Each start has moved to the next block's: shift them back.
  memmove(start + 1, start, (size_t)row.blocks * sizeof *start);
  start[0] = 0;
  return total;
}

// A token of the current block while its edits are counted.
struct Edited {
  int32_t block;
  int32_t count;      // occurrences in the output so far; below 0, minus the longest repetition
  float base, value;  // what the next edit of its kind starts from; after its edits so far
};

// After an edit of the history, given the token after those before.
FS_INLINE Edited repeat(const Edited& c, const Edit& e, const RowParams& params,
                        const float* powers) {
  const float base = c.count < 0 ? c.base : c.value;
  const int32_t longest = c.count < 0 && -c.count > e.repetition ? -c.count : e.repetition;
  const float power = longest == kBanned ? 0.0f : powers[longest - params.dry_allowed_length];
  return Edited{c.block, -longest, base, after_repetition(base, params, longest, power)};
}

// Stages 2 and 3: gives every edit the logit that it leads to (a token's last edit counts), and
// keeps the block maxima up to date. Branches on a token would be mispredicted, so there are none
// where tokens are many.
template <class T>
void apply_edits(const RowParams& params, int n, const Workspace& ws, Row<T>* row, Peak* peak) {
  Edited edited[kBlock];
  for (Edited& c : edited) c.block = -1;
  bool broken = peak->status == kNaN, banned = false;
  for (Edit* e = ws.edits; e < ws.edits + n; ++e) {
    const int32_t b = e->id / kBlock;
    Edited& c = edited[e->id % kBlock];
    const float raw = allowed_logit(*row, e->id);
    const bool known = c.block == b, bias = e->kind == kBias;
    const float old = known ? c.value : raw, base = known ? c.base : raw;
    if (e->kind == kRepetition) {
      banned |= e->repetition == kBanned;
      c = repeat(known ? c : Edited{b, 0, raw, raw}, *e, params, ws.powers);
    } else {
      const int32_t count = (known ? c.count : 0) + (e->kind == kOutput);
      const float biased = bias ? base + e->x : base;
      const float penalised = penalise(base, params, count, true);
      c = Edited{b, count, biased, bias ? biased : penalised};
    }
    const float x = e->x = c.value;
    broken |= x != x;
    // NaN marks a block whose maximum was lowered: it is scanned again below.
    float& max = ws.block_max[b];
    max = x > max ? x : old == max && x != old ? NAN : max;
  }
  row->edits = ws.edits;
  row->edit_start = ws.edit_start;
  if (broken && banned) {  // perhaps what was no number is banned
    for (int b = 0; b < row->blocks; ++b) ws.block_max[b] = NAN;
    broken = false;
  }
  float buffer[kBlock];
  Sound sound;
  for (int b = 0; b < row->blocks; ++b) {
    if (ws.block_max[b] == ws.block_max[b]) continue;
    ws.block_max[b] = block_peak(block(*row, b, buffer), sound);
  }
  const float max = row_max(ws.block_max, row->blocks);
  *peak = Peak{max, status_of(max, broken || !sound.all()), peak->low};
}

}  // namespace
}  // namespace fastsample

// Stages 0 to 4 for one row: processed logits, block by block, and the one streaming pass over
// them.
#pragma once

#include <math.h>

#include "core/process.h"
#include "cpu/kernel.h"
#include "cpu/simd.h"

namespace fastsample {
namespace {

// A row after stages 0 to 3. Blocks are made when asked for: an untouched float32 block is the
// caller's memory itself.
template <class T>
struct Row {
  const T* logits;
  int32_t vocab;
  int32_t blocks;
  const int32_t* mask;  // null: every token is allowed
  int64_t mask_words;
  const Edit* edits;          // null: none
  const int32_t* edit_start;  // [blocks + 1]
  const RowParams* params;
};

template <class T>
Row<T> raw_row(const Batch& batch, int64_t r) {
  const Logits& l = batch.logits;
  const T* logits = (const T*)l.data + r * l.stride;
  return Row<T>{logits,  l.vocab, (l.vocab + kBlock - 1) / kBlock, nullptr, 0, nullptr,
                nullptr, nullptr};
}

template <class T>
FS_INLINE bool has_edits(const Row<T>& row, int b) {
  return row.edits && row.edit_start[b] != row.edit_start[b + 1];
}

// The words of a block's bitmask combined: all ones in `every` where all is allowed, 0 in `some`
// where nothing is.
struct MaskSummary {
  uint32_t every, some;
};

template <class T>
FS_INLINE MaskSummary summarise_mask(const Row<T>& row, int b) {
  MaskSummary s = {~0u, 0};
  if (!row.mask) return MaskSummary{~0u, ~0u};
  const int64_t begin = (int64_t)b * (kBlock / 32);
  for (int64_t i = begin; i < begin + kBlock / 32; ++i) {
    const uint32_t word = i < row.mask_words ? (uint32_t)row.mask[i] : 0;
    s.every &= word;
    s.some |= word;
  }
  return s;
}

// Whether a block is a whole one of which every token is allowed.
template <class T>
FS_INLINE bool is_allowed(const Row<T>& row, int b) {
  return (b + 1) * kBlock <= row.vocab && summarise_mask(row, b).every == ~0u;
}

// Whether nothing changes such a block.
template <class T>
FS_INLINE bool is_clean(const Row<T>& row, int b) {
  return !has_edits(row, b) && is_allowed(row, b);
}

template <class T>
void upcast(const Row<T>& row, int begin, int n, float* x) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(x + i, load(row.logits + begin + i));
  if (i < n) {
    T tail[kLanes] = {};
    memcpy(tail, row.logits + begin + i, (size_t)(n - i) * sizeof(T));
    store(x + i, load(tail));
  }
  for (i = n; i < kBlock; ++i) x[i] = -INFINITY;
}

template <class T>
void apply_bitmask(const Row<T>& row, int b, float* x) {
  for (int i = 0; i < kBlock; i += 32) {
    const int64_t word = ((int64_t)b * kBlock + i) / 32;
    const uint32_t allowed = word < row.mask_words ? (uint32_t)row.mask[word] : 0;
    for (int j = 0; j < 32; j += kLanes) {
      const Mask m = from_bits(allowed >> j & kAllLanes);
      store(x + i + j, select(m, load(x + i + j), splat(-INFINITY)));
    }
  }
}

// Bias, then penalties. Edits of a block stand in the order bias, output, prompt.
template <class T>
void apply_edits(const Row<T>& row, int b, float* x) {
  const Edit* begin = row.edits + row.edit_start[b];
  const Edit* end = row.edits + row.edit_start[b + 1];
  int32_t count[kBlock];
  for (const Edit* e = begin; e < end; ++e) count[e->lane] = 0;
  for (const Edit* e = begin; e < end; ++e) {
    if (e->kind == kBiasEdit) x[e->lane] = x[e->lane] + e->bias;
    if (e->kind == kOutputEdit) ++count[e->lane];
  }
  for (const Edit* e = begin; e < end; ++e) {
    if (e->kind == kBiasEdit || count[e->lane] < 0) continue;
    x[e->lane] = penalise(x[e->lane], *row.params, count[e->lane], true);
    count[e->lane] = -1;  // once per token
  }
}

// The kBlock processed logits of block b, -inf past the vocabulary; in `buffer` or in place.
template <class T>
const float* block(const Row<T>& row, int b, float* buffer) {
  if (sizeof(T) == sizeof(float) && is_clean(row, b)) return (const float*)row.logits + b * kBlock;
  const MaskSummary mask = summarise_mask(row, b);
  const int begin = b * kBlock;
  const int n = row.vocab - begin < kBlock ? row.vocab - begin : kBlock;
  upcast(row, begin, mask.some ? n : 0,
         buffer);  // a block that the grammar rules out is not even read
  if (mask.some && mask.every != ~0u) apply_bitmask(row, b, buffer);
  if (has_edits(row, b)) apply_edits(row, b, buffer);
  return buffer;
}

struct Peak {
  float max;
  bool nan;
};

// Watches nothing of the streaming pass.
struct Nothing {
  static constexpr bool kSees = false;

  FS_MEMBER void see(vf, vf) {}
  FS_MEMBER void end(int, float) {}
};

// Maximum of kBlock values of any type that `load` knows; notes NaNs, two vectors at a time.
template <class T, class Watch>
FS_INLINE float block_peak(const T* x, Mask& nan, Watch& watch) {
  constexpr int kStreams = 4;
  vf m[kStreams];
  for (int u = 0; u < kStreams; ++u) m[u] = splat(-INFINITY);
  for (int i = 0; i < kBlock; i += kStreams * kLanes) {
    vf v[kStreams];
    for (int u = 0; u < kStreams; u += 2) load_pair(x + i + u * kLanes, v[u], v[u + 1]);
    nan = either(nan, either(unordered(v[0], v[1]), unordered(v[2], v[3])));
    for (int u = 0; u < kStreams; ++u) m[u] = max(m[u], v[u]);
    for (int u = 0; u < kStreams; u += 2) watch.see(v[u], v[u + 1]);
  }
  return reduce_max(max(max(m[0], m[1]), max(m[2], m[3])));
}

template <class T>
FS_INLINE float block_peak(const T* x, Mask& nan) {
  Nothing nothing;
  return block_peak(x, nan, nothing);
}

// The maximum of an allowed block whose logits have the maximum `raw`, after its edits: only edited
// tokens are looked at, unless one of them may have been that maximum.
template <class T>
float edited_peak(const Row<T>& row, int b, float raw, Mask& nan) {
  const Edit* begin = row.edits + row.edit_start[b];
  const Edit* end = row.edits + row.edit_start[b + 1];
  float x[kBlock];
  bool kept = true;
  for (const Edit* e = begin; e < end; ++e) {
    x[e->lane] = value_at(row.logits + b * kBlock, e->lane);
    kept &= x[e->lane] < raw;
  }
  if (!kept) return block_peak(block(row, b, x), nan);
  apply_edits(row, b, x);
  float peak = raw;
  for (const Edit* e = begin; e < end; ++e) {
    if (x[e->lane] != x[e->lane]) nan = from_bits(kAllLanes);
    if (x[e->lane] > peak) peak = x[e->lane];
  }
  return peak;
}

// Asks for every line of a block that will be read soon: on Zen a line does not bring its neighbour.
template <class T>
FS_INLINE void prefetch_block(const T* x) {
  for (int i = 0; i < kBlock; i += 64 / (int)sizeof(T)) __builtin_prefetch(x + i);
}

// The streaming pass: the maximum of every block and of the row. `watch` sees every pair of vectors
// of a block, then the block's maximum.
template <class T, class Watch>
FS_INLINE Peak scan(const Row<T>& row, float* block_max, Watch watch) {
  float buffer[kBlock];
  Mask nan = from_bits(0);
  const auto look = [&](int b, const auto* x) {
    block_max[b] = block_peak(x, nan, watch);
    watch.end(b, block_max[b]);
  };
  const auto look_at_logits = [&](int b) {
    constexpr int kSoon = 8192 / (int)sizeof(T);
    prefetch_block(row.logits + b * kBlock + kSoon);
    look(b, row.logits + b * kBlock);
  };
  const int untouched = row.mask || row.edits ? 0 : row.vocab / kBlock;
  for (int b = 0; b < untouched; ++b) look_at_logits(b);
  for (int b = untouched; b < row.blocks; ++b) {
    if (!is_allowed(row, b) || (Watch::kSees && has_edits(row, b))) {
      look(b, block(row, b, buffer));
      continue;
    }
    look_at_logits(b);
    if (has_edits(row, b)) block_max[b] = edited_peak(row, b, block_max[b], nan);
  }
  for (int i = 0; i < kPad; ++i) block_max[row.blocks + i] = -INFINITY;
  vf peak = splat(-INFINITY);
  for (int b = 0; b < row.blocks; b += kLanes) peak = max(peak, load(block_max + b));
  return Peak{reduce_max(peak), any(nan)};
}

template <class T>
Peak scan(const Row<T>& row, float* block_max) {
  return scan(row, block_max, Nothing());
}

FS_INLINE Status status_of(Peak peak) {
  if (peak.nan) return kNaN;
  if (peak.max == INFINITY) return kPositiveInfinity;
  return peak.max == -INFINITY ? kNothingLeft : kValid;
}

// Calls f(id, kind, bias) for every edit within the vocabulary, in the order in which a block needs
// them.
template <class F>
FS_INLINE void each_edit(const Batch& batch, int64_t r, const RowParams& params, F f) {
  const Rows& rows = batch.rows;
  const auto inside = [&](int64_t id) { return id >= 0 && id < batch.logits.vocab; };
  if (rows.bias.row_ptr) {
    for (int64_t i = rows.bias.row_ptr[r]; i < rows.bias.row_ptr[r + 1]; ++i) {
      const int64_t id = rows.bias.ids[i];
      if (inside(id)) f((int32_t)id, kBiasEdit, rows.bias.values[i]);
    }
  }
  const auto each_id = [&](const TokenIds& ids, EditKind kind) {
    const int64_t* id = ids.data + r * ids.stride;
    for (int64_t i = 0; i < ids.length; ++i) {
      if (inside(id[i])) f((int32_t)id[i], kind, 0.0f);
    }
  };
  if (rows.output.data && penalises_output(params)) each_id(rows.output, kOutputEdit);
  if (rows.prompt.data && penalises_prompt(params)) each_id(rows.prompt, kPromptEdit);
}

// The row with its bitmask and its edits, the latter sorted by block (a stable counting sort).
template <class T>
Row<T> processed_row(const Batch& batch, int64_t r, const RowParams& params, const Workspace& ws) {
  Row<T> row = raw_row<T>(batch, r);
  row.params = &params;
  const Bitmask& mask = batch.rows.bitmask;
  if (mask.data) {
    row.mask = mask.data + r * mask.stride;
    row.mask_words = mask.words;
  }
  if (!batch.rows.bias.row_ptr && !batch.rows.output.data && !batch.rows.prompt.data) return row;
  int32_t* start = ws.edit_start;
  memset(start, 0, (size_t)(row.blocks + 1) * sizeof *start);
  int32_t total = 0;
  each_edit(batch, r, params, [&](int32_t id, EditKind, float) {
    ++start[id / kBlock];
    ++total;
  });
  if (!total) return row;
  for (int b = 0, sum = 0; b <= row.blocks; ++b) {
    sum += start[b];
    start[b] = sum - start[b];
  }
  each_edit(batch, r, params, [&](int32_t id, EditKind kind, float bias) {
    ws.edits[start[id / kBlock]++] = Edit{(uint16_t)(id % kBlock), kind, bias};
  });
  // Each start has moved to the next block's: shift them back.
  memmove(start + 1, start, (size_t)row.blocks * sizeof *start);
  start[0] = 0;
  row.edits = ws.edits;
  row.edit_start = start;
  return row;
}

}  // namespace
}  // namespace fastsample

// A row as the stages see it: its logits, mask and edits, block by block.
#pragma once

#include <math.h>

#include "core/process.h"
#include "cpu/half.h"
#include "cpu/kernel.h"

namespace fastsample {
namespace {

// A row after stages 0 to 3. A block is made when it is needed; a float32 block that nothing
// changes is the caller's memory itself.
template <class T>
struct Row {
  const T* logits;
  int32_t vocab;
  int32_t blocks;
  const int32_t* mask;  // null: every token is allowed
  int64_t mask_words;
  const Edit* edits;          // null: none
  const int32_t* edit_start;  // [blocks + 1]
};

template <class T>
Row<T> raw_row(const Batch& batch, int64_t r) {
  const Logits& l = batch.logits;
  const T* logits = (const T*)l.data + r * l.stride;
  return Row<T>{logits, l.vocab, (l.vocab + kBlock - 1) / kBlock, nullptr, 0, nullptr, nullptr};
}

template <class T>
Row<T> masked_row(const Batch& batch, int64_t r) {
  Row<T> row = raw_row<T>(batch, r);
  const Bitmask& mask = batch.rows.bitmask;
  if (mask.data) {
    row.mask = mask.data + r * mask.stride;
    row.mask_words = mask.words;
  }
  return row;
}

template <class T>
FS_INLINE bool has_edits(const Row<T>& row, int b) {
  return row.edits && row.edit_start[b] != row.edit_start[b + 1];
}

// f(edit) for the edits of a block; where a token has several, the last one counts.
template <class T, class F>
FS_INLINE void each_edit(const Row<T>& row, int b, F f) {
  if (!row.edits) return;
  const Edit* end = row.edits + row.edit_start[b + 1];
  for (const Edit* e = row.edits + row.edit_start[b]; e < end; ++e) f(*e);
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

template <class T>
FS_INLINE bool is_ruled_out(const Row<T>& row, int b) {
  return !summarise_mask(row, b).some;
}

// Whether a block is a whole one, with every token allowed.
template <class T>
FS_INLINE bool is_allowed(const Row<T>& row, int b) {
  return (b + 1) * kBlock <= row.vocab && summarise_mask(row, b).every == ~0u;
}

// Whether a block is a whole one that nothing changes.
template <class T>
FS_INLINE bool is_clean(const Row<T>& row, int b) {
  return !has_edits(row, b) && is_allowed(row, b);
}

// A token after stage 1.
template <class T>
FS_INLINE float allowed_logit(const Row<T>& row, int32_t id) {
  const bool in = !row.mask || allowed(row.mask, row.mask_words, id);
  return in ? upcast(row.logits[id]) : -INFINITY;
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
  each_edit(row, b, [&](const Edit& e) { buffer[e.id % kBlock] = e.x; });
  return buffer;
}

}  // namespace
}  // namespace fastsample

// Stages 0 to 3: a block's slice of a row, its logits processed whenever they are read.
//
// The logits themselves are never rewritten: bits of the mask are looked up beside them, and tokens
// with a bias or a penalty are marked in a bitmap and have their final value in a hash table. So a
// 16-bit row stays 16 bits wide, wherever it is.
#pragma once

#include <math.h>
#include <string.h>

#include "core/process.h"
#include "cuda/block.cuh"
#include "cuda/workspace.h"

namespace fastsample {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

// Zero bits at the end of the keys of unedited logits.
template <class T>
constexpr int kLowBits = 0;
template <>
constexpr int kLowBits<Half> = 13;
template <>
constexpr int kLowBits<BFloat> = 16;

template <class T>
constexpr int kVec = 16 / (int)sizeof(T);

FS_DEVICE float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

FS_DEVICE float upcast(float x) { return x; }
FS_DEVICE float upcast(Half x) { return half_to_float(x.bits); }
FS_DEVICE float upcast(BFloat x) { return from_bits((uint32_t)x.bits << 16); }

template <class T>
FS_DEVICE void unpack(const Vec16& v, float (&x)[kVec<T>]) {
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[i] = from_bits(v.word[i]);
    } else {
      x[i] = upcast(T{(uint16_t)(v.word[i / 2] >> 16 * (i & 1))});
    }
  }
}

// One row of the caller's logits.
template <class T>
FS_DEVICE float logit(const T* row, int32_t id) {
  if constexpr (sizeof(T) == 4) {
    return load_global((const float*)row + id);
  } else {
    return upcast(T{load_global((const uint16_t*)row + id)});
  }
}

struct Table {
  Entry* entries;
  uint32_t size;  // 0: no token of the row is edited
};

FS_DEVICE uint32_t first_slot(const Table& t, int32_t id) {
  return (uint32_t)((u64)((uint32_t)id * 0x9E3779B1u) * t.size >> 32);
}

FS_DEVICE Entry& claim(const Table& t, int32_t id) {
  for (uint32_t slot = first_slot(t, id);; slot = slot + 1 < t.size ? slot + 1 : 0) {
    const int32_t found = atomicCAS(&t.entries[slot].id, -1, id);
    if (found == -1 || found == id) return t.entries[slot];
  }
}

FS_DEVICE float edited_value(const Table& t, int32_t id) {
  // Other blocks insert into a shared table, so that what a cache holds of it may be out of date.
  for (uint32_t slot = first_slot(t, id);; slot = slot + 1 < t.size ? slot + 1 : 0) {
    const volatile Entry* entry = t.entries + slot;
    if (entry->id == id) return entry->value;
  }
}

// What is asked of a row's logits, in shared memory: most rows of most batches have none of it.
struct Overlay {
  const int32_t* mask;  // null: all allowed
  int64_t mask_words;
  uint32_t* edited;  // bit per position of the slice; null: none
  Table table;

  FS_METHOD uint32_t mask_word(int32_t index) const {
    return index >= 0 && index < mask_words ? (uint32_t)load_global(mask + index) : 0;
  }
};

// The part of a row that one block works on. Positions count from the last 16-byte boundary at or
// before the row: id = position - shift. Vectors are kVec positions.
template <class T, bool kResident>
struct Slice {
  static constexpr int kWidth = kVec<T>, kUnusedBits = kLowBits<T>;
  const T* row;
  int32_t vocab;
  int32_t shift;
  int32_t vectors;         // of the whole row
  int32_t per_warp;        // vectors
  int32_t first;           // vector
  Vec16* held;             // [warps * per_warp] the raw logits, -inf outside the row; resident only
  const Overlay* overlay;  // null: the logits are taken as they are

  FS_METHOD bool owns(int64_t id) const {
    if (id < 0 || id >= vocab) return false;
    const int32_t vector = ((int32_t)id + shift) / kVec<T>;
    return vector >= first && vector < first + warps() * per_warp;
  }

  // 16 bytes of logits, as they are.
  FS_METHOD Vec16 fetch(int32_t vector) const {
    const int32_t id = vector * kVec<T> - shift;
    if (id >= 0 && id + kVec<T> <= vocab) return load_global16(row + id);
    Vec16 v;
#pragma unroll
    for (int w = 0; w < 4; ++w) v.word[w] = 0;
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) {
      const bool inside = id + i >= 0 && id + i < vocab;
      if constexpr (sizeof(T) == 4) {
        v.word[i] = inside ? load_global((const uint32_t*)row + id + i) : 0xff800000u;
      } else {
        const uint32_t none = sizeof(T) == 2 && kLowBits<T> == 16 ? 0xff80u : 0xfc00u;
        const uint32_t bits = inside ? load_global((const uint16_t*)row + id + i) : none;
        v.word[i / 2] |= bits << 16 * (i & 1);
      }
    }
    return v;
  }

  template <bool kFirst>
  FS_METHOD Vec16 raw(int32_t vector) const {
    if constexpr (!kResident) return fetch(vector);
    if constexpr (kFirst) return held[vector - first] = fetch(vector);
    return held[vector - first];
  }

  FS_METHOD void process(const Vec16& v, int32_t vector, float (&x)[kVec<T>]) const {
    unpack<T>(v, x);
    if (!overlay) return;
    const int32_t id = vector * kVec<T> - shift;
    if (overlay->mask) {
      const int32_t word = id >> 5, bit = id & 31;
      uint32_t allowed = overlay->mask_word(word) >> bit;
      if (bit + kVec<T> > 32) allowed |= overlay->mask_word(word + 1) << (32 - bit);
#pragma unroll
      for (int i = 0; i < kVec<T>; ++i) {
        if (!(allowed >> i & 1)) x[i] = -INFINITY;
      }
    }
    if (overlay->edited) {
      const int32_t position = (vector - first) * kVec<T>;
      uint32_t marks = overlay->edited[position >> 5] >> (position & 31) & ((1u << kVec<T>)-1);
      // A loop with one look-up in it is less code than a look-up for each.
      for (; marks; marks &= marks - 1) {
        const int edited = __ffs((int)marks) - 1;
        const float value = edited_value(overlay->table, id + edited);
#pragma unroll
        for (int i = 0; i < kVec<T>; ++i) x[i] = i == edited ? value : x[i];
      }
    }
  }

  // One logit behind the mask.
  FS_METHOD float masked(int32_t id) const {
    const bool gone = overlay && overlay->mask && !allowed(overlay->mask, overlay->mask_words, id);
    return gone ? -INFINITY : logit(row, id);
  }

  // One processed logit of this slice.
  FS_METHOD float value(int32_t id) const {
    if (overlay && overlay->edited) {
      const int32_t position = id + shift - first * kVec<T>;
      if (overlay->edited[position >> 5] >> (position & 31) & 1) {
        return edited_value(overlay->table, id);
      }
    }
    return masked(id);
  }

  FS_METHOD int32_t begin() const { return first + warp() * per_warp; }
  FS_METHOD int32_t end() const {
    return begin() + per_warp < vectors ? begin() + per_warp : vectors;
  }
};

template <class T, bool kResident>
FS_DEVICE Slice<T, kResident> make_slice(const Batch& batch, int64_t r, int rank, int parts) {
  const Logits& l = batch.logits;
  Slice<T, kResident> s = {};
  s.row = (const T*)l.data + r * l.stride;
  s.vocab = l.vocab;
  s.shift = (int32_t)((uintptr_t)s.row % 16 / sizeof(T));
  s.vectors = (s.shift + s.vocab + kVec<T> - 1) / kVec<T>;
  s.per_warp = vectors_per_warp(s.vocab, (int32_t)sizeof(T), parts * warps());
  s.first = rank * warps() * s.per_warp;
  return s;
}

// Calls f(x, id) for every position of the slice, several loads ahead; x is -inf outside the row.
// kFirst: the logits have not been read before.
template <bool kFirst, class T, bool kResident, class F>
FS_DEVICE void each_maybe_first(const Slice<T, kResident>& s, F f) {
  // Logits of a lane in one go: from device memory many, so that loads overlap.
  constexpr int kAtOnce = kFirst ? 16 : kResident ? kVec<T> : 8;
  constexpr int kAhead = kAtOnce / kVec<T>;
  const int32_t end = s.end();
  for (int32_t v = s.begin() + lane(); v < end; v += 32 * kAhead) {
    Vec16 raw[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (v + 32 * u < end) raw[u] = s.template raw<kFirst>(v + 32 * u);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (v + 32 * u < end) {
        float x[kVec<T>];
        s.process(raw[u], v + 32 * u, x);
#pragma unroll
        for (int i = 0; i < kVec<T>; ++i) f(x[i], (v + 32 * u) * kVec<T> + i - s.shift);
      }
    }
  }
}

template <class T, bool kResident, class F>
FS_DEVICE void each_first(const Slice<T, kResident>& s, F f) {
  each_maybe_first<true>(s, f);
}
template <class T, bool kResident, class F>
FS_DEVICE void each(const Slice<T, kResident>& s, F f) {
  each_maybe_first<false>(s, f);
}

// Calls f(id, entry's flags, bias) for the row's edits that this slice owns.
template <class S, class F>
FS_DEVICE void each_edit(const Batch& batch, int64_t r, const RowParams& p, const S& s, F f) {
  const Rows& rows = batch.rows;
  if (rows.bias.row_ptr) {
    const int64_t begin = rows.bias.row_ptr[r], end = rows.bias.row_ptr[r + 1];
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      const int64_t id = load_global(rows.bias.ids + i);
      if (s.owns(id)) f((int32_t)id, kHasBias, load_global(rows.bias.values + i));
    }
  }
  const auto ids = [&](const TokenIds& list, uint32_t flag) {
    for (int64_t i = threadIdx.x; i < list.length; i += blockDim.x) {
      const int64_t id = load_global(list.data + r * list.stride + i);
      if (s.owns(id)) f((int32_t)id, flag, 0.0f);
    }
  };
  if (rows.output.data && penalises_output(p)) ids(rows.output, 1);
  if (rows.prompt.data && penalises_prompt(p)) ids(rows.prompt, kInPrompt);
}

// How many edits the row may have, all slices together.
FS_DEVICE int64_t count_edits(const Batch& batch, int64_t r, const RowParams& p) {
  const Rows& rows = batch.rows;
  int64_t n = 0;
  if (rows.bias.row_ptr) n += rows.bias.row_ptr[r + 1] - rows.bias.row_ptr[r];
  if (rows.output.data && penalises_output(p)) n += rows.output.length;
  if (rows.prompt.data && penalises_prompt(p)) n += rows.prompt.length;
  return n;
}

// Where the row's shared table begins: every row has room for two slots per edit.
FS_DEVICE int64_t table_offset(const Batch& batch, int64_t r) {
  const Rows& rows = batch.rows;
  const int64_t before = rows.bias.row_ptr ? rows.bias.row_ptr[r] : 0;
  const int64_t lists =
      (rows.output.data ? rows.output.length : 0) + (rows.prompt.data ? rows.prompt.length : 0);
  return 2 * (before + r * lists);
}

// Stages 2 and 3. Few edits go to a table of this block's own (`near`), many to the row's shared
// one in device memory (`far`); `sync_team` is the barrier of the blocks that share it.
template <class S, class Sync>
FS_DEVICE void apply_edits(const Batch& batch, int64_t r, const RowParams& p, Entry* near,
                           uint32_t* bitmap, Entry* far, int rank, int parts, Sync sync_team,
                           Overlay& overlay, const S& s) {
  const int64_t n = count_edits(batch, r, p);
  if (n == 0) return;
  const bool own = n <= kPrivateEntries;
  const Table table = {own ? near : far + table_offset(batch, r), (uint32_t)(2 * n)};
  const int32_t words = warps() * s.per_warp * S::kWidth / 32;
  for (int32_t i = (int32_t)threadIdx.x; i < words; i += (int32_t)blockDim.x) bitmap[i] = 0;
  const uint32_t start = (own ? 0 : rank * blockDim.x) + threadIdx.x;
  const uint32_t step = (own ? 1 : parts) * blockDim.x;
  for (uint32_t i = start; i < table.size; i += step) table.entries[i] = Entry{-1, 0, 0.0f};
  own ? __syncthreads() : sync_team();

  each_edit(batch, r, p, s, [&](int32_t id, uint32_t flag, float bias) {
    Entry& entry = claim(table, id);
    if (flag == 1) {
      atomicAdd(&entry.count, 1u);
    } else {
      atomicOr(&entry.count, flag);
    }
    if (flag == kHasBias) entry.value = bias;
  });
  __syncthreads();

  for (uint32_t i = threadIdx.x; i < table.size; i += blockDim.x) {
    Entry& entry = table.entries[i];
    const int32_t id = *(volatile int32_t*)&entry.id;
    if (id < 0 || !s.owns(id)) continue;
    float x = s.masked(id);
    if (entry.count & kHasBias) x = x + entry.value;
    const int32_t count = (int32_t)(entry.count & kCount);
    entry.value = penalise(x, p, count, count > 0 || (entry.count & kInPrompt));
    const int32_t position = id + s.shift - s.first * S::kWidth;
    atomicOr(bitmap + (position >> 5), 1u << (position & 31));
  }
  if (threadIdx.x == 0) {
    overlay.edited = bitmap;
    overlay.table = table;
  }
  __syncthreads();
}

}  // namespace fastsample

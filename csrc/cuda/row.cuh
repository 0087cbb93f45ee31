// A row as the stages read it: a block's slice of its logits, upcast and with the mask and the
// edits applied at each reading.
#pragma once

#include <math.h>

#include "core/process.h"
#include "cuda/edits.cuh"

namespace fastsample {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

// Low bits that are 0 in the keys of all unedited logits.
template <class T>
constexpr int kLowBits = 0;
template <>
constexpr int kLowBits<Half> = 13;
template <>
constexpr int kLowBits<BFloat> = 16;

// Logits per 16-byte vector.
template <class T>
constexpr int kVec = 16 / (int)sizeof(T);

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

// One of a row's logits, as the caller gave them.
template <class T>
FS_DEVICE float logit(const T* row, int32_t id) {
  if constexpr (sizeof(T) == 4) {
    return load_global((const float*)row + id);
  } else {
    return upcast(T{load_global((const uint16_t*)row + id)});
  }
}

// What lies over a row's logits. It is in shared memory rather than in registers, since most rows
// have none of it.
struct Overlay {
  const int32_t* mask;  // null: every token is allowed
  int64_t mask_words;
  uint32_t* edited;  // a bit per position of the slice; null: no token is edited
  EditTable table;

  FS_METHOD uint32_t mask_word(int32_t index) const {
    return index >= 0 && index < mask_words ? (uint32_t)load_global(mask + index) : 0;
  }
};

// Where a row is read after its first pass: held in shared memory, or from the L2 cache. And
// whether anything may lie over it. The code for a plain row is far less.
template <bool kHeld, bool kBare>
struct Reading {
  static constexpr bool kResident = kHeld, kPlain = kBare;
};

// Where the part of a row lies that one block works on. Positions count from the last 16-byte
// boundary at or before the row's begin: id = position - shift. A vector is kVec positions.
struct Extent {
  const void* data;  // of the whole row
  int32_t vocab;
  float nothing;  // what stands outside the row and for masked tokens: -inf, or 0
  int32_t shift;
  int32_t vectors;   // of the whole row
  int32_t per_warp;  // vectors
  int32_t first;     // vector
};

template <class T, class How>
struct Slice : Extent {
  static constexpr bool kResident = How::kResident, kPlain = How::kPlain;
  static constexpr int kWidth = kVec<T>, kUnusedBits = kLowBits<T>;
  Vec16* held;               // resident only: [warps * per_warp] raw logits
  const Overlay* lies_over;  // null: the logits are used as they are

  FS_METHOD const T* row() const { return (const T*)data; }
  FS_METHOD const Overlay* overlay() const { return How::kPlain ? nullptr : lies_over; }

  FS_METHOD bool owns(int64_t id) const {
    if (id < 0 || id >= vocab) return false;
    const int32_t vector = ((int32_t)id + shift) / kVec<T>;
    return vector >= first && vector < first + warps() * per_warp;
  }

  // Whether a vector lies within the row as a whole.
  FS_METHOD bool inside(int32_t vector) const {
    const int32_t id = vector * kVec<T> - shift;
    return id >= 0 && id + kVec<T> <= vocab;
  }

  // A vector of logits, as they are.
  FS_METHOD Vec16 fetch_inside(int32_t vector) const {
    return load_global16(row() + vector * kVec<T> - shift);
  }
  FS_METHOD Vec16 fetch_edge(int32_t vector) const {
    const int32_t id = vector * kVec<T> - shift;
    Vec16 v = {};
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) {
      const bool is = id + i >= 0 && id + i < vocab;
      if constexpr (sizeof(T) == 4) {
        v.word[i] = is ? load_global((const uint32_t*)row() + id + i) : nothing_bits();
      } else {
        const uint32_t bits = is ? load_global((const uint16_t*)row() + id + i) : nothing_bits();
        v.word[i / 2] |= bits << 16 * (i & 1);
      }
    }
    return v;
  }
  FS_METHOD uint32_t nothing_bits() const {
    return nothing == 0 ? 0 : sizeof(T) == 4 ? 0xff800000u : kLowBits<T> == 16 ? 0xff80u : 0xfc00u;
  }

  // One vector of a row that has been read before.
  FS_METHOD Vec16 raw(int32_t vector) const {
    if constexpr (How::kResident) return load_shared16(held + vector - first);
    return inside(vector) ? fetch_inside(vector) : fetch_edge(vector);
  }

  // Several from device memory: at v, v + 32, ... before `end`. The loads overlap. Few vectors are
  // edges, so the code for them is there once.
  template <int kAhead>
  FS_METHOD void fetch(int32_t v, int32_t end, Vec16 (&raw)[kAhead]) const {
    const int32_t whole = (shift + vocab) / kVec<T>;  // the first past those that lie within
    const int32_t stop = whole < end ? whole : end;
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      raw[u] = {};
      if (v + 32 * u < stop && (u || inside(v))) raw[u] = fetch_inside(v + 32 * u);
    }
    const int32_t ahead = whole - v;  // to the last edge
    const bool last = whole < end && ahead >= 0 && ahead < 32 * kAhead && ahead % 32 == 0;
    if (!last && (v >= end || inside(v))) return;
#pragma unroll 1
    for (int i = 0; i < kAhead; ++i) {
      Vec16 next = raw[0];
      if (v + 32 * i < end && !inside(v + 32 * i)) next = fetch_edge(v + 32 * i);
#pragma unroll
      for (int u = 1; u < kAhead; ++u) raw[u - 1] = raw[u];
      raw[kAhead - 1] = next;
    }
  }

  // The raw logits upcast, with the mask and the edits applied. What is held has been through the
  // scan, which left in it what its dtype can hold.
  FS_METHOD void process(Vec16 v, int32_t vector, float (&x)[kVec<T>]) const {
    if (!kResident && overlay() && overlay()->mask) apply_mask(vector, v);
    unpack<T>(v, x);
    if constexpr (kResident && sizeof(T) == 4) return;
    if (overlay() && overlay()->edited) apply_edits(vector, x);
  }

  // The same in the scan of a row that is held from then on: every dtype can hold that a token is
  // masked, but only float32 an edited logit.
  FS_METHOD void process_held(int32_t vector, float (&x)[kVec<T>]) const {
    Vec16 v = load_shared16(held + vector - first);
    if (overlay()->mask) apply_mask(vector, v);
    unpack<T>(v, x);
    if (overlay()->edited) apply_edits(vector, x);
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) v.word[i] = to_bits(x[i]);
    }
    store_shared16(held + vector - first, v);
  }

  FS_METHOD void apply_mask(int32_t vector, Vec16& v) const {
    const int32_t id = vector * kVec<T> - shift;
    const int32_t word = id >> 5, bit = id & 31;
    uint32_t allowed = overlay()->mask_word(word) >> bit;
    if (bit + kVec<T> > 32) allowed |= overlay()->mask_word(word + 1) << (32 - bit);
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) {
      if (allowed >> i & 1) continue;
      if constexpr (sizeof(T) == 4) {
        v.word[i] = nothing_bits();
      } else {
        v.word[i / 2] = (v.word[i / 2] & 0xffffu << 16 * (~i & 1)) | nothing_bits() << 16 * (i & 1);
      }
    }
  }

  FS_METHOD void apply_edits(int32_t vector, float (&x)[kVec<T>]) const {
    const int32_t id = vector * kVec<T> - shift;
    const int32_t position = (vector - first) * kVec<T>;
    uint32_t marks = overlay()->edited[position >> 5] >> (position & 31) & ((1u << kVec<T>)-1);
    // A loop around one look-up is less code than a look-up for each logit.
    for (; marks; marks &= marks - 1) {
      const int edited = __ffs((int)marks) - 1;
      const float value = overlay()->table.x_of(id + edited);
#pragma unroll
      for (int i = 0; i < kVec<T>; ++i) x[i] = i == edited ? value : x[i];
    }
  }

  // One logit after stage 1.
  FS_METHOD float masked(int32_t id) const {
    const bool gone =
        overlay() && overlay()->mask && !allowed(overlay()->mask, overlay()->mask_words, id);
    return gone ? nothing : logit(row(), id);
  }

  // One processed logit of this slice.
  FS_METHOD float value(int32_t id) const {
    if (overlay() && overlay()->edited) {
      const int32_t position = position_of(id);
      if (overlay()->edited[position >> 5] >> (position & 31) & 1) return overlay()->table.x_of(id);
    }
    return masked(id);
  }

  // Of a token, within the slice.
  FS_METHOD int32_t position_of(int32_t id) const { return id + shift - first * kVec<T>; }

  // The vectors of the calling thread's warp.
  FS_METHOD int32_t begin() const { return first + warp() * per_warp; }
  FS_METHOD int32_t end() const {
    return begin() + per_warp < vectors ? begin() + per_warp : vectors;
  }
};

template <class T, class How>
FS_DEVICE Slice<T, How> make_slice(const Batch& batch, int64_t r, int rank, int32_t per_warp) {
  const Logits& l = batch.logits;
  Slice<T, How> s = {};
  s.data = (const T*)l.data + r * l.stride;
  s.vocab = l.vocab;
  s.nothing = l.input == kProbabilities ? 0.0f : -INFINITY;
  s.shift = (int32_t)((uintptr_t)s.data % 16 / sizeof(T));
  s.vectors = (s.shift + s.vocab + kVec<T> - 1) / kVec<T>;
  s.per_warp = per_warp;
  s.first = rank * warps() * s.per_warp;
  return s;
}

// Calls f(x, id) for the positions of one vector.
template <class S, class F>
FS_DEVICE void each_of(const S& s, int32_t vector, const float (&x)[S::kWidth], F f) {
#pragma unroll
  for (int i = 0; i < S::kWidth; ++i) f(x[i], vector * S::kWidth + i - s.shift);
}

// Calls f(x, id) for every position of the slice, whose logits have not been read before; x is
// `nothing` outside the row. Many loads are under way at once, and all are stored, where the row is
// held, before any is looked at. What lies over a row is much code, which is there once.
template <class T, class How, class F>
FS_DEVICE void each_first(const Slice<T, How>& s, F f) {
  constexpr int kAhead = How::kResident ? 8 : 4;  // where 8 would spill registers
  const int32_t end = s.end();
#pragma unroll 1
  for (int32_t v = s.begin() + lane(); v < end; v += 32 * kAhead) {
    Vec16 raw[kAhead];
    s.fetch(v, end, raw);
    if constexpr (How::kResident) {
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (v + 32 * u < end) store_shared16(s.held + v + 32 * u - s.first, raw[u]);
      }
    }
    float x[kVec<T>];
    if (!s.overlay()) {
      constexpr int kSide = kAhead * kVec<T> > 32 ? kAhead / 2 : kAhead;  // more is too much code
#pragma unroll 1
      for (int32_t at = v; at < v + 32 * kAhead; at += 32 * kSide) {
#pragma unroll
        for (int u = 0; u < kSide; ++u) {
          if (at + 32 * u >= end) continue;
          unpack<T>(raw[u], x);
          each_of(s, at + 32 * u, x, f);
        }
#pragma unroll
        for (int u = kSide; u < kAhead; ++u) raw[u - kSide] = raw[u];
      }
      continue;
    }
#pragma unroll 1
    for (int32_t at = v; at < end && at < v + 32 * kAhead; at += 32) {
      if constexpr (How::kResident) {
        s.process_held(at, x);
      } else {
        s.process(raw[0], at, x);
#pragma unroll
        for (int u = 1; u < kAhead; ++u) raw[u - 1] = raw[u];
      }
      each_of(s, at, x, f);
    }
  }
}

// Later passes, from shared memory, or with some loads ahead from the L2 cache: calls f(x, id) for
// every vector of the slice, with the id of its first position.
template <class T, class How, class F>
FS_DEVICE void each_vector(const Slice<T, How>& s, F f) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  constexpr int kFromCache = kVec<T>;  // where more would spill registers
#else
  constexpr int kFromCache = 8;
#endif
  constexpr int kAhead = How::kResident ? 1 : kFromCache / kVec<T>;
  const int32_t end = s.end();
  for (int32_t v = s.begin() + lane(); v < end; v += 32 * kAhead) {
    Vec16 raw[kAhead];
    if constexpr (How::kResident) {
      raw[0] = load_shared16(s.held + v - s.first);
    } else {
      s.fetch(v, end, raw);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (v + 32 * u >= end) continue;
      float x[kVec<T>];
      s.process(raw[u], v + 32 * u, x);
      f(x, (v + 32 * u) * kVec<T> - s.shift);
    }
  }
}

// Calls f(x, id) for every position of the slice. kSide calls are side by side in the code: more
// than four would take more registers than there are.
template <int kSide = 4, class T, class How, class F>
FS_DEVICE void each(const Slice<T, How>& s, F f) {
  constexpr int kN = kVec<T>;
  each_vector(s, [&](float (&x)[kN], int32_t id) {
#pragma unroll 1
    for (int from = 0; from < kN; from += kSide) {
#pragma unroll
      for (int i = 0; i < kSide; ++i) f(x[i], id + from + i);
#pragma unroll
      for (int i = kSide; i < kN; ++i) x[i - kSide] = x[i];
    }
  });
}

// The same for the passes of rare filters: a loop around one call of f, which is far less code, and
// little slower where f does much.
template <class T, class How, class F>
FS_DEVICE void each_rolled(const Slice<T, How>& s, F f) {
  const int32_t end = s.end();
#pragma unroll 1
  for (int32_t v = s.begin() + lane(); v < end; v += 32) {
    float x[kVec<T>];
    s.process(s.raw(v), v, x);
#pragma unroll 1
    for (int i = 0; i < kVec<T>; ++i) {
      f(x[0], v * kVec<T> + i - s.shift);
#pragma unroll
      for (int j = 1; j < kVec<T>; ++j) x[j - 1] = x[j];
    }
  }
}

// How many low bits of every key in the slice are 0.
template <class S>
FS_DEVICE int low_bits(const S& slice) {
  return slice.overlay() && slice.overlay()->edited ? 0 : S::kUnusedBits;
}

}  // namespace fastsample

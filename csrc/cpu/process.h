// Stages 0 to 4 for one row: processed logits, block by block, and the one streaming pass over
// them.
#pragma once

#include <math.h>

#include "core/process.h"
#include "cpu/half.h"
#include "cpu/kernel.h"

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
  if (!row.edits) return buffer;
  const Edit* end = row.edits + row.edit_start[b + 1];
  for (const Edit* e = row.edits + row.edit_start[b]; e < end; ++e) buffer[e->id % kBlock] = e->x;
  return buffer;
}

struct Peak {
  float max;
  bool nan;
};

// Watches nothing of the streaming pass.
struct Nothing {
  FS_MEMBER void see(vf, vf) {}
  template <class T>
  FS_MEMBER void see(const T*) {}
  FS_MEMBER bool wants(float) const { return false; }
  FS_MEMBER void end(int, float) {}
};

// Lanes in which every test so far has held; several masks, as one test would wait for another.
template <class M>
struct Held {
  M m[kMaskChains];

  FS_MEMBER Held() {
    for (M& lanes : m) set_all(lanes);
  }
  FS_MEMBER M& operator[](int i) { return m[i % kMaskChains]; }
  FS_MEMBER bool all() const {
    M every = m[0];
    for (const M& lanes : m) every = (M)(every & lanes);
    return fastsample::all(every);
  }
};

// Whether no NaN has been met.
struct Sound {
  Held<Mask> floats;
  Held<Mask16> halves;
  bool negative = false;  // whether the latest block of 16-bit values had none from 0 up

  FS_MEMBER void test(int i, vf a, vf b) { floats[i] = ordered_where(floats[i], a, b); }
  // As unsigned numbers, the only bits above those of -inf are those of negative NaNs.
  FS_MEMBER void test(int i, vs bits, int16_t bottom) {
    halves[i] = le_unsigned_where(halves[i], bits, bottom);
  }
  FS_MEMBER bool all() const { return floats.all() && halves.all(); }
};

// Maximum of kBlock values; notes NaNs, two vectors at a time.
template <class Watch>
FS_INLINE float block_peak(const float* x, Sound& sound, Watch& watch) {
  constexpr int kStreams = 4;
  vf m[kStreams];
  for (int u = 0; u < kStreams; ++u) m[u] = splat(-INFINITY);
  for (int i = 0; i < kBlock; i += kStreams * kLanes) {
    vf v[kStreams];
    for (int u = 0; u < kStreams; ++u) v[u] = load(x + i + u * kLanes);
    for (int u = 0; u < kStreams; u += 2) sound.test(i / kLanes / 2 + u / 2, v[u], v[u + 1]);
    for (int u = 0; u < kStreams; ++u) m[u] = max(m[u], v[u]);
    for (int u = 0; u < kStreams; u += 2) watch.see(v[u], v[u + 1]);
  }
  return reduce_max(max(max(m[0], m[1]), max(m[2], m[3])));
}

// The highest of a block of negative 16-bit floats, whose bits are the lowest; false where others
// are among them.
template <class T>
FS_INLINE bool highest_negative(const T* x, int16_t* highest) {
  vs low = load_as<vs>(x);
  Held<Mask16> negative;
  for (int i = 0; i < kBlock; i += 2 * kLanes) {
    const vs v = load_as<vs>(x + i);
    low = min(low, v);
    negative[i / kLanes / 2] = le_where(negative[i / kLanes / 2], v, (int16_t)bottom<T>());
  }
  *highest = reduce_min(low);
  return negative.all();
}

// The bits of the highest of a block's 16-bit floats. Of those from 0 up they are the highest.
template <class T>
FS_INLINE int16_t highest(const T* x, Sound& sound) {
  int16_t bits;
  if (sound.negative && highest_negative(x, &bits)) return bits;
  vs high = load_as<vs>(x);
  for (int i = 0; i < kBlock; i += 2 * kLanes) {
    const vs v = load_as<vs>(x + i);
    high = max(high, v);
    sound.test(i / kLanes / 2, v, (int16_t)bottom<T>());
  }
  bits = reduce_max(high);
  if (bits > T::kInfinity) sound.floats[0] = from_bits(0);
  sound.negative = bits < 0;
  if (sound.negative) highest_negative(x, &bits);
  return bits;
}

// The same of 16-bit values, twice as many at a time. Who watches is shown only blocks whose
// maximum is of interest.
template <class T, class Watch>
FS_INLINE float block_peak(const T* x, Sound& sound, Watch& watch) {
  const float peak = upcast(T{(uint16_t)highest(x, sound)});
  if (watch.wants(peak)) watch.see(x);
  return peak;
}

template <class T>
FS_INLINE float block_peak(const T* x, Sound& sound) {
  Nothing nothing;
  return block_peak(x, sound, nothing);
}

// Asks for every line of a block that will be read soon: on Zen a line does not bring its
// neighbour.
template <class T>
FS_INLINE void prefetch_block(const T* x) {
  for (int i = 0; i < kBlock; i += 64 / (int)sizeof(T)) __builtin_prefetch(x + i);
}

FS_INLINE float row_max(float* block_max, int blocks) {
  for (int i = 0; i < kPad; ++i) block_max[blocks + i] = -INFINITY;
  vf peak = splat(-INFINITY);
  for (int b = 0; b < blocks; b += kLanes) peak = max(peak, load(block_max + b));
  return reduce_max(peak);
}

// The streaming pass over a row without edits: the maximum of every block and of the row. `watch`
// sees every pair of vectors of a block, then the block's maximum.
template <class T, class Watch>
FS_INLINE Peak scan(const Row<T>& row, float* block_max, Watch watch) {
  float buffer[kBlock];
  Sound sound;
  const auto look = [&](int b, const auto* x) {
    block_max[b] = block_peak(x, sound, watch);
    watch.end(b, block_max[b]);
  };
  const auto look_at_logits = [&](int b) {
    constexpr int kSoon = 8192 / (int)sizeof(T);
    prefetch_block(row.logits + b * kBlock + kSoon);
    look(b, row.logits + b * kBlock);
  };
  const int untouched = row.mask ? 0 : row.vocab / kBlock;
  for (int b = 0; b < untouched; ++b) look_at_logits(b);
  for (int b = untouched; b < row.blocks; ++b) {
    if (is_allowed(row, b)) {
      look_at_logits(b);
    } else if (is_ruled_out(row, b)) {
      block_max[b] = -INFINITY;
      watch.end(b, -INFINITY);
    } else {
      look(b, block(row, b, buffer));
    }
  }
  return Peak{row_max(block_max, row.blocks), !sound.all()};
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

// Calls f(id, kind, bias) for every change of a row to a token within the vocabulary: bias, output,
// prompt, which is the order in which a token needs them.
template <class F>
FS_INLINE void each_change(const Batch& batch, int64_t r, const RowParams& params, F f) {
  const Rows& rows = batch.rows;
  const auto inside = [&](int64_t id) { return id >= 0 && id < batch.logits.vocab; };
  if (rows.bias.row_ptr) {
    for (int64_t i = rows.bias.row_ptr[r]; i < rows.bias.row_ptr[r + 1]; ++i) {
      const int64_t id = rows.bias.ids[i];
      if (inside(id)) f((int32_t)id, kBias, rows.bias.values[i]);
    }
  }
  const auto each_id = [&](const TokenIds& ids, ChangeKind kind) {
    const int64_t* id = ids.data + r * ids.stride;
    for (int64_t i = 0; i < ids.length; ++i) {
      if (inside(id[i])) f((int32_t)id[i], kind, 0.0f);
    }
  };
  if (rows.output.data && penalises_output(params)) each_id(rows.output, kOutput);
  if (rows.prompt.data && penalises_prompt(params)) each_id(rows.prompt, kPrompt);
}

FS_INLINE bool has_changes(const Rows& rows) {
  return rows.bias.row_ptr || rows.output.data || rows.prompt.data;
}

// Sorts a row's changes by block (a stable counting sort), each with its kind and bias; returns how
// many there are.
template <class T>
int sort_changes(const Batch& batch, int64_t r, const RowParams& params, const Row<T>& row,
                 const Workspace& ws) {
  int32_t* start = ws.edit_start;
  memset(start, 0, (size_t)(row.blocks + 1) * sizeof *start);
  each_change(batch, r, params, [&](int32_t id, ChangeKind, float) { ++start[id / kBlock]; });
  int32_t total = 0;
  for (int b = 0; b <= row.blocks; ++b) {
    total += start[b];
    start[b] = total - start[b];
  }
  if (!total) return 0;
  each_change(batch, r, params, [&](int32_t id, ChangeKind kind, float bias) {
    ws.edits[start[id / kBlock]++] = Edit{id, kind, bias};
  });
  // Each start has moved to the next block's: shift them back.
  memmove(start + 1, start, (size_t)row.blocks * sizeof *start);
  start[0] = 0;
  return total;
}

// A token of the block at hand while its changes are counted.
struct Change {
  int32_t block;
  int32_t count;      // occurrences in the output so far
  float base, value;  // with its bias; with what it has been changed to so far
};

// Stages 2 and 3: makes every change an edit, of which a token's last one counts, and keeps the
// block maxima up to date. A token's branches would be guessed wrongly, so there are none.
template <class T>
void apply_changes(const RowParams& params, int n, const Workspace& ws, Row<T>* row, Peak* peak) {
  Change changes[kBlock];
  for (Change& c : changes) c.block = -1;
  bool broken = peak->nan;
  for (Edit* e = ws.edits; e < ws.edits + n; ++e) {
    const int32_t b = e->id / kBlock;
    Change& c = changes[e->id % kBlock];
    const float raw = allowed_logit(*row, e->id);
    const bool known = c.block == b, bias = e->kind == kBias;
    const float old = known ? c.value : raw, base = known ? c.base : raw;
    const int32_t count = (known ? c.count : 0) + (e->kind == kOutput);
    const float biased = bias ? base + e->x : base, penalised = penalise(base, params, count, true);
    const float x = bias ? biased : penalised;
    c = Change{b, count, biased, x};
    e->x = x;
    broken |= x != x;
    // Where the block's maximum was lowered the block is looked at again; NaN stands for that.
    float& max = ws.block_max[b];
    max = x > max ? x : old == max && x != old ? NAN : max;
  }
  row->edits = ws.edits;
  row->edit_start = ws.edit_start;
  float buffer[kBlock];
  Sound sound;
  for (int b = 0; b < row->blocks; ++b) {
    if (ws.block_max[b] == ws.block_max[b]) continue;
    ws.block_max[b] = block_peak(block(*row, b, buffer), sound);
  }
  *peak = Peak{row_max(ws.block_max, row->blocks), broken || !sound.all()};
}

}  // namespace
}  // namespace fastsample

// Stage 3's history edits: which tokens would repeat what the history ends with, and how far back
// that goes.
#pragma once

#include "core/history.h"
#include "cpu/simd.h"

namespace fastsample {
namespace {

// Writes the row's ids within the vocabulary, the last one first, `most` of them at most; returns
// how many there are. An id of no token follows them, as many times as a vector has lanes.
inline int32_t collect_history(const Batch& batch, int64_t r, int32_t most, int32_t* history) {
  int32_t n = 0;
  const auto collect = [&](const TokenIds& ids) {
    const int64_t* id = ids_of(ids, r);
    for (int64_t i = ids.length; i-- > 0 && n < most;) {
      history[n] = (int32_t)id[i];
      n += (uint64_t)id[i] < (uint64_t)num_ids(batch);
    }
  };
  if (batch.rows.drafted.data) collect(batch.rows.drafted);
  if (batch.rows.output.data) collect(batch.rows.output);
  if (batch.rows.prompt.data) collect(batch.rows.prompt);
  store(history + n, splat(-1));
  return n;
}

// DRY's breakers as a bit per token.
class Breakers {
 public:
  void read(const Batch& batch, int64_t r, uint32_t* words) {
    const TokenIds& ids = batch.rows.breakers;
    if (!ids.data) return;
    words_ = words;
    memset(words, 0, ((size_t)num_ids(batch) / 32 + 1) * sizeof *words);
    for (int64_t i = 0; i < ids.length; ++i) {
      const int64_t id = ids_of(ids, r)[i];
      if ((uint64_t)id < (uint64_t)num_ids(batch)) words[id / 32] |= 1u << (id & 31);
    }
  }
  bool has(int32_t id) const { return words_ && words_[id / 32] >> (id & 31) & 1; }
  int32_t first_of(const int32_t* ids, int32_t n) const {
    int32_t i = words_ ? 0 : n;
    while (i < n && !has(ids[i])) ++i;
    return i;
  }

 private:
  const uint32_t* words_ = nullptr;
};

// Calls f(j, equal) for every j > 0 from which on one or more of n ids are those from 0 on. The
// time is linear, however often the ids repeat: this is the Z algorithm, which looks for equal ids
// only past those that are known to be equal from an earlier j on, but jumps from one occurrence of
// id 0 to the next.
template <class F>
void each_return(const int32_t* ids, int32_t n, int32_t* equal, F f) {
  const vi first = splat(ids[0]);
  int32_t begin = 0, end = 0;  // of the known ones that reach farthest
  for (int32_t at = 0; at < n; at += kLanes) {
    store(equal + at, vi{});
    uint32_t found = bits(nonzero((vi)(load(ids + at) == first)));
    if (at == 0) found &= ~1u;
    for (; found; found &= found - 1) {
      const int32_t j = at + __builtin_ctz(found);
      int32_t length = 0;
      if (j < end) length = equal[j - begin] < end - j ? equal[j - begin] : end - j;
      if (j + length >= end) {
        while (ids[j + length] == ids[length]) ++length;
        begin = j;
        end = j + length;
      }
      equal[j] = length;
      f(j, length);
    }
  }
}

// Edits of tokens whose logits are here, but for most that another one of the same token makes
// needless.
class Repetitions {
 public:
  Repetitions(const Batch& batch, Edit* to)
      : first_(batch.rows.ids.first), vocab_(batch.logits.vocab), begin_(to), end_(to) {
    for (Recent& recent : recent_) recent = Recent{-1, 0};
  }
  int32_t count() const { return (int32_t)(end_ - begin_); }
  void add(int32_t token, int32_t repetition) {
    const int64_t id = token - first_;
    if (id < 0 || id >= vocab_) return;
    Recent& recent = recent_[(uint32_t)id % kRecent];
    if (recent.id == id && recent.repetition >= repetition) return;
    recent = Recent{(int32_t)id, repetition};
    *end_ = Edit{(int32_t)id, kRepetition, {}};
    (end_++)->repetition = repetition;
  }

 private:
  static constexpr int kRecent = 256;
  struct Recent {
    int32_t id, repetition;
  };
  const int64_t first_, vocab_;
  Edit* begin_;
  Edit* end_;
  Recent recent_[kRecent];
};

// Writes the edits that the row's history asks for to ws.repetitions, and to ws.powers what they
// are weighed by; returns how many there are. A token may have several.
inline int32_t find_repetitions(const Batch& batch, int64_t r, const RowParams& p,
                                const Workspace& ws) {
  const bool all = p.no_repeat_ngram_size > 0 || p.dry_range == 0;
  const int32_t* ids = ws.history;
  const int32_t n = collect_history(batch, r, all ? INT32_MAX : p.dry_range, ws.history);
  if (n == 0) return 0;
  Search search = search_for(p, n);
  Repetitions found(batch, ws.repetitions);
  if (search.before == 0) {
    for (int32_t j = 0; j < n; ++j) found.add(ids[j], kBanned);
    return found.count();  // whatever else repeats is banned too
  }
  Breakers breakers;
  if (search.window > 0) breakers.read(batch, r, ws.breakers);
  search.unbroken = breakers.first_of(ids, search.window);
  if (most_equal(search, 1, INT32_MAX) == 0) return 0;
  int32_t longest = 0;
  each_return(ids, n, ws.equal, [&](int32_t j, int32_t equal) {
    const int32_t length = repetition(search, j, equal), id = ids[j - 1];
    if (length == 0 || (length != kBanned && breakers.has(id))) return;
    if (length != kBanned && length > longest) longest = length;
    found.add(id, length);
  });
  float power = 1.0f;
  for (int32_t length = search.shortest; length <= longest; ++length) {
    ws.powers[length - search.shortest] = power;
    power = next_power(power, p.dry_base);
  }
  return found.count();
}

}  // namespace
}  // namespace fastsample

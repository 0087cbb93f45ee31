// Log-probabilities, ranks and top-n of one row, in float64. One block per row.
#pragma once

#include "cuda/sampled.cuh"
#include "cuda/search.cuh"

namespace fastsample {

// What the log-probabilities of one row are computed from: the distribution drawn from, or (raw)
// the logits or probabilities as given.
struct LogRow {
  RowTask task;
  KeptKeys kept;
  const RowState* state;
  bool raw, sound;  // unless sound, every log-probability is NaN
  double
      normaliser;  // raw: log of the sum of exp(x - max), or the sum of the probabilities' masses

  FS_METHOD float logprob(float x, int32_t id) const {
    if (!sound) return NAN;
    if (raw && !task.factor) return (float)(((double)x - (double)task.peak) - normaliser);
    const double w = raw ? (double)mass_in(task, x) / normaliser : share(task, *state, x, id);
    return (float)log(w);
  }
  FS_METHOD bool listed(float x, int32_t id) const {
    return raw ? key_of(x) >= task.lowest : is_kept(task, kept, x, id);
  }
};

template <class S>
FS_DEVICE LogRow raw_log_row(const Team<kBlockPolicy>& team, const S& slice, const RowTask& t) {
  LogRow row = {};
  row.task.params = t.params;
  row.task.lowest = t.lowest;
  row.raw = true;
  row.kept = everything(t);
  scan(team, slice, 0, row.task, false);
  row.sound = row.task.status == kValid;
  if (!row.sound) return row;
  set_scales(row.task, 1.0f);
  const RowTask& own = row.task;
  u64 mass = 0;
  each(slice, [&](float x, int32_t) { mass += mass_in(own, x); });
  const double total = (double)block_sum(mass);
  row.normaliser = own.factor ? total : log(total / (double)kMassUnit);
  return row;
}

// Sorts in descending order, in place, by the threads of a block; `length` is a power of two.
FS_DEVICE void sort_descending(long long* list, int64_t length) {
  for (int64_t span = 2; span <= length; span *= 2) {
    for (int64_t step = span / 2; step; step /= 2) {
      __syncthreads();
      for (int64_t i = threadIdx.x; i < length; i += threads()) {
        const int64_t other = i ^ step;
        if (other < i) continue;
        const long long a = list[i], b = list[other];
        if ((a < b) == !(i & span)) {
          list[i] = b;
          list[other] = a;
        }
      }
    }
  }
  __syncthreads();
}

// The first n listed tokens in rank order, as ranked() makes integers of them; LLONG_MIN past the
// last.
template <class S>
FS_DEVICE void list_top(const Team<kBlockPolicy>& team, const S& slice, const LogRow& row,
                        int32_t n, long long* list, int64_t length) {
  for (int64_t i = threadIdx.x; i < length; i += threads()) list[i] = LLONG_MIN;
  if (threadIdx.x == 0) team.own->listed = 0;
  note(*team.own, slice);
  const auto counts = [&](float x, int32_t, int32_t id) -> u64 { return row.listed(x, id); };
  u64 mine = 0;
  if (row.sound) each(slice, [&](float x, int32_t id) { mine += row.listed(x, id); });
  KeyPlace last = row.kept.low;
  if (block_sum(mine) > (u64)n) {
    last = nth_place(team, slice, row.kept, last.x, row.task.peak_key, (u64)n, counts);
  }
  if (row.sound) {
    each(slice, [&](float x, int32_t id) {
      const KeyPlace place = {key_of(x), id};
      if (ranks_before(last, place) || !row.listed(x, id)) return;
      list[atomicAdd(&team.own->listed, 1)] = ranked(place);
    });
  }
  sort_descending(list, length);
}

// The first num_top listed tokens; -1 and -inf past the last.
template <class S>
FS_DEVICE void write_top(const Batch& batch, const Workspace& ws, int64_t r,
                         const Team<kBlockPolicy>& team, const S& slice, const LogRow& row) {
  const Outputs& out = batch.out;
  const int32_t n = out.num_top;
  long long* list = ws.lists + blockIdx.x * ws.list_length;
  list_top(team, slice, row, n, list, ws.list_length);
  for (int32_t i = (int32_t)threadIdx.x; i < n; i += threads()) {
    const bool there = list[i] != LLONG_MIN;
    const KeyPlace place = place_of(list[i]);
    const float none = row.sound ? -INFINITY : NAN;
    store_global(out.top_ids + r * n + i, there ? (int64_t)place.id : (int64_t)-1);
    store_global(out.top_logprobs + r * n + i,
                 there ? row.logprob(from_key(place.x), place.id) : none);
  }
}

// 1 + number of tokens strictly above x.
template <class S>
FS_DEVICE int64_t rank_of(const S& slice, float x) {
  u64 above = 0;
  each(slice, [&](float other, int32_t) { above += other > x; });
  return 1 + (int64_t)block_sum(above);
}

template <class S>
FS_DEVICE void write_logprobs(const Batch& batch, const Workspace& ws, int64_t r,
                              const Team<kBlockPolicy>& team, S slice, const RowTask& t,
                              const RowState& state) {
  const Outputs& out = batch.out;
  // A row that follows a wrong draft has no token, as an invalid one has none.
  const bool valid = out.tokens[r * out.num_samples] >= 0;
  LogRow row = {t, state.drawable.kept, &state, false, valid, 0.0};
  if (out.mode == kRawLogprobs) {
    slice.lies_over = nullptr;
    if (valid) row = raw_log_row(team, slice, t);
  }
  for (int32_t j = 0; j < out.num_samples; ++j) {
    const int64_t at = r * out.num_samples + j;
    const int32_t token = (int32_t)out.tokens[at];
    const float x = valid ? slice.value(token) : 0.0f;
    const int64_t rank = valid && out.ranks ? rank_of(slice, x) : 0;
    if (threadIdx.x) continue;
    if (out.logprobs) store_global(out.logprobs + at, row.logprob(x, token));
    if (out.ranks) store_global(out.ranks + at, rank);
  }
  if (out.num_top) write_top(batch, ws, r, team, slice, row);
}

}  // namespace fastsample

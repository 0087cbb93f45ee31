// Whole rows of output, log-probabilities, ranks and top-n, from what `sample` found: a second
// kernel, so that the first one has no float64 in it. One block per row.
#pragma once

#include "cuda/sample.cuh"

namespace fastsample {

FS_DEVICE bool is_kept(const RowTask& t, KeyCut cut, float x, int32_t id) {
  return keeps(cut, key_of(x), id) && (!t.floor || mass_in(t, x) >= t.floor);
}

// filter_logits and probabilities. An invalid row keeps nothing.
template <class S>
FS_DEVICE void write_rows(const Batch& batch, int64_t r, const S& slice, const RowTask& t,
                          const RowState& state) {
  const Outputs& out = batch.out;
  const int32_t vocab = slice.vocab;
  const float divisor = t.greedy ? 1.0f : t.params->temperature;
  const double total = (double)state.total;
  each(slice, [&](float x, int32_t id) {
    if (id < 0 || id >= vocab) return;
    const bool kept = state.status == kValid && is_kept(t, state.cut, x, id);
    if (out.filtered) store_global(out.filtered + r * vocab + id, kept ? x / divisor : -INFINITY);
    if (out.probabilities) {
      const double w = kept ? (double)mass_in(t, x) : 0.0;
      store_global(out.probabilities + r * vocab + id, (float)(w / total));
    }
  });
}

// What the log-probabilities of one row are computed from: the distribution drawn from, or (raw)
// the logits as given.
struct LogRow {
  RowTask task;
  KeyCut cut;
  bool raw, sound;
  double normaliser;  // raw: log of the sum of exp(x - max); else the kept mass

  FS_METHOD float logprob(float x) const {
    if (!sound) return NAN;
    if (raw) return (float)(((double)x - (double)task.peak) - normaliser);
    return (float)log((double)mass_in(task, x) / normaliser);
  }
  FS_METHOD bool listed(float x, int32_t id) const {
    return raw ? x > -INFINITY : is_kept(task, cut, x, id);
  }
};

template <class S>
FS_DEVICE LogRow raw_log_row(const Team<kBlockPolicy>& team, const S& slice) {
  LogRow row = {};
  row.task.scale = mass_scale(1.0f);
  row.cut = kKeepAlive;
  row.raw = true;
  scan(team, slice, 0, row.task);
  row.sound = row.task.status == kValid;
  if (!row.sound) return row;
  const RowTask& t = row.task;
  u64 mass = 0;
  each(slice, [&](float x, int32_t) { mass += mass_in(t, x); });
  row.normaliser = log((double)block_sum(mass, team.own->scratch) / (double)kMassUnit);
  return row;
}

// Descending, in place, by the threads of a block; `length` is a power of two.
FS_DEVICE void sort_descending(long long* list, int64_t length) {
  for (int64_t span = 2; span <= length; span *= 2) {
    for (int64_t step = span / 2; step; step /= 2) {
      __syncthreads();
      for (int64_t i = threadIdx.x; i < length; i += blockDim.x) {
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

// The first num_top listed tokens in rank order; -1 and -inf past the last.
template <class S>
FS_DEVICE void write_top(const Batch& batch, const Workspace& ws, int64_t r,
                         const Team<kBlockPolicy>& team, const S& slice, const LogRow& row) {
  const Outputs& out = batch.out;
  const int32_t n = out.num_top;
  long long* list = ws.lists + blockIdx.x * ws.list_length;
  for (int64_t i = threadIdx.x; i < ws.list_length; i += blockDim.x) list[i] = LLONG_MIN;
  if (threadIdx.x == 0) team.own->listed = 0;
  const auto counts = [&](float x, int32_t, int32_t id) -> u64 { return row.listed(x, id); };
  u64 mine = 0;
  if (row.sound) each(slice, [&](float x, int32_t id) { mine += row.listed(x, id); });
  KeyCut cut = row.cut;
  if (block_sum(mine, team.own->scratch) > (u64)n) {
    cut = top_k_cut(team, slice, cut.key, row.task.peak_key, (u64)n, false, counts);
  }
  if (row.sound) {
    each(slice, [&](float x, int32_t id) {
      const int32_t key = key_of(x);
      if (!keeps(cut, key, id) || !row.listed(x, id)) return;
      const int32_t place = atomicAdd(&team.own->listed, 1);
      list[place] = ranked(key, id);
    });
  }
  sort_descending(list, ws.list_length);
  for (int32_t i = (int32_t)threadIdx.x; i < n; i += (int32_t)blockDim.x) {
    const bool there = list[i] != LLONG_MIN;
    const int64_t at = r * n + i;
    const int64_t id = id_in(list[i]);
    const float none = row.sound ? -INFINITY : NAN;
    store_global(out.top_ids + at, there ? id : (int64_t)-1);
    store_global(out.top_logprobs + at, there ? row.logprob(from_key(key_in(list[i]))) : none);
  }
}

// 1 + number of tokens strictly above x.
template <class S>
FS_DEVICE int64_t rank_of(const Team<kBlockPolicy>& team, const S& slice, float x) {
  u64 above = 0;
  each(slice, [&](float other, int32_t) { above += other > x; });
  return 1 + (int64_t)block_sum(above, team.own->scratch);
}

template <class S>
FS_DEVICE void write_logprobs(const Batch& batch, const Workspace& ws, int64_t r,
                              const Team<kBlockPolicy>& team, S slice, const RowTask& t,
                              const RowState& state) {
  const Outputs& out = batch.out;
  const bool valid = state.status == kValid;
  LogRow row = {t, state.cut, false, valid, (double)state.total};
  if (out.mode == kRawLogprobs) {
    slice.overlay = nullptr;
    if (valid) row = raw_log_row(team, slice);
  }
  for (int32_t j = 0; j < out.num_samples; ++j) {
    const int64_t at = r * out.num_samples + j;
    const float x = valid ? slice.value((int32_t)out.tokens[at]) : 0.0f;
    const int64_t rank = valid && out.ranks ? rank_of(team, slice, x) : 0;
    if (threadIdx.x) continue;
    if (out.logprobs) store_global(out.logprobs + at, row.logprob(x));
    if (out.ranks) store_global(out.ranks + at, rank);
  }
  if (out.num_top) write_top(batch, ws, r, team, slice, row);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    outputs_kernel(const __grid_constant__ Batch batch, const __grid_constant__ Workspace ws) {
  Shared* own = (Shared*)shared_memory();
  const Team<kBlockPolicy> team = {own, nullptr, nullptr, 0, 1};
  clear_bins(team);
  for (int64_t r = blockIdx.x; r < batch.logits.rows; r += gridDim.x) {
    auto slice = make_slice<T, false>(batch, r, 0, 1);
    RowTask t = make_task(at(batch.rows.params, r));
    const RowState& state = ws.states[r];
    t.peak_key = state.peak_key;
    t.peak = from_key(state.peak_key);
    process_row(batch, ws, r, *t.params, team, slice);
    if (batch.out.filtered || batch.out.probabilities) write_rows(batch, r, slice, t, state);
    if (batch.out.mode != kNoLogprobs) write_logprobs(batch, ws, r, team, slice, t, state);
    __syncthreads();
  }
}

}  // namespace fastsample

// What is kept of a row: how many tokens, which, their share of all mass, and the entropy of what
// is drawn from. Stem of csrc/cpu/keep.h.
#pragma once

#include "cuda/sampled.cuh"

namespace fastsample {

// Calls f(x, id, word) for every bit of the words of a row's bitmask, a warp's lanes being those of
// one word; x is `nothing` past the last token. Several loads are ahead.
template <class S, class F>
FS_DEVICE void each_bit(const S& slice, F f) {
  constexpr int kAhead = 4;
  const int32_t words = (slice.vocab + 31) / 32, step = warps();
  for (int32_t first = warp(); first < words; first += kAhead * step) {
    float x[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int32_t id = 32 * (first + u * step) + lane();
      x[u] = id < slice.vocab ? slice.value(id) : slice.nothing;
    }
#pragma unroll 1  // f is much code
    for (int32_t word = first; word < words && word < first + kAhead * step; word += step) {
      f(x[0], 32 * word + lane(), word);
#pragma unroll
      for (int u = 1; u < kAhead; ++u) x[u - 1] = x[u];
    }
  }
}

// The sum over a block of floats, always in the same order. The scratch is free after the block's
// next barrier.
FS_DEVICE double block_sum_of(double value) {
  const auto add = [](double a, double b) { return a + b; };
  value = warp_reduce(value, add);
  if (lane() == 0) memcpy(scratch() + warp(), &value, sizeof value);
  __syncthreads();
  double other = 0.0;
  if (lane() < warps()) memcpy(&other, scratch() + lane(), sizeof other);
  return warp_reduce(other, add);
}

// A kept token's part of the entropy.
FS_DEVICE double information(const RowTask& t, const RowState& state, float x, int32_t id) {
  const double p = share(t, state, x, id);
  if (p == 0.0) return 0.0;
  if (state.total != state.rest) return -p * log(p);
  const u64 w = drawn_mass(t, x);
  return p * log1p((double)(mass_of_all(t, state) - w) / (double)w);  // exact near p = 1
}

// log of the share of all mass that is kept.
FS_DEVICE double log_share(const RowTask& t, const RowState& state, u64 everything) {
  if (t.greedy) return 0.0;
  if (!state.total) return -INFINITY;
  const u64 out = everything - state.total;
  // Near 1, what is left out tells more digits than what is kept.
  if (2 * out < everything) return log1p((double)-(int64_t)out / (double)everything);
  return log((double)state.total / (double)everything);
}

template <class S>
FS_DEVICE void write_kept(const Outputs& out, int64_t r, const S& slice, const RowTask& t,
                          const RowState& state) {
  // A row that follows a wrong draft has no token, as an invalid one has none.
  const bool valid = out.tokens[r * out.num_samples] >= 0;
  const bool weighs = out.log_kept_mass && state.total;
  u64 count = 0, everything = 0;
  double entropy = 0.0;
  each_bit(slice, [&](float x, int32_t id, int32_t word) {
    const bool kept = valid && is_kept(t, state.drawable.kept, x, id);
    const uint32_t bits = __ballot_sync(kWholeWarp, kept);
    if (out.kept_bitmask && lane() == 0) {
      store_global(out.kept_bitmask + r * ((slice.vocab + 31) / 32) + word, (int32_t)bits);
    }
    count += kept;
    if (weighs) everything += drawn_mass(t, x);
    if (kept && out.entropy) entropy += information(t, state, x, id);
  });
  count = block_sum(count);
  everything = block_sum(everything);
  entropy = block_sum_of(entropy);
  if (threadIdx.x) return;
  const double mass = valid ? log_share(t, state, everything) : NAN;
  if (out.kept_count) store_global(out.kept_count + r, (int32_t)count);
  if (out.log_kept_mass) store_global(out.log_kept_mass + r, (float)mass);
  if (out.entropy) store_global(out.entropy + r, valid ? (float)entropy : NAN);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    keep_kernel(const __grid_constant__ Batch batch, const __grid_constant__ Workspace ws) {
  each_sampled_row<T>(batch, ws,
                      [&](int64_t r, const auto&, const auto& slice, const RowTask& t,
                          const RowState& state) { write_kept(batch.out, r, slice, t, state); });
}

}  // namespace fastsample

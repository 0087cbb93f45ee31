// Kept sets as lists of ids, made of their bitmasks. One block per row.
#pragma once

#include "cuda/team.cuh"

namespace fastsample {

static __global__ void __launch_bounds__(kThreads)
    list_kernel(const __grid_constant__ Lists lists) {
  const int64_t r = blockIdx.x;
  int64_t at = lists.row_ptr[r];
  if (at < lists.row_ptr[r + 1]) {
    for (int32_t first = 0; first < lists.words; first += threads()) {
      const int32_t word = first + (int32_t)threadIdx.x;
      const int32_t* own = lists.bitmask + r * lists.words;
      uint32_t bits = word < lists.words ? (uint32_t)load_global(own + word) : 0;
      const auto [before, count] = block_scan((u64)__popc(bits));
      int64_t place = at + (int64_t)before;
      for (; bits; bits &= bits - 1) {
        store_global(lists.ids + place++, 32 * word + __ffs((int)bits) - 1);
      }
      at += (int64_t)count;
    }
  }
  const int64_t end = lists.row_ptr[lists.rows], step = (int64_t)gridDim.x * threads();
  for (int64_t i = end + r * threads() + threadIdx.x; i < lists.size; i += step) {
    store_global(lists.ids + i, -1);
  }
}

}  // namespace fastsample

// Verification by drawing: how far a request's drafts are what its rows drew. Stem of
// csrc/cpu/verify.h.
#pragma once

#include "cuda/device.cuh"

namespace fastsample {

// Once all rows of a request have drawn, the thread that comes last says what is accepted and pads
// what follows. Other blocks have written the tokens, so they are read past the first cache.
FS_DEVICE void settle(const Batch& batch, int64_t row) {
  const Drafts& drafts = batch.drafts;
  const int64_t width = drafts.count + 1, request = (uint32_t)row / (uint32_t)width;
  __threadfence();
  if (atomicAdd(drafts.arrivals + request, 1u) != (uint32_t)drafts.count) return;
  __threadfence();
  drafts.arrivals[request] = 0;
  volatile int64_t* tokens = batch.out.tokens + request * width;
  const int64_t* ids = drafts.ids + request * drafts.count;
  int32_t accepted = 0;
  while (accepted < drafts.count && tokens[accepted] >= 0 && tokens[accepted] == ids[accepted]) {
    ++accepted;
  }
  drafts.num_accepted[request] = accepted;
  drafts.status[request] = ((volatile int32_t*)batch.out.status)[request * width + accepted];
#pragma unroll 1
  for (int64_t i = accepted + 1; i < width; ++i) tokens[i] = -1;
}

}  // namespace fastsample

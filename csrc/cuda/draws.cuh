// Stage 8: the random numbers of a row's draws.
#pragma once

#include "core/philox.h"
#include "cuda/device.cuh"

namespace fastsample {

// A uniform integer below `total`, which is at most 2^60. Called, since ten rounds are much code,
// and a row may draw in several places.
FS_CALLED u64 random_below(Stream stream, int32_t draw, Purpose purpose, u64 total) {
  const u64 bits = uniform60(stream.seed, stream.offset, (uint32_t)draw, purpose);
  return threshold_at(bits, total);
}

// Whether a draw takes part in a pass over what XTC leaves, if `excluding`, or else over what it
// does not touch.
FS_DEVICE bool takes_part(const Stream& stream, int32_t draw, float coin, bool excluding) {
  const u64 bits = random_below(stream, draw, kXtcCoin, (u64)1 << 60);
  return (bits < coin_threshold(coin)) == excluding;
}

}  // namespace fastsample

// Stage 8: the counter RNG (Philox4x32-10, Salmon et al. 2011) and the draw's threshold.
#pragma once

#include "core/mass.h"
#include "core/rows.h"

namespace fastsample {

struct Philox4 {
  uint32_t word[4];
};

FS_HD Philox4 philox4x32_10(Philox4 c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = (uint64_t)c.word[0] * 0xD2511F53u;
    const uint64_t p1 = (uint64_t)c.word[2] * 0xCD9E8D57u;
    c = Philox4{{(uint32_t)(p1 >> 32) ^ c.word[1] ^ k0, (uint32_t)p1,
                 (uint32_t)(p0 >> 32) ^ c.word[3] ^ k1, (uint32_t)p0}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// What random bits are for. No two purposes share any.
enum Purpose : uint32_t { kPlainDraw = 0, kXtcCoin = 1 };

// 60 uniform bits for draw `index` of the sequence `seed` at position `offset`.
FS_HD uint64_t uniform60(uint64_t seed, uint64_t offset, uint32_t index,
                         Purpose purpose = kPlainDraw) {
  const Philox4 counter = {{(uint32_t)offset, (uint32_t)(offset >> 32), index, purpose}};
  const Philox4 out = philox4x32_10(counter, (uint32_t)seed, (uint32_t)(seed >> 32));
  return (((uint64_t)out.word[0] << 32) | out.word[1]) >> 4;
}

// The drawn token is the first, in id order, whose running mass exceeds this.
FS_HD uint64_t threshold_at(uint64_t bits, uint64_t total) { return multiply_high60(bits, total); }
FS_HD uint64_t draw_threshold(uint64_t seed, uint64_t offset, uint32_t index, uint64_t total) {
  return threshold_at(uniform60(seed, offset, index), total);
}

// Of 2^60 values of a coin, how many say yes.
FS_HD uint64_t coin_threshold(float probability) { return (uint64_t)(probability * 0x1p60f); }

// Whether a draw leaves out what XTC excludes.
FS_HD bool xtc_excludes(uint64_t seed, uint64_t offset, uint32_t index, float probability) {
  return uniform60(seed, offset, index, kXtcCoin) < coin_threshold(probability);
}

}  // namespace fastsample

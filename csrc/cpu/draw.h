// Stage 8: the first kept token, in id order, whose running mass exceeds the draw's threshold. For
// a few draws it is searched for among the groups' masses; for many in a table of all kept tokens.
#pragma once

#include "core/philox.h"
#include "cpu/domain.h"

namespace fastsample {
namespace {

struct Drawn {
  int32_t id;
  float x;
  uint64_t mass;
};

// Inside a block: the first kept token whose running mass exceeds r.
template <class Domain, class Weight>
Drawn draw_in_block(const Domain& d, const Kept<float>& kept, const Weight& weight, int b,
                    uint64_t r) {
  float buffer[kBlock];
  const float* x = values(d, b, buffer);
  for (int i = 0; i < kBlock; i += kLanes) {
    const vi id = ids(d, b, i);
    const auto [hi, lo] = weight.of(load(x + i), ranks_within(kept, load(x + i), id));
    const uint64_t here = (reduce_add(hi) << kHalfBits) + reduce_add(lo);
    if (here <= r) {
      r -= here;
      continue;
    }
    for (int lane = 0;; ++lane) {
      const uint64_t w = ((uint64_t)hi[lane] << kHalfBits) + lo[lane];
      if (r < w) return Drawn{id[lane], x[i + lane], w};
      r -= w;
    }
  }
  __builtin_unreachable();  // r is below the block's mass
}

// `running` holds running sums, group by group.
template <class Domain, class W>
Drawn draw(const Domain& d, const Kept<float>& kept, const W& weigher, const uint64_t* running,
           uint64_t r) {
  int low = 0, high = groups(d) - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (running[middle] > r) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  if (low) r -= running[low - 1];
  const Weighing weight(weigher, kept.floor);
  const float lowest = weight.lowest();
  for (int b = low * kGroup;; ++b) {
    MassSum sum;
    add_block(d, b, kept, weight, lowest, sum);
    const uint64_t here = total(sum);
    if (r < here) return draw_in_block(d, kept, weight, b, r);
    r -= here;
  }
}

// A token's logit after stage 3.
template <class T>
FS_INLINE float logit_of(const Dense<T>& d, int32_t id) {
  float buffer[kBlock];
  return values(d, id / kBlock, buffer)[id % kBlock];
}

// The kept tokens that have mass, in id order, and where to begin to look among them: the uniform
// numbers are cut into 2^bits equal parts, and guide[k] is a token not behind the one that the
// least number of part k draws. So one or two steps are enough on average, whatever the masses are
// (Chen and Asau 1974).
struct Table {
  TableSpace space;
  int32_t n;
  int bits;
  uint64_t total;

  FS_MEMBER uint64_t mass(int32_t i) const { return space.ends[i] - (i ? space.ends[i - 1] : 0); }
  // The token of a uniform number and its threshold; -1 where there is none at all.
  FS_MEMBER int32_t find(uint64_t uniform, uint64_t threshold) const {
    if (!n) return -1;
    int32_t i = space.guide[uniform >> (60 - bits)];
    while (space.ends[i] <= threshold) ++i;
    return i;
  }
};

// Makes a table, token by token and without a branch, which would be mispredicted.
struct TableWriter {
  TableSpace to;
  double parts_per_mass;
  uint64_t running = 0;
  int32_t n = 0;

  // A token of any mass. The tokens before it have the numbers below `running`, so the first part
  // that begins at one of its own is the next after the part that `running` lies in, or that part.
  FS_MEMBER void add(int32_t id, uint64_t mass) {
    constexpr double kRounding = 0x1p-20;  // of a product of up to 2^21
    to.guide[(int32_t)((double)(int64_t)running * parts_per_mass + kRounding) + 1] = n;
    running += mass;
    to.ends[n] = running;
    to.id[n] = id;
    n += mass != 0;
  }
};

// Adds what is kept of block b.
template <class Domain, class Weight>
FS_INLINE void add_tokens(const Domain& d, int b, const Kept<float>& kept, const Weight& weight,
                          TableWriter& table) {
  float buffer[kBlock];
  uint64_t mass[kBlock];
  weigh_each(d, b, values(d, b, buffer), kept, weight, mass);
  TableWriter own = table;  // in registers: to the compiler, a store might change it
  for (int i = 0; i < kBlock; ++i) own.add(id_at(d, b, i), mass[i]);
  table.running = own.running;
  table.n = own.n;
}

// The table of what is kept, `total` in all, for so many draws.
template <class Domain, class W>
Table make_table(const Domain& d, const Kept<float>& kept, const W& weigher, uint64_t total,
                 int32_t draws, const TableSpace& space) {
  const int32_t tokens = blocks(d) * kBlock;
  const int bits = guide_bits(draws < tokens ? draws : tokens);
  const int32_t parts = 1 << bits;
  if (!total) return Table{space, 0, bits, total};
  memset(space.guide, 0, (size_t)(parts + 2) * sizeof *space.guide);
  TableWriter writer = {space, (double)parts / (double)total};
  const Weighing weight(weigher, kept.floor);
  const float lowest = weight.lowest();
  for (int b = 0; b < blocks(d); ++b) {
    if (!may_keep(d, b, kept) || upper_bound(d, b) < lowest) continue;
    add_tokens(d, b, kept, weight, writer);
  }
  for (int32_t k = 0, last = 0; k < parts; ++k) {
    last = space.guide[k] > last ? space.guide[k] : last;
    space.guide[k] = last;
  }
  return Table{space, writer.n, bits, total};
}

// The 60 uniform bits of N vectors of draws, side by side, as each round of a vector waits for the
// one before. A word is the lower half of a lane; no product sees the upper half.
template <int N>
FS_INLINE void uniform60(Stream stream, uint32_t first, Purpose purpose, vq (&bits)[N]) {
  constexpr uint64_t kLow = UINT32_MAX;
  uint32_t k0 = (uint32_t)stream.seed, k1 = (uint32_t)(stream.seed >> 32);
  vq lanes = {}, c0[N], c1[N], c2[N], c3[N];
  for (int i = 0; i < kWideLanes; ++i) lanes[i] = first + (uint32_t)i;
  FS_EACH(N) {
    c0[u] = splat(stream.offset & kLow);
    c1[u] = splat(stream.offset >> 32);
    c2[u] = lanes + splat((uint64_t)(u * kWideLanes));
    c3[u] = splat((uint64_t)purpose);
  }
  for (int round = 0; round < 10; ++round) {
    FS_EACH(N) {
      const vq p0 = multiply_low(c0[u], splat((uint64_t)0xD2511F53u));
      const vq p1 = multiply_low(c2[u], splat((uint64_t)0xCD9E8D57u));
      c0[u] = (p1 >> 32) ^ c1[u] ^ splat((uint64_t)k0);
      c1[u] = p1;
      c2[u] = (p0 >> 32) ^ c3[u] ^ splat((uint64_t)k1);
      c3[u] = p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  FS_EACH(N) bits[u] = ((c0[u] << 32) | (c1[u] & splat(kLow))) >> 4;
}

// floor(a * b / 2^60) as in core/mass.h.
FS_INLINE vq multiply_high60(vq a, uint64_t b) {
  constexpr uint64_t kLow = ((uint64_t)1 << 30) - 1;
  const vq a1 = a >> 30, a0 = a & splat(kLow), b1 = splat(b >> 30), b0 = splat(b & kLow);
  const vq middle = multiply_low(a1, b0) + multiply_low(a0, b1) + (multiply_low(a0, b0) >> 30);
  return multiply_low(a1, b1) + (middle >> 30);
}

// use(j, which table, its token's place in it) for each draw j: the first table, or the second one
// where the draw's coin says so.
template <class Use>
void each_draw(const Table (&tables)[2], float coin, Stream stream, Draws draws, Use use) {
  constexpr int kAtOnce = 256, N = 4;
  uint64_t uniform[kAtOnce], threshold[2][kAtOnce], toss[kAtOnce];
  if (coin == 0 && tables[0].n == 1) {
    for (int32_t j = draws.begin; j < draws.end; ++j) use(j, 0, 0);
    return;
  }
  const uint64_t heads = coin_threshold(coin);
  for (int32_t first = draws.begin, n; first < draws.end; first += n) {
    n = draws.end - first < kAtOnce ? draws.end - first : kAtOnce;
    for (int j = 0; j < n; j += N * kWideLanes) {
      vq bits[N];
      uniform60(stream, (uint32_t)(first + j), kPlainDraw, bits);
      FS_EACH(N) {
        store(uniform + j + u * kWideLanes, bits[u]);
        store(threshold[0] + j + u * kWideLanes, multiply_high60(bits[u], tables[0].total));
      }
      if (coin == 0) continue;
      FS_EACH(N)
      store(threshold[1] + j + u * kWideLanes, multiply_high60(bits[u], tables[1].total));
      uniform60(stream, (uint32_t)(first + j), kXtcCoin, bits);
      FS_EACH(N) store(toss + j + u * kWideLanes, bits[u]);
    }
    for (int j = 0; j < n; ++j) {
      const int which = coin > 0 && toss[j] < heads;
      use(first + j, which, tables[which].find(uniform[j], threshold[which][j]));
    }
  }
}

}  // namespace
}  // namespace fastsample

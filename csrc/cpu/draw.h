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

// The random numbers of a row.
struct Stream {
  uint64_t seed, offset;
};

FS_INLINE Stream stream_of(const Batch& batch, int64_t r) {
  return Stream{(uint64_t)at(batch.rows.seeds, r), (uint64_t)at(batch.rows.offsets, r)};
}

// Inside a block: the first kept token whose running mass exceeds r.
template <class Domain>
Drawn draw_in_block(const Domain& d, Cutoff cut, const Weigher& weigher, int b, uint64_t r) {
  float buffer[kBlock];
  const float* x = values(d, b, buffer);
  for (int i = 0; i < kBlock; i += kLanes) {
    const vi id = ids(d, b, i);
    const auto [hi, lo] = weigh(weigher, load(x + i), keeps(cut, load(x + i), id));
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
template <class Domain>
Drawn draw(const Domain& d, Cutoff cut, const Weigher& weigher, const uint64_t* running,
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
  const Weighing weight = {weigher, 1.0f};
  const float lowest = weight.lowest();
  for (int b = low * kGroup;; ++b) {
    MassSum sum;
    add_block(d, b, cut, weight, lowest, sum);
    const uint64_t here = total(sum);
    if (r < here) return draw_in_block(d, cut, weigher, b, r);
    r -= here;
  }
}

// A token's logit after stage 3.
template <class T>
FS_INLINE float logit_of(const Dense<T>& d, int32_t id) {
  float buffer[kBlock];
  return values(d, id / kBlock, buffer)[id % kBlock];
}

// Whether a table of a domain's tokens costs less than the draws do without.
FS_INLINE bool pays_table(const Outputs& out, const Workspace& ws, int32_t tokens) {
  constexpr int64_t kTokensPerDraw = 128, kManyRanks = 128;
  if (!ws.steps) return false;
  if (out.ranks && out.num_samples >= kManyRanks) return true;
  return out.num_samples * kTokensPerDraw >= tokens;
}

// The kept tokens' running masses, and where to begin to look in them: of 2^bits equal parts of the
// uniform numbers, guide[k] is the token of the least number in part k. So one or two steps are
// enough on average, whatever the masses are (Chen and Asau 1974).
struct StepTable {
  const Step* steps;
  int32_t n;
  const int32_t* guide;
  int bits;
  uint64_t total;

  FS_MEMBER uint64_t mass(int32_t i) const { return steps[i].end - (i ? steps[i - 1].end : 0); }
  // The token of a uniform number and its threshold.
  FS_MEMBER int32_t find(uint64_t uniform, uint64_t threshold) const {
    int32_t i = guide[uniform >> (60 - bits)];
    while (steps[i].end <= threshold) ++i;
    return i;
  }
};

FS_INLINE void fill_guide(const StepTable& table, int32_t* guide) {
  // floor(k * total / 2^bits), in halves: the product has up to 80 bits.
  const uint64_t parts = (uint64_t)1 << table.bits;
  const uint64_t whole = table.total >> table.bits, rest = table.total & (parts - 1);
  int32_t i = 0;
  for (uint64_t k = 0; k < parts; ++k) {
    const uint64_t threshold = k * whole + (k * rest >> table.bits);
    while (table.steps[i].end <= threshold) ++i;
    guide[k] = i;
  }
}

template <class Domain>
StepTable list_steps(const Domain& d, Cutoff cut, const Weigher& weigher, uint64_t total,
                     const Workspace& ws) {
  const float lowest = lowest_x(weigher, weigher.floor ? weigher.floor : 1);
  float buffer[kBlock];
  uint64_t running = 0;
  int32_t n = 0;
  for (int b = 0; b < blocks(d); ++b) {
    if (!may_keep(d, b, cut) || upper_bound(d, b) < lowest) continue;
    const float* x = values(d, b, buffer);
    for (int i = 0; i < kBlock; i += kLanes) {
      const vi id = ids(d, b, i);
      const Halves w = weigh(weigher, load(x + i), keeps(cut, load(x + i), id));
      if (!any(nonzero((vi)(w.hi | w.lo)))) continue;
      for (int lane = 0; lane < kLanes; ++lane) {  // no branch: it would be guessed wrongly
        const uint64_t mass = ((uint64_t)w.hi[lane] << kHalfBits) + w.lo[lane];
        running += mass;
        ws.steps[n] = Step{running, id[lane], 0};
        n += mass != 0;
      }
    }
  }
  int bits = 0;
  while (1 << bits < n) ++bits;
  const StepTable table = {ws.steps, n, ws.guide, bits, total};
  fill_guide(table, ws.guide);
  return table;
}

// The 60 uniform bits of N vectors of draws, side by side, as a vector's rounds wait for each
// other. A word is the lower half of a lane; what stands in the upper half no product sees.
template <int N>
FS_INLINE void uniform60(Stream stream, uint32_t first, vq (&bits)[N]) {
  constexpr uint64_t kLow = UINT32_MAX;
  uint32_t k0 = (uint32_t)stream.seed, k1 = (uint32_t)(stream.seed >> 32);
  vq lanes = {}, c0[N], c1[N], c2[N], c3[N];
  for (int i = 0; i < kWideLanes; ++i) lanes[i] = first + (uint32_t)i;
  FS_EACH(N) {
    c0[u] = splat(stream.offset & kLow);
    c1[u] = splat(stream.offset >> 32);
    c2[u] = lanes + splat((uint64_t)(u * kWideLanes));
    c3[u] = vq{};
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

// use(j, its token's place in the table) for each draw j.
template <class Use>
void each_draw(const StepTable& table, Stream stream, Draws draws, Use use) {
  constexpr int kAtOnce = 256, N = 4;
  uint64_t uniform[kAtOnce], threshold[kAtOnce];
  if (table.n == 1) {
    for (int32_t j = draws.begin; j < draws.end; ++j) use(j, 0);
    return;
  }
  for (int32_t first = draws.begin, n; first < draws.end; first += n) {
    n = draws.end - first < kAtOnce ? draws.end - first : kAtOnce;
    for (int j = 0; j < n; j += N * kWideLanes) {
      vq bits[N];
      uniform60(stream, (uint32_t)(first + j), bits);
      FS_EACH(N) {
        store(uniform + j + u * kWideLanes, bits[u]);
        store(threshold + j + u * kWideLanes, multiply_high60(bits[u], table.total));
      }
    }
    for (int j = 0; j < n; ++j) use(first + j, table.find(uniform[j], threshold[j]));
  }
}

}  // namespace
}  // namespace fastsample

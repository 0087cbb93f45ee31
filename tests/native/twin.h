// The contract once more, one token at a time and in the plainest way: what the fuzzer compares
// every instruction set with. Shares nothing with the engine but the views of core/rows.h.
#pragma once

#include <math.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "core/filters.h"

namespace twin {

using namespace fastsample;
typedef unsigned __int128 uint128_t;

inline float half_value(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const float sign = h >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? ldexpf((float)(1024 + mantissa), exponent - 25)
                          : ldexpf((float)mantissa, -24));
}

inline float bfloat_value(uint16_t b) {
  const uint32_t bits = (uint32_t)b << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline float logit(const Logits& l, int64_t r, int32_t i) {
  const int64_t at = r * l.stride + i;
  if (l.dtype == kFloat32) return ((const float*)l.data)[at];
  const uint16_t bits = ((const uint16_t*)l.data)[at];
  return l.dtype == kFloat16 ? half_value(bits) : bfloat_value(bits);
}

inline Status status_of(const std::vector<float>& x) {
  bool nan = false, infinite = false, something = false;
  for (float v : x) {
    nan |= v != v;
    infinite |= v == INFINITY;
    something |= v != -INFINITY;
  }
  return nan ? kNaN : infinite ? kPositiveInfinity : something ? kValid : kNothingLeft;
}

inline uint64_t mass(float x, float max, float temperature) {
  const float c = 0x1.715476p+0f / temperature;
  const float difference = x - max;
  const float y = difference * c;
  if (!(y >= -60.0f)) return 0;
  const float t = y + 12582912.0f;
  const float n = t - 12582912.0f;
  const float f = y - n;
  float p = 0x1.5bba14p-10f;
  for (float next : {0x1.3cea88p-7f, 0x1.c6b752p-5f, 0x1.ebf9bcp-3f, 0x1.62e42ap-1f, 1.0f}) {
    p = p * f;
    p = p + next;
  }
  return (uint64_t)ldexp((double)p, (int)n + 40);
}

inline uint64_t uniform60(uint64_t seed, uint64_t offset, uint32_t draw) {
  uint32_t c[4] = {(uint32_t)offset, (uint32_t)(offset >> 32), draw, 0};
  uint32_t k[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
    const uint32_t next[4] = {(uint32_t)(b >> 32) ^ c[1] ^ k[0], (uint32_t)b,
                              (uint32_t)(a >> 32) ^ c[3] ^ k[1], (uint32_t)a};
    memcpy(c, next, sizeof c);
    k[0] += 0x9E3779B9u;
    k[1] += 0xBB67AE85u;
  }
  return ((uint64_t)c[0] << 32 | c[1]) >> 4;
}

// Stages 1 to 3.
inline void process(const Batch& batch, int64_t r, const RowParams& p, std::vector<float>& x) {
  const int32_t vocab = (int32_t)x.size();
  const Bitmask& mask = batch.rows.bitmask;
  for (int32_t i = 0; mask.data && i < vocab; ++i) {
    const bool inside = i / 32 < mask.words;
    if (!inside || !((uint32_t)mask.data[r * mask.stride + i / 32] >> i % 32 & 1)) x[i] = -INFINITY;
  }
  const BiasEntries& bias = batch.rows.bias;
  for (int64_t e = bias.row_ptr ? bias.row_ptr[r] : 0; bias.row_ptr && e < bias.row_ptr[r + 1]; ++e)
    x[bias.ids[e]] += bias.values[e];
  std::vector<int> count(vocab), seen(vocab);
  const auto tally = [&](const TokenIds& ids, bool output) {
    for (int64_t i = 0; ids.data && i < ids.length; ++i) {
      const int64_t id = ids.data[r * ids.stride + i];
      if (id < 0 || id >= vocab) continue;
      seen[id] = 1;
      count[id] += output;
    }
  };
  tally(batch.rows.output, true);
  tally(batch.rows.prompt, false);
  for (int32_t i = 0; i < vocab; ++i) {
    if (p.repetition_penalty != 1 && seen[i])
      x[i] = x[i] > 0 ? x[i] / p.repetition_penalty : x[i] * p.repetition_penalty;
    if (p.frequency_penalty != 0 && count[i]) {
      const float subtract = p.frequency_penalty * (float)count[i];
      x[i] = x[i] - subtract;
    }
    if (p.presence_penalty != 0 && count[i]) x[i] = x[i] - p.presence_penalty;
  }
}

// By value descending, then id ascending.
inline std::vector<int32_t> rank_order(const std::vector<float>& x) {
  std::vector<int32_t> ranked(x.size());
  for (size_t i = 0; i < x.size(); ++i) ranked[i] = (int32_t)i;
  std::sort(ranked.begin(), ranked.end(),
            [&](int32_t a, int32_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); });
  return ranked;
}

// Stage 7.
inline std::vector<char> kept(const std::vector<float>& x, const std::vector<uint64_t>& w,
                              const std::vector<int32_t>& ranked, const RowParams& p) {
  const size_t vocab = x.size();
  std::vector<char> keep(vocab), top_k(vocab), heavy(vocab), top_p(vocab);
  const size_t k = p.top_k == 0 || (size_t)p.top_k > vocab ? vocab : (size_t)p.top_k;
  for (size_t rank = 0; rank < vocab; ++rank) {
    const int32_t i = ranked[rank];
    const bool alive = x[i] > -INFINITY;
    top_k[i] = alive && (rank < k || (p.ties == kTiesAll && x[i] >= x[ranked[k - 1]]));
    heavy[i] = alive && w[i] >= mass_floor(p, kMassUnit);
  }
  const auto in_base = [&](int32_t i) {
    if (p.order == kJoint) return x[i] > -INFINITY;
    return p.order == kMinPFirst ? top_k[i] && heavy[i] : (bool)top_k[i];
  };
  uint64_t total = 0, reached = 0;
  for (size_t i = 0; i < vocab; ++i) total += in_base((int32_t)i) ? w[i] : 0;
  const uint64_t p30 = (uint64_t)(p.top_p * 0x1p30f);
  const uint64_t target = std::max<uint64_t>(1, (uint64_t)((uint128_t)p30 * total >> 30));
  for (int32_t i : ranked) {
    if (!in_base(i)) continue;
    top_p[i] = p.top_p == 1 || reached < target;
    reached += w[i];
  }
  for (size_t i = 0; i < vocab; ++i) keep[i] = top_k[i] && heavy[i] && top_p[i];
  return keep;
}

inline int64_t rank_of(const std::vector<float>& x, float own) {
  return 1 + std::count_if(x.begin(), x.end(), [&](float v) { return v > own; });
}

// Every output of one row; returns its status.
inline Status sample_row(const Batch& batch, int64_t r) {
  const Outputs& out = batch.out;
  const int32_t vocab = batch.logits.vocab;
  const RowParams& p = at(batch.rows.params, r);
  std::vector<float> raw(vocab);
  for (int32_t i = 0; i < vocab; ++i) raw[i] = logit(batch.logits, r, i);
  std::vector<float> x = raw;
  process(batch, r, p, x);
  const Status status = status_of(x);
  const bool valid = status == kValid, greedy = p.temperature < 1e-5f;
  const float temperature = greedy ? 1.0f : p.temperature;

  std::vector<uint64_t> w(vocab);
  std::vector<int32_t> ranked;
  std::vector<char> keep(vocab);
  uint64_t total = 0;
  if (valid) {
    const auto best = std::max_element(x.begin(), x.end());  // the first of them
    if (!greedy || out.top_ids) ranked = rank_order(x);
    for (int32_t i = 0; i < vocab; ++i) w[i] = mass(x[i], *best, temperature);
    if (greedy) {
      keep[best - x.begin()] = 1;
    } else {
      keep = kept(x, w, ranked, p);
    }
    for (int32_t i = 0; i < vocab; ++i) total += keep[i] ? w[i] : 0;
  }
  for (int32_t i = 0; i < vocab; ++i) {
    const int64_t slot = r * vocab + i;
    if (out.filtered) out.filtered[slot] = keep[i] ? x[i] / temperature : -INFINITY;
    if (out.probabilities)
      out.probabilities[slot] = keep[i] ? (float)((double)w[i] / (double)total) : 0.0f;
  }

  // Log-probabilities are of `of`, log-softmax of the row as given or of what is kept.
  const bool of_raw = out.mode == kRawLogprobs;
  const std::vector<float>& of = of_raw ? raw : x;
  const bool sound = valid && (!of_raw || status_of(raw) == kValid);
  const float highest = sound ? *std::max_element(of.begin(), of.end()) : 0;
  double normaliser = 0;
  if (sound && of_raw) {
    uint64_t sum = 0;
    for (float v : raw) sum += mass(v, highest, 1.0f);
    normaliser = log((double)sum / 0x1p40);
  }
  const auto logprob = [&](int32_t i) {
    if (!sound) return NAN;
    return (float)(of_raw ? ((double)of[i] - (double)highest) - normaliser
                          : log((double)w[i] / (double)total));
  };
  for (int32_t j = 0; out.tokens && j < out.num_samples; ++j) {
    const int64_t slot = r * out.num_samples + j;
    int32_t token = -1;
    if (valid) {
      const uint64_t u =
          uniform60((uint64_t)at(batch.rows.seeds, r), (uint64_t)at(batch.rows.offsets, r), j);
      const uint64_t threshold = (uint64_t)((uint128_t)u * total >> 60);
      for (uint64_t running = 0; running <= threshold;) {
        ++token;
        running += keep[token] ? w[token] : 0;
      }
    }
    out.tokens[slot] = token;
    if (out.logprobs) out.logprobs[slot] = valid ? logprob(token) : NAN;
    if (out.ranks) out.ranks[slot] = valid ? rank_of(of, of[token]) : 0;
  }
  if (out.top_ids && sound && of_raw) ranked = rank_order(raw);
  int32_t n = 0;
  for (int32_t i : out.top_ids&& sound ? ranked : std::vector<int32_t>()) {
    if (n == out.num_top) break;
    if (of_raw ? !(raw[i] > -INFINITY) : !keep[i]) continue;
    out.top_ids[r * out.num_top + n] = i;
    out.top_logprobs[r * out.num_top + n++] = logprob(i);
  }
  for (; out.top_ids && n < out.num_top; ++n) {
    out.top_ids[r * out.num_top + n] = -1;
    out.top_logprobs[r * out.num_top + n] = sound ? -INFINITY : NAN;
  }
  return status;
}

}  // namespace twin

// The contract once more, one token at a time and in the plainest way: what the fuzzer compares
// every instruction set with. Shares nothing with the engine but the views of core/rows.h.
#pragma once

#include <math.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "twin_filters.h"

namespace twin {

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

// A negative probability is like an infinite one.
inline Status status_of(const std::vector<float>& x, bool probabilities) {
  bool nan = false, infinite = false, something = false;
  for (float v : x) {
    nan |= v != v;
    infinite |= v == INFINITY || (probabilities && v < 0);
    something |= probabilities ? v > 0 : v != -INFINITY;
  }
  return nan ? kNaN : infinite ? kPositiveInfinity : something ? kValid : kNothingLeft;
}

inline std::vector<float> depths(const std::vector<float>& x, float temperature) {
  const float c = 0x1.715476p+0f / temperature, max = *std::max_element(x.begin(), x.end());
  std::vector<float> y(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    const float difference = x[i] - max;
    y[i] = difference * c;
  }
  return y;
}

inline std::vector<uint64_t> masses(const std::vector<float>& x, float temperature) {
  std::vector<uint64_t> w;
  for (float y : depths(x, temperature)) w.push_back(mass_at(y));
  return w;
}

// Of probabilities: the largest lies in [2^39, 2^40).
inline std::vector<uint64_t> masses_of_probabilities(const std::vector<float>& p) {
  int exponent;
  frexp((double)*std::max_element(p.begin(), p.end()), &exponent);
  std::vector<uint64_t> w;
  for (float v : p) w.push_back((uint64_t)ldexp((double)v, 40 - exponent));
  return w;
}

inline uint64_t uniform60(uint64_t seed, uint64_t offset, uint32_t draw, uint32_t purpose) {
  uint32_t c[4] = {(uint32_t)offset, (uint32_t)(offset >> 32), draw, purpose};
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

// The ids of a row within the vocabulary.
inline void append_ids(const TokenIds& ids, int64_t r, int32_t vocab, std::vector<int32_t>& to) {
  for (int64_t i = 0; ids.data && i < ids.length; ++i) {
    const int64_t id = ids.data[(ids.list_of ? ids.list_of[r] : r) * ids.stride + i];
    if (id >= 0 && id < vocab) to.push_back((int32_t)id);
  }
}

// The end of stage 3: DRY, then the ban of repeated n-grams.
inline void edit_by_history(const Batch& batch, int64_t r, const RowParams& p,
                            std::vector<float>& x) {
  const int32_t vocab = (int32_t)x.size();
  std::vector<int32_t> history, breakers, longest(vocab);
  append_ids(batch.rows.prompt, r, vocab, history);
  append_ids(batch.rows.output, r, vocab, history);
  append_ids(batch.rows.drafted, r, vocab, history);
  append_ids(batch.rows.breakers, r, vocab, breakers);
  const auto breaks = [&](int32_t id) {
    return std::find(breakers.begin(), breakers.end(), id) != breakers.end();
  };
  const size_t range = p.dry_range ? (size_t)p.dry_range : history.size();
  const size_t skipped = history.size() - std::min(range, history.size());
  const std::vector<int32_t> h(history.begin() + (int64_t)skipped, history.end());
  for (size_t i = 0; p.dry_multiplier > 0 && i + 1 < h.size(); ++i) {
    int32_t length = 0;
    for (size_t j = 0; j <= i && h[i - j] == h[h.size() - 1 - j] && !breaks(h[i - j]); ++j)
      ++length;
    longest[h[i + 1]] = std::max(longest[h[i + 1]], length);
  }
  for (int32_t t = 0; t < vocab; ++t) {
    if (longest[t] < p.dry_allowed_length || breaks(t)) continue;
    float q = 1;
    for (int32_t i = p.dry_allowed_length; i < longest[t] && q * p.dry_base < INFINITY; ++i) {
      q = q * p.dry_base;
    }
    const float subtract = p.dry_multiplier * q;
    x[t] = x[t] - subtract;
  }
  const size_t n = (size_t)p.no_repeat_ngram_size, size = history.size();
  for (size_t i = 0; n > 0 && i + n <= size; ++i) {
    const auto at = history.begin() + (int64_t)i;
    if (std::equal(at, at + (int64_t)n - 1, history.end() - (int64_t)(n - 1))) {
      x[*(at + (int64_t)n - 1)] = -INFINITY;
    }
  }
}

// Stages 1 to 3.
inline void process(const Batch& batch, int64_t r, const RowParams& p, std::vector<float>& x) {
  const int32_t vocab = (int32_t)x.size();
  const Bitmask& mask = batch.rows.bitmask;
  for (int32_t i = 0; mask.data && i < vocab; ++i) {
    const bool inside = i / 32 < mask.words;
    const bool allowed = inside && (uint32_t)mask.data[r * mask.stride + i / 32] >> i % 32 & 1;
    if (!allowed) x[i] = batch.logits.input == kProbabilities ? 0.0f : -INFINITY;
  }
  const BiasEntries& bias = batch.rows.bias;
  for (int64_t e = bias.row_ptr ? bias.row_ptr[r] : 0; bias.row_ptr && e < bias.row_ptr[r + 1]; ++e)
    x[bias.ids[e]] += bias.values[e];
  std::vector<int> count(vocab), seen(vocab);
  const auto tally = [&](const TokenIds& list, bool output) {
    std::vector<int32_t> ids;
    append_ids(list, r, vocab, ids);
    for (const int32_t id : ids) {
      seen[id] = 1;
      count[id] += output;
    }
  };
  tally(batch.rows.output, true);
  tally(batch.rows.drafted, true);
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
  edit_by_history(batch, r, p, x);
}

// By value descending, then id ascending.
inline std::vector<int32_t> rank_order(const std::vector<float>& x) {
  std::vector<int32_t> ranked(x.size());
  for (size_t i = 0; i < x.size(); ++i) ranked[i] = (int32_t)i;
  std::sort(ranked.begin(), ranked.end(),
            [&](int32_t a, int32_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); });
  return ranked;
}

inline int64_t rank_of(const std::vector<float>& x, float own) {
  return 1 + std::count_if(x.begin(), x.end(), [&](float v) { return v > own; });
}

// What a draw from a set goes by: of tokens that all weigh nothing, the first weighs what it would
// alone in a row.
template <class Alone>
std::vector<uint64_t> drawn_masses(const std::vector<uint64_t>& w, const Set& s,
                                   const std::vector<int32_t>& ranked, Alone alone) {
  std::vector<uint64_t> masses(w.size());
  bool nothing = true;
  for (size_t i = 0; i < w.size(); ++i) {
    masses[i] = s[i] ? w[i] : 0;
    nothing = nothing && !masses[i];
  }
  for (int32_t i : ranked) {
    if (!nothing || !s[i]) continue;
    masses[i] = alone(i);
    break;
  }
  return masses;
}

// What is kept: its number, its ids where they fit in slots, else its bits.
inline void write_kept(const Outputs& out, int64_t r, const Set& keep) {
  const int32_t vocab = (int32_t)keep.size(), words = (vocab + 31) / 32;
  const int32_t n = (int32_t)std::count(keep.begin(), keep.end(), 1);
  if (out.kept_count) out.kept_count[r] = n;
  if (out.kept_slots && n <= out.num_slots) {
    int32_t* slot = out.kept_slots + r * out.num_slots;
    for (int32_t i = 0; i < vocab; ++i) {
      if (keep[i]) *slot++ = i;
    }
    return;
  }
  if (!out.kept_bitmask) return;
  uint32_t* bits = (uint32_t*)out.kept_bitmask + r * words;
  std::fill(bits, bits + words, 0u);
  for (int32_t i = 0; i < vocab; ++i) bits[i / 32] |= (uint32_t)keep[i] << i % 32;
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
  const bool of_probabilities = batch.logits.input == kProbabilities;
  const Status status = status_of(x, of_probabilities);
  const bool valid = status == kValid, greedy = p.temperature < 1e-5f;
  const float temperature = greedy ? 1.0f : p.temperature;
  const auto weigh = [&](const std::vector<float>& row, float t) {
    return of_probabilities ? masses_of_probabilities(row) : masses(row, t);
  };

  std::vector<uint64_t> w(vocab), whole(vocab), rest(vocab);
  std::vector<int32_t> ranked;
  Set keep(vocab), out_of(vocab);
  uint64_t total = 0, rest_total = 0;
  if (valid) {
    const auto best = std::max_element(x.begin(), x.end());  // the first of them
    w = weigh(x, temperature);
    const auto alone = [&](int32_t i) { return weigh({x[i]}, temperature)[0]; };
    ranked = rank_order(x);
    if (greedy) {
      keep[best - x.begin()] = 1;
    } else {
      const float judging = p.order == kTemperatureLast ? 1.0f : temperature;
      Judged row = {x, ranked, weigh(x, judging), depths(x, judging), Set(vocab), *best, 0, 0};
      row.scale = 0x1.715476p+0f / judging;
      row.unit = *std::max_element(row.w.begin(), row.w.end());
      for (int32_t i = 0; i < vocab; ++i) row.alive[i] = x[i] > (of_probabilities ? 0 : -INFINITY);
      keep = kept(row, p);
      out_of = excluded(row, p, keep);
    }
    if (p.xtc_probability == 1) {
      for (int32_t i = 0; i < vocab; ++i) keep[i] = keep[i] && !out_of[i];
      out_of.assign(vocab, 0);
    }
    whole = drawn_masses(w, keep, ranked, alone);
    bool weighs = false;
    for (int32_t i = 0; i < vocab; ++i) weighs |= keep[i] && w[i];
    for (int32_t i = 0; i < vocab && !weighs; ++i) {  // the first of them is all that stays
      keep[i] = whole[i] != 0;
      out_of[i] = 0;
    }
    for (int32_t i = 0; i < vocab; ++i) out_of[i] = keep[i] && !out_of[i];
    rest = drawn_masses(w, out_of, ranked, alone);
    for (int32_t i = 0; i < vocab; ++i) total += whole[i], rest_total += rest[i];
  }
  const bool mixed = whole != rest;
  // The probability of a kept token.
  const auto share = [&](int32_t i) {
    const double coin = (double)p.xtc_probability;
    if (!mixed) return (double)whole[i] / (double)total;
    const double plain = (1 - coin) * (double)whole[i] / (double)total;
    return plain + coin * (double)rest[i] / (double)rest_total;
  };
  for (int32_t i = 0; i < vocab; ++i) {
    const int64_t slot = r * vocab + i;
    if (out.filtered) out.filtered[slot] = keep[i] ? x[i] / temperature : -INFINITY;
    if (out.probabilities) out.probabilities[slot] = keep[i] ? (float)share(i) : 0.0f;
  }

  write_kept(out, r, keep);
  if (out.log_kept_mass) {
    uint64_t all = 0, left_out = 0;
    for (int32_t i = 0; i < vocab; ++i) all += w[i], left_out += keep[i] ? 0 : w[i];
    const double part = 2 * left_out < all ? log1p((0.0 - (double)left_out) / (double)all)
                                           : log((double)(all - left_out) / (double)all);
    out.log_kept_mass[r] = !valid ? NAN : greedy ? 0.0f : (float)part;
  }
  if (out.entropy) {
    double sum = valid ? 0.0 : NAN;
    for (int32_t i = 0; i < vocab; ++i) {
      const double of = (double)whole[i], others = (double)(total - whole[i]);
      if (!keep[i] || share(i) <= 0) continue;
      sum += share(i) * (mixed ? -log(share(i)) : log1p(others / of));
    }
    out.entropy[r] = (float)sum;
  }

  // Log-probabilities are of `of`, log-softmax of the row as given or of what is kept.
  const bool of_raw = out.mode == kRawLogprobs;
  const std::vector<float>& of = of_raw ? raw : x;
  const bool sound = valid && (!of_raw || status_of(raw, of_probabilities) == kValid);
  const float highest = sound ? *std::max_element(of.begin(), of.end()) : 0;
  double normaliser = 0;
  std::vector<uint64_t> raw_w;
  if (sound && of_raw) {
    uint64_t sum = 0;
    raw_w = weigh(raw, 1.0f);
    for (uint64_t mass : raw_w) sum += mass;
    normaliser = of_probabilities ? (double)sum : log((double)sum / 0x1p40);
  }
  const auto logprob = [&](int32_t i) {
    if (!sound) return NAN;
    if (of_raw && of_probabilities) return (float)log((double)raw_w[i] / normaliser);
    return (float)(of_raw ? ((double)of[i] - (double)highest) - normaliser : log(share(i)));
  };
  for (int32_t j = 0; out.tokens && j < out.num_samples; ++j) {
    const int64_t slot = r * out.num_samples + j;
    int32_t token = -1;
    bool leaves_out = false;
    if (valid) {
      const auto bits = [&](uint32_t purpose) {
        const uint64_t offset = (uint64_t)at(batch.rows.offsets, r);
        return uniform60((uint64_t)at(batch.rows.seeds, r), offset, (uint32_t)j, purpose);
      };
      leaves_out = bits(1) < (uint64_t)ldexp((double)p.xtc_probability, 60);
      const uint64_t of_these = leaves_out ? rest_total : total;
      const uint64_t threshold = (uint64_t)((uint128_t)bits(0) * of_these >> 60);
      for (uint64_t running = 0; running <= threshold;) {
        ++token;
        running += leaves_out ? rest[token] : whole[token];
      }
      if (out.given && out.given[r] >= 0 && out.given[r] < vocab) token = (int32_t)out.given[r];
    }
    const std::vector<uint64_t>& law =
        leaves_out ? rest : whole;  // of draw 0, where it is asked for
    if (out.weights) {
      out.weights[2 * r] = valid ? (int64_t)law[token] : 0;
      out.weights[2 * r + 1] = (int64_t)(leaves_out ? rest_total : total);
    }
    for (int32_t i = 0; out.masses && i < vocab; ++i) {
      out.masses[r * vocab + i] = (int64_t)law[i];
    }
    out.tokens[slot] = token;
    if (out.logprobs) out.logprobs[slot] = valid ? logprob(token) : NAN;
    if (out.ranks) out.ranks[slot] = valid ? rank_of(of, of[token]) : 0;
  }
  if (out.top_ids && sound && of_raw) ranked = rank_order(raw);
  int32_t n = 0;
  for (int32_t i : out.top_ids&& sound ? ranked : std::vector<int32_t>()) {
    if (n == out.num_top) break;
    if (of_raw ? !(raw[i] > (of_probabilities ? 0 : -INFINITY)) : !keep[i]) continue;
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

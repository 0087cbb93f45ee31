// Stage 7 of the twin: sets of tokens as flags, each filter by its definition.
#pragma once

#include <math.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "core/filters.h"

namespace twin {

using namespace fastsample;
typedef unsigned __int128 uint128_t;
typedef std::vector<char> Set;  // [V] whether a token is in it

inline uint64_t mass_at(float y) {
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

// A valid row, by the masses that filters judge by.
struct Judged {
  const std::vector<float>& x;
  const std::vector<int32_t>& ranked;
  std::vector<uint64_t> w;
  std::vector<float> y;  // of logits
  Set alive;
  float max, scale;
  uint64_t unit;  // the heaviest mass

  int32_t vocab() const { return (int32_t)x.size(); }
  uint64_t total(const Set& s) const {
    uint64_t sum = 0;
    for (int32_t i = 0; i < vocab(); ++i) sum += s[i] ? w[i] : 0;
    return sum;
  }
  uint64_t heaviest(const Set& s) const {
    uint64_t most = 0;
    for (int32_t i = 0; i < vocab(); ++i) most = s[i] ? std::max(most, w[i]) : most;
    return most;
  }
  template <class Keep>
  Set those(const Set& s, Keep keep) const {
    Set kept(s.size());
    for (int32_t i = 0; i < vocab(); ++i) kept[i] = s[i] && keep(i);
    return kept;
  }
};

inline Set both(const Set& a, const Set& b) {
  Set kept(a.size());
  for (size_t i = 0; i < a.size(); ++i) kept[i] = a[i] && b[i];
  return kept;
}

inline Set top_n_sigma(const Judged& row, const RowParams& p) {
  if (p.top_n_sigma == 0) return row.alive;
  uint64_t n = 0, d1 = 0, d2 = 0;
  for (int32_t i = 0; i < row.vocab(); ++i) {
    if (!row.alive[i]) continue;
    const float scaled = (row.max - row.x[i]) * 2048.0f;
    const uint64_t d = scaled < 1048575.0f ? (uint64_t)scaled : 1048575;
    n += 1, d1 += d, d2 += d * d;
  }
  const double a = (double)d1 / (double)n, square = a * a;
  const double v = (double)d2 / (double)n - square;
  const double sigma = sqrt(std::max(v, 0.0)) * 0x1p-11;
  const float lowest = row.max - (float)((double)p.top_n_sigma * sigma);
  return row.those(row.alive, [&](int32_t i) { return row.x[i] >= lowest; });
}

inline Set top_k(const Judged& row, const RowParams& p) {
  const size_t vocab = row.x.size();
  const size_t k = p.top_k == 0 || (size_t)p.top_k > vocab ? vocab : (size_t)p.top_k;
  Set kept(vocab);
  for (size_t rank = 0; rank < vocab; ++rank) {
    const int32_t i = row.ranked[rank];
    const bool tied = p.ties == kTiesAll && row.x[i] >= row.x[row.ranked[k - 1]];
    kept[i] = row.alive[i] && (rank < k || tied);
  }
  return kept;
}

inline uint64_t target_of(float p, uint64_t total) {
  const uint64_t p30 = (uint64_t)(p * 0x1p30f);
  return std::max<uint64_t>(1, (uint64_t)((uint128_t)p30 * total >> 30));
}

inline Set top_p(const Judged& row, const RowParams& p, const Set& base) {
  if (p.top_p == 1) return base;
  const uint64_t target = target_of(p.top_p, row.total(base));
  Set kept(base.size());
  uint64_t reached = 0;
  for (int32_t i : row.ranked) {
    if (!base[i]) continue;
    kept[i] = reached < target;
    reached += row.w[i];
  }
  return kept;
}

inline double mean_depth(const Judged& row, const Set& s) {
  uint64_t high = 0, low = 0;
  for (int32_t i = 0; i < row.vocab(); ++i) {
    if (!s[i] || !row.w[i]) continue;
    const uint64_t e = (uint64_t)(-row.y[i] * 16384.0f);
    high += (row.w[i] >> 20) * e;
    low += row.w[i] % (1 << 20) * e;
  }
  const double wide = (double)high * 0x1p20;
  return (wide + (double)low) / (double)row.total(s);
}

inline Set typical(const Judged& row, const RowParams& p, const Set& base) {
  if (p.typical_p == 1) return base;
  const double below = (mean_depth(row, base) * 0x1p-14) / (double)row.scale;
  const float mean = (float)((double)row.max - below);
  std::vector<std::pair<float, uint64_t>> near;
  for (int32_t i = 0; i < row.vocab(); ++i) {
    if (base[i]) near.push_back({fabsf(row.x[i] - mean), row.w[i]});
  }
  std::sort(near.begin(), near.end());
  const uint64_t target = target_of(p.typical_p, row.total(base));
  uint64_t reached = 0;
  float limit = 0;
  for (size_t i = 0; i < near.size() && reached < target; ++i) {
    reached += near[i].second;
    limit = near[i].first;
  }
  return row.those(base, [&](int32_t i) { return fabsf(row.x[i] - mean) <= limit; });
}

// What weighs at least as much, and the heaviest token in any case.
inline Set heavy(const Judged& row, const Set& base, double floor) {
  const double least = std::min(floor, (double)row.heaviest(base));
  return row.those(base, [&](int32_t i) { return row.w[i] >= (uint64_t)least; });
}

inline Set measured_floors(const Judged& row, const RowParams& p, Set kept) {
  if (p.epsilon_cutoff > 0) {
    kept = heavy(row, kept, (double)p.epsilon_cutoff * (double)row.total(kept));
  }
  if (p.eta_cutoff > 0) {
    const double e = (double)p.eta_cutoff;
    const uint64_t typical = mass_at(-(float)(mean_depth(row, kept) * 0x1p-14));
    kept = heavy(row, kept, std::min(e * (double)row.total(kept), sqrt(e) * (double)typical));
  }
  if (p.top_a > 0) {
    const double unit = (double)row.unit, left = (double)p.top_a * unit;
    kept = heavy(row, kept, left * (unit / (double)row.total(kept)));
  }
  if (p.p_less) {
    uint64_t hh = 0, hl = 0, ll = 0;
    for (int32_t i = 0; i < row.vocab(); ++i) {
      const uint64_t h = kept[i] ? row.w[i] >> 20 : 0, l = kept[i] ? row.w[i] % (1 << 20) : 0;
      hh += h * h, hl += h * l, ll += l * l;
    }
    const double high = (double)hh * 0x1p20;
    const double upper = (high + (double)(2 * hl)) * 0x1p20;
    kept = heavy(row, kept, (upper + (double)ll) / (double)row.total(kept));
  }
  return kept;
}

inline Set kept(const Judged& row, const RowParams& p) {
  const Set head = both(top_n_sigma(row, p), top_k(row, p));
  const auto floored = [&](const Set& base) {
    const uint64_t floor = mass_floor(p, row.heaviest(base));
    return row.those(base, [&](int32_t i) { return row.w[i] >= floor; });
  };
  Set found;
  switch (p.order) {
    case kMinPFirst:
      found = typical(row, p, top_p(row, p, floored(head)));
      break;
    case kJoint:
      found = typical(row, p, floored(both(head, top_p(row, p, row.alive))));
      break;
    case kTemperatureLast:
      found = floored(top_p(row, p, typical(row, p, head)));
      break;
    default:
      found = typical(row, p, floored(top_p(row, p, head)));
  }
  return measured_floors(row, p, found);
}

// What XTC excludes where its coin says so.
inline Set excluded(const Judged& row, const RowParams& p, const Set& kept) {
  const uint64_t floor = (uint64_t)((double)p.xtc_threshold * (double)row.total(kept));
  Set out(kept.size());
  std::vector<int32_t> top;
  for (int32_t i : row.ranked) {
    if (kept[i] && row.w[i] >= floor) top.push_back(i);
  }
  if (!(p.xtc_probability > 0) || top.size() < 2) return out;
  for (int32_t i : row.ranked) {
    if (i == top.back()) break;
    out[i] = kept[i];
  }
  return out;
}

}  // namespace twin

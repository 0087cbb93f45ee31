// A rank's part of a row that is split over ranks: tokens, sums, counts and places that ranks put
// together. The whole row's maximum, and what filters have kept of it so far, come with each
// question.
#pragma once

#include <type_traits>

#include "core/place.h"
#include "cpu/outputs.h"
#include "cpu/question.h"
#include "cpu/search.h"
#include "cpu/stats.h"

namespace fastsample {
namespace {

template <class T>
struct PartRow {
  const PartArguments& ask;
  const PartQuery& query;
  int64_t r;
  const Workspace& ws;
  Dense<T> dense;
  LogitWeigher weigher;
  Kept<float> kept;
  TopChoices top;

  const int64_t* details() const { return (const int64_t*)ask.details + r * ask.count; }
  int64_t* answers() const { return (int64_t*)ask.answers + r * ask.words; }
};

// Whether the first tokens of a valid part are less than a share of its mass, as some of its blocks
// tell.
template <class T>
bool is_flat(const PartRow<T>& p, const List& first, float share) {
  const Weighing weight(p.weigher.judge(), 0);
  const auto mass = [&](const auto& domain, int stride) {
    double total = 0;
    for (int b = 0; b < blocks(domain); b += stride) {
      MassSum sum;
      add_block(domain, b, everything(), weight, -INFINITY, sum);
      total += (double)weight.total(sum) * stride;
    }
    return total;
  };
  return mass(first, 1) < mass(p.dense, 16) * (double)share;
}

// As many tokens as there are words, in id order. An invalid row has its status's value instead.
template <class T>
List tell_first(const PartRow<T>& p, Status status, int64_t words, int64_t* to) {
  constexpr Place<float> kNone = {-INFINITY, -1};
  const int64_t vocab = p.dense.row.vocab;
  List list = {};
  int n = 0;
  if (status == kNaN) to[n++] = word_of_token({NAN, -1});
  if (status == kPositiveInfinity) to[n++] = word_of_token({INFINITY, -1});
  if (status == kValid) {
    const int32_t most = (int32_t)(words < vocab ? words : vocab);
    list = take_head(p.dense, most, kTiesFirst, p.ws).list;
    for (; n < list.n; ++n) {
      to[n] = word_of_token({list.x[n], (int32_t)p.ask.start + list.id[n]});
    }
  }
  for (; n < words; ++n) to[n] = word_of_token(kNone);
  return list;
}

// If they are wanted, the mass follows the tokens, as it would be if this were all of the row, and
// whether the part is flat. details: for the latter, the share.
template <class T>
void answer_first(PartRow<T> p, Peak peak) {
  const bool weighs = p.ask.wants & kWantsMass, judges = p.ask.wants & kWantsFlat;
  const int64_t words = p.ask.words - weighs - judges;
  p.weigher.max = peak.max;
  const Status status = peak.status;
  int64_t* to = p.answers();
  const List list = tell_first(p, status, words, to);
  const bool flat = judges && status == kValid && is_flat(p, list, float_of(*p.details()));
  int64_t n = words;
  if (weighs) {
    to[n++] = status == kValid ? (int64_t)weigh_groups(p.dense, p.kept, p.weigher, p.ws) : 0;
  }
  if (judges) to[n] = flat;
}

// Logits from `low` to `high`.
struct Band {
  float low, high;

  FS_MEMBER Mask has(vf x) const { return both(ge(x, splat(low)), ge(splat(high), x)); }
};

// Which bin logits are in: bin i holds those whose place is from i to less than i + 1.
struct Binning {
  float peak, per;

  explicit Binning(const LogitWeigher& judge) : peak(judge.max), per(judge.scale * kBinsOfOctave) {}

  FS_MEMBER vf place(vf x) const {
    constexpr float kEdge = kFineBins, kLast = kBins - 1;
    const vf fine = (splat(peak) - x) * splat(per);
    const vf coarse = splat(kEdge) + (fine - splat(kEdge)) * splat(1.0f / kCoarse);
    const vf place = min(fine, coarse);
    return max(select(gt(splat(kLast), place), place, splat(kLast)), splat(0.0f));
  }
  FS_MEMBER float place(float x) const { return place(splat(x))[0]; }

  // The logits of bins from `begin` to `end` - 1, and perhaps some of the next ones.
  FS_MEMBER Band band(int64_t begin, int64_t end) const {
    if (begin >= end) return {INFINITY, -INFINITY};
    return {end < kBins ? edge(end, 1) : -FLT_MAX, begin > 0 ? edge(begin, -1) : FLT_MAX};
  }

 private:
  // Where a bin begins, or some roundings farther down or up.
  FS_MEMBER float edge(int64_t bin, int side) const {
    const int64_t fine = bin < kFineBins ? bin : kFineBins + (bin - kFineBins) * kCoarse;
    const double off = 0.02 + 1e-6 * (double)fine;
    const double x = (double)peak - ((double)fine + side * off) / (double)per;
    return fabs(x) <= FLT_MAX ? nextafterf((float)x, side > 0 ? -FLT_MAX : FLT_MAX) : -FLT_MAX;
  }
};

// Everything that kSums may ask for, in one pass; and nothing.
struct Products {
  Depths depths;
  Squares squares = {};

  FS_MEMBER void add(vf x, const Halves& w) {
    depths.add(x, w);
    squares.add(x, w);
  }
};

struct NoProducts {
  FS_MEMBER void add(vf, const Halves&) {}
};

// The mass of each of a block's tokens, and which bin it is in; where it is not in a set, 0 and
// kBins. `more` sees all that has mass.
template <class Weight, class More>
FS_INLINE void place_each(const float* x, const BlockBits& set, const Weight& weight,
                          const Binning& binning, More& more, uint64_t* mass, int32_t* bin) {
  uint32_t hi[kBlock], lo[kBlock];
  for (int i = 0; i < kBlock; i += kAbreast * kLanes) {
    const auto p = load_pack<kAbreast>(x + i);
    Where<kAbreast> where;
    FS_EACH(kAbreast) where.m[u] = set.at(i + u * kLanes);
    const auto q = weight.of(p, where);
    FS_EACH(kAbreast) {
      const Halves w = to_fixed(q.v[u]);
      store(hi + i + u * kLanes, w.hi);
      store(lo + i + u * kLanes, w.lo);
      more.add(p.v[u], w);
      const vf place = select(where.m[u], binning.place(p.v[u]), splat((float)kBins));
      store(bin + i + u * kLanes, truncate(place));
    }
  }
  for (int i = 0; i < kBlock; ++i) mass[i] = ((uint64_t)hi[i] << kHalfBits) + lo[i];
}

// BinMass [kBins]; `more` is a sum of something else.
template <class T, class More>
void write_bins(const PartRow<T>& p, More& more, int64_t* to) {
  typedef uint64_t Pair __attribute__((vector_size(16)));  // a BinMass, which is added to at once
  constexpr int kFew = 16;
  const LogitWeigher judge = p.weigher.judge();
  const Binning binning(judge);
  const Weighing weight(judge, p.kept.floor);
  Pair found[kBins + 1] = {};  // the last is for tokens that are not kept
  float buffer[kBlock];
  uint64_t mass[kBlock];
  int32_t bin[kBlock];
  More own = more;  // in registers
  for (int b = 0; b < blocks(p.dense); ++b) {
    if (!may_keep(p.dense, b, p.kept)) continue;
    const float* x = values(p.dense, b, buffer);
    const BlockBits set = bits_within(p.dense, b, x, p.kept);
    if (std::is_same<More, NoProducts>::value && count(set) <= kFew) {
      each_bit(set, [&](int i) {
        const uint64_t own = judge.mass(x[i]);
        if (own >= p.kept.floor) found[truncate(binning.place(splat(x[i])))[0]] += Pair{own, 1};
      });
      continue;
    }
    place_each(x, set, weight, binning, own, mass, bin);
    if (p.kept.floor) {
      for (int i = 0; i < kBlock; ++i) bin[i] = mass[i] ? bin[i] : kBins;
    }
    for (int i = 0; i < kBlock; ++i) found[bin[i]] += Pair{mass[i], 1};
  }
  more = own;
  memcpy(to, found, kBins * sizeof *found);
}

template <class T>
void answer_bins(const PartRow<T>& p) {
  NoProducts none;
  write_bins(p, none, p.answers());
}

template <class T>
void answer_sums(const PartRow<T>& p) {
  int64_t* to = p.answers();
  memset(to, 0, kSumWords * sizeof *to);
  const LogitWeigher judge = p.weigher.judge();
  int64_t* bins = p.ask.wants & kWantsBins ? to + kSumWords : nullptr;
  const auto total_of_bins = [&] {
    uint64_t total = 0;
    for (int i = 0; i < kBins; ++i) total += (uint64_t)bins[2 * i];
    return total;
  };
  if (p.ask.wants & kWantsProducts) {
    Products products = {{judge}};
    if (bins) write_bins(p, products, bins);
    const uint64_t total = bins ? total_of_bins() : measure(p.dense, p.kept, judge, p.ws, products);
    const DepthSums d = products.depths.sums(total);
    const SquareSums s = products.squares.sums(total);
    const uint64_t sums[] = {d.mass, d.high, d.low, s.high, s.cross, s.low};
    memcpy(to, sums, sizeof sums);
  } else if (bins) {
    NoProducts none;
    write_bins(p, none, bins);
    to[0] = (int64_t)total_of_bins();
  } else {
    to[0] = (int64_t)weigh_groups(p.dense, p.kept, judge, p.ws);
  }
  if (p.ask.wants & kWantsSpread) {
    const SpreadSums s = spread(p.dense, p.weigher.max);
    const uint64_t sums[] = {s.count, s.sum, s.squares};
    memcpy(to + 6, sums, sizeof sums);
  }
}

template <class T>
void answer_totals(const PartRow<T>& p) {
  int64_t* to = p.answers();
  const auto first = [&](const Kept<float>& kept) {
    if (!(p.ask.wants & kWantsFirst)) return kNoKey;
    const Place<float> place = first_of(p.dense, kept, p.weigher.judge());
    return place.id < 0 ? kNoKey : key_of_place(place, p.ask.start);
  };
  const bool excludes = p.top.probability > 0;
  to[0] = to[1] = (int64_t)weigh_groups(p.dense, p.kept, p.weigher, p.ws);
  to[2] = to[3] = first(p.kept);
  int32_t count = 0;
  if (p.ask.wants & kWantsCount) {
    Batch batch = {};
    batch.out.kept_count = &count;
    if (p.ask.bitmask) {
      const int64_t words = (p.dense.row.vocab + 31) / 32;
      batch.out.kept_bitmask = (int32_t*)p.ask.bitmask + p.r * words;
    }
    write_kept_set(batch, 0, p.dense, p.dense, p.kept, p.weigher);
  }
  to[4] = count;
  if (!excludes) return;
  const Kept<float> rest = without(p.kept, p.top);
  to[1] = (int64_t)weigh_groups(p.dense, rest, p.weigher, p.ws);
  to[3] = first(rest);
}

// The maximum of words; not finite where the row is invalid.
FS_INLINE float peak_of_words(const int64_t* words, int64_t n) {
  float peak = -INFINITY;
  for (int64_t i = 0; i < n; ++i) {
    const float x = token_of_word(words[i]).x;
    peak = x > peak || x != x ? x : peak;
    if (x != x) break;
  }
  return peak;
}

template <class T>
void answer_whole(PartRow<T> p) {
  p.weigher.max = peak_of_words(p.details(), p.ask.count);
  if (fabsf(p.weigher.max) <= FLT_MAX) return answer_sums(p);
  memset(p.answers(), 0, (size_t)p.ask.words * sizeof(int64_t));
}

// A threshold t of the running mass of what XTC leaves is given as -2 - t; -1 is none.
template <class T>
void answer_draws(const PartRow<T>& p) {
  const Shares shares = {(uint64_t)p.query.total, (uint64_t)p.query.rest, p.top};
  const Kept<float> rest = without(p.kept, p.top);
  const int64_t n = p.ask.count;
  int64_t* to = p.answers();
  bool here = p.ask.wants & kWantsEntropy;
  for (int64_t j = 0; j < n; ++j) {
    to[j] = kNoKey;
    to[n + j] = 0;
    here |= p.details()[j] != -1;
  }
  to[2 * n] = 0;
  if (!here) return;
  weigh_groups(p.dense, p.kept, p.weigher, p.ws);
  if (p.ask.wants & kWantsEntropy) {
    const double own = shares.mixed()
                           ? entropy_of_mixture(p.dense, p.kept, p.weigher, shares)
                           : entropy_by_mass(p.dense, p.kept, p.weigher, shares.total, p.ws);
    memcpy(to + 2 * n, &own, sizeof own);
  }
  const bool excludes = p.top.probability > 0;
  if (excludes) weigh_groups(p.dense, rest, p.weigher, p.ws, p.ws.rest_mass);
  add_up(p.ws.group_mass, groups(p.dense));
  if (excludes) add_up(p.ws.rest_mass, groups(p.dense));
  for (int64_t j = 0; j < n; ++j) {
    const int64_t threshold = p.details()[j];
    const bool leaves = threshold < -1;
    const uint64_t at = (uint64_t)(leaves ? -2 - threshold : threshold);
    const bool by_rest = leaves && excludes;
    const uint64_t* running = by_rest ? p.ws.rest_mass : p.ws.group_mass;
    Drawn token = {-1, 0, 0};
    if (threshold != -1 && at < running[groups(p.dense) - 1]) {
      token = draw(p.dense, by_rest ? rest : p.kept, p.weigher, running, at);
    }
    to[j] = token.id < 0 ? kNoKey : key_of_place({token.x, token.id}, p.ask.start);
    to[n + j] = (int64_t)token.mass;
  }
}

template <class T>
void answer_above(const PartRow<T>& p) {
  for (int64_t j = 0; j < p.ask.count; ++j) {
    p.answers()[j] = rank_of(p.dense, float_of(p.details()[j])) - 1;
  }
}

template <class T>
void answer_ends(const PartRow<T>& p) {
  const LogitWeigher judge = p.weigher.judge();
  const Last last = last_of(p.dense, p.kept, judge);
  const int64_t key = last.count ? key_of_place(last.place, p.ask.start) : 0;
  const int64_t ends[] = {(int64_t)heaviest(p.dense, p.kept, judge), key, (int64_t)last.count};
  memcpy(p.answers(), ends, sizeof ends);
}

template <class T>
void answer_bits(const PartRow<T>& p) {
  int64_t* to = p.answers();
  memset(to, 0, (size_t)p.ask.words * sizeof *to);
  each_kept(p.dense, p.kept, p.weigher, [&](int b, const BlockBits& set) {
    for (int k = 0; k < kBlock / 64; ++k) {
      const uint64_t word = set.word[k];
      if (!word) continue;
      const int64_t first = p.ask.start + b * kBlock + 64 * k, shift = first % 64;
      to[first / 64] |= (int64_t)(word << shift);
      const uint64_t rest = shift ? word >> (64 - shift) : 0;
      if (rest) to[first / 64 + 1] |= (int64_t)rest;
    }
  });
}

// details: of what tokens the logits are wanted, as words; -inf of those that are not here.
template <class T>
void tell_logits(const PartRow<T>& p, int64_t* to) {
  const int64_t n = p.ask.count;
  for (int64_t i = 0; i < n; i += 2) {
    float x[2] = {-INFINITY, -INFINITY};
    for (int64_t j = i; j < n && j < i + 2; ++j) {
      const int64_t id = token_of_word(p.details()[j]).id - p.ask.start;
      if (id >= 0 && id < p.dense.row.vocab) x[j - i] = allowed_logit(p.dense.row, (int32_t)id);
    }
    memcpy(to + i / 2, x, sizeof x);
  }
}

// details: the bins whose tokens are wanted, as two pairs of a first one and the one after the
// last.
template <class T>
void answer_within(const PartRow<T>& p) {
  const int64_t* bins = p.details();
  const LogitWeigher judge = p.weigher.judge();
  const Binning binning(judge);
  const Band near[2] = {binning.band(bins[0], bins[1]), binning.band(bins[2], bins[3])};
  const auto is_wanted = [&](Place<float> token) {
    const auto bin = (int64_t)binning.place(token.x);
    const bool in = (bin >= bins[0] && bin < bins[1]) || (bin >= bins[2] && bin < bins[3]);
    return in && ranks_within(p.kept, token) &&
           (!p.kept.floor || judge.mass(token.x) >= p.kept.floor);
  };
  int64_t* to = p.answers();
  int64_t n = 0;
  float buffer[kBlock];
  for (int b = 0; b < blocks(p.dense); ++b) {
    if (!may_keep(p.dense, b, p.kept)) continue;
    const float* x = values(p.dense, b, buffer);
    const BlockBits some =
        block_bits(x, [&](vf v, int) { return either(near[0].has(v), near[1].has(v)); });
    each_bit(some, [&](int i) {
      const Place<float> token = {x[i], id_at(p.dense, b, i)};
      if (n == p.ask.words || !is_wanted(token)) return;
      to[n++] = word_of_token({token.x, (int32_t)p.ask.start + token.id});
    });
  }
  for (; n < p.ask.words; ++n) to[n] = word_of_token({-INFINITY, -1});
}

}  // namespace
}  // namespace fastsample

#include "cpu/search.h"

#include <float.h>
#include <math.h>

#include <algorithm>
#include <vector>

#include "core/filters.h"
#include "core/philox.h"
#include "core/place.h"
#include "cpu/platform.h"
#include "cpu/question.h"

namespace fastsample {
namespace {

uint64_t weight(const PlaceSearch& s, uint64_t mass, uint64_t tokens) {
  return s.by == kByNumber ? tokens : mass;
}

// The weight of each bin on all ranks.
std::vector<uint64_t> weights_of(const PlaceSearch& s) {
  std::vector<uint64_t> sums(kBins);
  for (int64_t rank = 0; rank < s.ranks; ++rank) {
    const BinMass* own = s.bins[rank];
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += weight(s, own[i].mass, own[i].tokens);
  }
  return sums;
}

bool holds(const Uncertain& u, int64_t bin) {
  return (bin >= u.begin && bin < u.in) || (bin >= u.out && bin < u.end);
}

// In rank order: the bin in which the target is reached; none where it is not.
Uncertain uncertain_in_order(const PlaceSearch& s, const std::vector<uint64_t>& weights) {
  uint64_t running = 0;
  int64_t bin = 0;
  while (bin < kBins && running + weights[(size_t)bin] < s.target) {
    running += weights[(size_t)bin++];
  }
  return {0, 0, bin, std::min<int64_t>(bin + 1, kBins), 0};
}

// How far the tokens of bins are from a mean, at least and at most, outward from the bin that it is
// in. Bounds are wide enough for the roundings of a place, of a distance and of these.
class Distances {
 public:
  explicit Distances(const PlaceSearch& s)
      : peak_(s.peak),
        width_(std::min(1 / ((double)s.scale * kBinsOfOctave), kWidest)),
        mean_(s.mean),
        least_(kBins),
        most_(kBins) {
    const double at = (peak_ - mean_) / width_;
    while (middle_ + 1 < kBins && begin(middle_ + 1) <= at) ++middle_;
    for (int64_t i = middle_; i >= 0; --i) add(i, i + 1);
    for (int64_t i = middle_ + 1; i < kBins; ++i) add(i, i - 1);
  }

  int64_t middle() const { return middle_; }
  double least(int64_t bin) const { return least_[(size_t)bin]; }
  double most(int64_t bin) const { return most_[(size_t)bin]; }

 private:
  static constexpr double kSlack = 0x1p-17, kWidest = 0x1p900;

  // Where a bin begins, in widths of fine ones below the maximum.
  static double begin(int64_t bin) {
    return (double)(bin <= kFineBins ? bin : kFineBins + (bin - kFineBins) * kCoarse);
  }

  // `nearer` is the next bin towards the middle one.
  void add(int64_t i, int64_t nearer) {
    const double high = peak_ - begin(i) * (1 - kSlack) * width_;
    const double low = i == kBins - 1 ? -INFINITY : peak_ - begin(i + 1) * (1 + kSlack) * width_;
    const double least = std::max({0.0, low - mean_, mean_ - high}) * (1 - kSlack);
    const double most = std::max(high - mean_, mean_ - low) * (1 + kSlack);
    least_[(size_t)i] = i == middle_ ? 0 : least;
    most_[(size_t)i] = i == middle_ ? most : std::max(most, most_[(size_t)nearer]);
  }

  int64_t middle_ = 0;
  double peak_, width_, mean_;
  std::vector<double> least_, most_;
};

// The least distance d for which the bins with distance(bin) <= d reach the target: distances rise
// outward from a middle bin.
template <class Distance>
double reaching(const std::vector<uint64_t>& weights, int64_t middle, uint64_t target,
                Distance distance) {
  const int64_t n = (int64_t)weights.size();
  uint64_t running = 0;
  for (int64_t up = middle, down = middle + 1; up >= 0 || down < n;) {
    const bool goes_up = down >= n || (up >= 0 && distance(up) <= distance(down));
    const int64_t bin = goes_up ? up-- : down++;
    running += weights[(size_t)bin];
    if (running >= target) return distance(bin);
  }
  return INFINITY;
}

// Outward from a mean: what is nearer than the least that the limit may be is on the near side, and
// what is further than the most that it may be is not.
Uncertain uncertain_about_mean(const PlaceSearch& s, const std::vector<uint64_t>& weights) {
  const Distances d(s);
  const int64_t middle = d.middle();
  const double least = reaching(weights, middle, s.target, [&](int64_t i) { return d.least(i); });
  const double most = reaching(weights, middle, s.target, [&](int64_t i) { return d.most(i); });
  Uncertain u = {middle + 1, middle + 1, middle + 1, middle + 1, 0};
  while (u.in > 0 && d.most(u.in - 1) < least) --u.in;
  if (u.in <= middle) {
    while (u.out < kBins && d.most(u.out) < least) ++u.out;
  }
  u.begin = u.in;
  u.end = u.out;
  while (u.begin > 0 && d.least(u.begin - 1) <= most) --u.begin;
  while (u.end < kBins && d.least(u.end) <= most) ++u.end;
  return u;
}

Uncertain bins_of(const PlaceSearch& s) {
  const std::vector<uint64_t> weights = weights_of(s);
  return s.by == kByDistance ? uncertain_about_mean(s, weights) : uncertain_in_order(s, weights);
}

struct Candidate {
  int64_t rank;
  Place<float> token;
  float distance;
  uint64_t mass;
};

std::vector<Candidate> candidates_of(const PlaceSearch& s) {
  std::vector<Candidate> found;
  for (int64_t rank = 0; rank < s.ranks; ++rank) {
    for (int64_t i = 0; i < s.words_of_rank; ++i) {
      const Place<float> token = token_of_word(s.words[rank][i]);
      if (token.id < 0) continue;
      const uint64_t mass = mass_of(token.x, s.peak, s.scale);
      found.push_back({rank, token, fabsf(token.x - s.mean), mass});
    }
  }
  const bool by_distance = s.by == kByDistance;
  std::sort(found.begin(), found.end(), [&](const Candidate& a, const Candidate& b) {
    return by_distance ? a.distance < b.distance : ranks_before(a.token, b.token);
  });
  return found;
}

PlaceSearch search_of(const PartArguments& ask, int64_t r) {
  const PartQuery& row = ((const PartQuery*)ask.queries)[r];
  const int64_t* details = (const int64_t*)ask.details + r * ask.count;
  const SearchQuery& q = *(const SearchQuery*)details;
  const int64_t* bins = (const int64_t*)(&q + 1);
  const int64_t* words = bins + q.ranks * kBins * (int64_t)(sizeof(BinMass) / sizeof *bins);
  const int64_t told = (details + ask.count - words) / q.ranks;
  return {
      float_of(row.peak), float_of(row.judged_scale),       q.ranks,       q.by, (uint64_t)q.target,
      float_of(q.mean),   {bins, (words - bins) / q.ranks}, {words, told}, told};
}

void answer_thresholds(const PartArguments& ask, int64_t r, int64_t* to) {
  const DrawQuery& q = *(const DrawQuery*)((const int64_t*)ask.details + r * ask.count);
  const PartQuery& row = ((const PartQuery*)ask.queries)[r];
  const int64_t* shares = (const int64_t*)(&q + 1);
  const int64_t n = ask.words / 2;
  const float coin = row.top == kHighestKey ? 0.0f : float_of(row.coin);
  for (int64_t j = 0; j < n; ++j) {
    const bool leaves =
        coin > 0 && xtc_excludes((uint64_t)q.seed, (uint64_t)q.offset, (uint32_t)j, coin);
    const int64_t place = own_threshold(q, {shares + leaves, 2}, j);
    to[j] = leaves && place >= 0 ? -2 - place : place;
    to[n + j] = leaves;
  }
}

}  // namespace

Uncertain uncertain_of(const PlaceSearch& s) {
  const platform::FloatEnvironment environment;
  Uncertain u = bins_of(s);
  for (int64_t rank = 0; rank < s.ranks; ++rank) {
    int64_t tokens = 0;
    for (int64_t i = u.begin; i < u.end; ++i) {
      if (holds(u, i)) tokens += (int64_t)s.bins[rank][i].tokens;
    }
    u.most = std::max(u.most, tokens);
  }
  return u;
}

// Bins on the near side, and the first of the candidates.
NearSide near_side(const PlaceSearch& s, int64_t* masses, int64_t* tokens) {
  const platform::FloatEnvironment environment;
  constexpr int64_t kLowest = -(int64_t)0x7F7FFFFF * ((int64_t)1 << 32);
  const Uncertain u = bins_of(s);
  uint64_t running = 0;
  for (int64_t rank = 0; rank < s.ranks; ++rank) {
    masses[rank] = tokens[rank] = 0;
    for (int64_t i = u.in; i < u.out; ++i) {
      masses[rank] += (int64_t)s.bins[rank][i].mass;
      tokens[rank] += (int64_t)s.bins[rank][i].tokens;
    }
    running += weight(s, (uint64_t)masses[rank], (uint64_t)tokens[rank]);
  }
  const bool by_distance = s.by == kByDistance;
  const std::vector<Candidate> found = candidates_of(s);
  const Candidate* last = nullptr;
  for (const Candidate& c : found) {
    const bool ties = by_distance && last && c.distance == last->distance;
    if (running >= s.target && !ties) break;
    running += weight(s, c.mass, 1);
    masses[c.rank] += (int64_t)c.mass;
    tokens[c.rank] += 1;
    last = &c;
  }
  if (!last || running < s.target) return {kHighestKey, kLowest};
  if (!by_distance) return {kHighestKey, key_of_place(last->token)};
  const float high = highest_near(s.mean, last->distance);
  const int64_t low = key_of_place({-highest_near(-s.mean, last->distance), INT32_MAX});
  return {high < s.peak ? key_of_place({high, -1}) : kHighestKey, low};
}

int64_t own_threshold(const DrawQuery& q, const OfRanks<int64_t>& shares, int64_t draw) {
  uint64_t total = 0, before = 0;
  for (int64_t rank = 0; rank < q.ranks; ++rank) {
    before += rank < q.rank ? (uint64_t)*shares[rank] : 0;
    total += (uint64_t)*shares[rank];
  }
  const uint64_t place =
      draw_threshold((uint64_t)q.seed, (uint64_t)q.offset, (uint32_t)draw, total) - before;
  return place < (uint64_t)*shares[q.rank] ? (int64_t)place : -1;
}

int64_t key_of_draw(const int64_t* told, int64_t words, const DrawQuery& q, int64_t draw) {
  uint64_t total = 0;
  for (int64_t rank = 0; rank < q.ranks; ++rank) total += (uint64_t)told[rank * words];
  uint64_t place = draw_threshold((uint64_t)q.seed, (uint64_t)q.offset, (uint32_t)draw, total);
  const int64_t* owner = told;
  for (; place >= (uint64_t)*owner; owner += words) place -= (uint64_t)*owner;
  const int64_t* of = owner + 1 + draw * kWordsOfDraw;
  for (int i = 0; i < kGuesses; ++i) {
    if ((int64_t)place >= of[0] && (int64_t)place < of[1 + 2 * i]) return of[2 + 2 * i];
  }
  return kNoKey;
}

void search(const PartArguments& ask, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    int64_t* to = (int64_t*)ask.answers + r * ask.words;
    switch ((SearchQuestion)ask.question) {
      case kUncertain: {
        const Uncertain u = uncertain_of(search_of(ask, r));
        const int64_t answers[] = {u.begin, u.in, u.out, u.end, u.most};
        std::copy(std::begin(answers), std::end(answers), to);
        break;
      }
      case kNearSide: {
        const PlaceSearch s = search_of(ask, r);
        const NearSide near = near_side(s, to + 2, to + 2 + s.ranks);
        to[0] = near.high;
        to[1] = near.low;
        break;
      }
      case kThresholds:
        answer_thresholds(ask, r, to);
        break;
    }
  }
}

}  // namespace fastsample

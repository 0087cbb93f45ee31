#include "cpu/search.h"

#include <float.h>
#include <math.h>

#include <algorithm>
#include <vector>

#include "core/filters.h"
#include "core/philox.h"
#include "core/place.h"
#include "cpu/platform.h"

namespace fastsample {
namespace {

// Bins begin to in - 1 and out to end - 1 are uncertain. Those in between are on the near side.
struct Uncertain {
  int64_t begin, in, out, end;

  bool holds(int64_t bin) const { return (bin >= begin && bin < in) || (bin >= out && bin < end); }
};

struct Search {
  const PartArguments& ask;
  const PartQuery& row;
  const SearchQuery& query;
  const BinMass* bins;   // [ranks, kBins]
  const int64_t* words;  // [ranks, words_of_rank()]

  Search(const PartArguments& ask, int64_t r)
      : ask(ask),
        row(((const PartQuery*)ask.queries)[r]),
        query(*(const SearchQuery*)((const int64_t*)ask.details + r * ask.count)),
        bins((const BinMass*)(&query + 1)),
        words((const int64_t*)(bins + query.ranks * kBins)) {}

  int64_t words_of_rank() const {
    const int64_t used = words - (const int64_t*)&query;
    return (ask.count - used) / query.ranks;
  }
  const BinMass* of_rank(int64_t rank) const { return bins + rank * kBins; }
  uint64_t target() const { return (uint64_t)query.target; }
  float mean() const { return float_of(query.mean); }
  uint64_t weight(uint64_t mass, uint64_t tokens) const {
    return query.by == kByNumber ? tokens : mass;
  }

  // The weight of each bin on all ranks.
  std::vector<uint64_t> weights() const {
    std::vector<uint64_t> sums(kBins);
    for (int64_t rank = 0; rank < query.ranks; ++rank) {
      const BinMass* own = of_rank(rank);
      for (size_t i = 0; i < sums.size(); ++i) sums[i] += weight(own[i].mass, own[i].tokens);
    }
    return sums;
  }
};

// In rank order: the bin in which the target is reached; none where it is not.
Uncertain uncertain_in_order(const Search& s, const std::vector<uint64_t>& weights) {
  uint64_t running = 0;
  int64_t bin = 0;
  while (bin < kBins && running + weights[(size_t)bin] < s.target()) {
    running += weights[(size_t)bin++];
  }
  return {0, 0, bin, std::min<int64_t>(bin + 1, kBins)};
}

// How far the tokens of bins are from a mean, at least and at most, outward from the bin that it is
// in. Bounds are wide enough for the roundings of a place, of a distance and of these.
class Distances {
 public:
  explicit Distances(const Search& s)
      : peak_(float_of(s.row.peak)),
        width_(std::min(1 / (double)float_of(s.query.per), kWidest)),
        mean_(s.mean()),
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
Uncertain uncertain_about_mean(const Search& s, const std::vector<uint64_t>& weights) {
  const Distances d(s);
  const int64_t middle = d.middle();
  const double least = reaching(weights, middle, s.target(), [&](int64_t i) { return d.least(i); });
  const double most = reaching(weights, middle, s.target(), [&](int64_t i) { return d.most(i); });
  Uncertain u = {middle + 1, middle + 1, middle + 1, middle + 1};
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

Uncertain uncertain_of(const Search& s) {
  const std::vector<uint64_t> weights = s.weights();
  return s.query.by == kByDistance ? uncertain_about_mean(s, weights)
                                   : uncertain_in_order(s, weights);
}

void answer_uncertain(const Search& s, int64_t* to) {
  const Uncertain u = uncertain_of(s);
  int64_t most = 0;
  for (int64_t rank = 0; rank < s.query.ranks; ++rank) {
    int64_t tokens = 0;
    for (int64_t i = u.begin; i < u.end; ++i) {
      if (u.holds(i)) tokens += (int64_t)s.of_rank(rank)[i].tokens;
    }
    most = std::max(most, tokens);
  }
  const int64_t answers[] = {u.begin, u.in, u.out, u.end, most};
  std::copy(std::begin(answers), std::end(answers), to);
}

struct Candidate {
  int64_t rank;
  Place<float> token;
  float distance;
  uint64_t mass;
};

std::vector<Candidate> candidates_of(const Search& s) {
  std::vector<Candidate> found;
  const int64_t n = s.words_of_rank();
  const float peak = float_of(s.row.peak), scale = float_of(s.row.judged_scale);
  for (int64_t i = 0; i < s.query.ranks * n; ++i) {
    const Place<float> token = token_of_word(s.words[i]);
    if (token.id < 0) continue;
    found.push_back({i / n, token, fabsf(token.x - s.mean()), mass_of(token.x, peak, scale)});
  }
  const bool by_distance = s.query.by == kByDistance;
  std::sort(found.begin(), found.end(), [&](const Candidate& a, const Candidate& b) {
    return by_distance ? a.distance < b.distance : ranks_before(a.token, b.token);
  });
  return found;
}

// What is on the near side: tokens of `bins`, and the first of the candidates.
void answer_bounds(const Search& s, int64_t* to) {
  constexpr int64_t kLowest = -(int64_t)0x7F7FFFFF * ((int64_t)1 << 32);
  const int64_t ranks = s.query.ranks;
  const Uncertain u = uncertain_of(s);
  int64_t* const masses = to + 2;
  int64_t* const tokens = masses + ranks;
  uint64_t running = 0;
  for (int64_t rank = 0; rank < ranks; ++rank) {
    masses[rank] = tokens[rank] = 0;
    for (int64_t i = u.in; i < u.out; ++i) {
      masses[rank] += (int64_t)s.of_rank(rank)[i].mass;
      tokens[rank] += (int64_t)s.of_rank(rank)[i].tokens;
    }
    running += s.weight((uint64_t)masses[rank], (uint64_t)tokens[rank]);
  }
  to[0] = kHighestKey;
  to[1] = kLowest;
  const bool by_distance = s.query.by == kByDistance;
  const std::vector<Candidate> found = candidates_of(s);
  const Candidate* last = nullptr;
  for (const Candidate& c : found) {
    const bool ties = by_distance && last && c.distance == last->distance;
    if (running >= s.target() && !ties) break;
    running += s.weight(c.mass, 1);
    masses[c.rank] += (int64_t)c.mass;
    tokens[c.rank] += 1;
    last = &c;
  }
  if (!last || running < s.target()) return;
  if (!by_distance) {
    to[1] = key_of_place(last->token);
    return;
  }
  const float high = highest_near(s.mean(), last->distance);
  if (high < float_of(s.row.peak)) to[0] = key_of_place({high, -1});
  to[1] = key_of_place({-highest_near(-s.mean(), last->distance), INT32_MAX});
}

void answer_thresholds(const PartArguments& ask, int64_t r, int64_t* to) {
  const DrawQuery& q = *(const DrawQuery*)((const int64_t*)ask.details + r * ask.count);
  const PartQuery& row = ((const PartQuery*)ask.queries)[r];
  const int64_t* shares = (const int64_t*)(&q + 1);
  const int64_t n = ask.words / 2;
  const float coin = row.top == kHighestKey ? 0.0f : float_of(row.coin);
  for (int64_t j = 0; j < n; ++j) {
    const uint64_t seed = (uint64_t)q.seed, offset = (uint64_t)q.offset;
    const bool leaves = coin > 0 && xtc_excludes(seed, offset, (uint32_t)j, coin);
    uint64_t total = 0, before = 0;
    for (int64_t rank = 0; rank < q.ranks; ++rank) {
      before += rank < q.rank ? (uint64_t)shares[2 * rank + leaves] : 0;
      total += (uint64_t)shares[2 * rank + leaves];
    }
    const uint64_t own = (uint64_t)shares[2 * q.rank + leaves];
    const uint64_t place = draw_threshold(seed, offset, (uint32_t)j, total) - before;
    to[j] = place >= own ? -1 : leaves ? -2 - (int64_t)place : (int64_t)place;
    to[n + j] = leaves;
  }
}

}  // namespace

void search(const PartArguments& ask, int64_t rows) {
  const platform::FloatEnvironment environment;
  for (int64_t r = 0; r < rows; ++r) {
    int64_t* to = (int64_t*)ask.answers + r * ask.words;
    switch ((SearchQuestion)ask.question) {
      case kUncertain:
        answer_uncertain(Search(ask, r), to);
        break;
      case kBounds:
        answer_bounds(Search(ask, r), to);
        break;
      case kThresholds:
        answer_thresholds(ask, r, to);
        break;
    }
  }
}

}  // namespace fastsample

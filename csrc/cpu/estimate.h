// Where the boundary of a weighted selection probably lies, from a sample. A wrong estimate costs
// time, but changes no token.
#pragma once

#include "cpu/domain.h"
#include "cpu/select.h"

namespace fastsample {
namespace {

// The boundary is believed to lie in low < x < high.
struct Bracket {
  float low, high;
};

// Values that stand for those of a whole domain.
constexpr int kSample = 2048;
struct Sample {
  alignas(FASTSAMPLE_VECTOR_BYTES) float x[kSample + kPad];
  alignas(FASTSAMPLE_VECTOR_BYTES) float weight[kSample + kPad];
  int n;
  double each;  // how many tokens a value stands for
};

// Some values of a domain, evenly spread: from as many blocks as possible, in runs of kRun, at most
// an eighth of a block.
template <int kRun, class Domain>
void take_sample(const Domain& domain, Sample* to) {
  constexpr int kRuns = kSample / kRun, kPlaces = kBlock / kRun, kMost = kPlaces / 8;
  const Domain d = domain;  // a copy: to the compiler, a store might change the original
  const int sampled = blocks(d) < kRuns ? blocks(d) : kRuns;
  const int runs = kRuns / sampled < kMost ? kRuns / sampled : kMost;
  const double step = (double)blocks(d) / sampled;
  // Each run has a place of its own in the block; 39 finds the run of a place, as 39 * 23 = 1
  // modulo kPlaces.
  const auto place = [](int s, int run) { return (unsigned)(29 * s + 23 * run) % kPlaces; };
  const auto run_at = [](int s, int place) { return (unsigned)(39 * (place - 29 * s)) % kPlaces; };
  float* next = to->x;
  for (int s = 0; s < sampled; ++s, next += runs * kRun) {
    const int b = (int)((s + 0.5) * step);
    for (int run = 0; run < runs; ++run) {
      copy_run<kRun>(d, b, (int)place(s, run) * kRun, next + run * kRun);
    }
    each_edit(d, b, [&](const Edit& e) {
      const unsigned run = run_at(s, e.id % kBlock / kRun);
      if (run < (unsigned)runs) next[run * kRun + e.id % kRun] = e.x;
    });
  }
  to->n = runs * sampled * kRun;
  to->each = (double)blocks(d) * kBlock / to->n;
}

// The highest fifth of a row's block maxima: nearly all of its highest tokens, each of which stands
// for itself.
template <class T>
Span take_heads(const Dense<T>& d, float* to) {
  Span all = copy(d.block_max, d.row.blocks, to);
  if (!all.n) return Span{to, 0, INFINITY, INFINITY};
  const float edge = narrow(Counting{}, all, 0, (uint64_t)all.n / 5 + 1, to).x;
  return filter(d.block_max, d.row.blocks, to, [&](vf v) { return ge(v, splat(edge)); });
}

FS_INLINE Span take_heads(const List&, float* to) { return Span{to, 0, INFINITY, INFINITY}; }

// Values that stand for a row's, for estimates: its heads (in ws.spare), each of which stands for
// itself, and a sample of what has weight below them. There are none of a short row.
struct StandIns {
  Span heads;
  Sample body;
};

template <class T, class Weight>
bool take_stand_ins(const Dense<T>& d, const Weight& weight, const Workspace& ws, StandIns* to) {
  if (blocks(d) < 2 * kSample / kBlock) return false;
  Span& heads = to->heads;
  Sample* body = &to->body;
  heads = take_heads(d, ws.spare);
  take_sample<Weight::kSampleRun>(d, body);
  // In a sorted row, the highest tokens share few blocks, and the sample shows more of them.
  const int shared = count_above(body->x, body->n, nextafterf(heads.low, -INFINITY));
  if (shared > 8 + 2 * heads.n / body->each) heads = {ws.spare, 0, INFINITY, -INFINITY};
  const float lowest = weight.lowest();
  body->n = filter(body->x, body->n, body->x, [&](vf v) {
              return both(gt(v, splat(lowest)), gt(splat(heads.low), v));
            }).n;
  return true;
}

// Weight by value, from high down: bin 1 begins at `high`, each is `width` wide, the first and the
// last take what lies beyond.
struct Histogram {
  static constexpr int kBins = 510, kParts = 4, kPart = (kBins + 2) / kParts;

  float high, width;
  float weight[kBins + 2] = {};  // after accumulate(): of this bin and all above

  // The width is such that no difference of floats divided by it is NaN.
  Histogram(float low, float top) : high(top), width(top / kBins - low / kBins) {
    if (!(width > 1e-30f)) width = 1e-30f;
  }

  void add(const float* x, const float* w, int n, float each) {
    const float scale = 1 / width;
    for (int i = 0; i < n; i += kLanes) {
      const vf place = (splat(high) - load(x + i)) * scale + 1.0f;
      int32_t bin[kLanes];
      store(bin, truncate(min(max(place, splat(0.0f)), splat(kBins + 1.0f))));
      for (int j = 0; j < kLanes && i + j < n; ++j) weight[bin[j]] += each * w[i + j];
    }
  }

  void accumulate() {
    // Several parts side by side, since each addition waits for the one before it.
    for (int i = 1; i < kPart; ++i) {
      for (int part = 0; part < kParts; ++part) {
        weight[part * kPart + i] += weight[part * kPart + i - 1];
      }
    }
    for (int part = 1; part < kParts; ++part) {
      const float above = weight[part * kPart - 1];
      for (int i = 0; i < kPart; ++i) weight[part * kPart + i] += above;
    }
  }

  float total() const { return weight[kBins + 1]; }

  // The bin in which the weight from above comes to exceed `goal`.
  int reach(double goal) const {
    int low = 0, high = kBins + 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (weight[middle] > goal) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }

  // Bounds of a bin, with a margin for rounding.
  float above(int bin) const {
    return bin ? nextafterf(high - ((float)bin - 1.0625f) * width, INFINITY) : INFINITY;
  }
  float below(int bin) const {
    return bin <= kBins ? nextafterf(high - ((float)bin + 0.0625f) * width, -INFINITY) : -INFINITY;
  }
};

// How far off the weight above `edge` may be, relative to the target: two and a half standard
// deviations of a Poisson sample. Weight above the edge raises the target by its share, as weight
// below it does.
template <class Weight>
double uncertainty(const Weight& weight, const Sample& s, float edge) {
  vf all = splat(0.0f), upper = splat(0.0f);
  for (int i = 0; i < s.n; i += kLanes) {
    const vf w = load(s.weight + i), square = w * w;
    all = all + square;
    upper = upper + select(gt(load(s.x + i), splat(edge)), square, splat(0.0f));
  }
  const double share = weight.share(), one = (double)weight.one(edge);
  const double above = (double)reduce_add(upper) + one * one;
  const double below = (double)reduce_add(all) - (double)reduce_add(upper);
  return 2.5 * s.each * sqrt((1 - share) * (1 - share) * above + share * share * below);
}

// Estimates the boundary from the heads (the top of the distribution) and a sample (its body).
template <class Weight, class Domain>
Bracket find_bracket(const Weight& weight, const Domain& d, const Workspace& ws) {
  Bracket found = {weight.lowest(), INFINITY};
  if (blocks(d) < 2 * kSample / kBlock) return found;
  const Span none = {ws.spare, 0, INFINITY, -INFINITY};
  Span heads = Weight::kHeavyHeads ? take_heads(d, ws.spare) : none;
  Sample body;
  take_sample<Weight::kSampleRun>(d, &body);
  // Where few tokens lie above a value that the boundary cannot lie below, there is nothing to
  // estimate.
  const float certain = weight.certain_low((double)weight_above(weight, heads, -INFINITY),
                                           (double)blocks(d) * kBlock);
  if (count_above(body.x, body.n, certain) < body.n / 32) return Bracket{certain, INFINITY};
  // In a sorted row, the highest tokens share few blocks, and the sample shows more of them.
  const int shared = count_above(body.x, body.n, nextafterf(heads.low, -INFINITY));
  if (shared > 8 + 2 * heads.n / body.each) heads = none;
  const Span rest = filter(body.x, body.n, body.x, [&](vf v) {
    return both(gt(v, splat(found.low)), gt(splat(heads.low), v));
  });
  body.n = rest.n;
  weight.roughly(body.x, body.n, body.weight);
  float* head_weight = ws.spare + heads.n + kPad;
  weight.roughly(heads.x, heads.n, head_weight);
  float low = rest.n ? rest.low : heads.low, high = heads.n ? heads.high : rest.high;
  if (!(low <= high)) return found;  // the sample missed all that has mass
  if (low == high) return Bracket{nextafterf(low, -INFINITY), nextafterf(high, INFINITY)};
  // Once is enough, unless outliers make the bins so wide that many tokens share a few.
  for (int before = body.n;;) {
    Histogram h(low, high);
    h.add(body.x, body.weight, body.n, (float)body.each);
    h.add(heads.x, head_weight, heads.n, 1.0f);
    h.accumulate();
    const double target = weight.estimate_target((double)h.total());
    const double slack = uncertainty(weight, body, h.below(h.reach(target)));
    const int top = target > slack ? h.reach(target - slack) : 0, bottom = h.reach(target + slack);
    low = h.below(bottom);
    high = h.above(top);
    found = Bracket{low > found.low ? low : found.low, high < found.high ? high : found.high};
    const int inside = count_above(body.x, body.n, low) - count_above(body.x, body.n, high);
    const bool open = low == -INFINITY || high == INFINITY, fine = bottom - top >= 8;
    if (open || fine || inside < body.n / 16 || inside > before / 2) return found;
    before = inside;
  }
}

}  // namespace
}  // namespace fastsample

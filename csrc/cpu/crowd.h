// Values that stand for those of a row, and where typical's limit probably lies by them. A wrong
// estimate costs time, but changes no token.
#pragma once

#include "cpu/estimate.h"
#include "cpu/typical.h"

namespace fastsample {
namespace {

// The distances between which a limit probably lies.
struct Distances {
  float near, far;
};

constexpr auto is_finite = [](vf v) { return gt(v, splat(-INFINITY)); };
FS_INLINE vf square(vf v) { return v * v; }

// Values, and about the mass of all that each stands for.
struct Crowd {
  static constexpr int kHeads = kMaxBlocks / 5 + 1, kTops = 3 * kSample / 2;
  static constexpr int kMost = kSample + kHeads + kTops;
  alignas(FASTSAMPLE_VECTOR_BYTES) float x[kMost + kPad];
  alignas(FASTSAMPLE_VECTOR_BYTES) float mass[kMost + kPad];
  int n = 0;

  // Adds those of some values for which where(x) holds, each of which stands for so many.
  template <class Weight, class Where>
  void add(const Weight& weight, const float* from, int some, double each, Where where) {
    const int more = filter(from, some, x + n, where).n;
    const float unit = (float)(each * 0x1p40 / (double)kRoughUnit);
    for (int i = 0; i < more; i += kAbreast * kLanes) {
      const auto q = weight.of(load_pack<kAbreast>(x + n + i), everywhere<kAbreast>());
      FS_EACH(kAbreast) store(mass + n + i + u * kLanes, q.v[u] * unit);
    }
    n += more;
  }

  double total() const {
    return sum(is_finite, [](vf, vf m) { return m; });
  }

  // Leaves out those from a place on for which where(x) does not hold.
  template <class Where>
  void keep_where(int begin, Where where) {
    int kept = begin;
    for (int i = begin; i < n; i += kLanes) {
      const vf v = load(x + i), m = load(mass + i);
      const Mask stays = both(first(n - i), where(v));
      compress_store(mass + kept, m, stays);
      kept += compress_store(x + kept, v, stays);
    }
    n = kept;
    fill_up(x, n);
  }

  // The sum of value(x, mass) over those for which where(x) holds; it must not for -inf.
  template <class Where, class Value>
  double sum(Where where, Value value) const {
    return add_up([&](vf sum, int i) {
      const vf v = load(x + i);
      return add_where(where(v), sum, value(v, load(mass + i)));
    });
  }

  // Their distances from a center.
  struct Away {
    alignas(FASTSAMPLE_VECTOR_BYTES) float far[kMost + kPad];
    float most;  // the farthest that is finite
  };
  void measure(float center, Away* away) const {
    vf most = splat(0.0f);
    for (int i = 0; i < n + kAtOnce * kLanes; i += kLanes) {
      const vf far = distance(load(x + i), center);
      store(away->far + i, far);
      most = select(first(n - i), max(most, far), most);
    }
    away->most = reduce_max(most);
  }

  double within(const Away& away, float limit) const {
    return add_up([&](vf sum, int i) {
      return add_where(ge(splat(limit), load(away.far + i)), sum, load(mass + i));
    });
  }

  // Between which distances of a range the mass within comes to reach a goal: it is halved so
  // often.
  Distances bracket(const Away& away, double goal, Distances range, int halves) const {
    for (; halves > 0; --halves) {
      const float middle = range.near + (range.far - range.near) / 2;
      (within(away, middle) < goal ? range.near : range.far) = middle;
    }
    return range;
  }

  // The distances between which it comes to reach a goal, a share of all, that may be off by so
  // much; not so far that hardly anything lies beyond. It reaches the goal itself at about these.
  Distances expect(const Away& away, double goal, double off, Distances range,
                   Distances about) const {
    constexpr int kHalves = 7;
    const double all = within(away, range.far), most = all - (all - goal) / 8;
    return Distances{bracket(away, goal - off, {range.near, about.far}, kHalves).near,
                     bracket(away, fmin(goal + off, most), {about.near, range.far}, kHalves).far};
  }

 private:
  static constexpr int kAtOnce = 4;  // sums, as an addition waits for the one before it

  // add(sum, place) for all, and for what fills them up.
  template <class Add>
  FS_MEMBER double add_up(Add add) const {
    vf sums[kAtOnce] = {};
    for (int i = 0; i < n; i += kAtOnce * kLanes) {
      FS_EACH(kAtOnce) sums[u] = add(sums[u], i + u * kLanes);
    }
    return (double)reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
};

// What a row is divided around, and how far from it the mean may be.
struct Center {
  float value;
  double off;
};

// How far off the mean and the limit may be, in standard deviations: the wider, the more values are
// looked at twice.
constexpr double kOfRow = 2;

// A value that about an eighth of a sample exceeds.
FS_INLINE float top_of(const Sample& s) {
  constexpr int kFew = 256;
  float some[kFew + kPad];
  for (int i = 0; i < kFew; ++i) some[i] = s.x[i * s.n / kFew];
  return narrow(Counting{}, span_of(some, kFew), 0, kFew / 8, some).x;
}

// The values from `low` up of every eighth block; none where they are too many.
struct Tops {
  int n = 0;
  double each = 0;

  template <class T>
  Tops(const Dense<T>& d, float low, int most, float* to) {
    constexpr int kEvery = 8;
    float buffer[kBlock];
    int seen = 0;
    for (int b = kEvery / 2; b < blocks(d) && n <= most; b += kEvery, ++seen) {
      if (upper_bound(d, b) >= low) n += copy_from(values(d, b, buffer), low, to + n);
    }
    n = n > most ? 0 : n;
    each = (double)blocks(d) / seen;
  }

 private:
  static FS_MEMBER int copy_from(const float* x, float low, float* to) {
    const auto among = [&](vf v, int) { return ge(v, splat(low)); };
    if (!kCompresses) return append(x, block_bits(x, among), to);
    int n = 0;
    for (int i = 0; i < kBlock; i += kLanes) {
      const vf v = load(x + i);
      n += compress_store(to + n, v, among(v, i));
    }
    return n;
  }
};

// What stands for a row: its heads for themselves and a sample for what is below; where the heads
// have less than half of the mass, a larger sample for the top of what is below. A sample may lack
// heavy values, the more so as a row's mass lies in few tokens; so it counts as off as if there
// were one more just below the heads.
struct RowCrowd : Crowd {
  float heads;
  double all, unseen;  // all its mass, and that of one more

  template <class T, class Weight>
  RowCrowd(const Dense<T>& d, const StandIns& s, const Weight& weight, const Workspace& ws)
      : heads(s.heads.low) {
    const float lowest = weight.lowest();
    const auto has_mass = [&](vf v) { return gt(v, splat(lowest)); };
    const int few = s.heads.n < kHeads ? s.heads.n : kHeads;  // more, where they tie
    if (few) add(weight, s.heads.x, few, (double)s.heads.n / few, has_mass);
    const int own = n;
    const double own_mass = total();
    add(weight, s.body.x, s.body.n, s.body.each, has_mass);
    double each = s.body.each;
    if (own_mass < total() / 2 && s.body.n > kSample / 2) {
      const float top = top_of(s.body);
      const Tops tops(d, top, kTops, ws.values);
      if (tops.n) {
        each = tops.each;
        keep_where(own, [&](vf v) { return gt(splat(top), v); });
        add(weight, ws.values, tops.n, each,
            [&](vf v) { return both(has_mass(v), gt(splat(heads), v)); });
      }
    }
    all = total();
    unseen = few ? each * (double)weight.one(heads) : 0;
  }

  // The sum of squares of what value(x, share of all) is, over the sample and one more.
  template <class Value>
  double squares(Value value) const {
    const float one = (float)(1 / all);
    const double sampled = sum([&](vf v) { return both(is_finite(v), gt(splat(heads), v)); },
                               [&](vf v, vf m) { return square(value(v, m * one)); });
    if (!(unseen > 0)) return sampled;
    return sampled + (double)square(value(splat(heads), splat((float)(unseen / all))))[0];
  }

  Center mean(float max) const {
    const double below = sum(is_finite, [&](vf v, vf m) { return (v - max) * m; });
    const float center = (float)((double)max + below / all);
    return Center{center, kOfRow * sqrt(squares([&](vf v, vf m) { return (v - center) * m; }))};
  }

  // Between which distances from a center the share of all mass is reached.
  Distances limit(float center, double share) const {
    Away away;
    measure(center, &away);
    const Distances range = {0, away.most};
    const Distances about = bracket(away, share * all, range, 6);
    const vf inside = splat((float)(1 - share)), outside = splat((float)share);
    const double off = sqrt(squares([&](vf v, vf m) {
      return m * select(ge(splat(about.far), distance(v, center)), inside, outside);
    }));
    return expect(away, share * all, kOfRow * off * all, range, about);
  }
};

// Adds some of n values, evenly spread, of those for which where(x) holds. These are so many.
template <class Weight, class Where>
void add_some(const Weight& weight, const float* x, int n, Where where, int many, Crowd* crowd) {
  constexpr int kFew = 512;
  float some[kFew + kPad];
  const int few = n < kFew ? n : kFew;
  const double step = few ? (double)n / few : 0;
  for (int i = 0; i < few; ++i) some[i] = x[(int)(i * step)];
  const int taken = filter(some, few, some, where).n;
  if (taken) crowd->add(weight, some, taken, (double)many / taken, where);
}

// Between which distances the n values in ws.values, nearest first, come to weigh `missing`. Those
// above the mean are few and heavy, those below it many and light. Three and a half standard
// deviations, since missing the limit costs two passes.
template <class Weight>
Distances find_among(const Weight& weight, int n, float mean, double missing, Distances range,
                     const Workspace& ws) {
  const auto is_above = [&](vf v) { return gt(v, splat(mean)); };
  const auto is_below = [&](vf v) { return both(is_finite(v), ge(splat(mean), v)); };
  const Span above = filter(ws.values, n, ws.spare, is_above);
  Crowd crowd;
  add_some(weight, above.x, above.n, is_above, above.n, &crowd);
  const int high = crowd.n;
  add_some(weight, ws.values, n, is_below, n - above.n, &crowd);
  const double each[2] = {high ? (double)above.n / high : 1,
                          crowd.n > high ? (double)(n - above.n) / (crowd.n - high) : 1};
  Crowd::Away away;
  crowd.measure(mean, &away);
  const Distances about = crowd.bracket(away, missing, range, 6);
  const auto squares = [&](auto side) {
    return crowd.sum([&](vf v) { return both(side(v), ge(splat(about.far), distance(v, mean))); },
                     [](vf, vf m) { return square(m); });
  };
  const double off =
      sqrt((1 - 1 / each[0]) * squares(is_above) + (1 - 1 / each[1]) * squares(is_below));
  return crowd.expect(away, missing, 3.5 * off, range, about);
}

}  // namespace
}  // namespace fastsample

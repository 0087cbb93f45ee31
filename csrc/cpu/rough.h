// Floors that are measured on a whole row: one pass bounds the sums of stage 6b, and weighs what
// lies above a guess of the floor. Where no token has a mass between the bounds of a floor, any of
// these floors keeps the same tokens.
#pragma once

#include "cpu/guess.h"
#include "cpu/stats.h"

namespace fastsample {
namespace {

struct Bounded {
  double low, high;
};

// What is averaged by mass: nothing, the float mass itself, or minus how far y lies below 0, in
// whole steps of 2^-14.
struct OfNothing {
  explicit OfNothing(const LogitWeigher&) {}
};
struct OfMass {
  explicit OfMass(const LogitWeigher&) {}

  template <int N>
  FS_MEMBER Pack<N> operator()(const Pack<N>&, const Pack<N>& q) const {
    return q;
  }
};
struct OfDepth {
  LogitWeigher weigher;

  explicit OfDepth(const LogitWeigher& w) : weigher(w) {}

  template <int N>
  FS_MEMBER Pack<N> operator()(const Pack<N>& x, const Pack<N>&) const {
    Pack<N> y = (x - weigher.max) * weigher.scale;
    FS_EACH(N) y.v[u] = round_up_14(raise_to(kMassFloor, y.v[u]));
    return y;
  }
};

// The sum of a pack, in a tree: so that few roundings follow each other.
FS_INLINE vf add_pack(const Pack<kAbreast>& q) {
  const vf* v = q.v;
  return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}
FS_INLINE vf add_products(const Pack<kAbreast>& q, const Pack<kAbreast>& f) {
  const auto pair = [&](int u) __attribute__((always_inline)) {
    return multiply_add(q.v[u], f.v[u], q.v[u + 1] * f.v[u + 1]);
  };
  return (pair(0) + pair(2)) + (pair(4) + pair(6));
}

FS_INLINE vd widen_sum(vf v) { return widen(v, 0) + widen(v, 1); }

// A sum of what add_pack or add_products gives for the packs of each block, which are added up in
// floats, and then block by block in doubles. No two numbers that are added up differ in sign, so
// it is off by at most what a number's way through it rounds: `depth` roundings of the tree, and
// one for each pack of a block but the first.
FS_INLINE Bounded bounds_of_sum(vd sum, int depth) {
  constexpr int kPacks = kBlock / (kLanes * kAbreast);
  const double error = (depth + kPacks - 1) * (0x1p-24 + 0x1p-40);
  double all = 0;
  for (int i = 0; i < kWideLanes; ++i) all += sum[i];
  return Bounded{fabs(all) * (1 - error), fabs(all) * (1 + error)};
}
FS_INLINE Bounded bounds_of_packs(vd sum) { return bounds_of_sum(sum, 3); }
FS_INLINE Bounded bounds_of_products(vd sum) { return bounds_of_sum(sum, 4); }

// Of the masses of a row, in kRoughUnit and before they become integers, and of their products with
// a factor.
struct RoughSums {
  vd mass = {}, product = {};
};

template <class Factor>
constexpr bool kAverages = !std::is_same<Factor, OfNothing>::value;

// A block's share of the pass: returns the end of the values that it has copied.
template <class Factor, bool kHasHeavy, class T, class Weight>
FS_INLINE float* part_block(const Weight& weight, const T* x, bool near, Guess guess, float* values,
                            RoughSums& sums, MassSum& heavy) {
  constexpr int N = kAbreast;
  const Factor factor(weight.weigher);  // made here: else the compiler computes y twice
  vf mass = {}, product = {};
  BlockBits inside = {};
  for (int i = 0; i < kBlock; i += N * kLanes) {
    const Pack<N> p = load_pack<N>(x + i);
    const Pack<N> q = weight.of(p, everywhere<N>(), near);
    mass = mass + add_pack(q);
    if constexpr (kAverages<Factor>) product = product + add_products(q, factor(p, q));
    if (!kHasHeavy) continue;
    FixedSum fixed;
    FS_EACH(N) {
      const Mask kept = ge(p.v[u], splat(guess.low)), above = ge(p.v[u], splat(guess.high));
      fixed.add(q.v[u], above);
      const Mask around = but_not(kept, above);
      if (kCompresses) {
        values += compress_store(values, p.v[u], around);
      } else {
        inside.set(i + u * kLanes, around);
      }
    }
    add(heavy, fixed);
  }
  if constexpr (kHasHeavy && !kCompresses) values += append(x, inside, values);
  sums.mass = sums.mass + widen_sum(mass);
  sums.product = sums.product + widen_sum(product);
  return values;
}

// Z and the sum of products, and in ws.group_mass the masses of what lies above the guess; what
// lies within it is copied to ws.values, group g's part to segment[g].
struct Parted {
  Bounded mass, product;  // in units of a mass
  uint64_t above;
  List around;  // without ids
};

template <class Factor, class T>
Parted part(const Dense<T>& d, const Weighing<LogitWeigher>& weight, Guess guess,
            const Workspace& ws) {
  const float lowest = weight.lowest();
  const auto has_mass = [&](int b) { return upper_bound(d, b) >= lowest; };
  RoughSums all;
  uint64_t above = 0;
  float* end = ws.values;
  for (int g = 0; g < groups(d); ++g) {
    ws.segment[g] = (int32_t)(end - ws.values);
    MassSum heavy;
    each_run(d, g, has_mass, [&](auto run, auto near) {
      // Copies: to the compiler, a store of values might change the originals.
      const Weighing<LogitWeigher> own = weight;
      const Guess around = guess;
      RoughSums sums;
      MassSum run_heavy;
      float* next = end;
      for (int b = run.begin; b < run.end; ++b) {
        const auto* x = run.x + (b - run.begin) * kBlock;
        fetch_ahead(d, b, ws);
        next = upper_bound(d, b) >= around.low
                   ? part_block<Factor, true>(own, x, near, around, next, sums, run_heavy)
                   : part_block<Factor, false>(own, x, near, around, next, sums, run_heavy);
      }
      end = next;
      heavy += run_heavy;
      all.mass = all.mass + sums.mass;
      all.product = all.product + sums.product;
    });
    ws.group_mass[g] = weight.total(heavy);
    above += ws.group_mass[g];
  }
  const int n = ws.segment[groups(d)] = (int32_t)(end - ws.values);
  fill_up(ws.values, n);
  // A mass has lost less than 1 when it became an integer.
  const Bounded mass = bounds_of_packs(all.mass);
  constexpr double kUnit = 0x1p40 / (double)kRoughUnit;
  const double tokens = (double)blocks(d) * kBlock;
  return Parted{{mass.low * kUnit - tokens, mass.high * kUnit},
                bounds_of_products(all.product),
                above,
                List{ws.values, nullptr, n}};
}

// Where a floor lies, both ends included.
struct FloorBounds {
  uint64_t low, high;
};

// What the operations that lead from sums to a floor may round, as a share of it: a few of doubles,
// and before them for some floors an exponential in floats, off by less than 2^-22 each time.
constexpr double kOfDoubles = 0x1p-36, kOfExponentials = 0x1p-21;

// No floor is above the heaviest token.
FS_INLINE FloorBounds widen_bounds(uint64_t low, uint64_t high, uint64_t heaviest,
                                   double rounding) {
  high += (uint64_t)((double)high * rounding) + 1;
  return {low - (uint64_t)((double)low * rounding) - (low > 0), high < heaviest ? high : heaviest};
}

// Logits around a floor: from `high` up, every token has at least the floor's upper bound, below
// `low` none has its lower bound. The margins are far above all rounding errors of a y and its
// exponential.
struct Edge {
  float low, high;

  Edge(const LogitWeigher& w, FloorBounds floor) {
    constexpr double kMargin = 1e-4;
    const auto at = [&](uint64_t mass, double margin) {
      return (double)w.max - (kMassBits + margin - log2((double)mass)) / (double)w.scale;
    };
    low = floor.low ? nextafterf((float)at(floor.low, kMargin), -INFINITY) : -INFINITY;
    high = nextafterf((float)at(floor.high, -kMargin), INFINITY);
  }
};

// Whether every token has at least the floor's upper bound as its mass, or less than the lower one.
template <class Domain>
bool determines(const Domain& d, const LogitWeigher& w, FloorBounds floor, Edge edge) {
  float buffer[kBlock];
  for (int b = 0; b < blocks(d); ++b) {
    if (!(upper_bound(d, b) >= edge.low)) continue;
    const float* x = values(d, b, buffer);
    Mask near = from_bits(0);
    for (int i = 0; i < kBlock; i += kLanes) {
      const vf v = load(x + i);
      near = either(near, both(ge(v, splat(edge.low)), gt(splat(edge.high), v)));
    }
    if (!any(near)) continue;
    for (int i = 0; i < kBlock; ++i) {
      if (!(x[i] >= edge.low && x[i] < edge.high)) continue;
      const uint64_t mass = w.mass(x[i]);
      if (mass >= floor.low && mass < floor.high) return false;
    }
  }
  return true;
}

// A floor that keeps what the contract's does, 0 where the bounds do not determine it; and the mass
// of what it keeps, if ws.group_mass holds that group by group, else 0.
struct RoughFloor {
  uint64_t floor, total;
};

template <class T>
RoughFloor settle(const Dense<T>& d, const Weighing<LogitWeigher>& before, FloorBounds floor,
                  Guess guess, const Parted& parted, const Workspace& ws) {
  const LogitWeigher& w = before.weigher;
  const Edge edge(w, floor);
  const bool good = (guess.low <= edge.low || guess.low == -FLT_MAX) && edge.high <= guess.high;
  if (!good) return {determines(d, w, floor, edge) ? floor.high : 0, 0};
  if (!determines(parted.around, w, floor, edge)) return {0, 0};
  const Weighing after(w, floor.high > before.floor ? floor.high : before.floor);
  uint64_t total = parted.above;
  for (int g = 0; g < groups(d); ++g) {
    const int begin = ws.segment[g], n = ws.segment[g + 1] - begin;
    if (!n) continue;
    const uint64_t more =
        weigh_some(after, ws.values + begin, n, [](vf) { return from_bits(kAllLanes); });
    ws.group_mass[g] += more;
    total += more;
  }
  return {floor.high, total};
}

// The sums themselves, by a pass more; the masses that are known stay.
template <class T, class More>
auto exact_sums(const Dense<T>& d, const Weighing<LogitWeigher>& before, More more,
                const Workspace& ws) {
  Workspace own = ws;
  own.group_mass = ws.rest_mass;
  const LogitWeigher& w = before.weigher;
  const Kept<float> kept = narrow_to_mass(alive(w), before.floor);
  return more.sums(measure(d, kept, w, own, more));
}

// The same with the exact floor, of exact sums, where bounds do not determine it.
template <class T, class More, class FloorOf>
RoughFloor settle_exactly(const Dense<T>& d, const Weighing<LogitWeigher>& before, More more,
                          FloorOf floor_of, Guess guess, const Parted& parted,
                          const Workspace& ws) {
  const uint64_t floor = floor_of(exact_sums(d, before, more, ws));
  return settle(d, before, FloorBounds{floor, floor}, guess, parted, ws);
}

// A floor that is a function of Z alone; 0 also where it keeps so few tokens that they are
// gathered.
template <class T, class FloorOf>
RoughFloor rough_floor_of_total(const Dense<T>& d, const Weighing<LogitWeigher>& weight,
                                const Workspace& ws, uint64_t heaviest, FloorOf floor_of) {
  constexpr RoughFloor kUnknown = {0, 0};
  const LogitWeigher& w = weight.weigher;
  StandIns sample;
  if (!take_stand_ins(d, weight, ws, &sample)) return kUnknown;
  const Average average = estimate_average(sample, w, OfMass(w));
  const auto floor_at = [&](double mass) {  // of the maximum's
    return (double)floor_of((uint64_t)(fmax(mass, 1) * (double)kMassUnit)) / (double)kMassUnit;
  };
  const double a = floor_at(average.mass - average.mass_error);
  const double b = floor_at(average.mass + average.mass_error);
  const Guess guess = guess_of(w, fmin(a, b), fmax(a, b));
  const int above = count_above(sample.body.x, sample.body.n, guess.low);
  const double kept = sample.heads.n + above * sample.body.each;
  const double share = kept / ((double)blocks(d) * kBlock);
  if (gathers_few(share)) return kUnknown;
  const Parted found = part<OfNothing>(d, weight, guess, ws);
  const uint64_t from = floor_of((uint64_t)fmax(found.mass.low, 1));
  const uint64_t to = floor_of((uint64_t)found.mass.high);
  const FloorBounds bounds =
      widen_bounds(from < to ? from : to, from < to ? to : from, heaviest, kOfDoubles);
  const RoughFloor rough = settle(d, weight, bounds, guess, found, ws);
  if (rough.floor) return rough;
  const Kept<float> all = narrow_to_mass(alive(w), weight.floor);
  const uint64_t floor = floor_of(weigh_groups(d, all, w, ws, ws.rest_mass));
  return settle(d, weight, FloorBounds{floor, floor}, guess, found, ws);
}

// Sums with which a floor is computed from Z and the sum of products.
FS_INLINE SquareSums squares_of(double mass, double squares) {
  const uint64_t high = squares > 0 ? (uint64_t)(squares * 0x1p-40) : 0;
  const uint64_t low = squares > 0 ? (uint64_t)(squares - (double)high * 0x1p40) : 0;
  return {mass > 1 ? (uint64_t)mass : 1, high, 0, low};
}
FS_INLINE DepthSums depths_of(double mass, double depths) {
  const uint64_t high = depths > 0 ? (uint64_t)(depths * 0x1p-20) : 0;
  const uint64_t low = depths > 0 ? (uint64_t)(depths - (double)high * 0x1p20) : 0;
  return {mass > 1 ? (uint64_t)mass : 1, high, low};
}

// Q is less than the sum of the squares of the float masses: each mass w has lost less than 1 when
// it became an integer, and its square less than 2w + 1.
FS_INLINE Bounded squares_bounds(const Parted& found, double tokens) {
  constexpr double kUnit = 0x1p40 / (double)kRoughUnit;
  return {found.product.low * kUnit * kUnit - 2 * (found.mass.high + tokens),
          found.product.high * kUnit * kUnit};
}

template <class T>
RoughFloor rough_p_less_floor(const Dense<T>& d, const Weighing<LogitWeigher>& weight,
                              const Workspace& ws, uint64_t heaviest) {
  const Average average = average_of_floor(d, weight, OfMass(weight.weigher), ws);
  // The maximum alone has a square of 1.
  const double least = 1 / (average.mass + average.mass_error), one = (double)kRoughUnit;
  const Guess guess =
      guess_of(weight.weigher, fmax((average.mean - average.mean_error) / one, least),
               (average.mean + average.mean_error) / one);
  const Parted found = part<OfMass>(d, weight, guess, ws);
  const Bounded squares = squares_bounds(found, (double)blocks(d) * kBlock);
  const uint64_t low = floor_at(p_less_mass(squares_of(found.mass.high, squares.low)), heaviest);
  const uint64_t high = floor_at(p_less_mass(squares_of(found.mass.low, squares.high)), heaviest);
  const RoughFloor rough =
      settle(d, weight, widen_bounds(low, high, heaviest, kOfDoubles), guess, found, ws);
  if (rough.floor) return rough;
  const auto floor_of = [&](const SquareSums& s) { return floor_at(p_less_mass(s), heaviest); };
  return settle_exactly(d, weight, Squares{}, floor_of, guess, found, ws);
}

// The same for the sum of the masses times depths: each product has lost less than the depth, which
// is at most 60 * 2^14.
FS_INLINE Bounded depth_bounds(Bounded product, double tokens) {
  constexpr double kUnit = 0x1p14 * 0x1p40 / (double)kRoughUnit;
  return {product.low * kUnit - tokens * (-(double)kMassFloor * 0x1p14), product.high * kUnit};
}

// The deeper the mean, the lower the floor.
template <class T>
RoughFloor rough_eta_floor(const Dense<T>& d, const Weighing<LogitWeigher>& weight,
                           const Workspace& ws, const RowParams& p, uint64_t heaviest) {
  const Average average = average_of_floor(d, weight, OfDepth(weight.weigher), ws);
  const double e = (double)p.eta_cutoff;
  const auto estimate = [&](double mass, double depth) {
    return fmin(e * mass, sqrt(e) * exp2(depth));
  };
  const Guess guess = guess_of(
      weight.weigher,
      estimate(fmax(average.mass - average.mass_error, 1), average.mean - average.mean_error),
      estimate(average.mass + average.mass_error, average.mean + average.mean_error));
  const Parted found = part<OfDepth>(d, weight, guess, ws);
  const Bounded depths = depth_bounds(found.product, (double)blocks(d) * kBlock);
  const uint64_t low = floor_at(eta_mass(p, depths_of(found.mass.low, depths.high)), heaviest);
  const uint64_t high = floor_at(eta_mass(p, depths_of(found.mass.high, depths.low)), heaviest);
  const RoughFloor rough =
      settle(d, weight, widen_bounds(low, high, heaviest, kOfExponentials), guess, found, ws);
  if (rough.floor) return rough;
  const auto floor_of = [&](const DepthSums& s) { return floor_at(eta_mass(p, s), heaviest); };
  return settle_exactly(d, weight, Depths{weight.weigher}, floor_of, guess, found, ws);
}

}  // namespace
}  // namespace fastsample

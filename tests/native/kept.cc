// Stages 7 and 8 of one instruction set on kept sets of every form, those with an upper end too,
// which few filters make; the plan, for every set of filters; and the bounds of a row's statistics.
// It includes the engine's source, whose functions are local to it.
#include "cpu/sample.cc"

#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <vector>

namespace {

using namespace fastsample;

#define CHECK(condition)                                              \
  do {                                                                \
    if (!(condition)) {                                               \
      fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      abort();                                                        \
    }                                                                 \
  } while (false)

struct Random {
  uint64_t counter = 0;
  uint32_t below(uint32_t n) { return (uint32_t)(uniform60(7, ++counter, 0) % n); }
};

template <class T>
T logit_from(Random& random, bool ties) {
  float x = ((float)random.below(1 << 16) + (float)random.below(1 << 16)) * 0x1p-13f - 8.0f;
  if (ties) x = floorf(x);
  if (random.below(50) == 0) x = -INFINITY;
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (std::is_same<T, BFloat>::value) return T{(uint16_t)(bits >> 16)};
    // Normal numbers, truncated; the rest become 0 or infinite.
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    const int exponent = (int)(bits >> 23 & 255) - 112;
    if (exponent < 1) return T{sign};
    if (exponent > 30) return T{(uint16_t)(sign | 0x7c00)};
    return T{(uint16_t)(sign | exponent << 10 | (bits >> 13 & 1023))};
  }
}

// A thread's scratch, as the dispatcher would make it.
struct Memory {
  std::vector<float> floats[5];
  std::vector<int32_t> ints[5];
  std::vector<uint64_t> wide[3];
  std::vector<uint32_t> keys[2];
  bool crowded = false;
  Workspace ws = {};

  Memory(int32_t vocab, bool many_draws) {
    const size_t n = (size_t)vocab + 2 * kPad;
    for (auto& v : floats) v.resize(n);
    for (auto& v : ints) v.resize(guide_size((int64_t)n));
    for (auto& v : wide) v.resize(n);
    for (auto& v : keys) v.resize(n);
    ws.block_max = floats[0].data();
    ws.values = floats[1].data();
    ws.spare = floats[2].data();
    ws.list_x = floats[3].data();
    ws.segment = ints[0].data();
    ws.list_id = ints[1].data();
    ws.group_mass = wide[0].data();
    ws.rest_mass = wide[2].data();
    ws.crowded = &crowded;
    if (many_draws) {
      ws.table[0] = {wide[1].data(), ints[2].data(), ints[3].data(), ints[4].data(),
                     floats[4].data()};
    }
    for (int i = 0; i < 2; ++i) ws.keys[i] = keys[i].data();
  }
};

// A row, its tokens in rank order, and what any filter leaves of it, token by token.
template <class T>
struct Oracle {
  std::vector<T> logits;
  std::vector<float> x;
  std::vector<Place<float>> ranked;
  std::vector<uint64_t> mass;
  float max = -INFINITY;

  Oracle(Random& random, int32_t vocab, bool ties, float scale) {
    for (int32_t i = 0; i < vocab; ++i) {
      logits.push_back(i ? logit_from<T>(random, ties) : T{});  // one at least is above -inf
      x.push_back(upcast(logits[i]));
      max = std::max(max, x[i]);
      ranked.push_back(Place<float>{x[i], i});
    }
    std::sort(ranked.begin(), ranked.end(), ranks_before<float>);
    for (float v : x) mass.push_back(mass_of(v, max, scale));
  }

  bool keeps(const Kept<float>& kept, int32_t id) const {
    return x[id] > -INFINITY && fastsample::ranks_within(kept, Place<float>{x[id], id}) &&
           mass[id] >= kept.floor;
  }
  uint64_t total(const Kept<float>& kept) const {
    uint64_t sum = 0;
    for (int32_t i = 0; i < (int32_t)x.size(); ++i) sum += keeps(kept, i) ? mass[i] : 0;
    return sum;
  }
};

template <class T>
Kept<float> any_kept(Random& random, const Oracle<T>& row) {
  const uint32_t n = (uint32_t)row.x.size();
  Kept<float> kept = everything();
  const auto place = [&](int32_t every_tie) {
    Place<float> p = row.ranked[random.below(2) ? random.below(n) : random.below(std::min(n, 40u))];
    if (random.below(2)) p.id = every_tie;
    return p;
  };
  if (random.below(4)) kept = narrow_below(kept, place(random.below(2) ? -1 : INT32_MAX));
  if (random.below(4)) {
    const Place<float> low = place(INT32_MAX);
    if (low.x > -INFINITY) kept = narrow_above(kept, low);
  }
  if (random.below(2)) kept.floor = kMassUnit >> random.below(30);
  if (random.below(4) == 0) kept.floor += random.below(1 << 20);  // more bits than a float has
  return kept;
}

// What is written for one row.
struct Buffers {
  std::vector<int64_t> tokens, ranks, top_ids;
  std::vector<float> filtered, probabilities, logprobs, top_logprobs;

  Buffers(int32_t vocab, int32_t draws, int32_t top)
      : tokens(draws),
        ranks(draws),
        top_ids(top),
        filtered(vocab),
        probabilities(vocab),
        logprobs(draws),
        top_logprobs(top) {}
};

template <class T>
void check_outputs(const Oracle<T>& row, const Kept<float>& kept, const Buffers& out,
                   uint64_t seed) {
  const uint64_t total = row.total(kept);
  const int32_t vocab = (int32_t)row.x.size();
  for (int32_t i = 0; i < vocab; ++i) {
    const bool in = row.keeps(kept, i);
    CHECK(out.filtered[i] == (in && (row.mass[i] || !kept.floor) ? row.x[i] : -INFINITY));
    CHECK(out.probabilities[i] == (in ? (float)((double)row.mass[i] / (double)total) : 0.0f));
  }
  for (size_t j = 0; j < out.tokens.size(); ++j) {
    const uint64_t threshold = draw_threshold(seed, 0, (uint32_t)j, total);
    int32_t token = -1;
    for (uint64_t running = 0; running <= threshold;) {
      ++token;
      running += row.keeps(kept, token) ? row.mass[token] : 0;
    }
    CHECK(out.tokens[j] == token);
    int64_t rank = 1;
    for (float v : row.x) rank += v > row.x[token];
    CHECK(out.ranks[j] == rank);
  }
  size_t n = 0;
  for (Place<float> token : row.ranked) {
    if (n < out.top_ids.size() && row.keeps(kept, token.id)) CHECK(out.top_ids[n++] == token.id);
  }
  for (; n < out.top_ids.size(); ++n) CHECK(out.top_ids[n] == -1);
}

// The first of a kept set's rank order whose mass reaches top-p's target.
template <class T>
Kept<float> kept_by_top_p(const Oracle<T>& row, Kept<float> kept, float p) {
  const uint64_t target = top_p_target(p, row.total(kept));
  uint64_t running = 0;
  for (Place<float> token : row.ranked) {
    if (!row.keeps(kept, token.id)) continue;
    running += row.mass[token.id];
    if (running >= target) return narrow_above(kept, token);
  }
  abort();
}

template <class T>
Kept<float> kept_by_top_k(const Oracle<T>& row, Kept<float> kept, int32_t k) {
  for (Place<float> token : row.ranked) {
    if (row.keeps(kept, token.id) && --k == 0) return narrow_above(kept, token);
  }
  return kept;
}

// Nothing is on.
RowParams neutral() {
  RowParams p = {};
  p.temperature = p.top_p = p.typical_p = p.repetition_penalty = 1;
  return p;
}

template <class T>
void check_row(Random& random, DType dtype, int32_t vocab) {
  const float scale = mass_scale(1.0f);
  const Oracle<T> row(random, vocab, random.below(2), scale);
  const int32_t draws = random.below(4) ? 2 : 300;
  Memory memory(vocab, draws > kManyDraws);
  const int64_t seed = (int64_t)random.counter, offset = 0;
  RowParams params = neutral();
  params.top_k = 1 + (int32_t)random.below(60);
  params.top_p = 0.7f;
  Buffers out(vocab, draws, 3);
  Batch batch = {};
  batch.logits = Logits{row.logits.data(), vocab, 1, vocab, dtype, kLogits};
  batch.rows.params = {&params, 0};
  batch.rows.seeds = {&seed, 0};
  batch.rows.offsets = {&offset, 0};
  batch.out = Outputs{nullptr,
                      out.tokens.data(),
                      out.filtered.data(),
                      out.probabilities.data(),
                      out.logprobs.data(),
                      out.ranks.data(),
                      out.top_ids.data(),
                      out.top_logprobs.data(),
                      draws,
                      3,
                      kProcessedLogprobs};
  const Row<T> logits = raw_row<T>(batch, 0);
  const Peak peak = scan(logits, memory.ws.block_max, near_bound(scale), Nothing());
  const LogitWeigher weigher = {peak.max, scale, scale};
  const Task<T, LogitWeigher> task = {
      batch,
      0,
      Draws{0, draws},
      memory.ws,
      Dense<T>{logits, memory.ws.block_max, is_near(peak.low, weigher.max, weigher.scale)},
      weigher,
      1.0f};
  for (int i = 0; i < 8; ++i) {
    const Kept<float> kept = any_kept(random, row);
    if (!row.total(kept)) continue;
    finish(task, task.dense, kept, 0);
    check_outputs(row, kept, out, (uint64_t)seed);
    Base<T, LogitWeigher> base = {task};
    narrow(base, kept);
    base.on([&](const auto& d) { finish(task, d, kept, 0); });
    check_outputs(row, kept, out, (uint64_t)seed);

    // Filters judged on what an earlier one has left.
    Base<T, LogitWeigher> top = {task};
    const Kept<float> by_top_p = top_p(top, kept, params);
    const Kept<float> want = kept_by_top_p(row, kept, params.top_p);
    CHECK(row.total(by_top_p) == row.total(want));
    top.on([&](const auto& d) { finish(task, d, by_top_p, top.total); });
    check_outputs(row, want, out, (uint64_t)seed);
    if (kept.floor || params.top_k >= vocab) continue;  // a list may hold tokens below the floor
    Base<T, LogitWeigher> head = {task};
    narrow(head, kept);
    const Kept<float> by_top_k = top_k(head, kept, params);
    head.on([&](const auto& d) { finish(task, d, by_top_k, 0); });
    check_outputs(row, kept_by_top_k(row, kept, params.top_k), out, (uint64_t)seed);
  }
}

// No filter but a floor of the mass, alone, may take the path that looks at candidates only.
void check_plan() {
  constexpr uint32_t kGreedy = 128, kAll = 127;
  for (uint32_t set = 0; set < 256; ++set) {
    RowParams p = neutral();
    if (set & kGreedy) p.temperature = 0;
    if (set & kUsesTopK) p.top_k = 5;
    if (set & kUsesTopP) p.top_p = 0.5f;
    if (set & kUsesMassFloor) p.min_p = 0.1f;
    if (set & kUsesTopNSigma) p.top_n_sigma = 1;
    if (set & kUsesTypical) p.typical_p = 0.5f;
    if (set & kUsesMeasuredFloors) p.p_less = 1;
    if (set & kUsesXtc) p.xtc_probability = 0.5f;
    CHECK(filters_of(p, 100) == (set & kAll));
    for (int kind = 0; kind < 32; ++kind) {
      const RowKind row = {100, (kind & 1) != 0, (kind & 2) != 0,
                           kind & 4 ? kProbabilities : kLogits, (kind & 16) != 0};
      RowParams own = p;
      if (kind & 8) own.order = kTemperatureLast;
      if (!(set & kGreedy)) own.temperature = 0.5f;
      const bool apart = (kind & 8) != 0;  // filters judge at T = 1
      const Plan plan = plan_of(own, row);
      const bool alone = set == kUsesMassFloor && !row.edited && row.input == kLogits && !apart;
      CHECK(plan.path == (set & kGreedy ? kArgmax : alone ? kCandidates : kFilters));
      CHECK(plan.watch == (alone && !row.narrow && row.crowded));
      const bool spreads = (set & (kGreedy | kUsesTopNSigma)) == kUsesTopNSigma;
      CHECK(plan.moments == (spreads && !row.edited && row.input == kLogits));
    }
  }
}

// The exact statistics of a row.
struct Exact {
  SpreadSums spread = {};
  DepthSums depths = {};
  SquareSums squares = {};

  Exact(const std::vector<float>& x, const LogitWeigher& w) {
    for (float v : x) {
      if (v > -INFINITY) spread.add(distance_below(v, w.max));
      const uint64_t mass = w.mass(v);
      if (mass) depths.add(mass, depth_at((v - w.max) * w.scale));
      squares.add(mass);
    }
  }
};

bool holds(double low, double value, double high, double width) {
  return low <= value && value <= high && high - low <= width;
}

// What float sums say about a row's statistics holds, and is narrow.
void check_bounds(const std::vector<float>& x) {
  const int32_t vocab = (int32_t)x.size();
  Memory memory(vocab, false);
  Batch batch = {};
  batch.logits = Logits{x.data(), vocab, 1, vocab, kFloat32, kLogits};
  const Row<float> row = raw_row<float>(batch, 0);
  Deviation sigma = kAnyDeviation;
  const Peak peak = scan_spread(row, memory.ws, 1.0f, &sigma);
  const float scale = mass_scale(0.8f);
  const LogitWeigher weigher = {peak.max, scale, scale};
  const Exact exact(x, weigher);
  // Narrow vectors add up more numbers each.
  CHECK(holds(sigma.low, deviation(exact.spread), sigma.high, 16e-3 / kLanes));

  const Dense<float> d = {row, memory.ws.block_max, false};
  const Weighing weight(weigher, 0);
  const double tokens = (double)blocks(d) * kBlock, total = (double)exact.depths.mass;
  const Parted parted = part<OfMass>(d, weight, {peak.max - 2, peak.max - 1}, memory.ws);
  CHECK(holds(parted.mass.low, total, parted.mass.high, total * 1e-5));
  const Bounded squares = squares_bounds(parted, tokens);
  const double all = sum_of_squares(exact.squares);
  CHECK(holds(squares.low, all, squares.high, all * 1e-5));
  const Division division = divide(d, weight, peak.max - 2, {0.5f, 1.0f}, memory.ws);
  CHECK((double)division.total == total);
  const MeanBounds mean = bound_mean(d, weigher, division);
  const float want = mean_logit(mean_depth(exact.depths), weigher.max, scale);
  CHECK(holds(mean.low, want, mean.high, 1e-4));
}

// Rows of which the contract's whole steps take nothing, or nearly a step from half of the tokens.
void check_all_bounds(Random& random) {
  for (int32_t vocab : {3, 300, 2048, 5001, 30000}) {
    for (int i = 0; i < 6; ++i) {
      std::vector<float> x(vocab);
      for (float& v : x) v = logit_from<float>(random, i == 1);
      if (i == 2) std::sort(x.begin(), x.end());
      if (i > 3) {
        for (float& v : x) v = random.below(2) ? -(100 + i % 2 * 0.999f) * 0x1p-11f : 0.0f;
      }
      x[1] = 0;
      check_bounds(x);
    }
  }
}

}  // namespace

int main() {
  check_plan();
  Random random;
  check_all_bounds(random);
  for (int32_t vocab : {1, 40, 256, 700, 5000}) {
    for (int i = 0; i < (vocab > 1000 ? 15 : 60); ++i) {
      check_row<float>(random, kFloat32, vocab);
      check_row<Half>(random, kFloat16, vocab);
      check_row<BFloat>(random, kBFloat16, vocab);
    }
  }
}

// Rows that are split over ranks, of which each has listed its first tokens: all filters and the
// draw, as far as the lists, and sums of the whole row, tell.
#pragma once

#include "core/place.h"
#include "cpu/filters.h"

namespace fastsample {
namespace {

// Not a status of the row: it takes more than its lists to decide what is kept.
constexpr Status kUndecided = (Status)-1;

// A row of input kListed, 64-bit words: vocab, ranks, whether sums are given; the sums that kSums
// of cpu/part.h answers, of the whole row; each rank's list. A token is the bits of its logit above
// its id, which is kLastId past the list's end. A row that is invalid has a NaN or +inf in it.
struct ListedRow {
  static constexpr int kHeader = 3, kSumWords = 9;

  const int64_t* words;
  int64_t ranks, length;  // tokens of each list

  ListedRow(const Batch& batch, int64_t r)
      : words((const int64_t*)((const float*)batch.logits.data + r * batch.logits.stride)),
        ranks(words[1]),
        length((batch.logits.vocab / 2 - kHeader - kSumWords) / ranks) {}

  FS_MEMBER int32_t vocab() const { return (int32_t)words[0]; }
  FS_MEMBER bool has_sums() const { return words[2]; }
  FS_MEMBER uint64_t sum(int i) const { return (uint64_t)words[kHeader + i]; }
  FS_MEMBER const int64_t* list(int64_t rank) const {
    return words + kHeader + kSumWords + rank * length;
  }
  FS_MEMBER int64_t tokens() const { return ranks * length; }

  DepthSums of(const Depths&) const { return {sum(0), sum(1), sum(2)}; }
  SquareSums of(const Squares&) const { return {sum(0), sum(3), sum(4), sum(5)}; }
  SpreadSums spread() const { return {sum(6), sum(7), sum(8)}; }
};

// The key down to which every rank has listed all of its tokens: the highest of the last ones of
// full lists. The lowest key of all where no list is full.
int64_t edge_of(const ListedRow& row) {
  int64_t edge = kNoKey;
  for (int64_t rank = 0; rank < row.ranks; ++rank) {
    const int64_t* list = row.list(rank);
    int64_t last = kHighestKey;
    bool full = true;
    for (int64_t i = 0; i < row.length; ++i) {
      const Place<float> token = token_of_word(list[i]);
      full &= token.id >= 0;
      const int64_t key = key_of_place(token);
      last = key < last ? key : last;
    }
    if (full && last > edge) edge = last;
  }
  return edge;
}

// The first tokens of the whole row's rank order, in id order, and what is wrong with the row.
struct Prefix {
  List list;
  Peak peak;
  bool complete;      // whether that is all of the row
  Place<float> last;  // where it ends, unless it is
};

Prefix take_prefix(const ListedRow& row, const Workspace& ws) {
  const int64_t edge = edge_of(row);
  Prefix p = {{}, {-INFINITY, kValid, -INFINITY}, edge == kNoKey, place_of_key(edge)};
  bool sound = true;
  int n = 0;
  for (int64_t i = 0; i < row.tokens(); ++i) {
    const Place<float> token = token_of_word(row.list(0)[i]);
    sound &= token.x == token.x;
    p.peak.max = token.x > p.peak.max ? token.x : p.peak.max;
    if (token.id < 0 || key_of_place(token) < edge) continue;
    ws.list_x[n] = token.x;
    ws.list_id[n++] = token.id;
  }
  p.peak.status = status_of(p.peak.max, !sound);
  p.list = list_of(ws.list_x, ws.list_id, n);
  return p;
}

// The base set of filters, as `Base`, where it is a prefix of the row. What it cannot tell makes
// the row undecided; whatever is then kept means nothing.
struct ListedBase {
  typedef LogitWeigher Weigher;

  const Task<float, LogitWeigher>& task;
  const ListedRow& row;
  const Prefix& prefix;
  LogitWeigher judge = task.weigher.judge();
  List list = prefix.list;
  uint64_t beyond = bound_beyond();  // more than what any other token weighs
  bool decided = true;

  // Whether the list holds all of a set.
  FS_MEMBER bool holds(const Kept<float>& kept) const {
    return prefix.complete || kept.floor > beyond || !ranks_before(prefix.last, kept.low);
  }
  // Notes that a set has to be all on the list.
  FS_MEMBER void require(bool known) { decided &= known; }
  FS_MEMBER bool sums_of(const Kept<float>& kept) {
    const bool whole = bounds_of(kept) == kUnbounded && !kept.floor && row.has_sums();
    require(holds(kept) || whole);
    return whole;
  }

 private:
  // Masses rise with the logit but for their last bits.
  FS_MEMBER uint64_t bound_beyond() const {
    if (prefix.complete) return 0;
    const uint64_t mass = judge.mass(prefix.last.x);
    return mass + (mass >> 18) + 2;
  }
};

uint64_t weigh(ListedBase& base, const Kept<float>& kept, const RowParams&) {
  if (base.sums_of(kept)) return base.row.sum(0);
  return weigh_groups(base.list, kept, base.judge, base.task.ws);
}

template <class More>
auto measure(ListedBase& base, const Kept<float>& kept, const RowParams&, More more) {
  if (base.sums_of(kept)) return base.row.of(more);
  const uint64_t total = measure(base.list, kept, base.judge, base.task.ws, more);
  return more.sums(total ? total : 1);  // of an undecided row, by which others divide
}

uint64_t heaviest(ListedBase& base, const Kept<float>& kept) {
  if (kept.high.x == INFINITY) return base.judge.unit();
  base.require(base.holds(kept));
  return heaviest(base.list, kept, base.judge);
}

Kept<float> top_n_sigma(ListedBase& base, Kept<float> kept, const RowParams& p) {
  if (!uses_top_n_sigma(p)) return kept;
  base.require(base.row.has_sums());
  if (!base.decided) return kept;
  return narrow_above(kept, {lowest_within_sigma(p, base.judge.max, base.row.spread()), INT32_MAX});
}

// The place of the last of a list's tokens at x: others that equal them need not be on the list.
Place<float> last_at(const List& list, float x) {
  return {x, nth_equal(list, x, count_equal(list.x, list.n, x))};
}

Kept<float> top_k(ListedBase& base, Kept<float> kept, const RowParams& p) {
  if (!uses_top_k(p, base.row.vocab())) return kept;
  base.require(base.prefix.complete || base.list.n >= p.top_k);
  const Head head = take_head(base.list, p.top_k, p.ties, base.task.ws);
  base.list = head.list;
  const bool ends = p.ties == kTiesFirst && head.low.x > -FLT_MAX;
  return narrow_above(kept, ends ? last_at(head.list, head.low.x) : head.low);
}

Kept<float> top_p(ListedBase& base, Kept<float> kept, const RowParams& p) {
  if (!uses_top_p(p)) return kept;
  const Workspace& ws = base.task.ws;
  const uint64_t target = top_p_target(p.top_p, weigh(base, kept, p));
  const Weighing weight(base.judge, kept.floor);
  Kept<float> within = kept;
  within.floor = 0;  // gathering does not weigh
  base.list = gather(base.list, within, ws.list_x, ws.list_id);
  const Boundary edge =
      narrow(weight, copy(base.list.x, base.list.n, ws.values), 0, target, ws.values, true);
  if (reached(weight, edge) < target) {
    base.require(false);
    return kept;
  }
  // Tokens that equal the last of the list need not be on it.
  const uint64_t m = ties_needed(weight, edge, target);
  return narrow_above(kept, {edge.x, nth_equal(base.list, edge.x, m)});
}

Kept<float> mass_floors(ListedBase& base, Kept<float> kept, const RowParams& p) {
  return mass_floors(kept, p, heaviest(base, kept));
}

Kept<float> typical(ListedBase& base, Kept<float> kept, const RowParams& p) {
  if (!uses_typical(p)) return kept;
  const Workspace& ws = base.task.ws;
  const DepthSums sums = measure(base, kept, p, Depths{base.judge});
  const uint64_t target = top_p_target(p.typical_p, sums.mass);
  base.require(weigh_groups(base.list, kept, base.judge, ws) >= target);
  if (!base.decided) return kept;
  const float mean = mean_logit(mean_depth(sums), base.judge.max, base.judge.scale);
  const Weighing weight(base.judge, kept.floor);
  const float limit = typical_limit(base.list, kept, weight, mean, target, ws);
  const float high = highest_near(mean, limit), low = -highest_near(-mean, limit);
  base.require(base.holds(kept) || low > base.prefix.last.x);
  if (high < base.judge.max) kept = narrow_below(kept, Place<float>{high, -1});
  return narrow_above(kept, Place<float>{low, INT32_MAX});
}

template <class FloorOf>
Kept<float> floor_of_total(ListedBase& base, const Kept<float>& kept, const RowParams& p,
                           FloorOf floor_of) {
  const uint64_t total = weigh(base, kept, p);
  return narrow_to_mass(kept, floor_of(total, heaviest(base, kept)));
}

Kept<float> eta(ListedBase& base, const Kept<float>& kept, const RowParams& p) {
  const uint64_t most = heaviest(base, kept);
  return narrow_to_mass(kept,
                        floor_at(eta_mass(p, measure(base, kept, p, Depths{base.judge})), most));
}

Kept<float> p_less(ListedBase& base, const Kept<float>& kept, const RowParams& p) {
  const uint64_t most = heaviest(base, kept);
  return narrow_to_mass(kept, floor_at(p_less_mass(measure(base, kept, p, Squares{})), most));
}

TopChoices xtc(ListedBase& base, const Kept<float>& kept, const RowParams& p) {
  if (!uses_xtc(p)) return kNoTopChoices;
  const Kept<float> heavy = narrow_to_mass(kept, xtc_floor(p, weigh(base, kept, p)));
  base.require(base.holds(heavy));
  return top_choices(last_of(base.list, heavy, base.judge), p.xtc_probability);
}

// How many tokens rank above each of the draws: others than those on the lists are below.
void write_ranks(const Batch& batch, int64_t r, Draws draws, const ListedRow& row) {
  for (int32_t j = draws.begin; j < draws.end; ++j) {
    const int64_t slot = r * batch.out.num_samples + j;
    const int64_t* list = row.list(0);
    float x = INFINITY;
    for (int64_t i = 0; i < row.tokens(); ++i) {
      const Place<float> token = token_of_word(list[i]);
      if (token.id == (int32_t)batch.out.tokens[slot]) x = token.x;
    }
    int64_t above = 0;
    for (int64_t i = 0; i < row.tokens(); ++i) above += token_of_word(list[i]).x > x;
    batch.out.ranks[slot] = 1 + above;
  }
}

// Stages 7 and 8 of a row that is not greedy.
bool decide(const Task<float, LogitWeigher>& t, const ListedRow& row, const Prefix& prefix,
            const RowParams& p, float* log_kept_mass) {
  ListedBase base = {t, row, prefix};
  Kept<float> kept = apply_filters(base, p);
  TopChoices top = xtc(base, kept, p);
  if (top.probability == 1) {
    kept = without(kept, top);
    top = kNoTopChoices;
  }
  if (log_kept_mass) base.require(row.has_sums() && !t.weigher.judges_apart());
  base.require(base.holds(kept));
  if (!base.decided) return false;
  const uint64_t total = weigh_groups(base.list, kept, t.weigher, t.ws);
  if (log_kept_mass) *log_kept_mass = (float)log_share(total, row.sum(0));
  if (total) {
    finish(t, base.list, kept, total, top);
  } else {
    finish_alone(t, first_of(base.list, kept, base.judge));
  }
  return true;
}

Status sample_listed(const Batch& given, int64_t r, Draws draws, const Workspace& workspace) {
  const ListedRow row(given, r);
  const RowParams& p = at(given.rows.params, r);
  Workspace ws = workspace;
  ws.table[0].ends = nullptr;  // a table would look for logits in the row
  const Prefix prefix = take_prefix(row, ws);
  if (prefix.peak.status != kValid) {
    write_invalid(given.out, r, draws, row.vocab());
    return prefix.peak.status;
  }
  Batch batch = given;  // without what takes more than the kept tokens
  batch.out.ranks = nullptr;
  batch.out.log_kept_mass = nullptr;
  float* const mass =
      draws.begin || !given.out.log_kept_mass ? nullptr : given.out.log_kept_mass + r;
  const float temperature = is_greedy(p) ? 1.0f : p.temperature;
  const float judged = is_greedy(p) ? 1.0f : judging_temperature(p);
  const LogitWeigher weigher = {prefix.peak.max, mass_scale(temperature), mass_scale(judged)};
  Dense<float> none = {};  // but for how wide the row is
  none.row.vocab = row.vocab();
  const Task<float, LogitWeigher> task = {batch, r, draws, ws, none, weigher, temperature};
  if (is_greedy(p)) {
    if (mass) *mass = 0;
    finish_alone(task, first_of(prefix.list, everything(), weigher));
  } else if (!decide(task, row, prefix, p, mass)) {
    return kUndecided;
  }
  if (given.out.ranks && given.out.mode == kProcessedLogprobs) write_ranks(given, r, draws, row);
  return kValid;
}

}  // namespace
}  // namespace fastsample

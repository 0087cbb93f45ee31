// What all ranks know of a row that is split over them: the first tokens of each, and what they
// have told besides. What they do not know, and would have to tell, is noted.
#pragma once

#include "core/place.h"
#include "cpu/filters.h"
#include "cpu/part.h"
#include "cpu/search.h"

namespace fastsample {
namespace {

// A row of input kListed is a ListedQuery. A token is the bits of its logit above its id, which is
// kLastId past a list's end. A row that is invalid has a NaN or +inf in some list.
struct ListedRow {
  const ListedQuery& head;

  ListedRow(const Batch& batch, int64_t r)
      : head(*(const ListedQuery*)((const float*)batch.logits.data + r * batch.logits.stride)) {}

  FS_MEMBER int32_t vocab() const { return (int32_t)head.vocab; }
  FS_MEMBER bool has_sums() const { return head.sums; }
  FS_MEMBER uint64_t sum(int i) const { return ((const uint64_t*)head.sums)[i]; }
  FS_MEMBER const int64_t* list(int64_t rank) const { return head.lists + rank * head.tokens; }
  FS_MEMBER int64_t tokens() const { return head.ranks * head.tokens; }
  FS_MEMBER SpreadSums spread() const { return {sum(6), sum(7), sum(8)}; }
};

// What is noted of a row.
struct Missing {
  const ListedRow& row;

  FS_MEMBER bool asked() const { return row.head.missing; }
  FS_MEMBER int64_t* details() const { return (int64_t*)(row.head.missing + 1); }
  FS_MEMBER void note(int64_t question) const {
    if (asked()) row.head.missing->question = question;
  }
};

// The key down to which every rank has listed all of its tokens: the highest of the last ones of
// full lists. The lowest key of all where no list is full.
int64_t edge_of(const ListedRow& row) {
  int64_t edge = kNoKey;
  for (int64_t rank = 0; rank < row.head.ranks; ++rank) {
    const int64_t* list = row.list(rank);
    int64_t last = kHighestKey;
    bool full = true;
    for (int64_t i = 0; i < row.head.tokens; ++i) {
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

// The sum of what ranks have answered.
FS_INLINE uint64_t total_of(const OfRanks<int64_t>& answers, int64_t ranks, int64_t word = 0) {
  uint64_t total = 0;
  for (int64_t rank = 0; rank < ranks; ++rank) total += (uint64_t)answers[rank][word];
  return total;
}

// The base set of filters, as `Base`, where it is a prefix of the row. What it cannot tell, ranks
// are asked for: until they have answered, the row is undecided, and whatever is then kept means
// nothing. With one answer more, all filters run again, and hear one after the other.
struct ListedBase {
  typedef LogitWeigher Weigher;

  const Task<float, LogitWeigher>& task;
  const ListedRow& row;
  const Prefix& prefix;
  LogitWeigher judge = task.weigher.judge();
  List list = prefix.list;
  uint64_t beyond = bound_beyond();  // more than what any other token weighs
  bool decided = true;
  int64_t heard = 0;     // answers
  int64_t searches = 0;  // and what the last of them has found:
  Kept<float> found = {};
  const int64_t* masses = nullptr;  // [ranks], of what each has, and how many tokens
  const int64_t* tokens = nullptr;
  Missing missing = {row};

  // Whether the list holds all of a set.
  FS_MEMBER bool holds(const Kept<float>& kept) const {
    return prefix.complete || kept.floor > beyond || !ranks_before(prefix.last, kept.low);
  }
  // Whether a set is all of the row, whose sums ranks may know.
  FS_MEMBER bool is_whole(const Kept<float>& kept) const {
    return bounds_of(kept) == kUnbounded && !kept.floor;
  }
  FS_MEMBER bool has_found(const Kept<float>& kept) const { return searches && equal(kept, found); }
  FS_MEMBER void require(bool known) { decided &= known; }

  // What ranks answer, `details` having been noted; or none.
  FS_MEMBER const Answered* hear(const PartQuery& query, PartQuestion question, int64_t wants,
                                 int64_t words, int64_t told, int64_t details = 0) {
    require(missing.asked());
    if (!decided) return nullptr;
    const auto next = [&] { return row.head.answered + heard; };
    while (heard < row.head.num_answered && next()->question != question) ++heard;
    if (heard < row.head.num_answered) return row.head.answered + heard++;
    decided = false;
    *row.head.missing = {question, wants, details, words, told, query};
    return nullptr;
  }
  // Sums of a set that the list does not hold: kSums.
  FS_MEMBER const Answered* hear_sums(const Kept<float>& kept, int64_t wants, int64_t told) {
    require(!is_whole(kept));  // ranks tell these of all rows
    return hear(query_of(kept), kSums, wants, kSumWords, told);
  }
  FS_MEMBER PartQuery query_of(const Kept<float>& kept) const {
    const int64_t high = kept.high.x == INFINITY ? kHighestKey : key_of_place(kept.high);
    const LogitWeigher& w = task.weigher;
    return {high,           key_of_place(kept.low), (int64_t)kept.floor,     kHighestKey, 0,
            bits_of(w.max), bits_of(w.scale),       bits_of(w.judged_scale), 0,           0};
  }

 private:
  // Masses rise with the logit but for their last bits.
  FS_MEMBER uint64_t bound_beyond() const {
    if (prefix.complete) return 0;
    const uint64_t mass = judge.mass(prefix.last.x);
    return mass + (mass >> 18) + 2;
  }
};

// Fills in what is told of a search, where ranks have told all that it takes. They tell their bins,
// and then their tokens in those that may hold the last of the tokens that reach the target.
void run_search(ListedBase& base, const Kept<float>& kept, SearchBy by, uint64_t target, float mean,
                int64_t* to) {
  constexpr int64_t kWords = kBins * (int64_t)(sizeof(BinMass) / sizeof(int64_t));
  const int64_t ranks = base.row.head.ranks;
  const PartQuery query = base.query_of(kept);
  const Answered* bins = base.hear(query, kMassOfBins, 0, kWords, kWords);
  if (!bins) return;
  PlaceSearch s = {base.judge.max,
                   base.judge.scale,
                   ranks,
                   by,
                   target,
                   mean,
                   {bins->first, bins->stride},
                   {},
                   0};
  const Uncertain u = uncertain_of(s);
  base.require(u.most <= kMostTold);
  if (u.most) {
    const int64_t where[] = {u.begin, u.in, u.out, u.end};
    memcpy(base.missing.details(), where, sizeof where);
    const Answered* words = base.hear(query, kWithin, 0, u.most, u.most, 4);
    if (!words) return;
    s.words = {words->first, words->stride};
    s.words_of_rank = words->words;
  }
  const NearSide near = near_side(s, to + 3, to + 3 + ranks);
  to[0] = base.heard;
  to[1] = near.low;
  to[2] = near.high;
}

// The tokens of a set that reach a target, in rank order or by their distance from a mean.
Kept<float> search(ListedBase& base, const Kept<float>& kept, SearchBy by, uint64_t target,
                   float mean = 0) {
  const ListedQuery& head = base.row.head;
  base.require(base.missing.asked() && base.searches < kSearches);
  if (!base.decided) return kept;
  int64_t* const to = head.found + base.searches * words_of_search(head.ranks);
  if (!to[0]) run_search(base, kept, by, target, mean, to);
  if (!base.decided) return kept;
  base.heard = to[0];
  ++base.searches;
  base.masses = to + 3;
  base.tokens = base.masses + head.ranks;
  base.found = narrow_above(kept, place_of_key(to[1]));
  if (to[2] != kHighestKey) base.found = narrow_below(base.found, place_of_key(to[2]));
  return base.found;
}

}  // namespace
}  // namespace fastsample

#include "cpu/split.h"

#include <math.h>

#include <algorithm>
#include <functional>
#include <vector>

#include "core/mass.h"
#include "core/place.h"
#include "cpu/question.h"
#include "cpu/search.h"

namespace fastsample {
namespace {

typedef std::vector<int64_t> Words;

// In this order. An answer to the i-th makes known what bit i + 1 of Known says.
constexpr PartQuestion kAsked[] = {kMassOfBins, kWithin, kTotals, kDraws};
constexpr int kQuestions = 4;

// What cpu/lists.h notes of a row, before what is as long as draws and ranks are many.
struct Note {
  ListedMissing missing;
  PartQuery query;
  const int64_t* thresholds() const { return (const int64_t*)(this + 1); }
};

template <class T>
constexpr int64_t words_of() {
  return (int64_t)(sizeof(T) / sizeof(int64_t));
}

class SplitRows {
 public:
  SplitRows(const SplitArguments& split, const RowArguments& rows, const CallArguments& call,
            const SplitHost& host)
      : split_(split),
        rows_(rows),
        call_(call),
        host_(host),
        count_(call.logits.rows),
        draws_(call.out.num_samples),
        status_((int32_t*)call.out.status),
        listed_(call),
        known_((size_t)count_) {
    // Lists do not tell raw log-probabilities.
    if (call.out.mode == kRawLogprobs) {
      OutputArguments& out = listed_.out;
      out.mode = kNoLogprobs;
      out.logprobs = out.ranks = out.top_ids = out.top_logprobs = 0;
    }
    for (int64_t r = 0; r < count_; ++r) all_.push_back(r);
  }

  SplitResult run() {
    if (split_.keeps_all) return draw_from_all();
    if (split_.tells_sums) tell_whole();
    int64_t invalid = sample();
    if (is_open() && !knows_sums_ && split_.may_tell_sums) {
      tell_whole();
      invalid = sample();
    }
    if (is_open()) {
      if (split_.flat) std::copy(told_[0].rows.begin(), told_[0].rows.end(), (int64_t*)split_.bins);
      return {kOpenRows, knows_sums_};
    }
    finish_raw();
    return {invalid, knows_sums_};
  }

 private:
  // Each row's answers of one rank, or of all [ranks]; those to a question of kAsked are all there.
  struct Told {
    int64_t words = 0;  // of a rank
    Words rows;         // [B, ranks, words]
  };

  bool is_open() const {
    return std::find(status_, status_ + count_, kUndecided) != status_ + count_;
  }

  // Stages 7 and 8 by what is known, and by what ranks then tell.
  int64_t sample() {
    int64_t invalid = sample_known();
    while (invalid && split_.asks && ask()) invalid = sample_known();
    return invalid;
  }

  int64_t sample_known() {
    const int64_t note = words_of<Note>() + draws_ + 2 * split_.ranks;
    const int64_t listed = split_.ranks * split_.tokens;
    if (split_.asks) notes_.assign((size_t)(count_ * note), 0);
    Words table;
    for (int64_t r = 0; r < count_; ++r) {
      const int64_t* own = split_.asks ? notes_.data() + r * note : nullptr;
      const ListedQuery head = {split_.vocab,   split_.ranks,   split_.rank,    known_[(size_t)r],
                                split_.tokens,  told_[0].words, told_[1].words, told_[2].words,
                                told_[3].words, (int64_t)own};
      append(table, &head.vocab, words_of<ListedQuery>());
      append(table, (const int64_t*)split_.sums + r * kSumWords, kSumWords);
      append(table, (const int64_t*)split_.lists + r * listed, listed);
      for (const Told& told : told_) {
        const int64_t n = split_.ranks * told.words;
        append(table, told.rows.data() + r * n, n);
      }
    }
    note_ = note;
    const int64_t words = 2 * (int64_t)table.size() / count_;
    const LogitsArguments logits = {(int64_t)table.data(), words, count_, words, kFloat32, kListed};
    return host_.sample(batch_of(rows_, {logits, listed_.out}));
  }

  const Note& note(int64_t r) const { return *(const Note*)(notes_.data() + r * note_); }

  // Has ranks answer the first of the questions that are noted; whether there is any, and all that
  // rows miss is noted.
  bool ask() {
    const auto asked = [&](int64_t r) { return note(r).missing.question; };
    for (int64_t r = 0; r < count_; ++r) {
      if (asked(r) == kUnasked) return false;
    }
    for (int i = 0; i < kQuestions; ++i) {
      Words rows;
      for (int64_t r = 0; r < count_; ++r) {
        if (asked(r) == kAsked[i]) rows.push_back(r);
      }
      if (rows.empty()) continue;
      learn(i, rows, answers(i, rows));
      return true;
    }
    return false;
  }

  // This rank's answers of some rows [b, words]; only the first words of each matter to others.
  Told answers(int i, const Words& rows) {
    int64_t answered[kQuestions] = {2 * kBins, 0, kTotalWords, 2 * draws_ + 1};
    int64_t used[kQuestions] = {2 * kBins, 0, 1, draws_};
    std::vector<PartQuery> queries;
    Words details;
    for (int64_t r : rows) {
      const Note& own = note(r);
      queries.push_back(own.query);
      if (kAsked[i] == kWithin) append(details, &own.missing.begin, 4);
      if (kAsked[i] == kDraws) append(details, own.thresholds(), draws_);
      used[1] = answered[1] = std::max(used[1], own.missing.most);
    }
    PartArguments ask = {};
    ask.question = kAsked[i];
    ask.count = (int64_t)(details.size() / rows.size());
    ask.words = answered[i];
    const Words found = answer(ask, rows, queries.data(), details.data());
    Told told = {used[i], {}};
    for (size_t k = 0; k < rows.size(); ++k) {
      append(told.rows, found.data() + (int64_t)k * answered[i], used[i]);
    }
    return told;
  }

  // What this rank answers of rows in ascending order, int64 [b, ask.words].
  Words answer(PartArguments ask, const Words& rows, const PartQuery* queries,
               const int64_t* details) {
    const int64_t n = (int64_t)rows.size();
    const LogitsArguments& l = call_.logits;
    const int64_t size = l.dtype == kFloat32 ? 4 : 2;
    Words found((size_t)(n * ask.words), nothing(ask.question));
    for (int64_t k = 0, next; l.vocab && k < n; k = next) {  // rows one behind the other
      for (next = k + 1; next < n && rows[(size_t)next] == rows[(size_t)next - 1] + 1;) ++next;
      const char* first = (const char*)l.logits + rows[(size_t)k] * l.logits_stride * size;
      ask.start = split_.start;
      ask.queries = (int64_t)(queries + k);
      ask.details = (int64_t)(details + k * ask.count);
      ask.answers = (int64_t)(found.data() + k * ask.words);
      host_.answer({{first, l.logits_stride, next - k, (int32_t)l.vocab, (DType)l.dtype}, ask});
    }
    return found;
  }

  // The answer of a rank that has no tokens.
  static int64_t nothing(int64_t question) {
    return question == kWithin ? word_of_token({-INFINITY, -1}) : question == kDraws ? kNoKey : 0;
  }

  // What all ranks give, [ranks, ...].
  Words gather(const Words& own) {
    Words found(own.size() * (size_t)split_.ranks);
    host_.gather(own.data(), (int64_t)own.size(), found.data());
    return found;
  }

  void learn(int i, const Words& rows, const Told& own) {
    const Words found = gather(own.rows);
    Told& told = told_[i];
    const int64_t words = std::max(told.words, own.words), before = told.words;
    Words all((size_t)(count_ * split_.ranks * words), nothing(kAsked[i]));
    for (int64_t row = 0; row < count_ * split_.ranks; ++row) {
      std::copy_n(told.rows.data() + row * before, before, all.data() + row * words);
    }
    const int64_t n = (int64_t)rows.size();
    for (int64_t k = 0; k < n; ++k) {
      const int64_t r = rows[(size_t)k];
      for (int64_t rank = 0; rank < split_.ranks; ++rank) {
        const int64_t* from = found.data() + (rank * n + k) * own.words;
        std::copy_n(from, own.words, all.data() + (r * split_.ranks + rank) * words);
      }
      known_[(size_t)r] |= (int64_t)2 << i;
    }
    told = {words, std::move(all)};
  }

  // Sums of all rows; with their bins if rows are flat, and with the mass for raw
  // log-probabilities.
  void tell_whole() {
    const int64_t bins = split_.flat ? 2 * kBins : 0;
    PartArguments ask = {};
    ask.question = kWhole;
    ask.wants = split_.wanted + (split_.flat ? kWantsBins : 0);
    ask.count = split_.ranks * split_.tokens;
    ask.words = kSumWords + bins;
    const int64_t* lists = (const int64_t*)split_.lists;
    const Words sums = answer(ask, all_, (const PartQuery*)split_.queries, lists);
    const Words raw = raw_masses();
    const int64_t words = ask.words + !raw.empty();
    Words own;
    for (int64_t r = 0; r < count_; ++r) {
      append(own, sums.data() + r * ask.words, ask.words);
      if (!raw.empty()) own.push_back(raw[(size_t)r]);
    }
    const Words found = gather(own);
    int64_t* total = (int64_t*)split_.sums;
    std::fill_n(total, count_ * kSumWords, 0);
    if (bins) told_[0] = {bins, {}};
    raw_.assign(raw.size(), 0);
    for (int64_t r = 0; r < count_; ++r) {
      for (int64_t rank = 0; rank < split_.ranks; ++rank) {
        const int64_t* from = found.data() + (rank * count_ + r) * words;
        for (int64_t i = 0; i < kSumWords; ++i) total[r * kSumWords + i] += from[i];
        append(told_[0].rows, from + kSumWords, bins);
        if (!raw.empty()) raw_[(size_t)r] += from[ask.words];
      }
      known_[(size_t)r] |= split_.flat ? kKnowsSums + kKnowsBins : kKnowsSums;
    }
    knows_sums_ = true;
  }

  // This rank's masses of whole rows at temperature 1; nothing where they are not wanted.
  Words raw_masses() {
    if (!split_.raw_queries) return {};
    PartArguments ask = {};
    ask.question = kWhole;
    ask.count = split_.ranks * split_.tokens;
    ask.words = kSumWords;
    const int64_t* lists = (const int64_t*)split_.lists;
    const Words sums = answer(ask, all_, (const PartQuery*)split_.raw_queries, lists);
    Words found;
    for (int64_t r = 0; r < count_; ++r) found.push_back(sums[(size_t)(r * kSumWords)]);
    return found;
  }

  // Raw log-probabilities, with a message more where masses are not known, or tokens are drawn that
  // are not listed.
  void finish_raw() {
    if (!split_.raw_queries) return;
    bool listed = true;
    const Words keys = keys_of_draws(&listed);
    const bool weighs = raw_.empty();
    Words above = listed ? above_on_lists(keys) : Words((size_t)(count_ * draws_));
    if (weighs || !listed) {
      const Words masses = weighs ? raw_masses() : Words();
      const Words own_above = listed ? Words() : answer_above(keys);
      Words own;
      for (int64_t r = 0; r < count_; ++r) {
        if (weighs) own.push_back(masses[(size_t)r]);
        if (!listed) append(own, own_above.data() + r * draws_, draws_);
      }
      const Words found = gather(own);
      if (weighs) raw_.assign((size_t)count_, 0);
      const int64_t* from = found.data();
      for (int64_t row = 0; row < split_.ranks * count_; ++row) {
        const int64_t r = row % count_;
        if (weighs) raw_[(size_t)r] += *from++;
        for (int64_t j = 0; !listed && j < draws_; ++j) above[(size_t)(r * draws_ + j)] += *from++;
      }
    }
    for (int64_t r = 0; r < count_; ++r) write_raw(r, keys.data(), above.data());
  }

  // f(word) for each token that ranks have listed of a row.
  template <class F>
  void each_listed(int64_t r, F f) const {
    const int64_t* lists = (const int64_t*)split_.lists + r * split_.ranks * split_.tokens;
    const int64_t step = split_.keeps_all ? split_.tokens : 1;
    for (int64_t i = 0; i < split_.ranks * split_.tokens; i += step) {
      const Place<float> token = token_of_word(lists[i]);
      if (token.id >= 0 && token.x > -INFINITY) f(token);
    }
  }

  // The keys of sampled tokens, int64 [B, num_samples]; whether all of them are listed.
  Words keys_of_draws(bool* listed) const {
    Words keys((size_t)(count_ * draws_), kNoKey);
    for (int64_t r = 0; r < count_; ++r) {
      int64_t* own = keys.data() + r * draws_;
      const Told& told = told_[kQuestions - 1];
      const bool drawn = known_[(size_t)r] & kKnowsKeys;
      *listed &= !drawn;
      for (int64_t i = 0; drawn && i < split_.ranks * draws_; ++i) {
        const int64_t key = told.rows[(size_t)(r * split_.ranks * draws_ + i)];
        own[i % draws_] = std::max(own[i % draws_], key);
      }
      if (drawn) continue;
      const int64_t* tokens = (const int64_t*)call_.out.tokens + r * draws_;
      each_listed(r, [&](Place<float> token) {
        for (int64_t j = 0; j < draws_; ++j) {
          if (token.id == tokens[j]) own[j] = key_of_place(token);
        }
      });
    }
    return keys;
  }

  // How many tokens rank above others by their logits, int64 [B, num_samples].
  Words above_on_lists(const Words& keys) const {
    Words above(keys.size());
    for (size_t i = 0; i < keys.size(); ++i) {
      const float x = place_of_key(keys[i]).x;
      each_listed((int64_t)i / draws_, [&](Place<float> token) { above[i] += token.x > x; });
    }
    return above;
  }

  // The same among this rank's tokens, of all of them.
  Words answer_above(const Words& keys) {
    Words details;
    for (int64_t key : keys) details.push_back(bits_of(place_of_key(key).x));
    PartArguments ask = {};
    ask.question = kAbove;
    ask.count = ask.words = draws_;
    return answer(ask, all_, (const PartQuery*)split_.queries, details.data());
  }

  void write_raw(int64_t r, const int64_t* keys, const int64_t* above) const {
    const OutputArguments& out = call_.out;
    const bool valid = !status_[r];
    float peak = -INFINITY;
    Words first;
    each_listed(r, [&](Place<float> token) {
      peak = std::max(peak, token.x);
      if (out.num_top) first.push_back(key_of_place(token));
    });
    const double normaliser = log((double)raw_[(size_t)r] / (double)kMassUnit);
    const auto logprob = [&](int64_t key) {
      return (float)(((double)place_of_key(key).x - (double)peak) - normaliser);
    };
    for (int64_t i = r * draws_; i < (r + 1) * draws_; ++i) {
      if (out.logprobs) ((float*)out.logprobs)[i] = valid ? logprob(keys[i]) : NAN;
      if (out.ranks) ((int64_t*)out.ranks)[i] = valid ? above[i] + 1 : 0;
    }
    std::sort(first.begin(), first.end(), std::greater<int64_t>());
    for (int64_t i = 0; i < out.num_top; ++i) {
      const bool there = valid && i < (int64_t)first.size();
      const int64_t key = there ? first[(size_t)i] : kNoKey, slot = r * out.num_top + i;
      ((int64_t*)out.top_ids)[slot] = there ? place_of_key(key).id : -1;
      ((float*)out.top_logprobs)[slot] = there ? logprob(key) : valid ? -INFINITY : NAN;
    }
  }

  // Of rows that keep everything, in one message.
  SplitResult draw_from_all() {
    const int64_t words = 1 + draws_ * kWordsOfDraw;
    PartArguments ask = {};
    ask.question = kOwned;
    ask.wants = split_.rank;
    ask.count = split_.ranks * split_.tokens + 2;
    ask.words = words;
    const Batch batch = batch_of(rows_, call_);
    Words given;
    for (int64_t r = 0; r < count_; ++r) {
      const Stream stream = stream_of(batch, r);
      append(given, (const int64_t*)split_.lists + r * (ask.count - 2), ask.count - 2);
      given.insert(given.end(), {(int64_t)stream.seed, (int64_t)stream.offset});
    }
    const Words found = gather(answer(ask, all_, (const PartQuery*)split_.queries, given.data()));
    told_[kQuestions - 1] = {draws_, Words((size_t)(count_ * split_.ranks * draws_), kNoKey)};
    int64_t invalid = 0;
    for (int64_t r = 0; r < count_; ++r) {
      Words told;
      for (int64_t rank = 0; rank < split_.ranks; ++rank) {
        append(told, found.data() + (rank * count_ + r) * words, words);
      }
      const int64_t* stream = given.data() + (r + 1) * ask.count - 2;
      if (!draw_owned(r, told, words, stream)) return {kOpenRows, false};
      invalid += status_[r] != 0;
    }
    finish_raw();
    return {invalid, false};
  }

  // Status and tokens of a row, by each rank's mass, or a status below 0, and candidates; whether
  // all draws are among these.
  bool draw_owned(int64_t r, const Words& told, int64_t words, const int64_t* stream) {
    int64_t* tokens = (int64_t*)call_.out.tokens + r * draws_;
    uint64_t total = 0;
    status_[r] = 0;
    for (int64_t rank = 0; rank < split_.ranks; ++rank) {
      const int64_t mass = told[(size_t)(rank * words)];
      if (mass < 0) status_[r] = (int32_t)-mass;
      total += (uint64_t)mass;
    }
    if (draws_at_one()) raw_.push_back((int64_t)total);
    known_[(size_t)r] |= kKnowsKeys;
    const DrawQuery query = {stream[0], stream[1], split_.rank, split_.ranks};
    for (int64_t j = 0; j < draws_; ++j) {
      const int64_t key = status_[r] ? kNoKey : key_of_draw(told.data(), words, query, j);
      if (key == kNoKey && !status_[r]) return false;
      tokens[j] = key == kNoKey ? -1 : place_of_key(key).id;
      told_[kQuestions - 1].rows[(size_t)(r * split_.ranks * draws_ + j)] = key;
    }
    return true;
  }

  // Whether masses of draws are those of raw log-probabilities.
  bool draws_at_one() const {
    const auto* own = (const PartQuery*)split_.queries;
    const auto* raw = (const PartQuery*)split_.raw_queries;
    const auto same = [](const PartQuery& a, const PartQuery& b) { return a.scale == b.scale; };
    return raw && std::equal(own, own + count_, raw, same);
  }

  static void append(Words& to, const int64_t* from, int64_t words) {
    to.insert(to.end(), from, from + words);
  }

  const SplitArguments& split_;
  const RowArguments& rows_;
  const CallArguments& call_;
  const SplitHost& host_;
  const int64_t count_, draws_;
  int32_t* const status_;
  Words all_;             // rows
  CallArguments listed_;  // what lists tell
  Words known_;           // [B]
  Told told_[kQuestions];
  Words raw_;  // [B], masses for raw log-probabilities, if they are known
  Words notes_;
  int64_t note_ = 0;  // words of each
  bool knows_sums_ = false;
};

}  // namespace

SplitResult sample_split(const SplitArguments& split, const RowArguments& rows,
                         const CallArguments& call, const SplitHost& host) {
  return SplitRows(split, rows, call, host).run();
}

}  // namespace fastsample

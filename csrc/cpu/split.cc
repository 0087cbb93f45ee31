#include "cpu/split.h"

#include <math.h>

#include <algorithm>
#include <vector>

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
        status_((const int32_t*)call.out.status),
        known_((size_t)count_) {}

  SplitResult run() {
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
    if (!knows_sums_) finish_raw();
    tell_keys();
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
    return host_.sample(batch_of(rows_, {logits, call_.out}));
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
      std::vector<int64_t> rows;
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
  Told answers(int i, const std::vector<int64_t>& rows) {
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
  Words answer(PartArguments ask, const std::vector<int64_t>& rows, const PartQuery* queries,
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

  void learn(int i, const std::vector<int64_t>& rows, const Told& own) {
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
    std::vector<int64_t> rows;
    for (int64_t r = 0; r < count_; ++r) rows.push_back(r);
    const int64_t bins = split_.flat ? 2 * kBins : 0;
    PartArguments ask = {};
    ask.question = kWhole;
    ask.wants = split_.wanted + (split_.flat ? kWantsBins : 0);
    ask.count = split_.ranks * split_.tokens;
    ask.words = kSumWords + bins;
    const int64_t* lists = (const int64_t*)split_.lists;
    const Words sums = answer(ask, rows, (const PartQuery*)split_.queries, lists);
    const Words raw = raw_masses(rows);
    const int64_t words = ask.words + (split_.raw ? 1 : 0);
    Words own;
    for (int64_t r = 0; r < count_; ++r) {
      append(own, sums.data() + r * ask.words, ask.words);
      if (split_.raw) own.push_back(raw[(size_t)r]);
    }
    const Words found = gather(own);
    int64_t* total = (int64_t*)split_.sums;
    std::fill_n(total, count_ * kSumWords, 0);
    if (bins) told_[0] = {bins, {}};
    for (int64_t r = 0; r < count_; ++r) {
      for (int64_t rank = 0; rank < split_.ranks; ++rank) {
        const int64_t* from = found.data() + (rank * count_ + r) * words;
        for (int64_t i = 0; i < kSumWords; ++i) total[r * kSumWords + i] += from[i];
        append(told_[0].rows, from + kSumWords, bins);
        if (split_.raw) ((int64_t*)split_.raw)[r] += from[ask.words];
      }
      known_[(size_t)r] |= split_.flat ? kKnowsSums + kKnowsBins : kKnowsSums;
    }
    knows_sums_ = true;
  }

  // This rank's masses of whole rows at temperature 1; nothing where they are not wanted.
  Words raw_masses(const std::vector<int64_t>& rows) {
    if (!split_.raw) return {};
    PartArguments ask = {};
    ask.question = kWhole;
    ask.count = split_.ranks * split_.tokens;
    ask.words = kSumWords;
    const int64_t* lists = (const int64_t*)split_.lists;
    const Words sums = answer(ask, rows, (const PartQuery*)split_.raw_queries, lists);
    Words found;
    for (int64_t r = 0; r < count_; ++r) found.push_back(sums[(size_t)(r * kSumWords)]);
    return found;
  }

  // The keys of tokens that are not listed, for raw log-probabilities; whether there are any.
  bool tell_keys() {
    bool any = false;
    for (int64_t r = 0; r < count_ && split_.raw; ++r) {
      if (!(known_[(size_t)r] & kKnowsKeys)) continue;
      any = true;
      const int64_t* told = told_[kQuestions - 1].rows.data() + r * split_.ranks * draws_;
      for (int64_t i = 0; i < split_.ranks * draws_; ++i) {
        int64_t& key = ((int64_t*)split_.keys)[r * draws_ + i % draws_];
        key = std::max(key, told[i]);
      }
    }
    return any;
  }

  // The masses for raw log-probabilities, unless more is to be asked for these anyway.
  void finish_raw() {
    if (!split_.raw || tell_keys()) return;
    std::vector<int64_t> rows;
    for (int64_t r = 0; r < count_; ++r) rows.push_back(r);
    const Words found = gather(raw_masses(rows));
    for (size_t i = 0; i < found.size(); ++i) {
      ((int64_t*)split_.raw)[i % (size_t)count_] += found[i];
    }
  }

  static void append(Words& to, const int64_t* from, int64_t words) {
    to.insert(to.end(), from, from + words);
  }

  const SplitArguments& split_;
  const RowArguments& rows_;
  const CallArguments& call_;
  const SplitHost& host_;
  const int64_t count_, draws_;
  const int32_t* status_;
  Words known_;  // [B]
  Told told_[kQuestions];
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

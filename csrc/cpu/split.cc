#include "cpu/split.h"

#include <string.h>

#include <algorithm>

#include "cpu/messages.h"
#include "cpu/search.h"
#include "cpu/split_raw.h"

namespace fastsample {
namespace {

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
        out_(call.out),
        messages_{split, call, host},
        raw_(messages_),
        count_(messages_.rows()),
        draws_(messages_.draws()),
        status_((int32_t*)out_.status),
        known_((size_t)count_),
        drawn_((size_t)(count_ * draws_), kNoKey) {
    if (out_.mode != kRawLogprobs) return;  // those are written last
    out_.mode = kNoLogprobs;
    out_.logprobs = out_.ranks = out_.top_ids = out_.top_logprobs = 0;
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
      if (split_.flat) tell_bins();
      return {kOpenRows, knows_sums_};
    }
    keep_drawn();
    raw_.write(raw_masses_, drawn_);
    return {invalid, knows_sums_};
  }

 private:
  // What ranks have answered of some rows.
  struct Told {
    Words all;                         // [ranks, b, ...]
    int64_t stride = 0, words = 0;     // from rank to rank; of a row
    std::vector<const int64_t*> rows;  // [B], of the first rank; null where none was asked

    const int64_t* of_row(int64_t r) const { return rows.empty() ? nullptr : rows[(size_t)r]; }
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
    if (split_.asks) notes_.assign((size_t)(count_ * note), 0);
    std::vector<ListedQuery> table;
    for (int64_t r = 0; r < count_; ++r) {
      const auto told = [&](int i) { return (int64_t)told_[i].of_row(r); };
      const int64_t* own = split_.asks ? notes_.data() + r * note : nullptr;
      table.push_back({split_.vocab, split_.ranks, split_.rank, known_[(size_t)r],
                       (int64_t)messages_.lists(r), split_.tokens,
                       split_.sums + r * kSumWords * (int64_t)sizeof(int64_t), told(0),
                       told_[0].stride, told(1), told_[1].stride, told_[1].words, told(2),
                       told_[2].stride, told(3), told_[3].stride, (int64_t)own});
    }
    note_ = note;
    // The width decides how much scratch there is: enough for all lists.
    constexpr int64_t kWidth = 2 * words_of<ListedQuery>();
    const int64_t width = std::max(kWidth, split_.ranks * split_.tokens);
    const LogitsArguments logits = {
        (int64_t)table.data(), kWidth, count_, width, kFloat32, kListed};
    return messages_.host.sample(batch_of(rows_, {logits, out_}));
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
      learn(i, rows);
      return true;
    }
    return false;
  }

  // Each question is asked once, of all rows that it is noted of. Only the first words of an answer
  // matter to others.
  void learn(int i, const Words& rows) {
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
    Words own = messages_.answer(ask, rows, queries.data(), details.data());
    const int64_t n = (int64_t)rows.size();
    if (kAsked[i] == kDraws) raw_.translate(own.data(), rows, answered[i], {0, draws_, 1});
    for (int64_t k = 0; k < n; ++k) {
      memmove(own.data() + k * used[i], own.data() + k * answered[i],
              (size_t)used[i] * sizeof own[0]);
    }
    own.resize((size_t)(n * used[i]));
    keep(i, messages_.gather(own), rows, used[i], 0, n * used[i]);
  }

  // Keeps what ranks have told of rows: of each, so many words from some place on.
  void keep(int i, Words all, const Words& rows, int64_t words, int64_t begin, int64_t stride) {
    told_[i] = {std::move(all), stride, words, {}};
    told_[i].rows.resize((size_t)count_);
    const int64_t each = stride / (int64_t)rows.size();
    for (size_t k = 0; k < rows.size(); ++k) {
      told_[i].rows[(size_t)rows[k]] = told_[i].all.data() + begin + (int64_t)k * each;
      known_[(size_t)rows[k]] |= (int64_t)2 << i;
    }
  }

  // Sums of all rows; with their bins if rows are flat, and with the mass for raw
  // log-probabilities.
  void tell_whole() {
    const int64_t bins = split_.flat ? 2 * kBins : 0, n = kSumWords + bins;
    const int64_t wants = split_.wanted | (bins ? (int64_t)kWantsBins : 0);
    const Words sums = messages_.answer_whole(split_.queries, wants, n);
    const Words raw = raw_.masses();
    const int64_t words = n + !raw.empty();
    Words own;
    for (int64_t r = 0; r < count_; ++r) {
      append(own, sums.data() + r * n, n);
      if (!raw.empty()) own.push_back(raw[(size_t)r]);
    }
    Words found = messages_.gather(own);
    int64_t* total = (int64_t*)split_.sums;
    std::fill_n(total, count_ * kSumWords, 0);
    raw_masses_.assign(raw.size(), 0);
    for (int64_t row = 0; row < split_.ranks * count_; ++row) {
      const int64_t* from = found.data() + row * words;
      const int64_t r = row % count_;
      for (int64_t i = 0; i < kSumWords; ++i) total[r * kSumWords + i] += from[i];
      if (!raw.empty()) raw_masses_[(size_t)r] += from[n];
    }
    for (int64_t& known : known_) known |= kKnowsSums;
    knows_sums_ = true;
    if (bins) keep(0, std::move(found), messages_.all_rows(), bins, kSumWords, count_ * words);
  }

  // For those who ask in another way.
  void tell_bins() const {
    int64_t* to = (int64_t*)split_.bins;
    for (int64_t rank = 0; rank < split_.ranks; ++rank) {
      for (int64_t r = 0; r < count_; ++r) {
        to = std::copy_n(told_[0].of_row(r) + rank * told_[0].stride, 2 * kBins, to);
      }
    }
  }

  // The keys of tokens that ranks have told.
  void keep_drawn() {
    const Told& told = told_[kQuestions - 1];
    for (int64_t r = 0; r < count_; ++r) {
      const int64_t* of_row = told.of_row(r);
      for (int64_t i = 0; of_row && i < split_.ranks * draws_; ++i) {
        int64_t& key = drawn_[(size_t)(r * draws_ + i % draws_)];
        key = std::max(key, of_row[i / draws_ * told.stride + i % draws_]);
      }
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
    const Batch batch = batch_of(rows_, messages_.call);
    Words given;
    for (int64_t r = 0; r < count_; ++r) {
      const Stream stream = stream_of(batch, r);
      append(given, messages_.lists(r), ask.count - 2);
      given.insert(given.end(), {(int64_t)stream.seed, (int64_t)stream.offset});
    }
    const auto* queries = (const PartQuery*)split_.queries;
    Words own = messages_.answer(ask, messages_.all_rows(), queries, given.data());
    for (int64_t j = 0; j < draws_; ++j) {
      raw_.translate(own.data(), messages_.all_rows(), words, {3 + j * kWordsOfDraw, kGuesses, 2});
    }
    const bool at_one = draws_as_given();
    const Words masses = at_one ? Words() : raw_.masses();
    append(own, masses.data(), (int64_t)masses.size());
    const Words found = messages_.gather(own);
    if (raw_.wanted()) raw_masses_.assign((size_t)count_, 0);
    int64_t invalid = 0;
    for (int64_t r = 0; r < count_; ++r) {
      Words told;
      for (int64_t rank = 0; rank < split_.ranks; ++rank) {
        const int64_t* from = found.data() + rank * (int64_t)own.size();
        append(told, from + r * words, words);
        if (!masses.empty()) raw_masses_[(size_t)r] += from[count_ * words + r];
      }
      const int64_t* stream = given.data() + (r + 1) * ask.count - 2;
      const uint64_t mass = draw_owned(r, told, words, stream);
      if (at_one) raw_masses_[(size_t)r] = (int64_t)mass;
      invalid += status_[r] != 0;
    }
    if (is_open()) return {kOpenRows, false};
    raw_.write(raw_masses_, drawn_);
    return {invalid, false};
  }

  // Status and tokens of a row, by each rank's mass, or a status below 0, and candidates; the mass
  // of the whole row.
  uint64_t draw_owned(int64_t r, const Words& told, int64_t words, const int64_t* stream) {
    int64_t* tokens = (int64_t*)out_.tokens + r * draws_;
    uint64_t total = 0;
    status_[r] = 0;
    for (int64_t rank = 0; rank < split_.ranks; ++rank) {
      const int64_t mass = told[(size_t)(rank * words)];
      if (mass < 0) status_[r] = (int32_t)-mass;
      total += (uint64_t)mass;
    }
    const DrawQuery query = {stream[0], stream[1], split_.rank, split_.ranks};
    for (int64_t j = 0; j < draws_; ++j) {
      const int64_t key = status_[r] ? kNoKey : key_of_draw(told.data(), words, query, j);
      if (key == kNoKey && !status_[r]) status_[r] = kUndecided;
      tokens[j] = key == kNoKey ? -1 : place_of_key(key).id;
      drawn_[(size_t)(r * draws_ + j)] = key;
    }
    return total;
  }

  // Whether masses of draws are those of raw log-probabilities.
  bool draws_as_given() const {
    const auto* own = (const PartQuery*)split_.queries;
    const auto* raw = (const PartQuery*)split_.raw_queries;
    const auto same = [](const PartQuery& a, const PartQuery& b) { return a.scale == b.scale; };
    return raw && !split_.raw_lists && std::equal(own, own + count_, raw, same);
  }

  const SplitArguments& split_;
  const RowArguments& rows_;
  OutputArguments out_;
  const Messages messages_;
  const RawRows raw_;
  const int64_t count_, draws_;
  int32_t* const status_;
  Words known_;  // [B]
  Told told_[kQuestions];
  Words raw_masses_;  // [B], if they are known
  Words drawn_;       // [B, num_samples], of rows whose tokens are not all listed; keys as given
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

#include "cpu/split.h"

#include <string.h>

#include <algorithm>
#include <deque>

#include "cpu/messages.h"
#include "cpu/search.h"
#include "cpu/split_raw.h"

namespace fastsample {
namespace {

// Rows that miss the same.
struct Group {
  ListedMissing missing;  // the most that any of them does
  Words rows;
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
        told_(split, call.logits.rows),
        messages_{split, told_.lists, call, host},
        raw_(messages_, told_),
        count_(messages_.rows()),
        draws_(messages_.draws()),
        status_((int32_t*)out_.status),
        answered_((size_t)count_),
        drawn_((size_t)(count_ * draws_), kNoKey) {
    if (out_.mode != kRawLogprobs) return;  // those are written last
    out_.mode = kNoLogprobs;
    out_.logprobs = out_.ranks = out_.top_ids = out_.top_logprobs = 0;
  }

  SplitResult run() {
    if (split_.keeps_all) return draw_from_all();
    if (split_.tells_sums || told_.flat) tell_whole();
    int64_t invalid = sample();
    if (is_open() && !knows_sums_ && split_.may_tell_sums) {
      tell_whole();
      invalid = sample();
    }
    if (is_open()) {
      if (told_.flat) tell_bins();
      return {kOpenRows, knows_sums_, false};
    }
    raw_.write(raw_masses_, drawn_);
    return {invalid, knows_sums_, raw_.wanted()};
  }

 private:
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
    const int64_t searches = kSearches * words_of_search(split_.ranks);
    note_ = words_of<ListedMissing>() + room_for_details(draws_);
    if (split_.asks) {
      notes_.assign((size_t)(count_ * note_), 0);
      found_.resize((size_t)(count_ * searches));
    }
    std::vector<ListedQuery> table;
    for (int64_t r = 0; r < count_; ++r) {
      const auto& answered = answered_[(size_t)r];
      const int64_t* sums = (const int64_t*)split_.sums + r * kSumWords;
      table.push_back({split_.vocab, split_.ranks, split_.rank, told_.lists.of(r),
                       told_.lists.tokens, knows_sums_ ? sums : nullptr, answered.data(),
                       (int64_t)answered.size(), split_.asks ? &note(r) : nullptr,
                       split_.asks ? found_.data() + r * searches : nullptr});
    }
    // The width decides how much scratch there is: enough for all lists.
    constexpr int64_t kWidth = 2 * words_of<ListedQuery>();
    const int64_t width = std::max(kWidth, split_.ranks * told_.lists.tokens);
    const LogitsArguments logits = {
        (int64_t)table.data(), kWidth, count_, width, kFloat32, kListed};
    return messages_.host.sample(batch_of(rows_, {logits, out_}));
  }

  ListedMissing& note(int64_t r) { return *(ListedMissing*)(notes_.data() + r * note_); }

  // Has ranks answer what rows miss, in one message; whether that is all noted.
  bool ask() {
    std::vector<Group> groups;
    for (int64_t r = 0; r < count_; ++r) {
      const ListedMissing& own = note(r);
      if (own.question == kUnasked) return false;
      if (own.question == kNothing) continue;
      const auto same = [&](const Group& g) {
        return g.missing.question == own.question && g.missing.wants == own.wants;
      };
      auto group = std::find_if(groups.begin(), groups.end(), same);
      if (group == groups.end()) group = groups.insert(group, {own, {}});
      group->missing.words = std::max(group->missing.words, own.words);
      group->missing.told = std::max(group->missing.told, own.told);
      group->rows.push_back(r);
    }
    Words own;
    for (const Group& group : groups) answer(group, own);
    if (groups.empty()) return false;
    const auto stride = (int64_t)own.size();
    heard_.push_back(messages_.gather(own));
    const int64_t* at = heard_.back().data();
    for (const Group& group : groups) {
      for (int64_t r : group.rows) {
        keep(r, {group.missing.question, at, stride, group.missing.told});
        at += group.missing.told;
      }
    }
    return true;
  }

  // Appends what this rank tells the others of some rows.
  void answer(const Group& group, Words& told) {
    const ListedMissing& m = group.missing;
    std::vector<PartQuery> queries;
    Words details;
    for (int64_t r : group.rows) {
      queries.push_back(note(r).query);
      append(details, (const int64_t*)(&note(r) + 1), m.count);
    }
    PartArguments ask = {};
    ask.question = m.question;
    ask.wants = m.wants;
    ask.count = m.count;
    ask.words = m.words;
    Words found = messages_.answer(ask, group.rows, queries.data(), details.data());
    if (m.question == kDraws) raw_.translate(found.data(), group.rows, m.words, {0, draws_, 1});
    for (size_t k = 0; k < group.rows.size(); ++k) {
      append(told, found.data() + (int64_t)k * m.words, m.told);
    }
  }

  void keep(int64_t r, const Answered& answered) {
    answered_[(size_t)r].push_back(answered);
    if (answered.question != kDraws) return;
    for (int64_t i = 0; i < split_.ranks * draws_; ++i) {
      int64_t& key = drawn_[(size_t)(r * draws_ + i % draws_)];
      key = std::max(key, answered.first[i / draws_ * answered.stride + i % draws_]);
    }
  }

  // Sums of all rows; with their bins if rows are flat, and with the mass for raw
  // log-probabilities.
  void tell_whole() {
    const int64_t bins = told_.flat ? 2 * kBins : 0, n = kSumWords + bins;
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
    knows_sums_ = true;
    if (!bins) return;
    heard_.push_back(std::move(found));
    for (int64_t r = 0; r < count_; ++r) {
      keep(r, {kMassOfBins, heard_.back().data() + r * words + kSumWords, count_ * words, bins});
    }
  }

  // For those who ask in another way.
  void tell_bins() const {
    int64_t* to = (int64_t*)split_.bins;
    for (int64_t rank = 0; rank < split_.ranks; ++rank) {
      for (int64_t r = 0; r < count_; ++r) {
        const Answered& bins = answered_[(size_t)r].front();
        to = std::copy_n(bins.first + rank * bins.stride, bins.words, to);
      }
    }
  }

  // Of rows that keep everything, in one message.
  SplitResult draw_from_all() {
    const int64_t words = 1 + draws_ * kWordsOfDraw;
    PartArguments ask = {};
    ask.question = kOwned;
    ask.wants = split_.rank;
    ask.count = split_.ranks * told_.lists.tokens + 2;
    ask.words = words;
    const Batch batch = batch_of(rows_, messages_.call);
    Words given;
    for (int64_t r = 0; r < count_; ++r) {
      const Stream stream = stream_of(batch, r);
      append(given, told_.lists.of(r), ask.count - 2);
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
    if (is_open()) return {kOpenRows, false, false};
    raw_.write(raw_masses_, drawn_);
    return {invalid, false, raw_.wanted()};
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
    return raw_.wanted() && !told_.edited && std::equal(own, own + count_, raw, same);
  }

  const SplitArguments& split_;
  const RowArguments& rows_;
  OutputArguments out_;
  const Told told_;
  const Messages messages_;
  const RawRows raw_;
  const int64_t count_, draws_;
  int32_t* const status_;
  std::deque<Words> heard_;                      // messages, in which all answers are
  std::vector<std::vector<Answered>> answered_;  // [B]
  Words raw_masses_;                             // [B], if they are known
  Words drawn_;  // [B, num_samples], of rows whose tokens are not all listed; keys as given
  Words found_;  // [B, kSearches, ...]
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

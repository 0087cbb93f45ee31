// An input's rows, split over ranks: what their lists decide, what searches find, and what is drawn
// from all tokens.
#pragma once

#include <math.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "core/filters.h"
#include "core/place.h"
#include "cpu/dispatch.h"
#include "cpu/messages.h"
#include "cpu/search.h"
#include "inputs.h"

namespace split {

using namespace fastsample;

// Where the threads of all ranks give each other words.
class Meeting {
 public:
  explicit Meeting(int64_t ranks) : told_((size_t)ranks) {}

  void gather(int64_t rank, const int64_t* own, int64_t words, int64_t* found) {
    told_[(size_t)rank].assign(own, own + words);
    wait();
    for (const Words& of_rank : told_) found = std::copy_n(of_rank.data(), words, found);
    wait();
  }

 private:
  // Until all are here.
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int64_t round = round_;
    if (++waiting_ == (int64_t)told_.size()) {
      waiting_ = 0;
      ++round_;
      all_here_.notify_all();
    }
    all_here_.wait(lock, [&] { return round_ != round; });
  }

  std::mutex mutex_;
  std::condition_variable all_here_;
  std::vector<Words> told_;
  int64_t waiting_ = 0, round_ = 0;
};

// Rows after stages 1 to 3, or a part of them, and what is wrong with that.
struct Edited {
  std::vector<float> x;
  std::vector<int32_t> status;

  explicit Edited(const fuzz::Input& in) : Edited(in, 0, in.vocab) {}
  // A mask's words are of the whole rows, so `begin` is a multiple of 32 if there is one.
  Edited(const fuzz::Input& in, int64_t begin, int64_t end)
      : x((size_t)(in.rows * (end - begin))), status((size_t)in.rows) {
    std::vector<RowParams> params = in.params;
    for (RowParams& p : params) {
      RowParams none = {};
      none.temperature = none.top_p = none.typical_p = 1;
      none.repetition_penalty = p.repetition_penalty;
      none.frequency_penalty = p.frequency_penalty;
      none.presence_penalty = p.presence_penalty;
      none.dry_multiplier = p.dry_multiplier;
      none.dry_base = p.dry_base;
      none.dry_allowed_length = p.dry_allowed_length;
      none.dry_range = p.dry_range;
      none.no_repeat_ngram_size = p.no_repeat_ngram_size;
      p = none;
    }
    RowArguments rows = in.row_arguments();
    rows.params = (int64_t)params.data();
    if (end - begin < in.vocab) {
      rows.first_id = begin;
      rows.num_ids = in.vocab;
      if (in.has_mask) {
        const int64_t before = std::min(begin / 32, rows.mask_words);
        rows.mask += before * (int64_t)sizeof(int32_t);
        rows.mask_words -= before;
      }
    }
    OutputArguments out = {};
    out.status = (int64_t)status.data();
    out.filtered = (int64_t)x.data();
    LogitsArguments part = in.logits_arguments();
    part.logits += begin * (part.dtype == kFloat32 ? 4 : 2);
    part.vocab = end - begin;
    sample_batch(batch_of(rows, {part, out}), 1);
  }
};

struct Ranks {
  const fuzz::Input& in;
  const Edited* edited;
  LogitsArguments whole;  // what is drawn from
  int64_t ranks, length;  // length: of a list
  std::vector<PartQuery> queries;

  explicit Ranks(const fuzz::Input& input, const Edited* edits = nullptr)
      : in(input),
        edited(edits),
        whole(input.logits_arguments()),
        ranks(1 + in.vocab % 4),
        length(in.vocab % 3 ? 1 + in.vocab % 11 : 256) {
    const int64_t lowest = -(int64_t)0x7F7FFFFF * ((int64_t)1 << 32);
    if (edited) whole = {(int64_t)edited->x.data(), in.vocab, in.rows, in.vocab, kFloat32, kLogits};
    for (int64_t r = 0; r < in.rows; ++r) {
      const RowParams& p = params(r);
      const float drawn = is_greedy(p) ? 1.0f : p.temperature;
      const float judged = is_greedy(p) ? 1.0f : judging_temperature(p);
      queries.push_back({INT64_MAX, lowest, 0, INT64_MAX, 0, 0, bits(mass_scale(drawn)),
                         bits(mass_scale(judged)), 0, 0});
    }
  }

  const RowParams& params(int64_t r) const { return in.params[in.params.size() > 1 ? r : 0]; }
  int64_t start(int64_t rank) const { return in.vocab * rank * rank / (ranks * ranks); }
  static int64_t bits(float x) {
    int32_t word;
    memcpy(&word, &x, sizeof word);
    return word;
  }
  static int64_t nothing() { return (int64_t)((uint64_t)bits(-INFINITY) << 32 | UINT32_MAX); }

  // What a rank has of rows.
  LogitsArguments part_of(LogitsArguments own, int64_t rank) const {
    own.logits += start(rank) * (own.dtype == kFloat32 ? 4 : 2);
    own.vocab = start(rank + 1) - start(rank);
    return own;
  }

  Words ask(int64_t rank, PartQuestion question, int64_t wants, int64_t words,
            const Words& details = {}) const {
    return ask_of(whole, rank, question, wants, words, details);
  }

  // What a rank answers for each row, of which it may have nothing.
  Words ask_of(const LogitsArguments& rows, int64_t rank, PartQuestion question, int64_t wants,
               int64_t words, const Words& details) const {
    const int64_t begin = start(rank), width = start(rank + 1) - begin;
    Words answers((size_t)(in.rows * words), question == kFirst && !width ? nothing() : 0);
    if (question == kFirst && !width && wants) {  // no mass, and as flat as any
      for (int64_t r = 0; r < in.rows; ++r) answers[(r + 1) * words - 1] = wants == kWantsFlat;
    }
    if (!width) return answers;
    const LogitsArguments own = part_of(rows, rank);
    Part part = {};
    part.logits = {(const void*)own.logits, own.logits_stride, own.rows, (int32_t)width,
                   (DType)own.dtype};
    part.ask = {(int64_t)queries.data(),
                begin,
                question,
                wants,
                (int64_t)details.size() / in.rows,
                (int64_t)details.data(),
                (int64_t)answers.data(),
                words,
                0};
    answer_part(part, 1);
    return answers;
  }

  // All ranks' answers by row, each row followed by `last`.
  Words gather(const std::vector<Words>& told, const Words& last = {}) const {
    Words found;
    const int64_t words = (int64_t)told[0].size() / in.rows;
    const int64_t more = (int64_t)last.size() / in.rows;
    for (int64_t r = 0; r < in.rows; ++r) {
      for (const Words& own : told) {
        found.insert(found.end(), own.begin() + r * words, own.begin() + (r + 1) * words);
      }
      found.insert(found.end(), last.begin() + r * more, last.begin() + (r + 1) * more);
    }
    return found;
  }

  // Each row of one behind that of another.
  Words after(const Words& first, const Words& second) const { return gather({first}, second); }

  Words conclude(SearchQuestion question, const Words& details, int64_t words) const {
    Words answers((size_t)(in.rows * words));
    search({(int64_t)queries.data(), 0, question, 0, (int64_t)details.size() / in.rows,
            (int64_t)details.data(), (int64_t)answers.data(), words, 0},
           in.rows);
    return answers;
  }

  template <class F>
  std::vector<Words> on_each(F f) const {
    std::vector<Words> told;
    for (int64_t rank = 0; rank < ranks; ++rank) told.push_back(f(rank));
    return told;
  }

  // A NaN or an infinity in front of lists of so many words, in rows that edits have found invalid;
  // `judges`: the last word is whether a part is valid and flat.
  Words marked(Words lists, int64_t words, bool judges) const {
    for (int64_t r = 0; edited && r < in.rows; ++r) {
      const int32_t status = edited->status[(size_t)r];
      const float x = status == kNaN ? NAN : INFINITY;
      if (judges && status) lists[(size_t)((r + 1) * words - 1)] = 0;
      if (status == kNaN || status == kPositiveInfinity) {
        lists[(size_t)(r * words)] = word_of_token({x, -1});
      }
    }
    return lists;
  }

  // The first message, int64 [ranks, B, words], as cpu/told.h has it.
  struct First {
    int64_t listed, raw_listed, words;
    bool keeps_all, judges, tells_edits;
    Words told;
  };

  First first(bool keeps_all, bool raw) const {
    const bool judges = !keeps_all && in.vocab % 4 == 1;
    First m = {keeps_all ? 1 : length, 0, 0, keeps_all, judges, raw && !edited, {}};
    if (raw && edited) m.raw_listed = std::max<int64_t>(in.num_top, 1 + in.vocab % 13);
    const int64_t own = m.listed + m.keeps_all + m.judges;
    const int64_t more = m.raw_listed ? m.raw_listed + (m.listed + 1) / 2 : 0;
    m.words = own + m.tells_edits + more;
    const int64_t wants = m.keeps_all * kWantsMass + m.judges * kWantsFlat;
    const Words shares((size_t)in.rows, bits(1.0f));
    for (int64_t q = 0; q < ranks; ++q) {
      const Words lists = marked(ask(q, kFirst, wants, own, shares), own, m.judges);
      Words listed;
      for (int64_t r = 0; r < in.rows; ++r) append(listed, lists.data() + r * own, m.listed);
      Words others((size_t)(in.rows * more), nothing());
      if (more && start(q + 1) > start(q)) {
        others = ask_of(in.logits_arguments(), q, kGiven, m.raw_listed, more, listed);
      }
      for (int64_t r = 0; r < in.rows; ++r) {
        append(m.told, lists.data() + r * own, own);
        if (m.tells_edits) m.told.push_back(0);
        append(m.told, others.data() + r * more, more);
      }
    }
    return m;
  }

  // Samples on every rank, each a thread, into its own outputs; rows that this does not decide get
  // kUndecided for a status. `keeps_all`: whether rows keep everything; `asks`: whether ranks may
  // tell more than sums, for status and tokens; `raw`: whether raw log-probabilities are wanted.
  void sample(const RowArguments& rows, const std::vector<OutputArguments>& out, bool keeps_all,
              bool asks, bool raw) const {
    const First m = first(keeps_all, raw);
    std::vector<PartQuery> at_one = queries;
    for (PartQuery& query : at_one) query.scale = query.judged_scale = bits(mass_scale(1.0f));
    Meeting meeting(ranks);
    std::vector<std::thread> threads;
    for (int64_t q = 0; q < ranks; ++q) {
      threads.emplace_back([&, q] {
        Words sums((size_t)(in.rows * kSumWords));
        Words bins((size_t)(ranks * in.rows * 2 * kBins));
        const LogitsArguments given = part_of(in.logits_arguments(), q);
        SplitArguments split = {};
        split.start = start(q);
        split.vocab = in.vocab;
        split.rank = q;
        split.ranks = ranks;
        split.told = (int64_t)m.told.data();
        split.told_words = m.words;
        split.listed = m.listed;
        split.raw_listed = m.raw_listed;
        split.keeps_all = m.keeps_all;
        split.judges = m.judges;
        split.tells_edits = m.tells_edits;
        split.queries = (int64_t)queries.data();
        split.raw_queries = raw ? (int64_t)at_one.data() : 0;
        split.wanted = kWantsProducts + kWantsSpread;
        split.tells_sums = in.vocab % 5 > 0;
        split.may_tell_sums = in.vocab % 7 > 0;
        split.asks = asks;
        split.sums = (int64_t)sums.data();
        split.bins = (int64_t)bins.data();
        split.raw_logits = given.logits;
        split.raw_stride = given.logits_stride;
        split.raw_dtype = given.dtype;
        const SplitHost host = {[](const auto& part, const auto& ask, const Words& some) {
                                  answer_rows(part, ask, some, 1);
                                },
                                [](const Batch& batch) { return sample_batch(batch, 1); },
                                [&](const int64_t* own, int64_t words, int64_t* found) {
                                  meeting.gather(q, own, words, found);
                                }};
        sample_split(split, rows, {part_of(whole, q), out[(size_t)q]}, host);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }

  // Where rows' tokens reach targets: `high` and `low`, then masses and numbers of tokens, of each
  // rank. `places` has SearchQuery of each row.
  Words find(const std::vector<float>& peaks, std::vector<SearchQuery> places) {
    constexpr int64_t kFields = sizeof(SearchQuery) / sizeof(int64_t);
    Words query;
    for (int64_t r = 0; r < in.rows; ++r) {
      queries[r].peak = bits(peaks[r]);
      places[r].ranks = ranks;
      query.insert(query.end(), &places[r].ranks, &places[r].ranks + kFields);
    }
    const auto bins = on_each([&](int64_t q) { return ask(q, kMassOfBins, 0, 2 * kBins); });
    const Words known = after(query, gather(bins));
    const Words uncertain = conclude(kUncertain, known, 5);
    int64_t most = 0;
    Words where;
    for (int64_t r = 0; r < in.rows; ++r) {
      const int64_t* own = uncertain.data() + 5 * r;
      where.insert(where.end(), own, own + 4);
      most = std::max(most, own[4]);
    }
    if (!most) return conclude(kNearSide, known, 2 + 2 * ranks);
    const auto told = on_each([&](int64_t q) {
      if (start(q + 1) > start(q)) return ask(q, kWithin, 0, most, where);
      return Words((size_t)(in.rows * most), nothing());
    });
    return conclude(kNearSide, after(known, gather(told)), 2 + 2 * ranks);
  }
};

}  // namespace split

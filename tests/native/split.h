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

// Rows after stages 1 to 3, and what is wrong with them.
struct Edited {
  std::vector<float> x;
  std::vector<int32_t> status;

  explicit Edited(const fuzz::Input& in)
      : x((size_t)(in.rows * in.vocab)), status((size_t)in.rows) {
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
    OutputArguments out = {};
    out.status = (int64_t)status.data();
    out.filtered = (int64_t)x.data();
    sample_batch(batch_of(rows, {in.logits_arguments(), out}), 1);
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
    if (question == kFirst && !width && wants) {
      for (int64_t r = 0; r < in.rows; ++r) answers[(r + 1) * words - 1] = 0;
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

  // A NaN or an infinity in front of lists of so many words, in rows that edits have found invalid.
  Words marked(Words lists, int64_t words) const {
    for (int64_t r = 0; edited && r < in.rows; ++r) {
      const int32_t status = edited->status[(size_t)r];
      const float x = status == kNaN ? NAN : INFINITY;
      if (status == kNaN || status == kPositiveInfinity) {
        lists[(size_t)(r * words)] = word_of_token({x, -1});
      }
    }
    return lists;
  }

  // What ranks list of rows as they were given, and the logits of those that they have listed.
  struct Given {
    int64_t tokens = 0;
    Words lists, listed;
  };

  Given given(const std::vector<Words>& lists, int64_t tokens, int64_t listed) const {
    Given found;
    found.tokens = std::max<int64_t>(in.num_top, 1 + in.vocab % 13);
    const int64_t more = (listed + 1) / 2, words = found.tokens + more;
    std::vector<Words> first, others;
    for (int64_t q = 0; q < ranks; ++q) {
      Words wanted;
      for (int64_t r = 0; r < in.rows; ++r)
        append(wanted, lists[(size_t)q].data() + r * tokens, listed);
      Words told((size_t)(in.rows * words), nothing());
      if (start(q + 1) > start(q)) {
        told = ask_of(in.logits_arguments(), q, kGiven, found.tokens, words, wanted);
      }
      first.emplace_back();
      others.emplace_back();
      for (int64_t r = 0; r < in.rows; ++r) {
        append(first.back(), told.data() + r * words, found.tokens);
        append(others.back(), told.data() + r * words + found.tokens, more);
      }
    }
    found.lists = gather(first);
    found.listed = gather(others);
    return found;
  }

  // Samples on every rank, each a thread, into its own outputs; rows that this does not decide get
  // kUndecided for a status. `keeps_all`: whether rows keep everything; `asks`: whether ranks may
  // tell more than sums, for status and tokens; `raw`: whether raw log-probabilities are wanted.
  void sample(const RowArguments& rows, const std::vector<OutputArguments>& out, bool keeps_all,
              bool asks, bool raw) const {
    const int64_t tokens = keeps_all ? 2 : length;
    const auto first =
        on_each([&](int64_t q) { return marked(ask(q, kFirst, keeps_all, tokens), tokens); });
    const Words lists = gather(first);
    const Given apart = raw && edited ? given(first, tokens, keeps_all ? 1 : tokens) : Given();
    std::vector<PartQuery> at_one = queries;
    for (PartQuery& query : at_one) query.scale = query.judged_scale = bits(mass_scale(1.0f));
    Meeting meeting(ranks);
    std::vector<std::thread> threads;
    for (int64_t q = 0; q < ranks; ++q) {
      threads.emplace_back([&, q] {
        Words sums((size_t)(in.rows * kSumWords));
        const LogitsArguments own = part_of(in.logits_arguments(), q);
        const SplitArguments split = {start(q),
                                      in.vocab,
                                      q,
                                      ranks,
                                      (int64_t)lists.data(),
                                      tokens,
                                      (int64_t)queries.data(),
                                      raw ? (int64_t)at_one.data() : 0,
                                      kWantsProducts + kWantsSpread,
                                      keeps_all,
                                      in.vocab % 5 > 0,
                                      in.vocab % 7 > 0,
                                      false,
                                      asks,
                                      (int64_t)sums.data(),
                                      0,
                                      apart.tokens ? (int64_t)apart.lists.data() : 0,
                                      apart.tokens,
                                      (int64_t)apart.listed.data(),
                                      apart.tokens > 0,
                                      own.logits,
                                      own.logits_stride,
                                      own.dtype};
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

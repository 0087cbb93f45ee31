// An input's rows, split over ranks: what their lists decide, what searches find, and what is drawn
// from all tokens.
#pragma once

#include <math.h>

#include <algorithm>
#include <vector>

#include "core/filters.h"
#include "core/place.h"
#include "cpu/dispatch.h"
#include "cpu/question.h"
#include "cpu/search.h"
#include "inputs.h"

namespace split {

using namespace fastsample;

// What ranks may be asked for, in this order: each says one bit more of what is known of a row.
constexpr PartQuestion kAsked[] = {kMassOfBins, kWithin, kTotals, kDraws};

typedef std::vector<int64_t> Words;  // [rows, words]

// As csrc/cpu/lists.h lays them out, before thresholds, masses and numbers of tokens.
struct Note {
  ListedMissing missing;
  PartQuery query;
};

struct Ranks {
  const fuzz::Input& in;
  LogitsArguments whole;
  int64_t ranks, length;  // length: of a list
  std::vector<PartQuery> queries;

  explicit Ranks(const fuzz::Input& input)
      : in(input),
        whole(input.logits_arguments()),
        ranks(1 + in.vocab % 4),
        length(in.vocab % 3 ? 1 + in.vocab % 11 : 256) {
    const int64_t lowest = -(int64_t)0x7F7FFFFF * ((int64_t)1 << 32);
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

  // What a rank answers for each row, of which it may have nothing.
  Words ask(int64_t rank, PartQuestion question, int64_t wants, int64_t words,
            const Words& details = {}) const {
    const int64_t begin = start(rank), width = start(rank + 1) - begin;
    Words answers((size_t)(in.rows * words), question == kFirst && !width ? nothing() : 0);
    if (question == kFirst && !width && wants) {
      for (int64_t r = 0; r < in.rows; ++r) answers[(r + 1) * words - 1] = 0;
    }
    if (!width) return answers;
    const int64_t size = in.dtype == kFloat32 ? 4 : 2;
    Part part = {};
    part.logits = {(const char*)whole.logits + begin * size, whole.logits_stride, in.rows,
                   (int32_t)width, in.dtype};
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

  // Samples by the ranks' lists, and if ranks may ask, by what these tell besides; rows that this
  // does not decide get kUndecided for a status.
  void sample(const RowArguments& rows, const OutputArguments& out, bool asks) {
    const Words lists = gather(on_each([&](int64_t q) { return ask(q, kFirst, 0, length); }));
    const bool with_sums = in.vocab % 5;
    const auto parts = on_each([&](int64_t q) { return ask(q, kWhole, 3, kSumWords, lists); });
    Words sums((size_t)(in.rows * kSumWords));
    for (const Words& own : parts) {
      for (size_t i = 0; i < sums.size(); ++i) sums[i] += own[i];
    }
    Known known;
    known.bits.assign((size_t)in.rows, with_sums);
    for (;;) {
      const int64_t note = (int64_t)(sizeof(Note) / 8) + out.num_samples + 2 * ranks;
      std::vector<Words> notes((size_t)ranks, Words((size_t)(in.rows * note)));
      for (int64_t q = ranks - 1; q >= 0; --q) {
        Words table;
        for (int64_t r = 0; r < in.rows; ++r) {
          const ListedQuery head = {in.vocab,
                                    ranks,
                                    q,
                                    known.bits[r],
                                    length,
                                    known.width[0],
                                    known.width[1],
                                    known.width[2],
                                    known.width[3],
                                    asks ? (int64_t)(notes[q].data() + r * note) : 0};
          table.insert(table.end(), &head.vocab, &head.vocab + sizeof head / 8);
          append(table, sums, r, kSumWords);
          append(table, lists, r, ranks * length);
          for (int i = 0; i < 4; ++i) append(table, known.told[i], r, ranks * known.width[i]);
        }
        const int64_t words = (int64_t)table.size() / in.rows;
        const LogitsArguments logits = {
            (int64_t)table.data(), 2 * words, in.rows, 2 * words, kFloat32, kListed};
        sample_batch(batch_of(rows, {logits, out}), 1);
      }
      if (!asks || !tell(notes, note, out.num_samples, known)) return;
    }
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

  // Status and tokens of each row, drawn from all of it; -1 where ranks have not told of one.
  Words draw_from_all(int64_t draws) const {
    Words streams;
    for (int64_t r = 0; r < in.rows; ++r) {
      streams.push_back(in.seeds[in.seeds.size() > 1 ? r : 0]);
      streams.push_back(in.offsets[in.offsets.size() > 1 ? r : 0]);
    }
    const auto first = on_each([&](int64_t q) { return ask(q, kFirst, 1, 2); });
    const Words told = gather(first, streams);
    const int64_t words = 1 + draws * kWordsOfDraw;
    const auto owned = on_each([&](int64_t q) { return ask(q, kOwned, q, words, told); });
    Words drawn;
    for (int64_t r = 0; r < in.rows; ++r) {
      int64_t status = 0;
      Words of_row;
      for (const Words& own : owned) {
        append(of_row, own, r, words);
        if (own[r * words] < 0) status = -own[r * words];
      }
      drawn.push_back(status);
      const DrawQuery query = {streams[2 * r], streams[2 * r + 1], 0, ranks};
      for (int64_t j = 0; j < draws; ++j) {
        const int64_t key = status ? kNoKey : key_of_draw(of_row.data(), words, query, j);
        drawn.push_back(key == kNoKey ? -1 : place_of_key(key).id);
      }
    }
    return drawn;
  }

 private:
  // What ranks have told of rows, each [rows, ranks * width].
  struct Known {
    Words bits;  // [rows]
    Words told[4];
    int64_t width[4] = {};
  };

  static void append(Words& to, const Words& from, int64_t row, int64_t words) {
    to.insert(to.end(), from.begin() + row * words, from.begin() + (row + 1) * words);
  }

  // Has ranks tell what all of them have noted; whether there was any such thing.
  bool tell(const std::vector<Words>& notes, int64_t words, int64_t draws, Known& known) {
    const auto of = [&](int64_t q, int64_t r) {
      return (const Note*)(notes[q].data() + r * words);
    };
    for (int i = 0; i < 4; ++i) {
      Words which((size_t)in.rows);
      int64_t width = std::vector<int64_t>{2 * kBins, 0, 5, 2 * draws + 1}[i];
      for (int64_t r = 0; r < in.rows; ++r) {
        which[r] = of(0, r)->missing.question == kAsked[i];
        if (which[r] && kAsked[i] == kWithin) width = std::max(width, of(0, r)->missing.most);
      }
      if (std::find(which.begin(), which.end(), 1) == which.end()) continue;
      const auto answers = on_each([&](int64_t q) {
        Words details;
        for (int64_t r = 0; r < in.rows; ++r) {
          const Note* own = of(q, r);
          const int64_t* thresholds = (const int64_t*)(own + 1);
          queries[r] = own->query;
          if (kAsked[i] == kWithin)
            append(details, Words(&own->missing.begin, &own->missing.most), 0, 4);
          if (kAsked[i] == kDraws) details.insert(details.end(), thresholds, thresholds + draws);
        }
        Words answer = start(q + 1) > start(q) ? ask(q, kAsked[i], 0, width, details)
                                               : Words((size_t)(in.rows * width));
        if (start(q + 1) == start(q)) {
          const int64_t empty = kAsked[i] == kWithin ? nothing() : kAsked[i] == kDraws ? kNoKey : 0;
          std::fill(answer.begin(), answer.end(), empty);
        }
        return answer;
      });
      learn(known, i, which, answers, width,
            kAsked[i] == kTotals  ? 1
            : kAsked[i] == kDraws ? draws
                                  : width);
      return true;
    }
    return false;
  }

  // Keeps the first `used` words of each rank's answers of some rows.
  void learn(Known& known, int i, const Words& which, const std::vector<Words>& answers,
             int64_t width, int64_t used) {
    const int64_t before = known.width[i], wide = std::max(before, used);
    Words told((size_t)(in.rows * ranks * wide), nothing());
    for (int64_t r = 0; r < in.rows; ++r) {
      for (int64_t q = 0; q < ranks; ++q) {
        const int64_t* from = which[r] ? answers[q].data() + r * width
                                       : known.told[i].data() + (r * ranks + q) * before;
        std::copy(from, from + (which[r] ? used : before), told.begin() + (r * ranks + q) * wide);
      }
      if (which[r]) known.bits[r] |= 2 << i;
    }
    known.told[i] = told;
    known.width[i] = wide;
  }
};

}  // namespace split

// What a rank of rows that are split gives the others, and takes from them.
#pragma once

#include <math.h>

#include "core/place.h"
#include "cpu/question.h"
#include "cpu/split.h"
#include "cpu/told.h"

namespace fastsample {

struct Messages {
  const SplitArguments& split;
  const Lists& lists;
  const CallArguments& call;
  const SplitHost& host;

  int64_t rows() const { return call.logits.rows; }
  int64_t draws() const { return call.out.num_samples; }
  Words all_rows() const {
    Words rows_;
    for (int64_t r = 0; r < rows(); ++r) rows_.push_back(r);
    return rows_;
  }

  // What this rank answers of rows in ascending order, int64 [b, ask.words]; `queries` and
  // `details` are of these.
  Words answer(PartArguments ask, const Words& some, const PartQuery* queries,
               const int64_t* details) const {
    Words found(some.size() * (size_t)ask.words, nothing(ask.question));
    ask.start = split.start;
    ask.queries = (int64_t)queries;
    ask.details = (int64_t)details;
    ask.answers = (int64_t)found.data();
    if (call.logits.vocab && !some.empty()) host.answer(call.logits, ask, some);
    return found;
  }

  // Sums of whole rows, int64 [B, words].
  Words answer_whole(int64_t queries, int64_t wants, int64_t words) const {
    Words tokens;
    for (int64_t r = 0; r < rows(); ++r) {
      lists.each(r, [&](int64_t word) { tokens.push_back(word); });
    }
    PartArguments ask = {};
    ask.question = kWhole;
    ask.wants = wants;
    ask.count = (int64_t)tokens.size() / rows();
    ask.words = words;
    return answer(ask, all_rows(), (const PartQuery*)queries, tokens.data());
  }

  // What all ranks give, [ranks, ...].
  Words gather(const Words& own) const {
    Words found(own.size() * (size_t)split.ranks);
    host.gather(own.data(), (int64_t)own.size(), found.data());
    return found;
  }

  // The answer of a rank that has no tokens.
  static int64_t nothing(int64_t question) {
    return question == kWithin ? word_of_token({-INFINITY, -1}) : question == kDraws ? kNoKey : 0;
  }
};

}  // namespace fastsample

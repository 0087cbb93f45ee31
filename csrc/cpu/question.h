// What ranks ask each other of rows that are split over them, and what is then known.
#pragma once

#include <stdint.h>

#include "core/arguments.h"

namespace fastsample {

// Each is answered by every rank, of its part of a row (cpu/part.h).
enum PartQuestion : int32_t {
  kFirst,   // the first tokens, as words
  kWhole,   // kSums of all above -inf; the maximum is that of what ranks have listed
  kSums,    // of a set: Z, EH, EL, HH, HL, LL; of all above -inf: n, D1, D2; the set's kMassOfBins
  kTotals,  // the mass of a set, and without what XTC may exclude; the first key of either, and
            // how many it holds; its bits
  kDraws,   // the tokens at thresholds of the running mass: keys and masses; the entropy's share
  kAbove,   // how many tokens lie above logits
  kMassOfBins,  // the mass and the number of the tokens of a set in each bin (cpu/search.h)
  kWithin,      // the set's tokens in some of these bins, as words
  kOwned,       // what draws from all tokens find here, before all masses are known (cpu/owner.h)
  kGiven,       // some of the first tokens, as words; then the logits of others, two to a word
  kBits,        // the bits of a set as a mask of the whole row, of 64 tokens to a word
  kEnds  // of a set: the mass of its heaviest token, the key of its last, how many it holds; or 0
};
enum FirstWanted : int64_t { kWantsMass = 1, kWantsFlat = 2 };
enum SumsWanted : int64_t { kWantsProducts = 1, kWantsSpread = 2, kWantsBins = 4 };
enum TotalsWanted : int64_t { kWantsFirst = 1, kWantsCount = 2 };
enum DrawsWanted : int64_t { kWantsEntropy = 1 };
constexpr int64_t kSumWords = 9, kTotalWords = 5, kEndWords = 3;

// What a rank tells of a draw with kOwned: where its first candidate begins in the rank's running
// mass; then where each ends, and its key.
constexpr int kGuesses = 4, kWordsOfDraw = 1 + 2 * kGuesses;

// What all ranks have answered to a question about a row, so many words each.
struct Answered {
  int64_t question;
  const int64_t* first;
  int64_t stride;  // from rank to rank
  int64_t words;
};

// What would tell more of a row, if each rank answers that.
struct ListedMissing {
  int64_t question;     // PartQuestion; kNothing, or kUnasked where ranks must ask in another way
  int64_t wants;        // bits, of the question
  int64_t count;        // details, which follow this record
  int64_t words, told;  // of an answer, and how many of these others need: the first
  PartQuery query;
};
constexpr int64_t kNothing = 0, kUnasked = -1;

// What all ranks know of a row (cpu/lists.h).
struct ListedQuery {
  int64_t vocab, ranks, rank;  // rank: this one
  const int64_t* lists;        // [ranks, tokens]
  int64_t tokens;
  const int64_t* sums;  // [kSumWords] of the whole row, or null
  // [num_answered], to what was missing so far, one after the other; but for bins of the whole row,
  // of which all ranks may have told before.
  const Answered* answered;
  int64_t num_answered;
  // To note it; null where nobody is asked. room_for_details details follow.
  ListedMissing* missing;
  int64_t* found;  // [kSearches, words_of_search(ranks)], zeros at first: what searches have found
};
inline constexpr int64_t room_for_details(int64_t draws) { return draws > 4 ? draws : 4; }

// Of a search that has ended: how many answers have been heard by then; the bounds of what it has
// found, as keys; and the mass that each rank has of that, and how many tokens.
constexpr int64_t kSearches = 3;
inline constexpr int64_t words_of_search(int64_t ranks) { return 3 + 2 * ranks; }

constexpr int32_t kUndecided = -1;  // instead of a row's status: ranks must tell more to decide it

}  // namespace fastsample

// What ranks ask each other of rows that are split over them, and what is then known.
#pragma once

#include <stdint.h>

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
  kGiven        // some of the first tokens, as words; then the logits of others, two to a word
};
enum FirstWanted : int64_t { kWantsMass = 1, kWantsFlat = 2 };
enum SumsWanted : int64_t { kWantsProducts = 1, kWantsSpread = 2, kWantsBins = 4 };
enum TotalsWanted : int64_t { kWantsFirst = 1, kWantsCount = 2 };
enum DrawsWanted : int64_t { kWantsEntropy = 1 };
constexpr int64_t kSumWords = 9, kTotalWords = 5;

// What a rank tells of a draw with kOwned: where its first candidate begins in the rank's running
// mass; then where each ends, and its key.
constexpr int kGuesses = 4, kWordsOfDraw = 1 + 2 * kGuesses;

// What all ranks know of a row besides their lists (cpu/lists.h).
enum Known : int64_t {
  kKnowsSums = 1,    // kWhole
  kKnowsBins = 2,    // kMassOfBins, of the set that the first search is for
  kKnowsTold = 4,    // kWithin, of that search
  kKnowsShares = 8,  // kTotals, of what draws are from: the mass
  kKnowsKeys = 16    // kDraws: the keys
};

constexpr int64_t kUnasked = -1;    // instead of a question: ranks must ask in another way
constexpr int32_t kUndecided = -1;  // instead of a row's status: ranks must tell more to decide it

}  // namespace fastsample

// What ranks make of each other's answers about a row that is split over them: all have the same
// answers, and come to the same.
//
// A search is for the place at which a set's tokens reach a target, in rank order or outward from a
// mean. Ranks first tell how much they have in each bin of logits (kMassOfBins of cpu/part.h). That
// leaves a few bins in which the place may be, and they tell which tokens they have there
// (kWithin).
#pragma once

#include "core/arguments.h"

namespace fastsample {

// Bins are of (peak - x) * scale * kBinsOfOctave, where the scale is that of the masses by which
// filters judge: the fine ones are 1 wide, those below kCoarse times as wide, and the last has all
// that is lower.
constexpr int kBins = 2048, kFineBins = 1792, kCoarse = 64, kBinsOfOctave = 128;
constexpr int64_t kMostTold = 4096;  // tokens that a rank may tell of where a search ends

struct BinMass {
  uint64_t mass, tokens;
};

enum SearchBy : int64_t { kByMass, kByNumber, kByDistance };  // the last is by mass

// What each rank has told.
template <class T>
struct OfRanks {
  const int64_t* first;
  int64_t stride;  // words

  const T* operator[](int64_t rank) const { return (const T*)(first + rank * stride); }
};

// What all ranks know of a search.
struct PlaceSearch {
  float peak, scale;
  int64_t ranks, by;  // SearchBy
  uint64_t target;
  float mean;
  OfRanks<BinMass> bins;   // [ranks, kBins]
  OfRanks<int64_t> words;  // [ranks, words_of_rank], tokens in bins that may hold the place
  int64_t words_of_rank;
};

// The bins that the place may be in: from `begin` to `in` - 1 and from `out` to `end` - 1. Those in
// between are on its near side.
struct Uncertain {
  int64_t begin, in, out, end;
  int64_t most;  // tokens that a rank has there
};
Uncertain uncertain_of(const PlaceSearch& search);

// Of what is on the place's near side, the bounds as keys; its mass on each rank, and the number of
// tokens.
struct NearSide {
  int64_t high, low;
};
NearSide near_side(const PlaceSearch& search, int64_t* masses, int64_t* tokens);

// Where a draw falls in a rank's running mass; -1 where it falls into another's. `shares`: the mass
// that each rank has.
int64_t own_threshold(const DrawQuery& query, const OfRanks<int64_t>& shares, int64_t draw);

// The key of a draw from all tokens, by what all ranks have answered to kOwned, `words` each;
// kNoKey where none of them has told of it.
int64_t key_of_draw(const int64_t* told, int64_t words, const DrawQuery& query, int64_t draw);

enum SearchQuestion : int64_t {
  kUncertain,  // Uncertain
  kNearSide,   // NearSide; then masses and numbers of tokens, of each rank
  kThresholds  // where draws fall in a rank's running mass, as kDraws of cpu/part.h takes them, and
               // which of them leave out what XTC excludes
};

// What `ask` is about needs no more of `rows` rows than their queries and details. These are, of
// kUncertain: SearchQuery, then BinMass [ranks, kBins]; of kNearSide: the same, then each rank's
// tokens as words [ranks, n]; of kThresholds: DrawQuery, then int64 [ranks, 2], the mass of the
// set, and without what XTC may exclude.
void search(const PartArguments& ask, int64_t rows);

}  // namespace fastsample

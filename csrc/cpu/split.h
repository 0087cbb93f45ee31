// Rows that are split over ranks, of which all ranks know the lists: what lists do not decide,
// ranks tell each other, one message after the other.
#pragma once

#include <functional>

#include "core/arguments.h"
#include "cpu/kernel.h"
#include "cpu/told.h"

namespace fastsample {

// What a call takes from outside.
struct SplitHost {
  // Answers what is asked of some of this rank's part of rows, in ascending order. Queries, details
  // and answers are of these.
  std::function<void(const LogitsArguments& part, const PartArguments& ask, const Words& rows)>
      answer;
  std::function<int64_t(const Batch& batch)> sample;  // the number of invalid rows
  // Gives words to every rank, and takes what each of them gives, one behind the other.
  std::function<void(const int64_t* own, int64_t words, int64_t* found)> gather;
};

// The number of invalid rows, or kOpenRows where it takes other questions to decide some row, whose
// status is then kUndecided; whether ranks have told sums of the whole rows; and whether raw
// log-probabilities are written.
struct SplitResult {
  int64_t invalid;
  bool knows_sums, tells_raw;
};
constexpr int64_t kOpenRows = -1;

// Fills outputs. `call` has this rank's part of the rows.
SplitResult sample_split(const SplitArguments& split, const RowArguments& rows,
                         const CallArguments& call, const SplitHost& host);

}  // namespace fastsample

// The CPU engine as the bindings see it.
#pragma once

#include <stdint.h>

#include <functional>
#include <string>
#include <vector>

#include "core/rows.h"
#include "cpu/kernel.h"

namespace fastsample {

// The kernel in use: the best that this CPU can run, or the one that FASTSAMPLE_ISA or force_isa
// names. Throws std::invalid_argument where FASTSAMPLE_ISA names none that can run here.
const Kernel& kernel();

// Names of the ISAs that this CPU can run, best first.
std::vector<std::string> isas();

// Throws std::invalid_argument where the name is none of isas().
void force_isa(const std::string& name);

// Samples every row on at most `threads` threads; returns the number of invalid rows. Now and then,
// never twice within some tens of microseconds, this thread asks `stop` whether to stop: then
// nothing more is begun, and what is not yet written stays as it is.
int64_t sample_batch(const Batch& batch, int threads, const std::function<bool()>& stop = {});

// Samples the rows of each request of batch.drafts as far as its drafts are right, one token per
// row; returns how many results end at an invalid row.
int64_t verify_batch(const Batch& batch, int threads, const std::function<bool()>& stop = {});

// Answers what is asked of each row of a part of rows that are split over ranks.
void answer_part(const Part& part, int threads);

// Likewise of some of its rows, in ascending order, which queries, details and answers are of.
void answer_rows(const LogitsArguments& part, const PartArguments& ask,
                 const std::vector<int64_t>& rows, int threads);

// What sample_batch has left of kept sets: the ids of those that fit in slots, the bits of others.
struct KeptSets {
  int64_t rows, words, num_slots;
  const int32_t* slots;    // [rows, num_slots]
  const int32_t* bitmask;  // [rows, words]
};

// Where each row's ids end, row_ptr[rows + 1], and how many there are in all. A row that has more
// than `capacity`, if that is not 0, lists none.
int64_t end_kept(const int32_t* counts, int64_t rows, int64_t capacity, int64_t* row_ptr);

// Lists the ids of each row that has a place in row_ptr, and -1 in the rest of ids[room].
void list_kept(const KeptSets& sets, const int64_t* row_ptr, int32_t* ids, int64_t room,
               int threads);

}  // namespace fastsample

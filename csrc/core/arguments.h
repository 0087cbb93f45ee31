// The native ABI: a call as flat records of 64-bit integers. Python writes them
// (fastsample/backends/native.py) and refuses an extension that lists other fields.
//
// B rows of V logits. Addresses are of borrowed memory; 0 means not given or not wanted. Strides
// count elements; a row stride of 0 shares the first row. Outputs are contiguous.
#pragma once

#include "core/rows.h"

namespace fastsample {

// Declares struct `name`, all int64_t, and k`name`, its fields as a string: "params, ...".
#define FASTSAMPLE_RECORD(name, ...) \
  struct name {                      \
    int64_t __VA_ARGS__;             \
  };                                 \
  constexpr char k##name[] = #__VA_ARGS__

// What the rows of a batch ask for; may serve many calls.
FASTSAMPLE_RECORD(RowArguments,                          //
                  params, params_stride,                 // RowParams [B or 1]; 32-bit words
                  seeds, seeds_stride,                   // int64 [B or 1]
                  offsets, offsets_stride, num_offsets,  // int64 [num_offsets], B or 1
                  mask, mask_stride, mask_words,         // int32 [B or 1, words], or words = -1
                  bias_row_ptr,                          // int64 [B + 1]
                  bias_ids, bias_values, bias_entries,   // int64, float32 [entries]
                  prompt, prompt_stride, prompt_length,  // int64 [R, length], of R requests
                  output, output_stride, output_length,  // int64 [R, length]
                  breakers, breakers_stride, breakers_length,  // int64 [R or 1, length]
                  drafted, drafted_stride, drafted_length,     // int64 [B, length]
                  requests,  // int64 [B]: whose prompt, output and breakers; 0 where R = B
                  first_id, num_ids);  // for the CPU engine: the id of the first logit, and V of
                                       // the whole row, where these are of a part; else 0

FASTSAMPLE_RECORD(LogitsArguments,        //
                  logits, logits_stride,  // dtype [B, V]
                  rows, vocab,            // B, V
                  dtype,                  // DType
                  input);                 // InputKind

FASTSAMPLE_RECORD(OutputArguments,          //
                  status,                   // int32 [B]
                  tokens,                   // int64 [B, num_samples]
                  filtered, probabilities,  // float32 [B, V]
                  logprobs,                 // float32 [B, num_samples]
                  ranks,                    // int64 [B, num_samples]
                  top_ids,                  // int64 [B, num_top]
                  top_logprobs,             // float32 [B, num_top]
                  weights, masses,          // int64 [B, 2], [B, V]
                  kept_count,               // int32 [B]
                  kept_bitmask,             // int32 [B, ceil(V / 32)]
                  log_kept_mass, entropy,   // float32 [B]
                  given,                    // int64 [B]: read, not written
                  num_samples, num_top,     // counts
                  mode);                    // LogprobsMode

FASTSAMPLE_RECORD(ReportArguments,  // what a call on the CPU reports in memory of its own: where in
                                    // it each output begins, -1 where it has none
                  bytes,            // up to the kept ids
                  kept_count, kept_bitmask,  // as above
                  log_kept_mass, entropy,    //
                  kept_row_ptr);             // int64 [B + 1]; the kept ids come last, int32

FASTSAMPLE_RECORD(DraftArguments,  // of a call that verifies drafts
                  ids, count,      // int64 [requests, count]
                  num_accepted,    // int32 [requests]
                  draft_status,    // int32 [requests]
                  arrivals);       // int32 [requests], zeros; 0 for the CPU engine

// Rows that are split over ranks, of which a rank has a part: what it is asked of each.
FASTSAMPLE_RECORD(PartQuery,            //
                  high, low, floor,     // of a kept set; places in the rank order as keys
                  top,                  // of the last token that XTC never excludes, as a key
                  coin,                 // float: how likely it excludes those before
                  peak,                 // float: the whole row's maximum
                  scale, judged_scale,  // floats
                  total, rest);         // masses of the whole set, and of what XTC leaves of it

FASTSAMPLE_RECORD(PartArguments,   //
                  queries,         // PartQuery [B]
                  start,           // the id of the part's first token
                  question,        // PartQuestion
                  wants,           // bits, of the question
                  count, details,  // int64 [B, count]
                  answers, words,  // int64 [B, words]
                  bitmask);        // int32 [B, ceil(V / 32)], of the part

// What ranks make of each other's answers (cpu/search.h): of a search, before the bins;
FASTSAMPLE_RECORD(SearchQuery,  //
                  ranks,        //
                  by, target,   // SearchBy
                  mean);        // float
// and of draws, before what each rank has.
FASTSAMPLE_RECORD(DrawQuery, seed, offset, rank, ranks);
// Rows that are split, once all ranks have told their first tokens (cpu/split.h).
FASTSAMPLE_RECORD(SplitArguments,             //
                  start, vocab, rank, ranks,  // of this rank's first token; of the whole rows
                  told, told_words,           // int64 [ranks, B, words], as cpu/told.h has it
                  listed, raw_listed,         // how many tokens of a row a rank lists there
                  keeps_all,            // whether rows keep everything, and lists end in masses
                  judges, tells_edits,  // whether all tell if they are flat, and edited
                  queries,              // PartQuery [B], of whole rows
                  raw_queries,  // the same at temperature 1, if raw log-probabilities are wanted
                  wanted,       // SumsWanted
                  tells_sums, may_tell_sums,  // before all else; where lists do not decide a row
                  asks,                       // whether to ask more
                  sums, bins,  // int64 [B, kSumWords]; where rows stay undecided, and are flat,
                               // BinMass [ranks, B, kBins]
                  raw_logits, raw_stride, raw_dtype);  // [B, V] of this rank, as they were given

#undef FASTSAMPLE_RECORD

// All records, each with its fields: what Python compares with its own.
#define FASTSAMPLE_NAME(type, name) #name " "
constexpr const char* kRecords[][2] = {{"PARAM_FIELDS", FASTSAMPLE_PARAM_FIELDS(FASTSAMPLE_NAME)},
                                       {"ROW_FIELDS", kRowArguments},
                                       {"LOGITS_FIELDS", kLogitsArguments},
                                       {"OUTPUT_FIELDS", kOutputArguments},
                                       {"REPORT_FIELDS", kReportArguments},
                                       {"DRAFT_FIELDS", kDraftArguments},
                                       {"PART_FIELDS", kPartArguments},
                                       {"PART_QUERY_FIELDS", kPartQuery},
                                       {"SEARCH_QUERY_FIELDS", kSearchQuery},
                                       {"DRAW_QUERY_FIELDS", kDrawQuery},
                                       {"SPLIT_FIELDS", kSplitArguments}};
#undef FASTSAMPLE_NAME

// What every call passes anew.
struct CallArguments {
  LogitsArguments logits;
  OutputArguments out;
};

static inline Rows rows_of(const RowArguments& a) {
  constexpr int64_t kRecord = sizeof(RowParams) / sizeof(int32_t);
  Rows rows = {};
  rows.params = {(const RowParams*)a.params, a.params_stride / kRecord};
  rows.seeds = {(const int64_t*)a.seeds, a.seeds_stride};
  rows.offsets = {(const int64_t*)a.offsets, a.offsets_stride};
  // The address of a mask of no words may be null, which would mean no mask at all.
  const int64_t mask = a.mask_words > 0 ? a.mask : a.params;
  if (a.mask_words >= 0) rows.bitmask = {(const int32_t*)mask, a.mask_stride, a.mask_words};
  rows.bias = {(const int64_t*)a.bias_row_ptr, (const int64_t*)a.bias_ids,
               (const float*)a.bias_values};
  const auto ids = [](int64_t data, int64_t stride, int64_t length, int64_t list_of) {
    return length ? TokenIds{(const int64_t*)data, stride, length, (const int64_t*)list_of}
                  : TokenIds{};
  };
  rows.prompt = ids(a.prompt, a.prompt_stride, a.prompt_length, a.requests);
  rows.output = ids(a.output, a.output_stride, a.output_length, a.requests);
  rows.breakers = ids(a.breakers, a.breakers_stride, a.breakers_length, a.requests);
  rows.drafted = ids(a.drafted, a.drafted_stride, a.drafted_length, 0);
  rows.ids = {a.first_id, a.num_ids};
  return rows;
}

// `drafts` may be null.
static inline Batch batch_of(const RowArguments& rows, const CallArguments& call,
                             const DraftArguments* drafts = nullptr) {
  const LogitsArguments& l = call.logits;
  const OutputArguments& o = call.out;
  Batch batch{
      Logits{(const void*)l.logits, l.logits_stride, l.rows, (int32_t)l.vocab, (DType)l.dtype,
             (InputKind)l.input},
      rows_of(rows),
      Outputs{(int32_t*)o.status, (int64_t*)o.tokens, (float*)o.filtered, (float*)o.probabilities,
              (float*)o.logprobs, (int64_t*)o.ranks, (int64_t*)o.top_ids, (float*)o.top_logprobs,
              (int32_t)o.num_samples, (int32_t)o.num_top, (LogprobsMode)o.mode, (int64_t*)o.weights,
              (int64_t*)o.masses, (const int64_t*)o.given, (int32_t*)o.kept_count,
              (int32_t*)o.kept_bitmask, (float*)o.log_kept_mass, (float*)o.entropy},
  };
  if (drafts) {
    batch.drafts = {(const int64_t*)drafts->ids, drafts->count, (int32_t*)drafts->num_accepted,
                    (int32_t*)drafts->draft_status, (uint32_t*)drafts->arrivals};
  }
  return batch;
}

}  // namespace fastsample

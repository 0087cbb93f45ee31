// A batch from the flat integers that Python passes: addresses, strides in elements, lengths. The
// order is that of fastsample/backends/cuda.py.
#pragma once

#include "core/rows.h"

namespace fastsample {

constexpr int kRowArguments = 19, kCallArguments = 16;

struct RowArguments {
  int64_t params, params_stride;  // stride in 32-bit words
  int64_t seeds, seeds_stride;
  int64_t offsets, offsets_stride;
  int64_t mask, mask_stride, mask_words;  // words -1: no mask
  int64_t bias_row_ptr, bias_ids, bias_values, bias_entries;
  int64_t prompt, prompt_stride, prompt_length;
  int64_t output, output_stride, output_length;
};

struct CallArguments {
  int64_t logits, stride, rows, vocab, dtype;
  int64_t status, tokens, filtered, probabilities, logprobs, ranks, top_ids, top_logprobs;
  int64_t num_samples, num_top, mode;
};

static_assert(sizeof(RowArguments) == kRowArguments * 8, "only integers");
static_assert(sizeof(CallArguments) == kCallArguments * 8, "only integers");

inline Rows rows_of(const RowArguments& a) {
  Rows rows = {};
  const int64_t fields = sizeof(RowParams) / sizeof(int32_t);
  rows.params = {(const RowParams*)a.params, a.params_stride / fields};
  rows.seeds = {(const int64_t*)a.seeds, a.seeds_stride};
  rows.offsets = {(const int64_t*)a.offsets, a.offsets_stride};
  // A mask of no words allows nothing; its address may be null, which would mean no mask at all.
  const int64_t mask = a.mask_words > 0 ? a.mask : a.params;
  if (a.mask_words >= 0) rows.bitmask = {(const int32_t*)mask, a.mask_stride, a.mask_words};
  rows.bias = {(const int64_t*)a.bias_row_ptr, (const int64_t*)a.bias_ids,
               (const float*)a.bias_values};
  if (a.prompt_length) rows.prompt = {(const int64_t*)a.prompt, a.prompt_stride, a.prompt_length};
  if (a.output_length) rows.output = {(const int64_t*)a.output, a.output_stride, a.output_length};
  return rows;
}

inline Batch batch_of(const Rows& rows, const CallArguments& a) {
  return Batch{
      Logits{(const void*)a.logits, a.stride, a.rows, (int32_t)a.vocab, (DType)a.dtype},
      rows,
      Outputs{(int32_t*)a.status, (int64_t*)a.tokens, (float*)a.filtered, (float*)a.probabilities,
              (float*)a.logprobs, (int64_t*)a.ranks, (int64_t*)a.top_ids, (float*)a.top_logprobs,
              (int32_t)a.num_samples, (int32_t)a.num_top, (LogprobsMode)a.mode},
  };
}

}  // namespace fastsample

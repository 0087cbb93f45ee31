// Stages 1 to 3: bitmask, bias, penalties, for one token.
#pragma once

#include <string.h>

#include "core/rows.h"

namespace fastsample {

// Whether the token's bit is 1; tokens past the last word are not allowed.
FS_HD bool allowed(const int32_t* words, int64_t num_words, int32_t token) {
  const int64_t word = token >> 5;
  return word < num_words && ((uint32_t)words[word] >> (token & 31) & 1u);
}

// Whether any row of a batch may have a bias or a penalty.
FS_HD bool has_edits(const Rows& rows) {
  return rows.bias.row_ptr || rows.output.data || rows.drafted.data || rows.prompt.data;
}

// How many ids a row has in prompt, output and drafts, padding included. (A list that is absent has
// the length 0.)
FS_HD int64_t ids_of_a_row(const Rows& rows) {
  return rows.output.length + rows.drafted.length + rows.prompt.length;
}

// How many ids there are; the logits may be those of some.
FS_HD int64_t num_ids(const Batch& batch) {
  return batch.rows.ids.count ? batch.rows.ids.count : batch.logits.vocab;
}

// Whether any penalty of this row looks at token ids at all.
FS_HD bool penalises_output(const RowParams& p) {
  return p.repetition_penalty != 1.0f || p.frequency_penalty != 0.0f || p.presence_penalty != 0.0f;
}

FS_HD bool penalises_prompt(const RowParams& p) { return p.repetition_penalty != 1.0f; }

FS_HD float zero_unless(bool condition, float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits &= 0u - (uint32_t)condition;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// `count` occurrences in the output; `seen` in the prompt or the output. There is no branch on a
// token's sign or count, which would often be mispredicted: the contract asks for the lower of
// quotient and product where the penalty exceeds 1, else for the higher one, whatever the sign; and
// to subtract +0 changes no bit.
FS_HD float penalise(float x, const RowParams& p, int32_t count, bool seen) {
  if (p.repetition_penalty != 1.0f && seen) {
    const float quotient = x / p.repetition_penalty, product = x * p.repetition_penalty;
    const float lower = quotient < product ? quotient : product;
    const float higher = quotient < product ? product : quotient;
    x = p.repetition_penalty > 1.0f ? lower : higher;
  }
  if (p.frequency_penalty != 0.0f) {
    x = x - zero_unless(count > 0, p.frequency_penalty * (float)count);
  }
  if (p.presence_penalty != 0.0f) x = x - zero_unless(count > 0, p.presence_penalty);
  return x;
}

}  // namespace fastsample

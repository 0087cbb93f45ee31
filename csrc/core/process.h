// Stages 1 to 3: bitmask, bias, penalties, for one token.
#pragma once

#include "core/rows.h"

namespace fastsample {

// Whether the token's bit is 1; tokens past the last word are not allowed.
FS_HD bool allowed(const int32_t* words, int64_t num_words, int32_t token) {
  const int64_t word = token >> 5;
  return word < num_words && ((uint32_t)words[word] >> (token & 31) & 1u);
}

// Whether any penalty of this row looks at token ids at all.
FS_HD bool penalises_output(const RowParams& p) {
  return p.repetition_penalty != 1.0f || p.frequency_penalty != 0.0f || p.presence_penalty != 0.0f;
}

FS_HD bool penalises_prompt(const RowParams& p) { return p.repetition_penalty != 1.0f; }

// `count` occurrences in the output; `seen` in the prompt or the output.
FS_HD float penalise(float x, const RowParams& p, int32_t count, bool seen) {
  if (p.repetition_penalty != 1.0f && seen) {
    x = x > 0.0f ? x / p.repetition_penalty : x * p.repetition_penalty;
  }
  if (p.frequency_penalty != 0.0f && count > 0) x = x - p.frequency_penalty * (float)count;
  if (p.presence_penalty != 0.0f && count > 0) x = x - p.presence_penalty;
  return x;
}

}  // namespace fastsample

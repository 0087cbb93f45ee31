// Verification by drawing: how far a request's drafts are what its rows draw. Rows after that are
// not sampled, and what their outputs hold is padding.
#pragma once

#include <math.h>

#include <algorithm>

#include "core/rows.h"

namespace fastsample {

// Whether a row follows a draft that is known to be wrong.
inline bool is_past(const Drafts& drafts, int64_t row) {
  const int64_t width = drafts.count + 1;
  return row % width > __atomic_load_n(drafts.num_accepted + row / width, __ATOMIC_RELAXED);
}

// Takes down what a row has drawn, -1 where it is invalid.
inline void compare(const Drafts& drafts, int64_t row, int64_t token) {
  const int64_t width = drafts.count + 1, request = row / width, at = row % width;
  if (at < drafts.count && token >= 0 && token == drafts.ids[request * drafts.count + at]) return;
  int32_t* end = drafts.num_accepted + request;
  int32_t known = __atomic_load_n(end, __ATOMIC_RELAXED);
  while (at < known && !__atomic_compare_exchange_n(end, &known, (int32_t)at, true,
                                                    __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

// Pads the outputs after each result; returns how many results end at an invalid row.
inline int64_t pad(const Drafts& drafts, int64_t requests, const Outputs& out, int32_t vocab) {
  int64_t invalid = 0;
  const int64_t width = drafts.count + 1, words = (vocab + 31) / 32;
  for (int64_t request = 0; request < requests; ++request) {
    const int64_t last = request * width + drafts.num_accepted[request];
    const int64_t begin = last + 1, end = (request + 1) * width;
    drafts.status[request] = out.status[last];
    invalid += out.status[last] != kValid;
    std::fill(out.tokens + begin, out.tokens + end, (int64_t)-1);
    if (out.logprobs) std::fill(out.logprobs + begin, out.logprobs + end, NAN);
    if (out.ranks) std::fill(out.ranks + begin, out.ranks + end, (int64_t)0);
    if (out.kept_count) std::fill(out.kept_count + begin, out.kept_count + end, 0);
    if (out.log_kept_mass) std::fill(out.log_kept_mass + begin, out.log_kept_mass + end, NAN);
    if (out.entropy) std::fill(out.entropy + begin, out.entropy + end, NAN);
    if (out.kept_bitmask) {
      std::fill(out.kept_bitmask + begin * words, out.kept_bitmask + end * words, 0);
    }
    if (!out.num_top) continue;
    std::fill(out.top_ids + begin * out.num_top, out.top_ids + end * out.num_top, (int64_t)-1);
    std::fill(out.top_logprobs + begin * out.num_top, out.top_logprobs + end * out.num_top, NAN);
  }
  return invalid;
}

}  // namespace fastsample

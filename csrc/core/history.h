// Stage 3's history edits: DRY and the ban of repeated n-grams.
//
// An engine reads a row's history backwards: id 0 is the last one. Where the ids from position j on
// are for a while those from 0 on, the end of the history stood there before, and the id at j - 1
// is what came next.
#pragma once

#include <float.h>
#include <math.h>

#include "core/rows.h"

namespace fastsample {

FS_HD bool uses_history(const RowParams& p) {
  return p.dry_multiplier > 0.0f || p.no_repeat_ngram_size > 0;
}

// What a row's history is searched for.
struct Search {
  int32_t length;    // of the history
  int32_t window;    // the last ids that DRY looks at; 0 where it is off
  int32_t unbroken;  // how many of them follow the last breaker
  int32_t shortest;  // repetition that DRY does not allow
  int32_t before;    // ids of an n-gram before its last one; INT32_MAX where none is banned
};

// Of a history without breakers.
FS_HD Search search_for(const RowParams& p, int32_t length) {
  int32_t window = p.dry_multiplier > 0.0f ? length : 0;
  if (p.dry_range > 0 && p.dry_range < window) window = p.dry_range;
  const int32_t n = p.no_repeat_ngram_size;
  return Search{length, window, window, p.dry_allowed_length, n > 0 ? n - 1 : INT32_MAX};
}

// A token's repetition, as a number of which the largest counts: its length, or kBanned.
constexpr int32_t kBanned = INT32_MAX;

// What the id at j - 1 gets where `equal` ids from j on are those from 0 on; 0 for nothing.
FS_HD int32_t repetition(const Search& s, int32_t j, int32_t equal) {
  if (equal >= s.before) return kBanned;
  int32_t length = s.window - j < equal ? s.window - j : equal;
  if (s.unbroken < length) length = s.unbroken;
  return length >= s.shortest ? length : 0;
}

// How many equal ids from j on can matter, if they weigh no more from `enough` on.
FS_HD int32_t most_equal(const Search& s, int32_t j, int32_t enough) {
  int32_t most = s.window - j < s.unbroken ? s.window - j : s.unbroken;
  if (enough < most) most = enough;
  if (most < s.shortest) most = 0;
  const bool may_ban = s.before <= s.length - j;
  return may_ban && s.before > most ? s.before : most;
}

// The next power of DRY's base, or the same one where that would overflow.
FS_HD float next_power(float power, float base) {
  const float next = power * base;
  return next <= FLT_MAX ? next : power;
}

FS_HD float power_of(float base, int32_t exponent) {
  float power = 1.0f;
  for (int32_t i = 0; i < exponent; ++i) {
    const float next = next_power(power, base);
    if (next == power) break;
    power = next;
  }
  return power;
}

// A length from which on repetitions weigh the same. Each power but the last is greater than the
// one before by half of base - 1 at least, roundings included, so it doubles within 2 / (base - 1)
// steps, and doubles at most 128 times.
FS_HD int32_t enough(const RowParams& p) {
  const float above_one = p.dry_base - 1.0f;
  const float steps = above_one > 0.0f ? 128.0f * (2.0f / above_one + 1.0f) : 0.0f;
  const int64_t length = (int64_t)steps + p.dry_allowed_length;
  return length < INT32_MAX ? (int32_t)length : INT32_MAX;
}

// The logit of a token whose longest repetition is of this length, or that is banned.
FS_HD float after_repetition(float x, const RowParams& p, int32_t length, float power) {
  return length == kBanned ? -INFINITY : x - p.dry_multiplier * power;
}

}  // namespace fastsample

// Rows as they were given to ranks, of whose tokens raw log-probabilities are.
#pragma once

#include "cpu/messages.h"

namespace fastsample {

// Which words of a row's answers are keys of tokens.
struct KeysAt {
  int64_t begin, count, step;
};

// The first message has told of these rows, too, where ranks may have edited them; otherwise they
// are those that are drawn from.
class RawRows {
 public:
  RawRows(const Messages& drawn, const Told& told);
  RawRows(const RawRows&) = delete;

  bool wanted() const { return wanted_; }

  // This rank's masses of whole rows at temperature 1; nothing where they are not wanted.
  Words masses() const;

  // Makes keys of this rank's tokens, in answers of some rows of so many words, those of the logits
  // as they were given.
  void translate(int64_t* answers, const Words& rows, int64_t words, KeysAt at) const;

  // Raw log-probabilities, if they are wanted. It takes a message more where masses of whole rows
  // are not known, which are then empty, or lists do not tell some rank. `drawn` int64 [B,
  // num_samples] has keys of tokens as they were given, and kNoKey in rows whose tokens are listed.
  void write(const Words& masses, const Words& drawn) const;

 private:
  void find_listed(int64_t r, int64_t* keys) const;
  bool count_above(int64_t r, const int64_t* keys, int64_t* above) const;
  Words answer_above(const Words& rows, const Words& keys) const;
  bool is_sound(int64_t r) const;
  void write_row(int64_t r, int64_t mass, const int64_t* keys, const int64_t* above) const;

  const Messages& drawn_;
  const Told& told_;
  const SplitArguments& split_;
  const CallArguments call_;  // of rows as they were given
  const Messages raw_;        // likewise
  const bool wanted_;
};

}  // namespace fastsample

// What ranks tell in the first message about rows that are split over them: of each row a list of
// tokens as words, the mass of their rank behind it where rows keep everything; whether the part is
// flat; whether edits may have changed it; tokens of the row as it was given, and the given logits
// of those on the first list, two to a word. All but the list may be missing.
#pragma once

#include <vector>

#include "core/arguments.h"
#include "cpu/question.h"

namespace fastsample {

typedef std::vector<int64_t> Words;

inline void append(Words& to, const int64_t* from, int64_t words) {
  to.insert(to.end(), from, from + words);
}

// Lists of rows, those of all ranks one behind the other.
struct Lists {
  int64_t ranks, tokens;  // words of a list
  int64_t step;           // from one token to the next
  Words words;

  const int64_t* of(int64_t r) const { return words.data() + r * ranks * tokens; }

  // f(word) for each token of a row.
  template <class F>
  void each(int64_t r, F f) const {
    for (int64_t i = 0; i < ranks * tokens; i += step) f(of(r)[i]);
  }
};

struct Told {
  bool flat;           // all rows on all ranks
  bool edited;         // whether rows as they were given may differ from those that are drawn from
  Lists lists, given;  // `given`: of rows as they were given, if these are listed
  Lists logits;        // of what `lists` has, in rows as they were given: float32, two to a word

  Told(const SplitArguments& split, int64_t rows)
      : flat(split.judges),
        edited(split.raw_listed),
        lists{split.ranks, split.listed + split.keeps_all, 1 + split.keeps_all * split.listed, {}},
        given{split.ranks, split.raw_listed, 1, {}},
        logits{split.ranks, split.raw_listed ? (split.listed + 1) / 2 : 0, 1, {}} {
    bool edits = !split.tells_edits;
    for (int64_t row = 0; row < rows * split.ranks; ++row) {
      const int64_t rank = row % split.ranks, r = row / split.ranks;
      const int64_t* from = (const int64_t*)split.told + (rank * rows + r) * split.told_words;
      take(lists, from);
      if (split.judges) flat &= *from++ != 0;
      if (split.tells_edits) edits |= *from++ != 0;
      take(given, from);
      take(logits, from);
    }
    edited &= edits;
    num_given_ = split.raw_listed ? split.raw_listed : edits ? -1 : split.listed;
  }

  // Whether so many of the first tokens of rows as they were given are listed.
  bool lists_given(int64_t tokens) const { return tokens <= num_given_; }

 private:
  static void take(Lists& to, const int64_t*& from) {
    append(to.words, from, to.tokens);
    from += to.tokens;
  }

  int64_t num_given_;
};

}  // namespace fastsample

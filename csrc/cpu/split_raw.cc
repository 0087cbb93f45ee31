// Raw log-probabilities of rows that are split over ranks.
#include "cpu/split_raw.h"

#include <algorithm>
#include <functional>

#include "core/mass.h"

namespace fastsample {
namespace {

CallArguments raw_call(CallArguments call, const SplitArguments& split) {
  call.logits.logits = split.raw_logits;
  call.logits.logits_stride = split.raw_stride;
  call.logits.dtype = split.raw_dtype;
  return call;
}

float logit_of(int64_t key) { return place_of_key(key).x; }

bool is_token(Place<float> token) { return token.id >= 0 && token.x > -INFINITY; }

}  // namespace

RawRows::RawRows(const Messages& drawn, const Told& told)
    : drawn_(drawn),
      told_(told),
      split_(drawn.split),
      call_(told.edited ? raw_call(drawn.call, drawn.split) : drawn.call),
      raw_{split_, told.given.tokens ? told.given : drawn.lists, call_, drawn.host},
      wanted_(split_.raw_queries && told.lists_given(call_.out.num_top)) {}

Words RawRows::masses() const {
  if (!wanted()) return {};
  const Words sums = raw_.answer_whole(split_.raw_queries, 0, kSumWords);
  Words masses;
  for (int64_t r = 0; r < raw_.rows(); ++r) masses.push_back(sums[(size_t)(r * kSumWords)]);
  return masses;
}

void RawRows::translate(int64_t* answers, const Words& rows, int64_t words, KeysAt at) const {
  if (!wanted() || !told_.edited) return;
  const int64_t n = (int64_t)rows.size(), end = split_.start + call_.logits.vocab;
  const auto key = [&](int64_t k, int64_t i) -> int64_t& {
    return answers[k * words + at.begin + i * at.step];
  };
  Words tokens;
  for (int64_t k = 0; k < n; ++k) {
    for (int64_t i = 0; i < at.count; ++i) tokens.push_back(place_of_key(key(k, i)).id);
  }
  PartArguments ask = {};
  ask.question = kGiven;
  ask.count = at.count;
  ask.words = (at.count + 1) / 2;
  const auto* queries = (const PartQuery*)split_.raw_queries;
  const Words found = raw_.answer(ask, rows, queries, tokens.data());
  for (int64_t k = 0; k < n; ++k) {
    const float* given = (const float*)(found.data() + k * ask.words);
    for (int64_t i = 0; i < at.count; ++i) {
      const int64_t id = tokens[(size_t)(k * at.count + i)];
      if (id >= split_.start && id < end) key(k, i) = key_of_place({given[i], (int32_t)id});
    }
  }
}

// The keys of a row's tokens, which are listed.
void RawRows::find_listed(int64_t r, int64_t* keys) const {
  const Lists& lists = drawn_.lists;
  const int64_t* tokens = (const int64_t*)call_.out.tokens + r * raw_.draws();
  const auto* given = (const float*)told_.logits.of(r);
  for (int64_t i = 0; i < lists.ranks * lists.tokens; i += lists.step) {
    Place<float> token = token_of_word(lists.of(r)[i]);
    if (!is_token(token)) continue;
    if (told_.edited)
      token.x = given[i / lists.tokens * 2 * told_.logits.tokens + i % lists.tokens];
    for (int64_t j = 0; j < raw_.draws(); ++j) {
      if (token.id == tokens[j]) keys[j] = key_of_place(token);
    }
  }
}

// How many tokens lie above each of these, as lists tell it; whether they do: a rank that lists a
// token no higher has listed all that are.
bool RawRows::count_above(int64_t r, const int64_t* keys, int64_t* above) const {
  const Lists& lists = raw_.lists;
  const int64_t draws = raw_.draws();
  float lowest = INFINITY;  // of the draws
  for (int64_t j = 0; j < draws; ++j) lowest = std::min(lowest, logit_of(keys[j]));
  for (int64_t rank = 0; rank < lists.ranks; ++rank) {
    const int64_t* list = lists.of(r) + rank * lists.tokens;
    float last = INFINITY;
    for (int64_t i = 0; i < lists.tokens; i += lists.step) {
      const float x = token_of_word(list[i]).x;
      last = std::min(last, x);
      for (int64_t j = 0; j < draws; ++j) above[j] += x > logit_of(keys[j]);
    }
    if (!(last <= lowest)) return false;
  }
  return is_sound(r);
}

// How many of this rank's tokens lie above those of some rows, int64 [b, num_samples].
Words RawRows::answer_above(const Words& rows, const Words& keys) const {
  const auto* all = (const PartQuery*)split_.raw_queries;
  const int64_t draws = raw_.draws();
  std::vector<PartQuery> queries;
  Words details;
  for (int64_t r : rows) {
    queries.push_back(all[r]);
    for (int64_t j = 0; j < draws; ++j) {
      details.push_back(bits_of(logit_of(keys[(size_t)(r * draws + j)])));
    }
  }
  PartArguments ask = {};
  ask.question = kAbove;
  ask.count = ask.words = draws;
  return raw_.answer(ask, rows, queries.data(), details.data());
}

// Whether no rank has found a NaN or an infinity, which it then lists.
bool RawRows::is_sound(int64_t r) const {
  bool sound = true;
  raw_.lists.each(r, [&](int64_t word) { sound &= token_of_word(word).x < INFINITY; });
  return sound;
}

void RawRows::write_row(int64_t r, int64_t mass, const int64_t* keys, const int64_t* above) const {
  const OutputArguments& out = call_.out;
  const bool valid = !((const int32_t*)out.status)[r], sound = valid && is_sound(r);
  float peak = -INFINITY;
  Words first;
  raw_.lists.each(r, [&](int64_t word) {
    const Place<float> token = token_of_word(word);
    if (!is_token(token)) return;
    peak = std::max(peak, token.x);
    if (out.num_top) first.push_back(key_of_place(token));
  });
  const double normaliser = log((double)mass / (double)kMassUnit);
  const auto logprob = [&](int64_t key) {
    return (float)(((double)logit_of(key) - (double)peak) - normaliser);
  };
  for (int64_t j = 0; j < raw_.draws(); ++j) {
    const int64_t slot = r * raw_.draws() + j;
    if (out.logprobs) ((float*)out.logprobs)[slot] = sound ? logprob(keys[j]) : NAN;
    if (out.ranks) ((int64_t*)out.ranks)[slot] = valid ? above[j] + 1 : 0;
  }
  std::sort(first.begin(), first.end(), std::greater<int64_t>());
  for (int64_t i = 0; i < out.num_top; ++i) {
    const bool there = sound && i < (int64_t)first.size();
    const int64_t key = there ? first[(size_t)i] : kNoKey, slot = r * out.num_top + i;
    ((int64_t*)out.top_ids)[slot] = there ? place_of_key(key).id : -1;
    ((float*)out.top_logprobs)[slot] = there ? logprob(key) : sound ? -INFINITY : NAN;
  }
}

void RawRows::write(const Words& known, const Words& drawn) const {
  if (!wanted()) return;
  const int64_t rows = raw_.rows(), draws = raw_.draws();
  Words keys = drawn, masses = known, above(keys.size()), open;
  for (int64_t r = 0; r < rows; ++r) {
    int64_t *own = keys.data() + r * draws, *counts = above.data() + r * draws;
    if (((const int32_t*)call_.out.status)[r]) continue;
    if (own[0] == kNoKey) find_listed(r, own);
    if (count_above(r, own, counts)) continue;
    open.push_back(r);
    std::fill_n(counts, draws, 0);
  }
  Words own = known.empty() ? this->masses() : Words();
  const int64_t weighed = (int64_t)own.size();
  const Words counts = answer_above(open, keys);
  append(own, counts.data(), (int64_t)counts.size());
  if (!own.empty()) {
    const Words found = raw_.gather(own);
    masses.resize((size_t)rows);
    const int64_t* from = found.data();
    for (int64_t rank = 0; rank < split_.ranks; ++rank) {
      for (int64_t r = 0; r < weighed; ++r) masses[(size_t)r] += *from++;
      for (int64_t r : open) {
        for (int64_t j = 0; j < draws; ++j) above[(size_t)(r * draws + j)] += *from++;
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    write_row(r, masses[(size_t)r], keys.data() + r * draws, above.data() + r * draws);
  }
}

}  // namespace fastsample

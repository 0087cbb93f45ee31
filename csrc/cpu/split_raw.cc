// Raw log-probabilities of rows that are split over ranks.
#include <algorithm>
#include <functional>

#include "core/mass.h"
#include "cpu/messages.h"

namespace fastsample {
namespace {

// f(token) for each that ranks have listed of a row.
template <class F>
void each_listed(const Messages& m, int64_t r, F f) {
  m.each_listed(r, [&](int64_t word) {
    const Place<float> token = token_of_word(word);
    if (token.id >= 0 && token.x > -INFINITY) f(token);
  });
}

float logit_of(int64_t key) { return place_of_key(key).x; }

// The keys of a row's tokens, which are listed.
void find_listed(const Messages& m, int64_t r, int64_t* keys) {
  const int64_t* tokens = (const int64_t*)m.call.out.tokens + r * m.draws();
  each_listed(m, r, [&](Place<float> token) {
    for (int64_t j = 0; j < m.draws(); ++j) {
      if (token.id == tokens[j]) keys[j] = key_of_place(token);
    }
  });
}

// How many tokens lie above those of keys int64 [B, num_samples]: of those that are listed,
Words above_on_lists(const Messages& m, const Words& keys) {
  Words above(keys.size());
  for (size_t i = 0; i < keys.size(); ++i) {
    const float x = logit_of(keys[i]);
    each_listed(m, (int64_t)i / m.draws(), [&](Place<float> token) { above[i] += token.x > x; });
  }
  return above;
}

// and of this rank's.
Words answer_above(const Messages& m, const Words& keys) {
  Words details;
  for (int64_t key : keys) details.push_back(bits_of(logit_of(key)));
  PartArguments ask = {};
  ask.question = kAbove;
  ask.count = ask.words = m.draws();
  return m.answer(ask, m.all_rows(), (const PartQuery*)m.split.queries, details.data());
}

void write_row(const Messages& m, int64_t r, int64_t mass, const int64_t* keys,
               const int64_t* above) {
  const OutputArguments& out = m.call.out;
  const bool valid = !((const int32_t*)out.status)[r];
  float peak = -INFINITY;
  Words first;
  each_listed(m, r, [&](Place<float> token) {
    peak = std::max(peak, token.x);
    if (out.num_top) first.push_back(key_of_place(token));
  });
  const double normaliser = log((double)mass / (double)kMassUnit);
  const auto logprob = [&](int64_t key) {
    return (float)(((double)logit_of(key) - (double)peak) - normaliser);
  };
  for (int64_t j = 0; j < m.draws(); ++j) {
    const int64_t slot = r * m.draws() + j;
    if (out.logprobs) ((float*)out.logprobs)[slot] = valid ? logprob(keys[j]) : NAN;
    if (out.ranks) ((int64_t*)out.ranks)[slot] = valid ? above[j] + 1 : 0;
  }
  std::sort(first.begin(), first.end(), std::greater<int64_t>());
  for (int64_t i = 0; i < out.num_top; ++i) {
    const bool there = valid && i < (int64_t)first.size();
    const int64_t key = there ? first[(size_t)i] : kNoKey, slot = r * out.num_top + i;
    ((int64_t*)out.top_ids)[slot] = there ? place_of_key(key).id : -1;
    ((float*)out.top_logprobs)[slot] = there ? logprob(key) : valid ? -INFINITY : NAN;
  }
}

}  // namespace

Words raw_masses(const Messages& m) {
  if (!m.split.raw_queries) return {};
  const Words sums = m.answer_whole(m.split.raw_queries, 0, kSumWords);
  Words masses;
  for (int64_t r = 0; r < m.rows(); ++r) masses.push_back(sums[(size_t)(r * kSumWords)]);
  return masses;
}

void write_raw(const Messages& m, const Words& known, const Words& drawn) {
  if (!m.split.raw_queries) return;
  const int64_t rows = m.rows(), draws = m.draws();
  Words keys = drawn, masses = known;
  bool listed = true;
  for (int64_t r = 0; r < rows; ++r) {
    const bool here = keys[(size_t)(r * draws)] == kNoKey;
    if (here) find_listed(m, r, keys.data() + r * draws);
    listed &= here;
  }
  const bool weighs = masses.empty();
  Words above = listed ? above_on_lists(m, keys) : Words(keys.size());
  if (weighs || !listed) {
    const Words mass = weighs ? raw_masses(m) : Words(),
                own_above = listed ? Words() : answer_above(m, keys);
    Words own;
    for (int64_t r = 0; r < rows; ++r) {
      if (weighs) own.push_back(mass[(size_t)r]);
      if (!listed) append(own, own_above.data() + r * draws, draws);
    }
    const Words found = m.gather(own);
    masses.resize((size_t)rows);
    const int64_t* from = found.data();
    for (int64_t row = 0; row < m.split.ranks * rows; ++row) {
      const int64_t r = row % rows;
      if (weighs) masses[(size_t)r] += *from++;
      for (int64_t j = 0; !listed && j < draws; ++j) above[(size_t)(r * draws + j)] += *from++;
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    write_row(m, r, masses[(size_t)r], keys.data() + r * draws, above.data() + r * draws);
  }
}

}  // namespace fastsample

// Fuzzes the native call: all outputs of every instruction set against the twin's, bit for bit; and
// of rows that are split over ranks, against the whole rows'.
// Runs under libFuzzer (clang++ -fsanitize=fuzzer), or within stress.cc with any compiler.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <deque>
#include <string>

#include "cpu/dispatch.h"
#include "inputs.h"
#include "split.h"
#include "twin.h"

namespace {

using namespace fastsample;

constexpr int64_t kSlots = 9;

// What one implementation writes, in buffers without a spare element.
struct Written {
  std::vector<int32_t> status;
  std::vector<int64_t> tokens, ranks, top_ids, weights, masses, given;
  std::vector<float> filtered, probabilities, logprobs, top_logprobs, log_kept_mass, entropy;
  std::vector<int32_t> kept_count, kept_bitmask, kept_slots;
  OutputArguments out = {};

  explicit Written(const fuzz::Input& in) {
    const size_t rows = (size_t)in.rows, draws = in.wants_tokens ? rows * in.num_samples : 0;
    const size_t full = rows * in.vocab, top = rows * in.num_top;
    const bool logs = in.mode != kNoLogprobs;
    status.assign(rows, -9);
    tokens.assign(draws, -9);
    filtered.assign(in.wants_filtered ? full : 0, -9);
    probabilities.assign(in.wants_probabilities ? full : 0, -9);
    logprobs.assign(logs ? draws : 0, -9);
    ranks.assign(logs && in.wants_ranks ? draws : 0, -9);
    top_ids.assign(top, -9);
    top_logprobs.assign(top, -9);
    if (in.wants_tokens && in.num_samples == 1) {
      weights.assign(2 * rows, -9);
      masses.assign(in.vocab % 3 ? full : 0, -9);
      given.assign(in.vocab % 2 ? rows : 0, 0);  // of every kind, -1 and V among them
      for (size_t r = 0; r < given.size(); ++r) given[r] = (int64_t)(7 * r) % (in.vocab + 2) - 1;
      out.weights = fuzz::address(weights);
      out.masses = fuzz::address(masses);
      out.given = fuzz::address(given);
    }
    if (in.wants_tokens && in.vocab % 5) {
      kept_count.assign(rows, -9);
      kept_bitmask.assign(rows * ((in.vocab + 31) / 32), -9);
      kept_slots.assign(in.vocab % 5 > 2 ? rows * kSlots : 0, -9);
      log_kept_mass.assign(rows, -9);
      entropy.assign(rows, -9);
      out.kept_count = fuzz::address(kept_count);
      out.kept_bitmask = fuzz::address(kept_bitmask);
      out.log_kept_mass = fuzz::address(log_kept_mass);
      out.entropy = fuzz::address(entropy);
    }
    out.status = fuzz::address(status);
    out.tokens = fuzz::address(tokens);
    out.num_samples = in.num_samples;
    out.filtered = fuzz::address(filtered);
    out.probabilities = fuzz::address(probabilities);
    out.mode = in.mode;
    out.logprobs = fuzz::address(logprobs);
    out.ranks = fuzz::address(ranks);
    out.top_ids = fuzz::address(top_ids);
    out.top_logprobs = fuzz::address(top_logprobs);
    out.num_top = in.num_top;
  }

  // A call that writes here.
  Batch batch(const RowArguments& rows, const LogitsArguments& logits) {
    Batch batch = batch_of(rows, {logits, out});
    if (!kept_slots.empty()) {
      batch.out.kept_slots = kept_slots.data();
      batch.out.num_slots = kSlots;
    }
    return batch;
  }
};

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.empty() || memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// All NaNs are alike, everything else is equal to the bit or, where `ulp` says so, close.
bool same_floats(const std::vector<float>& a, const std::vector<float>& b, int ulp) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] != a[i] && b[i] != b[i]) continue;
    int32_t x, y;
    memcpy(&x, &a[i], sizeof x);
    memcpy(&y, &b[i], sizeof y);
    if (llabs((long long)x - y) > ulp) return false;
  }
  return true;
}

// The first output that differs, or null.
const char* difference(const Written& a, const Written& b) {
  if (!same_bits(a.status, b.status)) return "status";
  if (!same_bits(a.tokens, b.tokens)) return "tokens";
  if (!same_bits(a.filtered, b.filtered)) return "filtered";
  if (!same_bits(a.probabilities, b.probabilities)) return "probabilities";
  if (!same_bits(a.ranks, b.ranks)) return "ranks";
  if (!same_bits(a.weights, b.weights)) return "weights";
  if (!same_bits(a.masses, b.masses)) return "masses";
  if (!same_bits(a.top_ids, b.top_ids)) return "top_ids";
  if (!same_bits(a.kept_count, b.kept_count)) return "kept_count";
  if (!same_bits(a.kept_bitmask, b.kept_bitmask)) return "kept_bitmask";
  for (size_t r = 0; r < a.kept_slots.size() / kSlots; ++r) {  // where ids do not fit, any are left
    const auto row = (ptrdiff_t)(r * kSlots);
    const auto begin = a.kept_slots.begin() + row;
    if (a.kept_count[r] > kSlots) continue;
    if (!std::equal(begin, begin + kSlots, b.kept_slots.begin() + row)) return "kept_slots";
  }
  if (!same_floats(a.log_kept_mass, b.log_kept_mass, 2)) return "log_kept_mass";
  if (!same_floats(a.entropy, b.entropy, 2)) return "entropy";
  if (!same_floats(a.logprobs, b.logprobs, 2)) return "logprobs";
  if (!same_floats(a.top_logprobs, b.top_logprobs, 2)) return "top_logprobs";
  return nullptr;
}

void check(bool good, const std::string& isa, const char* what) {
  if (good) return;
  fprintf(stderr, "%s: %s\n", isa.c_str(), what);
  abort();
}

// What rows ask for that nothing edits.
RowArguments without_edits(RowArguments rows) {
  rows.mask_words = -1;
  rows.bias_row_ptr = rows.prompt_length = rows.output_length = 0;
  rows.breakers_length = rows.drafted_length = rows.requests = 0;
  return rows;
}

bool keeps_all(const RowParams& p, int32_t vocab) {
  return !is_greedy(p) && !filters_of(p, vocab) && !uses_xtc(p);
}

// Where the tokens of a valid row reach a target, one by one, against what its ranks find.
void check_found(const split::Ranks& ranks, const std::vector<float>& x,
                 const std::vector<uint64_t>& mass, const SearchQuery& q, const int64_t* found,
                 const std::string& isa) {
  const float mean = float_of(q.mean);
  std::vector<int32_t> order;
  for (int32_t i = 0; i < (int32_t)x.size(); ++i) {
    if (x[i] > -INFINITY) order.push_back(i);
  }
  const bool by_distance = q.by == kByDistance;
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return by_distance ? fabsf(x[a] - mean) < fabsf(x[b] - mean) : x[a] > x[b];
  });
  uint64_t running = 0;
  size_t n = 0;
  while (n < order.size() && running < (uint64_t)q.target) {
    running += q.by == kByNumber ? 1 : mass[order[n]];
    ++n;
  }
  while (by_distance && n && n < order.size() &&
         fabsf(x[order[n]] - mean) == fabsf(x[order[n - 1]] - mean)) {
    ++n;
  }
  std::vector<int64_t> masses(ranks.ranks), tokens(ranks.ranks);
  for (size_t i = 0; i < order.size(); ++i) {
    const int64_t key = key_of_place({x[order[i]], order[i]});
    const bool is_kept = key < found[0] && key >= found[1];
    check(is_kept == (i < n), isa + ", split", "the place that a search finds");
    if (!is_kept) continue;
    int64_t rank = 0;
    while (ranks.start(rank + 1) <= order[i]) ++rank;
    masses[rank] += (int64_t)mass[order[i]];
    tokens[rank] += 1;
  }
  const bool same = std::equal(masses.begin(), masses.end(), found + 2) &&
                    std::equal(tokens.begin(), tokens.end(), found + 2 + ranks.ranks);
  check(same, isa + ", split", "what ranks have up to that place");
}

void check_searches(const fuzz::Input& in, const std::string& isa) {
  split::Ranks ranks(in);
  const Logits logits = batch_of({}, {in.logits_arguments(), {}}).logits;
  for (const SearchBy by : {kByMass, kByNumber, kByDistance}) {
    std::vector<std::vector<float>> x;
    std::vector<std::vector<uint64_t>> mass;
    std::vector<float> peaks;
    std::vector<SearchQuery> places;
    for (int64_t r = 0; r < in.rows; ++r) {
      std::vector<float> row;
      for (int32_t i = 0; i < in.vocab; ++i) {
        row.push_back(twin::logit(logits, r, i));
      }
      if (twin::status_of(row, false) != kValid) return;
      const RowParams& p = ranks.params(r);
      mass.push_back(twin::masses(row, is_greedy(p) ? 1.0f : judging_temperature(p)));
      uint64_t total = 0, number = 0;
      for (int32_t i = 0; i < in.vocab; ++i) {
        total += row[i] > -INFINITY ? mass.back()[i] : 0;
        number += row[i] > -INFINITY;
      }
      const uint64_t part = (uint64_t)(in.vocab * 7 + r * 3) % 11,
                     all = by == kByNumber ? number : total;
      peaks.push_back(*std::max_element(row.begin(), row.end()));
      const float low = row[(size_t)(in.vocab / 2)];
      const float mean = low > -INFINITY ? 0.5f * peaks.back() + 0.5f * low : peaks.back();
      places.push_back({0, by, (int64_t)(all / 10 * part + 1), split::Ranks::bits(mean)});
      x.push_back(row);
    }
    const split::Words found = ranks.find(peaks, places);
    for (int64_t r = 0; r < in.rows; ++r) {
      const int64_t* own = found.data() + r * (2 + 2 * ranks.ranks);
      check_found(ranks, x[r], mass[r], places[r], own, isa);
    }
  }
}

// What ranks may tell of rows besides their lists.
enum class Asks { kNothing, kAll, kOfTokens };

// All ranks, each with outputs of its own, against a run of the whole rows.
template <class Wanted>
void check_ranks(const fuzz::Input& in, const std::string& isa, const split::Edited* edited,
                 Asks asks, Wanted wanted) {
  const split::Ranks ranks(in, edited);
  const RowArguments rows = without_edits(in.row_arguments());
  Written want(in);
  const RowArguments of_whole = edited ? in.row_arguments() : rows;
  sample_batch(batch_of(of_whole, {in.logits_arguments(), wanted(want.out)}), 1);
  std::deque<Written> got;
  std::vector<OutputArguments> out;
  for (int64_t rank = 0; rank < ranks.ranks; ++rank) {
    out.push_back(wanted(got.emplace_back(in).out));
  }
  bool all = asks == Asks::kOfTokens;
  for (int64_t r = 0; r < in.rows; ++r) all &= keeps_all(ranks.params(r), in.vocab);
  const bool raw = out[0].mode == kRawLogprobs;
  if (raw && !edited && in.num_top > (all ? 1 : ranks.length)) return;
  ranks.sample(rows, out, all, asks != Asks::kNothing, raw);
  for (const Written& own : got) {
    bool decided = true;
    check(own.status == got[0].status, isa + ", split", "statuses of ranks");
    for (int64_t r = 0; r < in.rows; ++r) {
      decided &= own.status[r] != kUndecided;
      if (own.status[r] == kUndecided) continue;
      const auto first = r * in.num_samples, last = first + in.num_samples;
      const bool same = own.status[r] == want.status[r] &&
                        std::equal(own.tokens.begin() + first, own.tokens.begin() + last,
                                   want.tokens.begin() + first);
      check(same, isa + ", split", "tokens of a row");
    }
    const char* wrong = decided ? difference(want, own) : nullptr;
    check(!wrong, isa + ", split", wrong);
  }
}

// Of rows that are drawn from as they are given, or of edited ones.
void check_split(const fuzz::Input& in, const std::string& isa, const split::Edited* edited) {
  // All that lists tell, and what ranks tell besides, with log-probabilities of any kind.
  for (Asks asks : {Asks::kNothing, Asks::kAll}) {
    check_ranks(in, isa, edited, asks, [](OutputArguments out) {
      out.filtered = out.probabilities = out.weights = out.masses = out.given = 0;
      return out;
    });
  }
  // Tokens, of which ranks may guess some.
  check_ranks(in, isa, edited, Asks::kOfTokens, [](OutputArguments out) {
    const OutputArguments all = out;
    out = {};
    out.status = all.status;
    out.tokens = all.tokens;
    out.num_samples = all.num_samples;
    if (all.mode != kRawLogprobs) return out;
    out.mode = all.mode;
    out.logprobs = all.logprobs;
    out.ranks = all.ranks;
    out.top_ids = all.top_ids;
    out.top_logprobs = all.top_logprobs;
    out.num_top = all.num_top;
    return out;
  });
}

// Stages 1 to 3 of parts of rows, with ids of the whole rows.
void check_edits(const fuzz::Input& in, const std::string& isa, const split::Edited& whole) {
  const int64_t near = in.vocab / 3, middle = in.has_mask ? near / 32 * 32 : near;
  for (int64_t begin : {(int64_t)0, middle}) {
    const int64_t end = begin ? in.vocab : middle, width = end - begin;
    if (width == 0 || width == in.vocab) continue;
    const split::Edited part(in, begin, end);
    for (int64_t r = 0; r < in.rows; ++r) {
      if (part.status[r] || whole.status[r]) continue;
      const bool same = !memcmp(part.x.data() + r * width, whole.x.data() + r * in.vocab + begin,
                                (size_t)width * sizeof(float));
      check(same, isa + ", split", "logits of a part of a row after edits");
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::vector<std::string> names = isas();
  const fuzz::Input in(fuzz::Bytes{data, size});
  const RowArguments rows = in.row_arguments();
  const LogitsArguments logits = in.logits_arguments();
  Written want(in);
  const Batch expected = want.batch(rows, logits);
  int64_t invalid = 0;
  for (int64_t r = 0; r < in.rows; ++r)
    invalid += 0 != (want.status[r] = twin::sample_row(expected, r));
  const std::vector<uint8_t> before = in.logits;
  for (const std::string& isa : names) {
    force_isa(isa);
    Written got(in);
    check(sample_batch(got.batch(rows, logits), 1) == invalid, isa, "number of invalid rows");
    const char* wrong = difference(want, got);
    check(!wrong, isa, wrong);
    if (in.kind == kLogits && in.wants_tokens) {
      const split::Edited edited(in);
      check_edits(in, isa, edited);
      for (const split::Edited* of : {(const split::Edited*)nullptr, &edited}) {
        check_split(in, isa, of);
      }
    }
    if (in.kind == kLogits) check_searches(in, isa);
    check(before == in.logits, isa, "the logits were written to");
  }
  return 0;
}

// The law of a draw: the mass of its token and of all, every token's mass, and tokens that are
// given rather than drawn. What verification by rejection compares (fastsample/rejection.py).
#pragma once

#include "cpu/draw.h"

namespace fastsample {
namespace {

// What a draw is made from: running masses, group by group, of what is kept.
struct Source {
  Kept<float> kept;
  const uint64_t* running;
  uint64_t total;
};

void write_no_law(const Outputs& out, int64_t r, int32_t vocab) {
  if (out.weights) out.weights[2 * r] = out.weights[2 * r + 1] = 0;
  if (out.masses) memset(out.masses + r * vocab, 0, (size_t)vocab * sizeof *out.masses);
}

// A token that is given, with its mass in draws from `kept`.
template <class T, class W>
Drawn weigh_given(const Dense<T>& d, const W& weigher, const Kept<float>& kept, int32_t id) {
  float x = logit_of(d, id);
  if (!W::kOfLogits && x < 0) x = 0;  // a probability that the mask rules out
  const bool in = ranks_within(kept, Place<float>{x, id});
  return Drawn{id, x, in ? Weighing(weigher, kept.floor).one(x) : 0};
}

template <class T, class W>
void write_masses(int64_t* out, const Dense<T>& d, const W& weigher, const Kept<float>& kept) {
  const Weighing weight(weigher, kept.floor);
  float buffer[kBlock];
  uint64_t mass[kBlock];
  for (int b = 0; b < blocks(d); ++b, out += kBlock) {
    const int n = d.row.vocab - b * kBlock < kBlock ? d.row.vocab - b * kBlock : kBlock;
    memset(out, 0, (size_t)n * sizeof *out);
    if (!may_keep(d, b, kept)) continue;
    weigh_each(d, b, values(d, b, buffer), kept, weight, mass);
    memcpy(out, mass, (size_t)n * sizeof *out);
  }
}

// The draw's token, or the one that is given, with its mass of all that is kept; and the law, which
// is `lone`'s where nothing that is drawn from has any mass.
template <class T, class W>
Drawn write_law(const Outputs& out, int64_t r, const Dense<T>& d, const W& weigher,
                const Kept<float>& all, const Source& from, Drawn lone, Drawn token) {
  const int32_t vocab = d.row.vocab;
  if (out.given && out.given[r] >= 0 && out.given[r] < vocab) {
    token = weigh_given(d, weigher, all, (int32_t)out.given[r]);
  }
  const uint64_t unit = from.total ? 0 : weigher.below(lone.x).unit();
  const bool in = ranks_within(from.kept, Place<float>{token.x, token.id});
  const uint64_t own = from.total ? (in ? token.mass : 0) : token.id == lone.id ? unit : 0;
  out.weights[2 * r] = (int64_t)own;
  out.weights[2 * r + 1] = (int64_t)(from.total ? from.total : unit);
  if (out.masses) {
    int64_t* masses = out.masses + r * vocab;
    write_masses(masses, d, weigher, from.kept);
    if (!from.total) masses[lone.id] = (int64_t)unit;
  }
  return token;
}

}  // namespace
}  // namespace fastsample

// Draws from all tokens of a row that is split over ranks, in two messages. The rank that owns a
// draw's token knows that only once all have told their masses, which takes the maximum of all. So
// each tells its mass beside its own maximum first, which is nearly enough to know where the draw
// will fall; then the exact mass, and the tokens about that place.
#pragma once

#include "cpu/part.h"

namespace fastsample {
namespace {

// How far off a place may be, of all mass: more than roundings make of it, but for bad luck.
constexpr double kOff = 0x1p-20;

// What ranks have told of a row, each its first token and its mass beside that. After them come the
// row's seed and offset.
struct Told {
  const int64_t* words;
  int64_t ranks;

  FS_MEMBER float peak(int64_t rank) const { return token_of_word(words[2 * rank]).x; }
  FS_MEMBER double mass(int64_t rank) const { return (double)words[2 * rank + 1]; }
};

// The tokens from a place of the rank's running mass on, as many as there is room for.
template <class T>
void tell_guesses(const PartRow<T>& p, uint64_t from, int64_t* to) {
  const uint64_t* running = p.ws.group_mass;
  int g = 0;
  while (running[g] <= from) ++g;
  uint64_t at = g ? running[g - 1] : 0;
  int n = 0;
  const Weighing weight(p.weigher, 0);
  float buffer[kBlock];
  uint64_t mass[kBlock];
  for (int b = g * kGroup; b < blocks(p.dense); ++b) {
    if (!may_keep(p.dense, b, p.kept)) continue;
    const float* x = values(p.dense, b, buffer);
    weigh_each(p.dense, b, x, p.kept, weight, mass);
    for (int i = 0; i < kBlock; ++i) {
      if (at + mass[i] <= from || !mass[i]) {
        at += mass[i];
        continue;
      }
      if (!n) to[0] = (int64_t)at;
      at += mass[i];
      to[1 + 2 * n] = (int64_t)at;
      to[2 + 2 * n] = key_of_place({x[i], id_at(p.dense, b, i)}, p.ask.start);
      if (++n == kGuesses) return;
    }
  }
}

// This rank's exact mass, or a status below 0; and what it tells of each draw.
template <class T>
void answer_owned(PartRow<T> p) {
  const int64_t rank = p.ask.wants;
  int64_t* to = p.answers();
  memset(to, 0, (size_t)p.ask.words * sizeof *to);
  const Told told = {p.details(), (p.ask.count - 2) / 2};
  float peak = -INFINITY;
  bool nan = false;
  for (int64_t r = 0; r < told.ranks; ++r) {
    nan |= told.peak(r) != told.peak(r);
    peak = told.peak(r) > peak ? told.peak(r) : peak;
  }
  const Status status = status_of(peak, nan);
  if (status != kValid) {
    to[0] = -status;
    return;
  }
  p.weigher.max = peak;
  const uint64_t own = weigh_groups(p.dense, p.kept, p.weigher, p.ws);
  add_up(p.ws.group_mass, groups(p.dense));
  to[0] = (int64_t)own;
  double before = 0, all = 0;
  for (int64_t r = 0; r < told.ranks; ++r) {
    const double below = ((double)told.peak(r) - (double)peak) * (double)p.weigher.scale;
    const double mass = r == rank ? (double)own : told.mass(r) ? told.mass(r) * exp2(below) : 0;
    before += r < rank ? mass : 0;
    all += mass;
  }
  const int64_t* stream = p.details() + 2 * told.ranks;
  for (int32_t j = 0; (j + 1) * kWordsOfDraw < p.ask.words; ++j) {
    const uint64_t place =
        draw_threshold((uint64_t)stream[0], (uint64_t)stream[1], (uint32_t)j, (uint64_t)all);
    const double local = (double)place - before, off = all * kOff;
    if (!own || local < -off || local >= (double)own + off) continue;
    const uint64_t from = local > off ? (uint64_t)(local - off) : 0;
    tell_guesses(p, from < own ? from : own - 1, to + 1 + j * kWordsOfDraw);
  }
}

}  // namespace
}  // namespace fastsample

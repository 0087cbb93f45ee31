// Which tokens are kept, and what they weigh: for the filters, for the draw, and where it shows.
#pragma once

#include "core/filters.h"
#include "cuda/task.cuh"

namespace fastsample {

// A token's mass as filters judge it.
FS_DEVICE u64 mass_in(const Masses& t, float x) {
  return anew(t.factor) ? (u64)(x * t.scale * t.factor) : mass_of(x, t.peak, t.scale);
}

// Its mass in draws.
FS_DEVICE u64 drawn_mass(const Masses& t, float x) {
  return t.factor ? (u64)(x * t.scale * t.factor) : mass_of(x, t.peak, t.drawn_scale);
}

// The same, called: for threads that weigh a token or two.
FS_CALLED u64 mass_of_one(float x, Masses t) { return mass_in(t, x); }

// The mass of the heaviest token of the row.
FS_DEVICE u64 unit_of(const Masses& t) { return t.factor ? mass_in(t, t.peak) : kMassUnit; }

FS_DEVICE KeptKeys everything(const Masses& t) {
  return everything(t.factor ? kKeyAboveZero : kKeyLowest);
}

// A key below which every token's mass is less than `mass`, or 0. Within 2^-19 of it, mass doubles
// with every step of y; the factor of 2 that is left out here covers all rounding.
FS_CALLED int32_t key_reaching(float peak, u64 mass, float scale) {
  const float y = mass ? (float)(63 - __clzll((long long)mass)) - 41.0f : -41.0f;
  const int32_t key = key_of(peak + quotient(y, scale));
  return key > kKeyLowest ? key : kKeyLowest;
}
FS_DEVICE int32_t key_reaching(const Masses& t, u64 mass, float scale) {
  return t.factor ? kKeyAboveZero : key_reaching(t.peak, mass, scale);
}

// The lowest key that a kept token of any mass can have.
FS_DEVICE int32_t lowest_key(const Masses& t, const KeptKeys& kept, u64 mass) {
  const int32_t key = key_reaching(t, mass, t.scale);
  return key > kept.low.x ? key : kept.low.x;
}

FS_DEVICE bool is_kept(const Masses& t, const KeptKeys& kept, float x, int32_t id) {
  return within(kept, {key_of(x), id}) && (!kept.floor || mass_in(t, x) >= kept.floor);
}

// A token's mass where it is kept, else 0.
FS_DEVICE u64 kept_mass(const Masses& t, const KeptKeys& kept, float x, KeyPlace place) {
  if (!within(kept, place)) return 0;
  const u64 w = mass_in(t, x);
  return w >= kept.floor ? w : 0;
}

// Its mass in draws where it is kept, else 0. The scales are one but for "temperature_last".
FS_DEVICE u64 kept_drawn_mass(const Masses& t, const KeptKeys& kept, float x, KeyPlace place) {
  if (!within(kept, place)) return 0;
  const u64 w = mass_in(t, x);
  if (w < kept.floor) return 0;
  return t.drawn_scale == t.scale ? w : mass_of(x, t.peak, t.drawn_scale);
}

// The lowest key that a kept token can have that has any mass in draws.
FS_DEVICE int32_t lowest_drawn_key(const Masses& t, const KeptKeys& kept) {
  const u64 mass = t.drawn_scale == t.scale ? kept.floor : 0;
  const int32_t key = key_reaching(t, mass, t.drawn_scale);
  return key > kept.low.x ? key : kept.low.x;
}

// The mass of all that is kept, and of what XTC leaves of it.
struct Totals {
  u64 all, rest;
};

// For later kernels.
FS_DEVICE void write_state(const Workspace& ws, int64_t r, const RowTask& t, const Drawable& found,
                           const Totals& totals) {
  if (ws.states) ws.states[r] = RowState{t.status, t.peak_key, found, totals.all, totals.rest};
}

}  // namespace fastsample

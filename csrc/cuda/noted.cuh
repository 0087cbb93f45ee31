// Functions that are called rather than inlined, since their code is much and several ways through
// a row need it. They take few arguments, by value, so that all are in registers. Where the block's
// slice lies has been noted in shared memory.
#pragma once

#include "cuda/team.cuh"

namespace fastsample {

// What later passes need to know of a slice. A row that is held has no other edges.
template <class S>
FS_DEVICE void copy_extent(Extent& to, const Extent& from) {
  to.shift = from.shift;
  to.vectors = from.vectors;
  to.per_warp = from.per_warp;
  if (S::kResident) return;
  to.data = from.data;
  to.vocab = from.vocab;
  to.nothing = from.nothing;
}

// For the calls after the block's next barrier.
template <class S>
FS_DEVICE void note(Shared& own, const S& s) {
  if (threadIdx.x) return;
  copy_extent<S>(own.extent, s);
  if (!S::kPlain) own.overlaid = s.overlay() != nullptr;
}

template <class S>
FS_DEVICE S noted_slice(Shared& own, int rank) {
  S s = {};
  copy_extent<S>(s, own.extent);
  s.first = rank * warps() * s.per_warp;
  s.held = (Vec16*)(&own + 1);
  if (!S::kPlain) s.lies_over = own.overlaid ? &own.overlay : nullptr;
  return s;
}

}  // namespace fastsample

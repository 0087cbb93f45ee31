// Tokens with a bias, a penalty or a repetition, and the logits that these lead to, as a hash
// table. The row itself is never rewritten, so a 16-bit row stays 16 bits wide wherever it is.
#pragma once

#include "cuda/device.cuh"

namespace fastsample {

// Open addressing. Of the blocks that share a table, each inserts and looks up the ids of its own
// slice only.
struct EditTable {
  Edit* edits;
  uint32_t size;

  FS_METHOD uint32_t first_slot(int32_t id) const {
    return (uint32_t)((u64)((uint32_t)id * 0x9E3779B1u) * size >> 32);
  }
  FS_METHOD uint32_t next_slot(uint32_t slot) const { return slot + 1 < size ? slot + 1 : 0; }

  FS_METHOD Edit& claim(int32_t id) const {
    for (uint32_t slot = first_slot(id);; slot = next_slot(slot)) {
      const int32_t found = atomicCAS(&edits[slot].id, -1, id);
      if (found == -1 || found == id) return edits[slot];
    }
  }

  // The processed logit of an id that is in the table.
  FS_METHOD float x_of(int32_t id) const {
    // volatile: other blocks insert into a shared table, so a cached copy may be out of date.
    for (uint32_t slot = first_slot(id);; slot = next_slot(slot)) {
      const volatile Edit* edit = edits + slot;
      if (edit->id == id) return edit->x;
    }
  }
};

}  // namespace fastsample

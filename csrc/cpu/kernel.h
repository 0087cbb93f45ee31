// What dispatch.cc and the per-ISA translation units agree on.
#pragma once

#include "core/rows.h"

namespace fastsample {

constexpr int kBlock = 256;  // tokens per block: one maximum
constexpr int kGroup = 8;    // blocks per group: one mass
constexpr int kMaxVocab = 1 << 20;
constexpr int kMaxBlocks = kMaxVocab / kBlock;
constexpr int kPad = kBlock;  // slack after every vector buffer: whole blocks are read and written

enum ChangeKind : int32_t { kBias, kOutput, kPrompt };

// A token's change, and the logit that it leads to.
struct Edit {
  int32_t id;
  ChangeKind kind;
  float x;  // until then the bias
};

// Some of a row's draws, as other threads may have the others. Who has the first has all the rest
// of the row's outputs too.
struct Draws {
  int32_t begin, end;
};

// From so many on, draws may be looked up in a table of the kept tokens.
constexpr int32_t kManyDraws = 32;

// A line of that table: a kept token that has mass, in id order.
struct Step {
  uint64_t end;  // the running mass, this token's included
  int32_t id;
  int32_t rank;  // 0: not yet known
};

// Scratch of one thread, owned by dispatch.cc; kernels never allocate.
struct Workspace {
  float* block_max;      // [blocks + kPad]
  uint64_t* group_mass;  // [groups]
  int32_t* edit_start;   // [blocks + 1]
  Edit* edits;           // [bias entries + output ids + prompt ids of the row]
  int32_t* segment;      // [groups + 1]
  float* values;         // [V + kPad]
  float* spare;          // [V + kPad]
  float* list_x;         // [V + kPad]
  int32_t* list_id;      // [V + kPad]
  // Where there are many draws, else null:
  Step* steps;          // [V + kPad]
  int32_t* guide;       // [2^20 at most: a power of two, at least V]
  float* step_logprob;  // [V + kPad]
  uint32_t* keys[2];    // [V + kPad] each
  const void* ahead;    // the row that this thread probably takes next, or null
};

// One per ISA: the only global symbol of its translation unit.
struct Kernel {
  const char* isa;
  int vector_bytes;
  // Every stage for one row; writes the row's outputs and returns its status.
  Status (*sample_row)(const Batch& batch, int64_t row, Draws draws, const Workspace& workspace);
};

}  // namespace fastsample

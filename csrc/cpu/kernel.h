// What dispatch.cc and the per-ISA translation units agree on.
#pragma once

#include "core/arguments.h"

namespace fastsample {

constexpr int kBlock = 256;  // tokens per block: one maximum
constexpr int kGroup = 8;    // blocks per group: one mass
constexpr int kMaxVocab = 1 << 20;
constexpr int kMaxBlocks = kMaxVocab / kBlock;
constexpr int kPad = kBlock;  // slack after every vector buffer: whole blocks are read and written

enum EditKind : int32_t { kBias, kOutput, kPrompt, kRepetition };

// A token's change, and the logit that it leads to.
struct Edit {
  int32_t id;
  EditKind kind;
  union {
    float x;             // until then the bias
    int32_t repetition;  // until then, of core/history.h
  };
};

// Some of a row's draws: other threads may make the rest of them. The part that has draw 0 also
// writes the outputs that are not of a draw.
struct Draws {
  int32_t begin, end;
};

// From this many draws on, they may be looked up in a table of the kept tokens.
constexpr int32_t kManyDraws = 8;

// The guide of a table has a power of two of parts, at least as many as there are tokens, and two
// entries more.
inline constexpr int guide_bits(int64_t tokens) {
  int bits = 0;
  while ((int64_t)1 << bits < tokens) ++bits;
  return bits;
}
inline constexpr size_t guide_size(int64_t tokens) { return ((size_t)1 << guide_bits(tokens)) + 2; }

// A table of kept tokens, in id order, and what is known of each; null where there are few draws.
struct TableSpace {
  uint64_t* ends;  // [V + kPad] the running mass, the token's included
  int32_t* id;     // [V + kPad]
  int32_t* guide;  // [guide_size(V)]
  int32_t* rank;   // [V + kPad]
  float* logprob;  // [V + kPad]
};

// Scratch of one thread, owned by dispatch.cc; kernels never allocate.
struct Workspace {
  float* block_max;      // [blocks + kPad]
  uint64_t* group_mass;  // [groups]
  int32_t* edit_start;   // [blocks + 1]
  Edit* edits;           // [bias entries + 2 (output ids + prompt ids) of the row]
  Edit* repetitions;     // [ids + 1] of output and prompt, here and below
  int32_t* history;      // [ids + kPad]
  int32_t* equal;        // [ids + kPad]
  float* powers;         // [ids + 1]
  uint32_t* breakers;    // [V / 32 + 1], of the whole row
  int32_t* segment;      // [groups + 1]
  float* values;         // [V + kPad]
  float* spare;          // [V + kPad]
  float* list_x;         // [V + kPad]
  int32_t* list_id;      // [V + kPad]
  uint64_t* rest_mass;   // [groups] without what XTC leaves out
  TableSpace table[2];   // of what is kept, and without what XTC leaves out
  uint32_t* keys[2];     // [V + kPad] each, where there are many draws
  bool* crowded;         // whether the last row had many candidates (cpu/plan.h)
  const void* ahead;     // the row that this thread will probably take next, or null
};

// A rank's part of rows, and what is asked of it (cpu/part.h).
struct Part {
  Logits logits;
  PartArguments ask;
};

// One per ISA: the only global symbol of its translation unit.
struct Kernel {
  const char* isa;
  int vector_bytes;
  // Every stage for one row; writes the row's outputs and returns its status.
  Status (*sample_row)(const Batch& batch, int64_t row, Draws draws, const Workspace& workspace);
  // Lists the bits of n words, of which `total` are set.
  void (*list_bits)(const int32_t* words, int64_t n, int32_t* ids, int64_t total);
  // Answers what is asked of a row of a part.
  void (*answer)(const Part& part, int64_t row, const Workspace& workspace);
};

}  // namespace fastsample

// POD views of a batch: borrowed pointers, strides in elements, a row stride of 0 where all rows
// share one.
#pragma once

#include <stddef.h>
#include <stdint.h>

// Everything in core/ has internal linkage: a translation unit built for AVX-512 must not lend a
// weak symbol to one that runs on any CPU.
#if defined(__CUDACC__)
#define FS_HD static __host__ __device__ __forceinline__
#define FS_HD_CALLED static __host__ __device__ __attribute__((noinline, unused))
#define FS_HD_MEMBER __host__ __device__ __forceinline__
#else
#define FS_HD static inline __attribute__((always_inline, unused))
#define FS_HD_CALLED FS_HD
#define FS_HD_MEMBER inline __attribute__((always_inline))
#endif

namespace fastsample {

// The packed record of one row, in the order of fastsample/params.py. X(type, name).
#define FASTSAMPLE_PARAM_FIELDS(X) \
  X(float, temperature)            \
  X(int32_t, top_k)                \
  X(float, top_p)                  \
  X(float, min_p)                  \
  X(float, repetition_penalty)     \
  X(float, frequency_penalty)      \
  X(float, presence_penalty)       \
  X(int32_t, ties)                 \
  X(int32_t, order)                \
  X(float, top_n_sigma)            \
  X(float, typical_p)              \
  X(float, epsilon_cutoff)         \
  X(float, eta_cutoff)             \
  X(float, top_a)                  \
  X(int32_t, p_less)               \
  X(float, xtc_probability)        \
  X(float, xtc_threshold)          \
  X(float, dry_multiplier)         \
  X(float, dry_base)               \
  X(int32_t, dry_allowed_length)   \
  X(int32_t, dry_range)            \
  X(int32_t, no_repeat_ngram_size)

struct RowParams {
#define FASTSAMPLE_MEMBER(type, name) type name;
  FASTSAMPLE_PARAM_FIELDS(FASTSAMPLE_MEMBER)
#undef FASTSAMPLE_MEMBER
};

enum Ties : int32_t { kTiesFirst = 0, kTiesAll = 1 };
enum Order : int32_t { kTopKFirst = 0, kMinPFirst = 1, kJoint = 2, kTemperatureLast = 3 };
enum DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
// kListed: what the ranks that a row is split over have listed of it, for the CPU engine alone.
enum InputKind : int32_t { kLogits = 0, kProbabilities = 1, kListed = 2 };
enum Status : int32_t { kValid = 0, kNaN = 1, kPositiveInfinity = 2, kNothingLeft = 3 };
enum LogprobsMode : int32_t { kNoLogprobs = 0, kRawLogprobs = 1, kProcessedLogprobs = 2 };

template <class T>
struct Column {
  const T* data;   // [B or 1]
  int64_t stride;  // in elements of T (in records for RowParams)
};

struct Logits {
  const void* data;  // [B, V]
  int64_t stride;
  int64_t rows;
  int32_t vocab;  // 1 .. 2^20
  DType dtype;
  InputKind input = kLogits;
};

struct Bitmask {
  const int32_t* data;  // [B or 1, words], null when absent
  int64_t stride;
  int64_t words;
};

struct BiasEntries {
  const int64_t* row_ptr;  // [B + 1], null when absent
  const int64_t* ids;      // [N]
  const float* values;     // [N]
};

struct TokenIds {
  const int64_t* data;  // [lists, length], null when absent
  int64_t stride;
  int64_t length;
  const int64_t* list_of = nullptr;  // [B]: each row's list; null where row r has list r
};

struct IdRange {
  int64_t first, count;
};

struct Rows {
  Column<RowParams> params;
  Column<int64_t> seeds;
  Column<int64_t> offsets;
  Bitmask bitmask;
  BiasEntries bias;
  TokenIds prompt;
  TokenIds output;
  TokenIds breakers;      // [B or 1, length]: DRY's
  TokenIds drafted = {};  // [B, length]: continues the output
  // What all these ids are of: the id of the first logit, and how many there are, where the logits
  // are a part of a row.
  IdRange ids = {};
};

// Buffers to fill; null means not wanted. All contiguous.
struct Outputs {
  int32_t* status;       // [B]
  int64_t* tokens;       // [B, num_samples]
  float* filtered;       // [B, V]
  float* probabilities;  // [B, V]
  float* logprobs;       // [B, num_samples]
  int64_t* ranks;        // [B, num_samples]
  int64_t* top_ids;      // [B, num_top]
  float* top_logprobs;   // [B, num_top]
  int32_t num_samples;
  int32_t num_top;
  LogprobsMode mode;
  // The law of draw 0, for calls that draw one token: its mass and that of all, every token's mass,
  // and tokens that are given, not drawn (what is no token is drawn). Weights come with any of it.
  int64_t* weights = nullptr;      // [B, 2]
  int64_t* masses = nullptr;       // [B, V]
  const int64_t* given = nullptr;  // [B]
  // What is kept, for calls that draw. A row that keeps at most num_slots tokens may list its ids
  // and leave its bitmask as it is: then its slots are not null.
  int32_t* kept_count = nullptr;    // [B]
  int32_t* kept_bitmask = nullptr;  // [B, ceil(V / 32)]
  float* log_kept_mass = nullptr;   // [B]
  float* entropy = nullptr;         // [B]
  int32_t* kept_slots = nullptr;    // [B, num_slots]
  int32_t num_slots = 0;
};

// The drafts of requests, each with count + 1 rows one behind the other, and what comes out. The
// seed of a request is that of all its rows, the offset that of the first.
struct Drafts {
  const int64_t* ids;  // [requests, count]; what is no token is wrong
  int64_t count;
  int32_t* num_accepted;  // [requests]; null where a batch has no requests with drafts
  int32_t* status;        // [requests], of the row that ends a result
  uint32_t* arrivals;     // [requests], for GPUs: 0 between launches
};

struct Batch {
  Logits logits;
  Rows rows;
  Outputs out;
  Drafts drafts = {};
};

// What a row draws with.
struct Stream {
  uint64_t seed, offset;
};

FS_HD Stream stream_of(const Batch& batch, int64_t row) {
  const bool shared = batch.drafts.num_accepted;
  const uint32_t width = (uint32_t)batch.drafts.count + 1;
  const int64_t request = shared ? (uint32_t)row / width : row;
  const uint64_t step = shared ? (uint64_t)((uint32_t)row % width) : 0;
  const int64_t seed = batch.rows.seeds.data[request * batch.rows.seeds.stride];
  const int64_t offset = batch.rows.offsets.data[request * batch.rows.offsets.stride];
  return Stream{(uint64_t)seed, (uint64_t)offset + step};
}

template <class T>
FS_HD const T& at(const Column<T>& column, int64_t row) {
  return column.data[row * column.stride];
}

// The first of a row's ids.
FS_HD const int64_t* ids_of(const TokenIds& ids, int64_t row) {
  return ids.data + (ids.list_of ? ids.list_of[row] : row) * ids.stride;
}

}  // namespace fastsample

// What the instruction sets share: vector types of the width that the including file names in
// FASTSAMPLE_VECTOR_BYTES, and all that GCC's and Clang's vector extensions can say by themselves.
#pragma once

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define FS_INLINE static inline __attribute__((always_inline, unused))
#define FS_MEMBER inline __attribute__((always_inline))
#define FS_EACH(N) _Pragma("GCC unroll 8") for (int u = 0; u < N; ++u)

namespace fastsample {
namespace {

typedef float vf __attribute__((vector_size(FASTSAMPLE_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(FASTSAMPLE_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(FASTSAMPLE_VECTOR_BYTES)));
typedef uint64_t vq __attribute__((vector_size(FASTSAMPLE_VECTOR_BYTES)));
typedef int16_t vs __attribute__((vector_size(FASTSAMPLE_VECTOR_BYTES)));
typedef uint16_t vh __attribute__((vector_size(FASTSAMPLE_VECTOR_BYTES / 2)));
typedef float Four __attribute__((vector_size(16)));

constexpr int kLanes = FASTSAMPLE_VECTOR_BYTES / 4;
constexpr int kWideLanes = FASTSAMPLE_VECTOR_BYTES / 8;
constexpr uint32_t kAllLanes = (1u << kLanes) - 1;

constexpr int16_t kSign = INT16_MIN;

// 16-bit logits.
struct Half {
  uint16_t bits;
  static constexpr int16_t kInfinity = 0x7c00;
};
struct BFloat {
  uint16_t bits;
  static constexpr int16_t kInfinity = 0x7f80;
};

// Loads and stores need no alignment.
template <class V, class T>
FS_INLINE V load_as(const T* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

FS_INLINE vf load(const float* p) { return load_as<vf>(p); }
FS_INLINE vi load(const int32_t* p) { return load_as<vi>(p); }
FS_INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
FS_INLINE void store(int32_t* p, vi v) { memcpy(p, &v, sizeof v); }
FS_INLINE void store(uint32_t* p, vu v) { memcpy(p, &v, sizeof v); }
FS_INLINE void store(uint64_t* p, vq v) { memcpy(p, &v, sizeof v); }

FS_INLINE vf splat(float x) { return x - vf{}; }
FS_INLINE vi splat(int32_t x) { return x - vi{}; }
FS_INLINE vq splat(uint64_t x) { return x - vq{}; }

typedef double vd __attribute__((vector_size(FASTSAMPLE_VECTOR_BYTES)));

// Integers below 2^52 as doubles.
FS_INLINE vd to_double(vq v) {
  constexpr double kShift = 0x1p52;
  return (vd)(v | (vq)(vd{} + kShift)) - kShift;
}

// {0, 1, 2, ...}
FS_INLINE vi iota() {
  vi v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

FS_INLINE vf to_float(vi a) { return __builtin_convertvector(a, vf); }

FS_INLINE float reduce_add(vf v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// Numbers of 20 fractional bits, as FixedSum adds them up: the integer part and the 20 bits.
constexpr int kFractionBits = 20;
struct Halves {
  vu hi, lo;
};

}  // namespace
}  // namespace fastsample

// The whole SIMD vocabulary: GCC/Clang vector extensions, and an intrinsic where the extension has
// no word for it. Everything is in an anonymous namespace: this header means something else in
// every ISA's translation unit.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(FASTSAMPLE_ISA_avx512)
#define FASTSAMPLE_VECTOR_BYTES 64
#elif defined(FASTSAMPLE_ISA_avx2)
#define FASTSAMPLE_VECTOR_BYTES 32
#else
#define FASTSAMPLE_VECTOR_BYTES 16
#endif

#define FS_INLINE static inline __attribute__((always_inline, unused))
#define FS_MEMBER inline __attribute__((always_inline))

namespace fastsample {
namespace {

typedef float vf __attribute__((vector_size(FASTSAMPLE_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(FASTSAMPLE_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(FASTSAMPLE_VECTOR_BYTES)));

typedef uint64_t vq __attribute__((vector_size(FASTSAMPLE_VECTOR_BYTES)));

constexpr int kLanes = FASTSAMPLE_VECTOR_BYTES / 4;
constexpr int kWideLanes = FASTSAMPLE_VECTOR_BYTES / 8;
constexpr uint32_t kAllLanes = (1u << kLanes) - 1;

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

// {0, 1, 2, ...}
FS_INLINE vi iota() {
  vi v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// A truth value per lane.
#if defined(FASTSAMPLE_ISA_avx512)
typedef __mmask16 Mask;
constexpr int kMaskChains = 4;  // tests that follow each other side by side: each takes some cycles
FS_INLINE Mask gt(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ); }
FS_INLINE Mask ge(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ); }
FS_INLINE Mask gt_where(Mask m, vf a, vf b) {
  return _mm512_mask_cmp_ps_mask(m, (__m512)a, (__m512)b, _CMP_GT_OQ);
}
FS_INLINE Mask eq(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_EQ_OQ); }
FS_INLINE Mask ordered_where(Mask m, vf a, vf b) {
  return _mm512_mask_cmp_ps_mask(m, (__m512)a, (__m512)b, _CMP_ORD_Q);
}
FS_INLINE Mask le(vi a, vi b) { return _mm512_cmple_epi32_mask((__m512i)a, (__m512i)b); }
FS_INLINE Mask nonzero(vi a) { return _mm512_test_epi32_mask((__m512i)a, (__m512i)a); }
FS_INLINE Mask both(Mask a, Mask b) { return (Mask)(a & b); }
FS_INLINE Mask either(Mask a, Mask b) { return (Mask)(a | b); }
FS_INLINE Mask but_not(Mask a, Mask b) { return (Mask)(a & ~b); }
FS_INLINE uint32_t bits(Mask m) { return m; }
FS_INLINE Mask from_bits(uint32_t b) { return (Mask)b; }
FS_INLINE vf select(Mask m, vf a, vf b) {
  return (vf)_mm512_mask_blend_ps(m, (__m512)b, (__m512)a);
}
FS_INLINE vu keep(Mask m, vu a) { return (vu)_mm512_maskz_mov_epi32(m, (__m512i)a); }
FS_INLINE vu add_where(Mask m, vu sum, vu a) {
  return (vu)_mm512_mask_add_epi32((__m512i)sum, m, (__m512i)sum, (__m512i)a);
}
FS_INLINE vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
FS_INLINE vf min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
FS_INLINE vi truncate(vf a) { return (vi)_mm512_cvttps_epi32((__m512)a); }
#else
typedef vi Mask;
constexpr int kMaskChains = 1;
FS_INLINE Mask gt(vf a, vf b) { return a > b; }
FS_INLINE Mask ge(vf a, vf b) { return a >= b; }
FS_INLINE Mask gt_where(Mask m, vf a, vf b) { return m & (a > b); }
FS_INLINE Mask eq(vf a, vf b) { return a == b; }
FS_INLINE Mask le(vi a, vi b) { return a <= b; }
FS_INLINE Mask nonzero(vi a) { return a != 0; }
FS_INLINE Mask both(Mask a, Mask b) { return a & b; }
FS_INLINE Mask either(Mask a, Mask b) { return a | b; }
FS_INLINE Mask but_not(Mask a, Mask b) { return a & ~b; }
FS_INLINE Mask from_bits(uint32_t b) {
  vi lane_bit;
  for (int i = 0; i < kLanes; ++i) lane_bit[i] = 1 << i;
  return (splat((int32_t)b) & lane_bit) != 0;
}
FS_INLINE vf select(Mask m, vf a, vf b) { return (vf)((m & (vi)a) | (~m & (vi)b)); }
FS_INLINE vu keep(Mask m, vu a) { return (vu)m & a; }
FS_INLINE vu add_where(Mask m, vu sum, vu a) { return sum + ((vu)m & a); }
FS_INLINE vi truncate(vf a) { return __builtin_convertvector(a, vi); }
#if defined(FASTSAMPLE_ISA_avx2)
FS_INLINE Mask ordered_where(Mask m, vf a, vf b) {
  return m & (vi)_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_ORD_Q);
}
FS_INLINE uint32_t bits(Mask m) { return (uint32_t)_mm256_movemask_ps((__m256)m); }
FS_INLINE vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
FS_INLINE vf min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#elif defined(__x86_64__)
FS_INLINE Mask ordered_where(Mask m, vf a, vf b) {
  return m & (vi)_mm_cmpord_ps((__m128)a, (__m128)b);
}
FS_INLINE uint32_t bits(Mask m) { return (uint32_t)_mm_movemask_ps((__m128)m); }
FS_INLINE vf max(vf a, vf b) { return (vf)_mm_max_ps((__m128)a, (__m128)b); }
FS_INLINE vf min(vf a, vf b) { return (vf)_mm_min_ps((__m128)a, (__m128)b); }
#elif defined(__aarch64__)
FS_INLINE Mask ordered_where(Mask m, vf a, vf b) { return m & (a == a) & (b == b); }
FS_INLINE uint32_t bits(Mask m) {
  const vu lane_bit = {1, 2, 4, 8};
  return vaddvq_u32((uint32x4_t)((vu)m & lane_bit));
}
FS_INLINE vf max(vf a, vf b) { return (vf)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
FS_INLINE vf min(vf a, vf b) { return (vf)vminq_f32((float32x4_t)a, (float32x4_t)b); }
#else
FS_INLINE Mask ordered_where(Mask m, vf a, vf b) { return m & (a == a) & (b == b); }
FS_INLINE uint32_t bits(Mask m) {
  uint32_t b = 0;
  for (int i = 0; i < kLanes; ++i) b |= (uint32_t)(m[i] & 1) << i;
  return b;
}
FS_INLINE vf max(vf a, vf b) { return select(a > b, a, b); }
FS_INLINE vf min(vf a, vf b) { return select(a < b, a, b); }
#endif
#endif

// The lowest n lanes; none where n < 0.
FS_INLINE Mask first(int n) {
  return from_bits(n >= kLanes ? kAllLanes : n < 0 ? 0 : (1u << n) - 1);
}
FS_INLINE void set_all(Mask& m) { m = from_bits(kAllLanes); }
FS_INLINE bool all(Mask m) { return bits(m) == kAllLanes; }
FS_INLINE int count(Mask m) {
  uint64_t set = bits(m);
#if defined(FASTSAMPLE_ISA_avx512)
  asm("" : "+r"(set));  // else GCC counts in 16 bits, which have to be widened again
#endif
  return __builtin_popcountll(set);
}
FS_INLINE bool any(Mask m) { return bits(m) != 0; }
FS_INLINE vf to_float(vi a) { return __builtin_convertvector(a, vf); }

#if defined(FASTSAMPLE_ISA_avx2)
// For every mask, the lanes that are set, lowest first.
struct LaneTable {
  int32_t lane[256][8] = {};

  constexpr LaneTable() {
    for (int mask = 0; mask < 256; ++mask) {
      for (int i = 0, n = 0; i < 8; ++i) {
        if (mask >> i & 1) lane[mask][n++] = i;
      }
    }
  }
};
constexpr LaneTable kLaneTable;
#endif

// Whether that takes a few instructions, or one step for each lane.
#if defined(FASTSAMPLE_ISA_avx512) || defined(FASTSAMPLE_ISA_avx2)
constexpr bool kCompresses = true;
#else
constexpr bool kCompresses = false;
#endif

// Stores the lanes of m next to each other; writes at most a whole vector, returns how many count.
template <class T, class V>
FS_INLINE int compress_store(T* to, V v, Mask m) {
#if defined(FASTSAMPLE_ISA_avx512)
  // Through a register: the form that stores to memory is microcoded on Zen 4.
  store(to, (V)_mm512_maskz_compress_epi32(m, (__m512i)v));
  return count(m);
#elif defined(FASTSAMPLE_ISA_avx2)
  const __m256i lanes = (__m256i)load(kLaneTable.lane[bits(m)]);
  store(to, (V)_mm256_permutevar8x32_epi32((__m256i)v, lanes));
  return count(m);
#else
  const uint32_t set = bits(m);
  int at = 0;
  if (!set) return at;
  for (int i = 0; i < kLanes;
       ++i) {  // no branch that depends on a lane: it would be guessed wrongly
    to[at] = v[i];
    at += (int)(set >> i & 1);
  }
  return at;
#endif
}

// Stores the lanes of four vectors that are at least `least` next to each other, in no order;
// returns their end. Two vectors go together where no lane has two such values, as is likely where
// there are few.
FS_INLINE float* append_at_least(float* to, const vf (&v)[4], vf least) {
  const auto append = [&](vf x) __attribute__((always_inline)) {
    to += compress_store(to, x, ge(x, least));
  };
  if (__builtin_expect(any(ge(max(min(v[0], v[1]), min(v[2], v[3])), least)), false)) {
    for (const vf& x : v) append(x);
  } else {
    append(max(v[0], v[1]));
    append(max(v[2], v[3]));
  }
  return to;
}

// Products of the lower halves of each lane; there is no word for them among the vector extensions.
FS_INLINE vq multiply_low(vq a, vq b) {
#if defined(FASTSAMPLE_ISA_avx512)
  return (vq)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(FASTSAMPLE_ISA_avx2)
  return (vq)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (vq)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
  return (vq)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
  return (a & splat((uint64_t)UINT32_MAX)) * (b & splat((uint64_t)UINT32_MAX));
#endif
}

FS_INLINE float reduce_max(vf v) {
#if defined(FASTSAMPLE_ISA_avx512)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

FS_INLINE float reduce_min(vf v) {
#if defined(FASTSAMPLE_ISA_avx512)
  return _mm512_reduce_min_ps((__m512)v);
#else
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] < m ? v[i] : m;
  return m;
#endif
}

FS_INLINE float reduce_add(vf v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

FS_INLINE uint64_t reduce_add(vu v) {
#if defined(FASTSAMPLE_ISA_avx512)
  // At most kGroup * kBlock numbers of 21 bits are summed up here: 32 bits hold that.
  return (uint32_t)_mm512_reduce_add_epi32((__m512i)v);
#else
  uint64_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
#endif
}

}  // namespace
}  // namespace fastsample

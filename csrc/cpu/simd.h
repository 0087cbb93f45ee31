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
typedef uint16_t vh __attribute__((vector_size(FASTSAMPLE_VECTOR_BYTES / 2)));
typedef int16_t vs __attribute__((vector_size(FASTSAMPLE_VECTOR_BYTES)));

constexpr int kLanes = FASTSAMPLE_VECTOR_BYTES / 4;
constexpr uint32_t kAllLanes = (1u << kLanes) - 1;

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

FS_INLINE vf splat(float x) { return x - vf{}; }
FS_INLINE vi splat(int32_t x) { return x - vi{}; }

// {0, 1, 2, ...}
FS_INLINE vi iota() {
  vi v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

FS_INLINE vf load(const BFloat* p) {
#if defined(FASTSAMPLE_ISA_avx512)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(FASTSAMPLE_ISA_avx2)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  return (vf)(__builtin_convertvector(load_as<vh>(p), vu) << 16);
#endif
}

FS_INLINE vf load(const Half* p) {
#if defined(FASTSAMPLE_ISA_avx512)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(FASTSAMPLE_ISA_avx2)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
  return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p)));
#else
  const vu h = __builtin_convertvector(load_as<vh>(p), vu);
  // Exponent and mantissa in place, rescaled by an exact product, which also makes subnormals
  // normal.
  const vf magnitude = (vf)((h & 0x7fff) << 13) * 0x1p112f;
  const vu special = (vu)((h & 0x7c00) == 0x7c00) & 0x7f800000;
  return (vf)((vu)magnitude | special | ((h & 0x8000) << 16));
#endif
}

// Two vectors of values that stand side by side, in any order.
template <class T>
FS_INLINE void load_pair(const T* p, vf& a, vf& b) {
  a = load(p);
  b = load(p + kLanes);
}

FS_INLINE void load_pair(const BFloat* p, vf& a, vf& b) {
  const vu both = load_as<vu>(p);
  a = (vf)(both & 0xffff0000u);
  b = (vf)(both << 16);
}

FS_INLINE float upcast(float x) { return x; }
FS_INLINE float upcast(BFloat x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}
FS_INLINE float upcast(Half x) {
#if defined(FASTSAMPLE_ISA_avx512) || defined(FASTSAMPLE_ISA_avx2)
  return _cvtsh_ss(x.bits);
#else
  Half lanes[kLanes] = {x};
  return load(lanes)[0];
#endif
}

// 16-bit floats as integers of the same order, and back: the same step undoes it. (-0 comes before
// +0, NaNs before -inf or past +inf, by their sign.)
FS_INLINE vs order_16(vs bits) { return bits ^ (bits >> 15 & 0x7fff); }
FS_INLINE int16_t order_16(int16_t bits) { return (int16_t)(bits ^ (bits >> 15 & 0x7fff)); }

FS_INLINE vs max(vs a, vs b) {
#if defined(FASTSAMPLE_ISA_avx512)
  return (vs)_mm512_max_epi16((__m512i)a, (__m512i)b);
#elif defined(FASTSAMPLE_ISA_avx2)
  return (vs)_mm256_max_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (vs)_mm_max_epi16((__m128i)a, (__m128i)b);
#else
  return a > b ? a : b;
#endif
}

FS_INLINE vs min(vs a, vs b) {
#if defined(FASTSAMPLE_ISA_avx512)
  return (vs)_mm512_min_epi16((__m512i)a, (__m512i)b);
#elif defined(FASTSAMPLE_ISA_avx2)
  return (vs)_mm256_min_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (vs)_mm_min_epi16((__m128i)a, (__m128i)b);
#else
  return a < b ? a : b;
#endif
}

FS_INLINE int16_t reduce_max(vs v) {
#if defined(FASTSAMPLE_ISA_avx512) || defined(FASTSAMPLE_ISA_avx2)
#if defined(FASTSAMPLE_ISA_avx512)
  const __m256i wide = _mm256_max_epi16(_mm512_castsi512_si256((__m512i)v),
                                        _mm512_extracti64x4_epi64((__m512i)v, 1));
#else
  const __m256i wide = (__m256i)v;
#endif
  const __m128i m = _mm_max_epi16(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  // The one instruction that reduces finds an unsigned minimum.
  const __m128i flip = _mm_set1_epi16(0x7fff);
  return (int16_t)(_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(m, flip))) ^ 0x7fff);
#else
  int16_t m = v[0];
  for (int i = 1; i < 2 * kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

// Whether 16-bit lanes are at most `bottom`, as unsigned numbers.
#if defined(FASTSAMPLE_ISA_avx512)
typedef __mmask32 Mask16;
FS_INLINE Mask16 everywhere_16() { return ~(Mask16)0; }
FS_INLINE Mask16 below_where(Mask16 m, vs v, int16_t bottom) {
  return _mm512_mask_cmple_epu16_mask(m, (__m512i)v, _mm512_set1_epi16(bottom));
}
FS_INLINE bool all_16(Mask16 m) { return m == everywhere_16(); }
#else
typedef vs Mask16;
FS_INLINE Mask16 everywhere_16() { return ~(vs){}; }
FS_INLINE Mask16 below_where(Mask16 m, vs v, int16_t bottom) {
  // Not negative, or no further from 0.
  return m & ((v >= 0) | (v <= bottom));
}
FS_INLINE bool all_16(Mask16 m) {
  const vs none = ~m;
  uint64_t w[sizeof none / 8];
  memcpy(w, &none, sizeof w);
  for (uint64_t x : w)
    if (x) return false;
  return true;
}
#endif

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
FS_INLINE bool disjoint(Mask a, Mask b) { return _ktestz_mask16_u8(a, b); }
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
FS_INLINE int count(Mask m) { return __builtin_popcount(bits(m)); }
FS_INLINE bool any(Mask m) { return bits(m) != 0; }
#if !defined(FASTSAMPLE_ISA_avx512)
FS_INLINE bool disjoint(Mask a, Mask b) { return !any(both(a, b)); }
#endif
FS_INLINE vf to_float(vi a) { return __builtin_convertvector(a, vf); }

#if defined(FASTSAMPLE_ISA_avx2)
// For every mask, the lanes that are set, lowest first.
struct LaneTable {
  uint8_t lane[256][8] = {};

  constexpr LaneTable() {
    for (int mask = 0; mask < 256; ++mask) {
      for (int i = 0, n = 0; i < 8; ++i) {
        if (mask >> i & 1) lane[mask][n++] = (uint8_t)i;
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
  const __m128i lanes = _mm_loadl_epi64((const __m128i*)kLaneTable.lane[bits(m)]);
  store(to, (V)_mm256_permutevar8x32_epi32((__m256i)v, _mm256_cvtepu8_epi32(lanes)));
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

// Of two vectors, in no order: together, where no lane counts in both, as is likely where few
// count.
FS_INLINE int compress_store(float* to, vf a, Mask in_a, vf b, Mask in_b) {
  if (__builtin_expect(disjoint(in_a, in_b), true)) {
    return compress_store(to, select(in_b, b, a), either(in_a, in_b));
  }
  const int n = compress_store(to, a, in_a);
  return n + compress_store(to + n, b, in_b);
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

// AVX-512 with BW, DQ and VL: truth values in mask registers, and the rounding of each operation
// its own.
#pragma once

#define FASTSAMPLE_VECTOR_BYTES 64
#include "cpu/simd/vectors.h"
#include "cpu/simd/x86.h"

namespace fastsample {
namespace {

typedef __mmask16 Mask;
constexpr int kMaskChains = 4;  // masks in which tests that follow each other are collected: each
                                // test takes a few cycles
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
FS_INLINE int count(Mask m) {
  uint64_t set = bits(m);
  asm("" : "+r"(set));  // else GCC counts in 16 bits, which have to be widened again
  return __builtin_popcountll(set);
}

FS_INLINE vf select(Mask m, vf a, vf b) {
  return (vf)_mm512_mask_blend_ps(m, (__m512)b, (__m512)a);
}
FS_INLINE vu keep(Mask m, vu a) { return (vu)_mm512_maskz_mov_epi32(m, (__m512i)a); }
FS_INLINE vu add_where(Mask m, vu sum, vu a) {
  return (vu)_mm512_mask_add_epi32((__m512i)sum, m, (__m512i)sum, (__m512i)a);
}
FS_INLINE vf add_where(Mask m, vf sum, vf a) {
  return (vf)_mm512_mask_add_ps((__m512)sum, m, (__m512)sum, (__m512)a);
}
FS_INLINE vi truncate(vf a) { return (vi)_mm512_cvttps_epi32((__m512)a); }

FS_INLINE vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
FS_INLINE vf min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
// The higher of y and a negative number. As unsigned numbers, negative floats fall and lie above
// all others; Zen has more units that compare numbers than floats.
FS_INLINE vf raise_to(float low, vf y) {
  return (vf)_mm512_min_epu32((__m512i)y, (__m512i)splat(low));
}
FS_INLINE vs max(vs a, vs b) { return (vs)_mm512_max_epi16((__m512i)a, (__m512i)b); }
FS_INLINE vs min(vs a, vs b) { return (vs)_mm512_min_epi16((__m512i)a, (__m512i)b); }

// a - b, with a rounded down to 11 fractional bits, for numbers from 0 to 2^9; far from 0 where a
// is higher. A sum that begins at 2^12 has no more bits.
FS_INLINE vf round_down_11(vf a, float b) {
  constexpr int kDown = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;
  return (vf)_mm512_add_round_ps((__m512)a, _mm512_set1_ps(0x1p12f), kDown) - (0x1p12f + b);
}
// y rounded up to 14 fractional bits.
FS_INLINE vf round_up_14(vf y) {
  constexpr int kUp = 14 << 4 | _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC;
  return (vf)_mm512_roundscale_ps((__m512)y, kUp);
}
// a * b + c, which need not be rounded in between.
FS_INLINE vf multiply_add(vf a, vf b, vf c) {
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

// Half of a vector's lanes as doubles. GCC converts four at a time unless it is told to.
FS_INLINE vd widen(vf v, int half) {
  const __m256 low = _mm512_castps512_ps256((__m512)v);
  return (vd)_mm512_cvtps_pd(half ? _mm512_extractf32x8_ps((__m512)v, 1) : low);
}

FS_INLINE float reduce_max(vf v) { return _mm512_reduce_max_ps((__m512)v); }
FS_INLINE float reduce_min(vf v) { return _mm512_reduce_min_ps((__m512)v); }
FS_INLINE int16_t reduce_max(vs v) {
  return reduce_max_of_16((__m256i)_mm256_max_epi16(_mm512_castsi512_si256((__m512i)v),
                                                    _mm512_extracti64x4_epi64((__m512i)v, 1)));
}
// Modulo 2^32.
FS_INLINE uint64_t reduce_add(vu v) { return (uint32_t)_mm512_reduce_add_epi32((__m512i)v); }

// Products of the lower halves of each lane.
FS_INLINE vq multiply_low(vq a, vq b) { return (vq)_mm512_mul_epu32((__m512i)a, (__m512i)b); }

// Stores the lanes of m next to each other; writes at most a whole vector, returns how many count.
template <class T, class V>
FS_INLINE int compress_store(T* to, V v, Mask m) {
  // Through a register: the form that stores to memory is microcoded on Zen 4.
  store(to, (V)_mm512_maskz_compress_epi32(m, (__m512i)v));
  return count(m);
}

// Takes y apart into the nearest integer, which is returned, and a fraction.
FS_INLINE vf split_integer(vf y, vf& fraction) {
  fraction = (vf)_mm512_reduce_ps((__m512)y, _MM_FROUND_TO_NEAREST_INT);
  return y - fraction;
}

// p * 2^integer where m holds, else 0.
FS_INLINE vf times_power(Mask m, vf p, vf integer) {
  return (vf)_mm512_maskz_scalef_ps(m, (__m512)p, (__m512)integer);
}

FS_INLINE Halves to_fixed(vf q) {
  const vi hi = truncate(q);
  return Halves{(vu)hi, (vu)truncate((q - to_float(hi)) * 0x1p20f)};
}

// Sums of floats from 0 to 2^20, each rounded down to 20 fractional bits. They are added up in
// floats: rounded down, a sum that begins at 2^23 takes an integer part and one that begins at 8
// the 20 bits of a fraction, and both leave integers in their lowest bits.
struct FixedSum {
  static constexpr int kMost = 8;  // summands
  // What each lane of a half has besides: the bits of 2^23 and of 8.
  static constexpr uint32_t kHiBias = 0x4b000000, kLoBias = 0x41000000;
  vf hi = splat(0x1p23f), lo = splat(8.0f);

  FS_MEMBER void add(vf q) {
    hi = (vf)_mm512_add_round_ps((__m512)hi, (__m512)q, kDown);
    lo = (vf)_mm512_add_round_ps((__m512)lo, fraction(q), kDown);
  }
  FS_MEMBER void add(vf q, Mask m) {
    hi = (vf)_mm512_mask_add_round_ps((__m512)hi, m, (__m512)hi, (__m512)q, kDown);
    lo = (vf)_mm512_mask_add_round_ps((__m512)lo, m, (__m512)lo, fraction(q), kDown);
  }
  // To `part` only where m holds.
  FS_MEMBER void add(vf q, FixedSum& part, Mask m) {
    add(q);
    part.hi = (vf)_mm512_mask_add_round_ps((__m512)part.hi, m, (__m512)part.hi, (__m512)q, kDown);
    part.lo = (vf)_mm512_mask_add_round_ps((__m512)part.lo, m, (__m512)part.lo, fraction(q), kDown);
  }
  FS_MEMBER Halves halves() const { return Halves{(vu)hi, (vu)lo}; }

 private:
  static constexpr int kDown = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;
  static FS_MEMBER __m512 fraction(vf q) { return _mm512_reduce_ps((__m512)q, kDown); }
};

FS_INLINE vf load(const BFloat* p) {
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
FS_INLINE vf load(const Half* p) {
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}

// What load_pair took apart, put together: in its order, and without loss.
FS_INLINE vs bits_of_pair(Half, vf a, vf b) {
  const __m256i low = _mm512_cvtps_ph((__m512)a, 0), high = _mm512_cvtps_ph((__m512)b, 0);
  return (vs)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// As unsigned numbers, a - b, or 0 where b is greater.
FS_INLINE vs subtract_to_zero(vs a, vs b) { return (vs)_mm512_subs_epu16((__m512i)a, (__m512i)b); }

// For each of 32 16-bit values, a bit: whether the value - low, as an unsigned number, is at most
// `most`.
template <class T>
FS_INLINE uint32_t bits_in_range(const T* x, int16_t low, int16_t most) {
  return _mm512_cmple_epu16_mask((__m512i)(load_as<vs>(x) - low), _mm512_set1_epi16(most));
}

// Whether all 16-bit numbers met so far, as unsigned ones, are at most `bound`.
struct AtMost {
  int16_t bound;
  __mmask32 held = ~(__mmask32)0;

  FS_MEMBER void test(vs v) {
    held = _mm512_mask_cmple_epu16_mask(held, (__m512i)v, _mm512_set1_epi16(bound));
  }
  FS_MEMBER bool all() const { return held == ~(__mmask32)0; }
};

}  // namespace
}  // namespace fastsample

// 16-bit logits: as vectors of floats, and as vectors of their bits, twice as many at a time.
#pragma once

#include "cpu/simd.h"

namespace fastsample {
namespace {

struct Half {
  uint16_t bits;
  static constexpr int16_t kInfinity = 0x7c00;
};
struct BFloat {
  uint16_t bits;
  static constexpr int16_t kInfinity = 0x7f80;
};

typedef uint16_t vh __attribute__((vector_size(FASTSAMPLE_VECTOR_BYTES / 2)));
typedef int16_t vs __attribute__((vector_size(FASTSAMPLE_VECTOR_BYTES)));

constexpr int16_t kSign = INT16_MIN;

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

// The bits of -inf.
template <class T>
constexpr uint16_t bottom() {
  return (uint16_t)T::kInfinity | 0x8000;
}

// Vectors full of -inf.
template <class T>
FS_INLINE vf all_masked() {
  return (vf)(vu{} + bottom<T>() * 0x10001u);
}
template <>
vf all_masked<float>() {
  return splat(-INFINITY);
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

// The values at four places.
typedef float Four __attribute__((vector_size(16)));
template <class T>
FS_INLINE Four values_at(const T* x, const int (&at)[4]) {
  return Four{upcast(x[at[0]]), upcast(x[at[1]]), upcast(x[at[2]]), upcast(x[at[3]])};
}
#if defined(FASTSAMPLE_ISA_avx512) || defined(FASTSAMPLE_ISA_avx2)
FS_INLINE Four values_at(const Half* x, const int (&at)[4]) {
  uint64_t bits = 0;
  for (int i = 0; i < 4; ++i) bits |= (uint64_t)x[at[i]].bits << 16 * i;
  return (Four)_mm_cvtph_ps(_mm_cvtsi64_si128((int64_t)bits));
}
#endif

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

// Whether all the bits met so far, as unsigned numbers, are at most `bound`.
struct AtMost {
  int16_t bound;
#if defined(FASTSAMPLE_ISA_avx512)
  __mmask32 held = ~(__mmask32)0;

  FS_MEMBER void test(vs v) {
    held = _mm512_mask_cmple_epu16_mask(held, (__m512i)v, _mm512_set1_epi16(bound));
  }
  FS_MEMBER bool all() const { return held == ~(__mmask32)0; }
#else
  vs most = vs{} + kSign;

  FS_MEMBER void test(vs v) { most = max(most, v ^ kSign); }
  FS_MEMBER bool all() const { return !any(nonzero((vi)(most > (int16_t)(bound ^ kSign)))); }
#endif
};

// 16-bit floats that are not below x, and perhaps the next below it, as a range of their bits: from
// 0 up they rise with the value, then they fall.
template <class T>
struct AtLeast;

#if defined(FASTSAMPLE_ISA_avx512) || defined(FASTSAMPLE_ISA_avx2)
// What load_pair took apart, put together: in its order, and without loss.
FS_INLINE vs bits_of_pair(BFloat, vf a, vf b) { return (vs)((vu)a | (vu)b >> 16); }
FS_INLINE vs bits_of_pair(Half, vf a, vf b) {
#if defined(FASTSAMPLE_ISA_avx512)
  const __m256i low = _mm512_cvtps_ph((__m512)a, 0), high = _mm512_cvtps_ph((__m512)b, 0);
  return (vs)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
#else
  const __m128i low = _mm256_cvtps_ph((__m256)a, 0), high = _mm256_cvtps_ph((__m256)b, 0);
  return (vs)_mm256_set_m128i(high, low);
#endif
}

// The bits of a value next to x: no other lies between.
FS_INLINE uint16_t bits_beside(BFloat, float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return (uint16_t)(bits >> 16);
}
FS_INLINE uint16_t bits_beside(Half, float x) {
  return (uint16_t)_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
}

// The bits of a magnitude next to x.
template <class T>
FS_INLINE int16_t edge_at(float x) {
  return (int16_t)bits_beside(T{}, x);
}

template <class T>
struct AtLeast {
  uint16_t base, size;

  FS_MEMBER explicit AtLeast(float x) : AtLeast(bits_beside(T{}, x)) {}
  FS_MEMBER explicit AtLeast(uint16_t low) {
    const uint16_t negative = 0x8000;
    const bool above_zero = low && low < negative;  // -0 is not below +0
    base = above_zero ? low : 0;
    size = (uint16_t)(above_zero ? negative - low : (low ? low : negative) + 1);
  }

  // Without the next below x.
  static FS_MEMBER AtLeast exactly(float x) {
    const uint16_t low = bits_beside(T{}, x);
    const bool below = upcast(T{low}) < x;
    return AtLeast((uint16_t)(low + (low & 0x8000 ? -below : below)));
  }

  // A bit for each of 32 values.
  FS_MEMBER uint32_t among(const T* x) const {
    const int16_t low = (int16_t)base, last = (int16_t)(size - 1);
#if defined(FASTSAMPLE_ISA_avx512)
    const vs place = load_as<vs>(x) - low;
    return _mm512_cmple_epu16_mask((__m512i)place, _mm512_set1_epi16(last));
#else
    const auto beyond = [&](vs place) __attribute__((always_inline)) {
      return _mm256_subs_epu16((__m256i)place, _mm256_set1_epi16(last));
    };
    const __m256i a = beyond(load_as<vs>(x) - low), b = beyond(load_as<vs>(x + 2 * kLanes) - low);
    const vs in_a = (vs)a == 0, in_b = (vs)b == 0;
    const __m256i both = _mm256_packs_epi16((__m256i)in_a, (__m256i)in_b);
    return (uint32_t)_mm256_movemask_epi8(_mm256_permute4x64_epi64(both, 0xd8));
#endif
  }

  // Of two neighbours either.
  FS_MEMBER Mask either(vs bits) const {
    const int16_t low = (int16_t)base;
    const vs place = bits - low;
#if defined(FASTSAMPLE_ISA_avx512)
    return nonzero((vi)_mm512_subs_epu16(_mm512_set1_epi16((int16_t)size), (__m512i)place));
#else
    return nonzero((vi)_mm256_subs_epu16(_mm256_set1_epi16((int16_t)size), (__m256i)place));
#endif
  }
};

// Stores the pairs next to each other of which either is at least that.
template <class T>
FS_INLINE int copy_pairs(float* to, vs bits, AtLeast<T> least) {
  return compress_store(to, (vf)bits, least.either(bits));
}
#else
template <class T>
FS_INLINE int16_t edge_at(float) {
  return T::kInfinity;
}
#endif
template <>
int16_t edge_at<float>(float) {
  return 0;
}

}  // namespace
}  // namespace fastsample

// Sums of products of eight-bit integers, exact in every instruction set: 4 weights of each row with 4 activations.
// Activations are in [-127, 127] (-128 only where a row of them holds a number that is not finite), weights in [-127,
// 127].
#pragma once

#include "simd.h"
#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace kruify::KRUIFY_ISA {

using Ints = Simd<float>::I;  // a sum per row
typedef int8_t Bytes __attribute__((vector_size(KRUIFY_VECTOR_BYTES)));
typedef int8_t LooseBytes __attribute__((vector_size(KRUIFY_VECTOR_BYTES), aligned(1), may_alias));
typedef int32_t LooseInts __attribute__((vector_size(KRUIFY_VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t LooseInt __attribute__((aligned(1), may_alias));

KRUIFY_INLINE Ints lane_numbers() {
  Ints v;
  for (int i = 0; i < kWidth<float>; ++i) v[i] = i;
  return v;
}

KRUIFY_INLINE Bytes load_bytes(const int8_t* p) { return *reinterpret_cast<const LooseBytes*>(p); }

// The lowest byte of each.
KRUIFY_INLINE void store_bytes(int8_t* to, Ints v) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)v));
#else
  Bytes first;
  for (int i = 0; i < KRUIFY_VECTOR_BYTES; ++i) first[i] = int8_t(4 * i % KRUIFY_VECTOR_BYTES);
  const Bytes lowest = __builtin_shuffle((Bytes)v, first);
  __builtin_memcpy(to, &lowest, kWidth<float>);
#endif
}

// The largest of a vector's integers.
KRUIFY_INLINE int32_t largest(Ints v) {
#pragma GCC unroll 4
  for (int half = kWidth<float> / 2; half; half /= 2) {
    const Ints other = __builtin_shuffle(v, lane_numbers() ^ half);
    v = v > other ? v : other;
  }
  return v[0];
}

// Four activations in every lane.
KRUIFY_INLINE Bytes spread(const int8_t* p) { return (Bytes)(Ints{} + *reinterpret_cast<const LooseInt*>(p)); }

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

// vpdpbusd takes unsigned activations: they are kept with 128 added to each, and `start` takes 128 times the weights
// off again.
constexpr int32_t kShift = 128;
using Activations = Bytes;
KRUIFY_INLINE Activations activations(const int8_t* p) { return spread(p); }
KRUIFY_INLINE Ints dot(Ints sum, Bytes w, const Activations& x) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#else
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)x, (__m256i)w);
#endif
}

#elif defined(__AVX2__)

// vpmaddubsw adds two products in 16 bits and saturates: 2 * 128 * 127 fits. The sign goes to the weights.
constexpr int32_t kShift = 0;
struct Activations {
  __m256i size, sign;
};
KRUIFY_INLINE Activations activations(const int8_t* p) {
  const __m256i x = (__m256i)spread(p);
  return {_mm256_abs_epi8(x), x};
}
KRUIFY_INLINE Ints dot(Ints sum, Bytes w, const Activations& x) {
  const __m256i pairs = _mm256_maddubs_epi16(x.size, _mm256_sign_epi8((__m256i)w, x.sign));
  return sum + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

#elif defined(__ARM_FEATURE_DOTPROD)

constexpr int32_t kShift = 0;
using Activations = Bytes;
KRUIFY_INLINE Activations activations(const int8_t* p) { return spread(p); }
KRUIFY_INLINE Ints dot(Ints sum, Bytes w, const Activations& x) {
  return (Ints)vdotq_s32((int32x4_t)sum, (int8x16_t)w, (int8x16_t)x);
}

#else

constexpr int32_t kShift = 0;
using Activations = Bytes;
KRUIFY_INLINE Activations activations(const int8_t* p) { return spread(p); }

typedef int16_t Shorts __attribute__((vector_size(KRUIFY_VECTOR_BYTES)));
typedef int8_t HalfBytes __attribute__((vector_size(KRUIFY_VECTOR_BYTES / 2)));

// Pairs of products, each of which fits 16 bits, added up.
KRUIFY_INLINE Ints pairs(HalfBytes w, HalfBytes x) {
  const Ints both = (Ints)(__builtin_convertvector(w, Shorts) * __builtin_convertvector(x, Shorts));
  return (both << 16 >> 16) + (both >> 16);
}

KRUIFY_INLINE Ints dot(Ints sum, Bytes w, const Activations& x) {
  HalfBytes wide[2], four[2];
  __builtin_memcpy(wide, &w, sizeof w), __builtin_memcpy(four, &x, sizeof x);
  const Ints low = pairs(wide[0], four[0]), high = pairs(wide[1], four[1]);
  return sum + __builtin_shuffle(low, high, Ints{0, 2, 4, 6}) + __builtin_shuffle(low, high, Ints{1, 3, 5, 7});
}

#endif

}  // namespace kruify::KRUIFY_ISA

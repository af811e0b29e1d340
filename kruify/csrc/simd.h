// Vectors of one instruction set. Included by the isa_*.cpp files only, each of which compiles everything below
// namespace KRUIFY_ISA once more with its own flags. Nothing here may come from the standard library: the linker
// would merge inline functions of several files, and the one compiled for AVX-512 could end up serving all.
#pragma once

#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define KRUIFY_NATIVE avx512
#define KRUIFY_VECTOR_BYTES 64
#define KRUIFY_REGISTERS 32
#elif defined(__AVX2__)
#define KRUIFY_NATIVE avx2
#define KRUIFY_VECTOR_BYTES 32
#define KRUIFY_REGISTERS 16
#else
#define KRUIFY_NATIVE portable
#define KRUIFY_VECTOR_BYTES 16
#if defined(__aarch64__)
#define KRUIFY_REGISTERS 32
#else
#define KRUIFY_REGISTERS 16
#endif
#endif
#if !defined(KRUIFY_ISA)
#define KRUIFY_ISA KRUIFY_NATIVE
#endif
#define KRUIFY_INLINE inline __attribute__((always_inline))

namespace kruify::KRUIFY_ISA {

template <class T> struct Simd;

template <> struct Simd<float> {
  typedef float V __attribute__((vector_size(KRUIFY_VECTOR_BYTES)));
  typedef float Loose __attribute__((vector_size(KRUIFY_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(KRUIFY_VECTOR_BYTES)));
};

template <> struct Simd<double> {
  typedef double V __attribute__((vector_size(KRUIFY_VECTOR_BYTES)));
  typedef double Loose __attribute__((vector_size(KRUIFY_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t I __attribute__((vector_size(KRUIFY_VECTOR_BYTES)));
};

template <class T> using Vec = typename Simd<T>::V;
template <class T> constexpr int kWidth = KRUIFY_VECTOR_BYTES / sizeof(T);

template <class T> KRUIFY_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Loose*>(p);
}

template <class T> KRUIFY_INLINE void store(T* p, Vec<T> v) { *reinterpret_cast<typename Simd<T>::Loose*>(p) = v; }

template <class T> KRUIFY_INLINE Vec<T> splat(T s) { return s - Vec<T>{}; }

// The first n lanes only; the others read as zero and are not written.
template <class T> KRUIFY_INLINE Vec<T> load_n(const T* p, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
  else return (Vec<T>)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return (Vec<T>)_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
  } else {
    const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
    return (Vec<T>)_mm256_maskload_pd(p, _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), lane));
  }
#else
  Vec<T> v{};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}

template <class T> KRUIFY_INLINE void store_n(T* p, Vec<T> v, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
  else _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    _mm256_maskstore_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane), (__m256)v);
  } else {
    const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
    _mm256_maskstore_pd(p, _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), lane), (__m256d)v);
  }
#else
  for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}

// Calls f(offset, lanes) over n elements; lanes is a compile-time kWidth except for the tail.
template <class T, class F> KRUIFY_INLINE void for_vectors(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kWidth<T> <= n; i += kWidth<T>)
    f(i, [](const T* p) { return load(p); }, [](T* p, Vec<T> v) { store(p, v); });
  if (const int rest = int(n - i); rest > 0)
    f(i, [rest](const T* p) { return load_n(p, rest); }, [rest](T* p, Vec<T> v) { store_n(p, v, rest); });
}

// The same for calls f.operator()<U>(offset, load, store) that take U vectors at once.
template <class T, int U, class F> KRUIFY_INLINE void for_groups(int64_t n, F f) {
  constexpr int W = kWidth<T>;
  auto get = [](const T* p) { return load(p); };
  auto put = [](T* p, Vec<T> v) { store(p, v); };
  int64_t i = 0;
  for (; i + U * W <= n; i += U * W) f.template operator()<U>(i, get, put);
  if constexpr (U > 1)
    for (; i + W <= n; i += W) f.template operator()<1>(i, get, put);
  if (const int rest = int(n - i); rest > 0)
    f.template operator()<1>(
        i, [rest](const T* p) { return load_n(p, rest); }, [rest](T* p, Vec<T> v) { store_n(p, v, rest); });
}

// The smaller (larger) of a constant and v; NaN in v stays NaN.
template <class T> KRUIFY_INLINE Vec<T> at_most(Vec<T> limit, Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_min_ps((__m512)limit, (__m512)v);
  else return (Vec<T>)_mm512_min_pd((__m512d)limit, (__m512d)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_min_ps((__m256)limit, (__m256)v);
  else return (Vec<T>)_mm256_min_pd((__m256d)limit, (__m256d)v);
#else
  return v > limit ? limit : v;
#endif
}

template <class T> KRUIFY_INLINE Vec<T> at_least(Vec<T> limit, Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_max_ps((__m512)limit, (__m512)v);
  else return (Vec<T>)_mm512_max_pd((__m512d)limit, (__m512d)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_max_ps((__m256)limit, (__m256)v);
  else return (Vec<T>)_mm256_max_pd((__m256d)limit, (__m256d)v);
#else
  return v < limit ? limit : v;
#endif
}

// 1 / sqrt(v), exact but for the last bit.
template <class T> KRUIFY_INLINE Vec<T> inverse_root(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const Vec<T> y = (Vec<T>)_mm512_rsqrt14_ps((__m512)v);
    return y + y * (T(0.5) - T(0.5) * v * y * y);  // Newton's step
  } else {
    return T(1) / (Vec<T>)_mm512_sqrt_pd((__m512d)v);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return T(1) / (Vec<T>)_mm256_sqrt_ps((__m256)v);
  else return T(1) / (Vec<T>)_mm256_sqrt_pd((__m256d)v);
#else
  for (int i = 0; i < kWidth<T>; ++i) v[i] = T(1) / (sizeof(T) == 4 ? __builtin_sqrtf(v[i]) : __builtin_sqrt(v[i]));
  return v;
#endif
}

template <class T> KRUIFY_INLINE T sum(Vec<T> v) {
  T total = 0;
  for (int i = 0; i < kWidth<T>; ++i) total += v[i];
  return total;
}

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// a[s], b[s], a[s + 1], b[s + 1], ...
template <class T> KRUIFY_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b, int s) {
  using I = typename Simd<T>::I;
  constexpr int W = kWidth<T>;
  if constexpr (W == 16) return __builtin_shuffle(a, b, I{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23} + s);
  else if constexpr (W == 8) return __builtin_shuffle(a, b, I{0, 8, 1, 9, 2, 10, 3, 11} + s);
  else if constexpr (W == 4) return __builtin_shuffle(a, b, I{0, 4, 1, 5} + s);
  else return __builtin_shuffle(a, b, I{0, 2} + s);
}

// The sum of each of W vectors, in their order.
template <class T> KRUIFY_INLINE Vec<T> sums(Vec<T> (&v)[kWidth<T>]) {
  constexpr int W = kWidth<T>;
#pragma GCC unroll 4
  for (int half = W / 2; half; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) v[i] = interleave<T>(v[i], v[i + half], 0) + interleave<T>(v[i], v[i + half], W / 2);
  return v[0];
}

// dst (cols, rows) = transpose of src (rows, cols).
template <class T> inline void transpose(int64_t rows, int64_t cols, const T* src, int64_t lds, T* dst, int64_t ldd) {
  int64_t r = 0;
#if defined(__AVX512F__) || defined(__AVX2__)
  constexpr int W = kWidth<T>;
  for (; r + W <= rows; r += W) {
    int64_t c = 0;
    for (; c + W <= cols; c += W) {
      Vec<T> v[W], u[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) v[i] = load(src + (r + i) * lds + c);
      // log2(W) rounds of perfect shuffles between row i and row i + W/2.
#pragma GCC unroll 4
      for (int round = 1; round < W; round *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < W / 2; ++i) {
          u[2 * i] = interleave<T>(v[i], v[i + W / 2], 0);
          u[2 * i + 1] = interleave<T>(v[i], v[i + W / 2], W / 2);
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) v[i] = u[i];
      }
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(dst + (c + i) * ldd + r, v[i]);
    }
    for (; c < cols; ++c)
      for (int i = 0; i < W; ++i) dst[c * ldd + r + i] = src[(r + i) * lds + c];
  }
#endif
  for (; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) dst[c * ldd + r] = src[r * lds + c];
}

}  // namespace kruify::KRUIFY_ISA

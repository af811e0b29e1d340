// The table of one instruction set: compiled by isa_portable.cpp, isa_avx2.cpp and isa_avx512.cpp with their own flags.
#pragma once

#include "big_gemm.h"
#include "sequence.h"

namespace kruify::KRUIFY_ISA {

template <class T>
void axpy(int64_t n, const T* x, T* y) {
  for_vectors<T>(n, [&](int64_t i, auto get, auto put) { put(y + i, get(y + i) + get(x + i)); });
}

// out (rows, N) = x (rows, K) w^T + bias for a handful of rows: no packing, each weight is read once.
template <class T>
void thin_gemm(int64_t rows, int64_t N, int64_t K, const T* x, const T* w, const T* bias, T* out, int64_t ldo) {
  for (int64_t s = 0; s < rows; ++s)
    for (int64_t n = 0; n < N; n += 8) {
      const int64_t count = min64(8, N - n);
      Vec<T> total[8] = {};
      int64_t k = 0;
      if (count == 8)
        for (; k + kWidth<T> <= K; k += kWidth<T>) {
          const Vec<T> v = load(x + s * K + k);
#pragma GCC unroll 8
          for (int j = 0; j < 8; ++j) total[j] += v * load(w + (n + j) * K + k);
        }
      for (int j = 0; j < count; ++j) {
        T sum_j = sum<T>(total[j]) + (bias ? bias[n + j] : T(0));
        for (int64_t i = k; i < K; ++i) sum_j += x[s * K + i] * w[(n + j) * K + i];
        out[s * ldo + n + j] = sum_j;
      }
    }
}

// `inline`: a constant would have internal linkage, and dispatch.cpp could not see it.
template <class T>
inline constexpr Kernels<T> kTable = {pack<T>,     product<T>,    product_backward<T>, unpack<T>,   forward<T>,  backward<T>,
                                      packed_b_size, pack_b<T>,   big_gemm<T>,         thin_gemm<T>, axpy<T>};

const Kernels<float>& float_kernels() { return kTable<float>; }
const Kernels<double>& double_kernels() { return kTable<double>; }

}  // namespace kruify::KRUIFY_ISA

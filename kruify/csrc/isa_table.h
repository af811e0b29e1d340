// The table of one instruction set: compiled by isa_portable.cpp, isa_avx2.cpp and isa_avx512.cpp with their own flags.
#pragma once

#include "big_gemm.h"
#include "dense.h"
#include "sequence.h"

namespace kruify::KRUIFY_ISA {

template <class T> void axpy(int64_t n, const T* x, T* y) {
  for_vectors<T>(n, [&](int64_t i, auto get, auto put) { put(y + i, get(y + i) + get(x + i)); });
}

// out (rows, N) = x (rows, K) w^T + bias for a handful of rows: no packing, each weight is read once.
template <class T>
void thin_gemm(int64_t rows, int64_t N, int64_t K, const T* x, const T* w, const T* bias, T* out, int64_t ldo) {
  constexpr int W = kWidth<T>;
  constexpr int U = 8;  // vectors of x in registers: w is read in the order in which it lies in memory
  int64_t n = 0;
  for (; n + W <= N; n += W)
    for (int64_t s = 0; s < rows; ++s) {
      Vec<T> total[W] = {};
      int64_t k = 0;
      for (; k + U * W <= K; k += U * W) {
        Vec<T> v[U];
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) v[u] = load(x + s * K + k + u * W);
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j)
#pragma GCC unroll 8
          for (int u = 0; u < U; ++u) total[j] += v[u] * load(w + (n + j) * K + k + u * W);
      }
      auto add = [&](int64_t i, auto get) __attribute__((always_inline)) {
        const Vec<T> v = get(x + s * K + k + i);
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) total[j] += v * get(w + (n + j) * K + k + i);
      };
      for_vectors<T>(K - k, [&](int64_t i, auto get, auto) __attribute__((always_inline)) { add(i, get); });
      store(out + s * ldo + n, sums<T>(total) + (bias ? load(bias + n) : Vec<T>{}));
    }
  for (; n < N; ++n)
    for (int64_t s = 0; s < rows; ++s) {
      Vec<T> total{};
      for_vectors<T>(K, [&](int64_t k, auto get, auto) { total += get(x + s * K + k) * get(w + n * K + k); });
      out[s * ldo + n] = sum<T>(total) + (bias ? bias[n] : T(0));
    }
}

// `inline`: a constant would have internal linkage, and dispatch.cpp could not see it.
template <class T>
inline constexpr Kernels<T> kTable = {
    .lanes = kWidth<T>,
    .pack = pack<T>,
    .product = product<T>,
    .dense = dense<T>,
    .dense_backward = dense_backward<T>,
    .dense_scratch = dense_scratch<T>,
    .product_backward = product_backward<T>,
    .unpack = unpack<T>,
    .forward = forward<T>,
    .backward = backward<T>,
    .packed_b_size = packed_b_size,
    .pack_b = pack_b<T>,
    .big_gemm = big_gemm<T>,
    .thin_gemm = thin_gemm<T>,
    .axpy = axpy<T>,
};

const Kernels<float>& float_kernels() { return kTable<float>; }
const Kernels<double>& double_kernels() { return kTable<double>; }

}  // namespace kruify::KRUIFY_ISA

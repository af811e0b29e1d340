// C = A B + bias over all rows at once, on all threads.
#pragma once

#include <algorithm>

#include "buffer.h"
#include "kernels.h"

namespace kruify {

// Threads that a product of so many multiply-adds pays for.
inline int64_t threads_for(int64_t multiply_adds) {
  return multiply_adds < (1 << 18) ? 1 : torch::stable::get_num_threads();
}

// B (K, N), packed for big_gemm.
template <class T> class PackedB {
 public:
  PackedB(int64_t K, int64_t N, Operand<T> b) : K_(K), N_(N), memory_(kernels<T>().packed_b_size(K, N)) {
    const int64_t panels = (N + kPanel - 1) / kPanel,
                  threads = K * N < (1 << 16) ? 1 : torch::stable::get_num_threads();
    const int64_t share = (panels + threads - 1) / threads * kPanel;
    parallel(threads, [&](int64_t i) {
      const int64_t n0 = i * share, n1 = std::min(n0 + share, N);
      if (n0 < n1) kernels<T>().pack_b(K, N, b, memory_.data(), n0, n1);
    });
  }

  // C (M, N) = A (M, K) B + bias, or += A B.
  void multiply(int64_t M, Operand<T> a, const T* bias, T* c, int64_t ldc, bool accumulate = false) const {
    if (M == 0) return;
    const int64_t threads = threads_for(M * N_ * K_);
    const int64_t share = ((M + threads - 1) / threads + 5) / 6 * 6;
    parallel((M + share - 1) / share, [&](int64_t i) {
      Buffer<T> scratch(kBigGemmScratch);
      const int64_t end = std::min((i + 1) * share, M);
      kernels<T>().big_gemm(i * share, end, N_, K_, a, memory_.data(), bias, c, ldc, accumulate, scratch.data());
    });
  }

 private:
  int64_t K_, N_;
  Buffer<T> memory_;
};

// C (M, N) = A (M, K) w^T + bias, w (N, K), for so few rows that every panel of w is packed right before its only use.
template <class T>
void multiply_by_panels(int64_t M, int64_t N, int64_t K, const T* a, const T* w, const T* bias, T* c, int64_t ldc) {
  const int64_t panels = (N + kPanel - 1) / kPanel, workers = std::min(threads_for(M * N * K), panels);
  parallel(workers, [&](int64_t worker) {
    Buffer<T> packed(kPanel * K), scratch(kBigGemmScratch);
    for (int64_t i = panels * worker / workers; i < panels * (worker + 1) / workers; ++i) {
      const int64_t n = i * kPanel, columns = std::min(N - n, kPanel);
      kernels<T>().pack_b(K, columns, {w + n * K, K, true}, packed.data(), 0, kPanel);
      kernels<T>().big_gemm(
          0, M, columns, K, {a, K, false}, packed.data(), bias + n, c + n, ldc, false, scratch.data());
    }
  });
}

}  // namespace kruify

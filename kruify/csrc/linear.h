// C = A B + bias over all rows at once, on all threads.
#pragma once

#include "checks.h"

namespace kruify {

// B packed for big_gemm; element (k, n) of the source at b[k * rs + n * cs].
template <class T>
class PackedB {
 public:
  PackedB(int64_t K, int64_t N, const T* b, int64_t rs, int64_t cs) : K_(K), N_(N), memory_(kernels<T>().packed_b_size(K, N)) {
    const int64_t panels = (N + kPanel - 1) / kPanel, threads = K * N < (1 << 16) ? 1 : torch::stable::get_num_threads();
    const int64_t share = (panels + threads - 1) / threads * kPanel;
    parallel(threads, [&](int64_t i) {
      const int64_t n0 = i * share, n1 = n0 + share < N ? n0 + share : N;
      if (n0 < n1) kernels<T>().pack_b(K, N, b, rs, cs, memory_.data(), n0, n1);
    });
  }

  // C (M, N) = A (M, K) B + bias, element (m, k) of A at a[m * rs + k * cs].
  void multiply(int64_t M, const T* a, int64_t rs, int64_t cs, const T* bias, T* c, int64_t ldc) const {
    if (M == 0) return;
    const int64_t threads = M * N_ * K_ < (1 << 18) ? 1 : torch::stable::get_num_threads();
    const int64_t share = ((M + threads - 1) / threads + 5) / 6 * 6;
    parallel((M + share - 1) / share, [&](int64_t i) {
      Buffer<T> scratch(kBigGemmScratch);
      const int64_t end = (i + 1) * share < M ? (i + 1) * share : M;
      kernels<T>().big_gemm(i * share, end, N_, K_, a, rs, cs, memory_.data(), bias, c, ldc, scratch.data());
    });
  }

 private:
  int64_t K_, N_;
  Buffer<T> memory_;
};

}  // namespace kruify

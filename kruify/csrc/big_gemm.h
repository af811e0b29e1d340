// GEMM over all steps at once (input projection and its gradients). On AMD machines torch's float32 GEMM stays at half
// of what AVX-512 offers, and it would be most of a layer's time.
#pragma once

#include "gemm.h"
#include "kernels.h"

namespace kruify::KRUIFY_ISA {

constexpr int64_t kBlockM = 96, kBlockK = 128;  // a block of A: kBigGemmScratch elements

inline int64_t packed_b_size(int64_t K, int64_t N) { return (N + kPanel - 1) / kPanel * kPanel * K; }

// Columns [n0, n1) of B into panels of kPanel columns, each (K, kPanel); n0 is a multiple of kPanel.
template <class T> inline void pack_b(int64_t K, int64_t N, Operand<T> b, T* packed, int64_t n0, int64_t n1) {
  for (int64_t n = n0; n < n1; n += kPanel) {
    T* panel = packed + n * K;
    const int64_t columns = min64(kPanel, N - n);
    if (b.transposed) transpose(columns, K, b.data + n * b.ld, b.ld, panel, kPanel);
    for (int64_t k = 0; !b.transposed && k < K; ++k) {
      const T* row = b.data + k * b.ld + n;
      for_vectors<T>(columns, [&](int64_t j, auto get, auto put) { put(panel + k * kPanel + j, get(row + j)); });
    }
    for (int64_t k = 0; columns < kPanel && k < K; ++k)
      for (int64_t j = columns; j < kPanel; ++j) panel[k * kPanel + j] = 0;
  }
}

template <class T, int MR, bool UnitK>
KRUIFY_INLINE void packed_rows(int64_t M, int64_t K, int64_t columns, const T* a, int64_t as, const T* panel, T* c,
    int64_t ldc, bool accumulate, const T* bias) {
  const int64_t step = UnitK ? as : 1;
  int64_t m = 0;
  for (; m + MR <= M; m += MR)
    gemm<T, UnitK>(MR, columns, K, a + m * step, as, panel, kPanel, c + m * ldc, ldc, accumulate, bias);
  if (m < M) gemm<T, UnitK>(M - m, columns, K, a + m * step, as, panel, kPanel, c + m * ldc, ldc, accumulate, bias);
}

// C[m0:m1] = A[m0:m1] B + bias, or += A[m0:m1] B.
template <class T>
inline void big_gemm(int64_t m0, int64_t m1, int64_t N, int64_t K, Operand<T> a, const T* packed, const T* bias, T* c,
    int64_t ldc, bool accumulate, T* scratch) {
  const bool direct = N <= 4 * kPanel;  // too few panels to pay for a copy: A is read where it stands
  const auto multiply = direct && !a.transposed ? &packed_rows<T, kTall, true> : &packed_rows<T, kTall, false>;
  for (int64_t m = m0; m < m1; m += kBlockM) {
    const int64_t rows = min64(kBlockM, m1 - m);
    for (int64_t k = 0; k < K || k == 0; k += kBlockK) {
      const int64_t depth = min64(kBlockK, K - k), ld = direct ? a.ld : rows;
      const T *from = a.data + (a.transposed ? k * a.ld + m : m * a.ld + k), *block = direct ? from : scratch;
      // The copy is (depth, rows): element (i, k) at scratch[k * rows + i].
      if (!direct && !a.transposed) transpose(rows, depth, from, a.ld, scratch, rows);
      for (int64_t j = 0; !direct && a.transposed && j < depth; ++j)
        for_vectors<T>(
            rows, [&](int64_t i, auto get, auto put) { put(scratch + j * rows + i, get(from + j * a.ld + i)); });
      for (int64_t n = 0; n < N; n += kPanel)
        multiply(rows, depth, min64(kPanel, N - n), block, ld, packed + n * K + k * kPanel, c + m * ldc + n, ldc,
            accumulate || k > 0, bias ? bias + n : nullptr);
    }
  }
}

}  // namespace kruify::KRUIFY_ISA

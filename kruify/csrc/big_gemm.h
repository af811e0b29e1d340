// GEMM over all steps at once (input projection and its gradients). On AMD machines torch's float32 GEMM stays at half
// of what AVX-512 offers, and it would be most of a layer's time.
#pragma once

#include "gemm.h"
#include "matrix.h"

namespace kruify::KRUIFY_ISA {

constexpr int64_t kBlockM = 96, kBlockK = 128;  // a block of A: kBigGemmScratch elements

inline int64_t packed_b_size(int64_t K, int64_t N) { return (N + kPanel - 1) / kPanel * kPanel * K; }

// Columns [n0, n1) of B into panels of kPanel columns, each (K, kPanel); n0 is a multiple of kPanel.
template <class T>
inline void pack_b(int64_t K, int64_t N, const T* b, int64_t rs, int64_t cs, T* packed, int64_t n0, int64_t n1) {
  for (int64_t n = n0; n < n1; n += kPanel) {
    T* panel = packed + n * K;
    const int64_t columns = min64(kPanel, N - n);
    if (rs == 1 && cs != 1) {
      transpose(columns, K, b + n * cs, cs, panel, kPanel);
    } else if (cs == 1) {
      for (int64_t k = 0; k < K; ++k)
        for_vectors<T>(
            columns, [&](int64_t j, auto get, auto put) { put(panel + k * kPanel + j, get(b + k * rs + n + j)); });
    } else {
      for (int64_t k = 0; k < K; ++k)
        for (int64_t j = 0; j < columns; ++j) panel[k * kPanel + j] = b[k * rs + (n + j) * cs];
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
inline void big_gemm(int64_t m0, int64_t m1, int64_t N, int64_t K, const T* a, int64_t rs, int64_t cs, const T* packed,
    const T* bias, T* c, int64_t ldc, bool accumulate, T* scratch) {
  for (int64_t m = m0; m < m1; m += kBlockM) {
    const int64_t rows = min64(kBlockM, m1 - m);
    for (int64_t k = 0; k < K || k == 0; k += kBlockK) {
      const int64_t depth = min64(kBlockK, K - k);
      const T* block = scratch;
      int64_t ld = rows;
      const bool direct = N <= 4 * kPanel && (rs == 1 || cs == 1);
      if (direct) {  // where it stands: too few panels to pay for a copy
        block = a + m * rs + k * cs, ld = cs == 1 ? rs : cs;
      } else if (cs == 1) {  // as (depth, rows): element (i, k) at scratch[k * rows + i]
        transpose(rows, depth, a + m * rs + k, rs, scratch, rows);
      } else if (rs == 1) {
        for (int64_t j = 0; j < depth; ++j)
          for_vectors<T>(
              rows, [&](int64_t i, auto get, auto put) { put(scratch + j * rows + i, get(a + (k + j) * cs + m + i)); });
      } else {
        for (int64_t j = 0; j < depth; ++j)
          for (int64_t i = 0; i < rows; ++i) scratch[j * rows + i] = a[(m + i) * rs + (k + j) * cs];
      }
      for (int64_t n = 0; n < N; n += kPanel) {
        const int64_t columns = min64(kPanel, N - n);
        T* out = c + m * ldc + n;
        const auto multiply = direct && cs == 1 ? &packed_rows<T, kTall, true> : &packed_rows<T, kTall, false>;
        multiply(rows, depth, columns, block, ld, packed + n * K + k * kPanel, out, ldc, accumulate || k > 0,
            bias ? bias + n : nullptr);
      }
    }
  }
}

}  // namespace kruify::KRUIFY_ISA

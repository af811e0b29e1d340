// C (M, N) = or += A (M, K) B (K, N): everything in this library is made of this product, with B's rows as vectors
// and A's elements as broadcast scalars. Where nothing accumulates, every row of C starts from `start`, or from 0.
// Element (i, k) of A is a[i * as + k] where UnitK, else a[k * as + i].
#pragma once

#include "simd.h"

namespace kruify::KRUIFY_ISA {

// One tile of MR rows and NV vectors in registers. Few accumulators are doubled up over k to hide the latency.
template <class T, int MR, int NV, bool UnitK, bool Tail>
KRUIFY_INLINE void tile(int64_t K, const T* a, int64_t as, const T* b, int64_t ldb, T* c, int64_t ldc, int tail,
    bool accumulate, const T* start) {
  constexpr int W = kWidth<T>;
  constexpr int KU = MR * NV >= 8 ? 1 : MR * NV >= 4 ? 2 : 4;
  Vec<T> acc[KU][MR][NV];
#pragma GCC unroll 32
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      if (accumulate)
        acc[0][i][j] = Tail && j == NV - 1 ? load_n(c + i * ldc + j * W, tail) : load(c + i * ldc + j * W);
      else if (start) acc[0][i][j] = Tail && j == NV - 1 ? load_n(start + j * W, tail) : load(start + j * W);
      else acc[0][i][j] = Vec<T>{};
      for (int u = 1; u < KU; ++u) acc[u][i][j] = Vec<T>{};
    }
  auto step = [&](int64_t k, Vec<T>(&out)[MR][NV]) __attribute__((always_inline)) {
    Vec<T> row[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j)
      row[j] = Tail && j == NV - 1 ? load_n(b + k * ldb + j * W, tail) : load(b + k * ldb + j * W);
#pragma GCC unroll 32
    for (int i = 0; i < MR; ++i) {
      const T s = UnitK ? a[i * as + k] : a[k * as + i];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) out[i][j] += s * row[j];
    }
  };
  int64_t k = 0;
  for (; k + KU <= K; k += KU)
#pragma GCC unroll 4
    for (int u = 0; u < KU; ++u) step(k + u, acc[u]);
  if (KU > 1)
    for (; k < K; ++k) step(k, acc[0]);
#pragma GCC unroll 32
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      for (int u = 1; u < KU; ++u) acc[0][i][j] += acc[u][i][j];
      if (Tail && j == NV - 1) store_n(c + i * ldc + j * W, acc[0][i][j], tail);
      else store(c + i * ldc + j * W, acc[0][i][j]);
    }
}

// All rows of one column panel: as many tiles of MR rows as fit, then smaller ones.
template <class T, int MR, int NV, bool UnitK, bool Tail>
KRUIFY_INLINE void panel(int64_t M, int64_t K, const T* a, int64_t as, const T* b, int64_t ldb, T* c, int64_t ldc,
    int tail, bool accumulate, const T* start) {
  const int64_t step = UnitK ? as : 1;
  int64_t m = 0;
  for (; m + MR <= M; m += MR)
    tile<T, MR, NV, UnitK, Tail>(K, a + m * step, as, b, ldb, c + m * ldc, ldc, tail, accumulate, start);
  if constexpr (MR > 1)
    if (m < M)
      panel<T, MR == 6 ? 4 : MR / 2, NV, UnitK, Tail>(
          M - m, K, a + m * step, as, b, ldb, c + m * ldc, ldc, tail, accumulate, start);
}

constexpr bool kManyRegisters = KRUIFY_REGISTERS == 32;
constexpr int kWide = kManyRegisters ? 4 : 2;  // vectors of the widest tile
constexpr int kTall = kManyRegisters ? 6 : 6;  // and its rows

template <class T, bool UnitK>
inline void gemm(int64_t M, int64_t N, int64_t K, const T* a, int64_t as, const T* b, int64_t ldb, T* c, int64_t ldc,
    bool accumulate, const T* start = nullptr) {
  constexpr int W = kWidth<T>;
  int64_t n = 0;
  auto from = [&](int64_t column) { return start ? start + column : nullptr; };
  if (M <= 2)  // a vector times a matrix: only width hides the latency
    for (; n + 8 * W <= N; n += 8 * W)
      panel<T, kManyRegisters ? 2 : 1, 8, UnitK, false>(M, K, a, as, b + n, ldb, c + n, ldc, 0, accumulate, from(n));
  for (; n + kWide * W <= N; n += kWide * W)
    panel<T, kTall, kWide, UnitK, false>(M, K, a, as, b + n, ldb, c + n, ldc, 0, accumulate, from(n));
  if constexpr (kWide > 2)
    if (n + 2 * W <= N) {
      panel<T, 8, 2, UnitK, false>(M, K, a, as, b + n, ldb, c + n, ldc, 0, accumulate, from(n));
      n += 2 * W;
    }
  if (n + W <= N) {
    panel<T, kManyRegisters ? 16 : 8, 1, UnitK, false>(M, K, a, as, b + n, ldb, c + n, ldc, 0, accumulate, from(n));
    n += W;
  }
  if (n < N)
    panel<T, kManyRegisters ? 16 : 8, 1, UnitK, true>(
        M, K, a, as, b + n, ldb, c + n, ldc, int(N - n), accumulate, from(n));
}

}  // namespace kruify::KRUIFY_ISA

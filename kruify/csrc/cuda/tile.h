// The arithmetic of the two-stage templates: one thread's tile of C[m][n] += sum_k A[m][k] B[n][k].
#pragma once

#include "host_device.h"

namespace kruify::cuda {

constexpr int kTileRows = 4;  // every tile has four rows, and two or four columns
constexpr int kPad = 4;  // floats behind each row in shared memory: 8 rows then start in 8 different groups of banks

// Both operands are rows of K consecutive floats, 16-byte aligned; a thread's rows lie `step` floats apart,
// neighbouring threads' rows next to each other, which keeps the 16-byte loads of a warp free of bank conflicts.
// `Turns` rounds of four k are unrolled.
template <int NT, int Turns>
KRUIFY_HD void tile_fma(
    const float* a, int a_step, const float* b, int b_step, int depth, float (&sum)[kTileRows][NT]) {
  KRUIFY_UNROLL_BY(Turns)
  for (int k = 0; k < depth; k += 4) {
    Quad left[kTileRows], right[NT];
    KRUIFY_UNROLL
    for (int i = 0; i < kTileRows; ++i) left[i] = load_quad(a + i * a_step + k);
    KRUIFY_UNROLL
    for (int j = 0; j < NT; ++j) right[j] = load_quad(b + j * b_step + k);
    KRUIFY_UNROLL
    for (int e = 0; e < 4; ++e) {
      KRUIFY_UNROLL
      for (int i = 0; i < kTileRows; ++i) {
        KRUIFY_UNROLL
        for (int j = 0; j < NT; ++j) sum[i][j] += left[i].v[e] * right[j].v[e];
      }
    }
  }
}

// Shapes known when the kernel is compiled: one of instantiations.h. The sizes are powers of two.
template <int Rows1, int Rows2> struct Square {
  static constexpr bool fixed = true;
  static constexpr int turns = 4;
  static constexpr int P1 = Rows1, Q1 = Rows1, P2 = Rows2, Q2 = Rows2;
};

// Any shapes that are multiples of four.
struct AnyShape {
  static constexpr bool fixed = false;
  static constexpr int turns = 2;  // more would spill
  int P1, Q1, P2, Q2;
};

struct Split {
  int quotient, remainder;
};

// Division by a size that is a power of two where the shapes are fixed; then `shift` is its logarithm.
template <class Shape> KRUIFY_HD Split split(int value, int size, int shift) {
  if constexpr (Shape::fixed) return {value >> shift, value & (size - 1)};
  else return {value / size, value % size};
}

}  // namespace kruify::cuda

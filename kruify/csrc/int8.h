// Matrices of eight-bit integers with one scale per row, as the CPU's operators and kernels see them: plain data.
#pragma once

#include "matrix.h"

namespace kruify {

// Rows in panels of as many as a vector has lanes of 32 bits, columns in groups of four: weights (panels, groups,
// lanes, 4). Rows and columns that fill up a panel or a group are zero.
struct Int8Panels {
  int64_t rows, groups;
  int64_t first;   // of the input's columns the one they begin at, a multiple of four
  float* scale;    // (panels * lanes,): a row's weights are scale * integers
  int32_t* start;  // (panels * lanes,): what a row's sum of products starts from
  int8_t* weights;
};

// W[g] = U[g], or U[g] V, where U[g] may take a part of V's rows alone.
struct Int8Matrix {
  int gates;
  int64_t rows, cols, rank;  // rank: rows of V, or 0 where there is none
  Int8Panels v, u[kMaxGates];

  int64_t depth() const { return rank ? rank : cols; }  // what U takes
};

constexpr int64_t kInt8Depth = 1 << 16;  // columns whose products an int32 can add up

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Scratch memory of a product with `count` vectors, in floats.
inline int64_t int8_scratch(const Int8Matrix& m, int64_t count) {
  return count * (round_up(m.cols > m.rank ? m.cols : m.rank, 64) / 4 + 16 + round_up(m.rank, 16)) + 64;
}

struct Int8Kernels {
  int64_t lanes;
  int32_t shift;  // what is added to every eight-bit activation before the products, to make it unsigned
  // y[g] (count rows, stride ys) += W[g] x, or = constant[g] + W[g] x, constant (gates * rows,)
  void (*multiply)(const Int8Matrix&, int64_t count, const float* x, int64_t xs, const float* constant, float* const* y,
      int64_t ys, float* scratch);
};

enum class Int8InstructionSet : int { kPortable, kAvx2, kAvxVnni, kAvx512Vnni, kDotProduct };
Int8InstructionSet int8_instruction_set();
const Int8Kernels& int8_kernels();

}  // namespace kruify

// What the CPU's operators and kernels share: the arguments of a layer, and the table of an instruction set's kernels.
#pragma once

#include "int8.h"

namespace kruify {

// One layer in one direction. Row of (t, b) in every (S, ...) array: starts[t] + b, less `first_row` in `gates` and
// `grad_gates`.
template <class T> struct Sequence {
  Kind kind;
  bool reverse, training;
  int64_t saved;  // columns of the workspace, in units of the hidden size
  int64_t steps, batch, hidden;
  const int64_t* sizes;
  const int64_t* starts;
  int64_t gates_ld, first_row;  // of `gates` or `grad_gates`
  int64_t together;             // samples that go through a product side by side
  Matrix<T> matrix;
  const Int8Matrix* int8;  // what is added to it, or null
  const T* threshold;      // of modReLU, or null: its bias, and not one of the matrix
  // forward
  T* gates;  // the input's share, overwritten by the activated gates
  T* h;      // (B, H) running state, in the end hT
  T* c;      // (B, H)
  T* out;    // (S, H)
  // backward
  const T* grad_out;  // (S, H) or null
  const T* workspace;
  const T* h0;
  const T* c0;
  const T* out_in;
  T* grad_gates;  // (rows, gates * H)
  T* grad_h;      // (B, H) running gradient, in the end grad_h0
  T* grad_c;
};

constexpr int64_t kTile = 16;  // samples that a thread takes through a product together

// A matrix with element (i, j) at data[i * ld + j], or at data[j * ld + i] where it is `transposed`.
template <class T> struct Operand {
  const T* data;
  int64_t ld;
  bool transposed;
};

// What one instruction set offers.
template <class T> struct Kernels {
  int64_t lanes;
  // Fills the packed copies of a matrix.
  void (*pack)(const Matrix<T>&);
  // y[g] (nb rows, stride ys) += W[g] x
  void (*product)(const Matrix<T>&, int64_t nb, const T* x, int64_t xs, T* const* y, int64_t ys, T* scratch);
  // out (gates * rows, cols) = W; and the gradients of what W is made of from that of W, in the operators' order.
  void (*dense)(const Matrix<T>&, T* out, T* scratch);
  void (*dense_backward)(const Matrix<T>&, const T* grad, T* const* grads, T* scratch);
  int64_t (*dense_scratch)(const Matrix<T>&);
  // dx (nb rows, stride dxs) += W^T dy, and the gradients' sums in `arena`
  void (*product_backward)(const Matrix<T>&, int64_t nb, const T* x, int64_t xs, T* const* dy, int64_t ys, T* dx,
      int64_t dxs, T* arena, T* scratch);
  // Writes an arena's sums out in the layout of the parameters; grads[i] in the operators' order.
  void (*unpack)(const Matrix<T>&, const T* arena, T* const* grads);
  // Steps [t0, t1) in time, samples [b0, b1).
  void (*forward)(const Sequence<T>&, int64_t t0, int64_t t1, int64_t b0, int64_t b1, T* scratch);
  void (*backward)(const Sequence<T>&, int64_t t0, int64_t t1, int64_t b0, int64_t b1, T* arena, T* scratch);
  // C[m0:m1] = A B + bias, or += A B, with B packed by pack_b.
  int64_t (*packed_b_size)(int64_t K, int64_t N);
  void (*pack_b)(int64_t K, int64_t N, Operand<T> b, T* packed, int64_t n0, int64_t n1);
  void (*big_gemm)(int64_t m0, int64_t m1, int64_t N, int64_t K, Operand<T> a, const T* packed, const T* bias, T* c,
      int64_t ldc, bool accumulate, T* scratch);
  // out = x w^T + bias for few rows, w (N, K) as it is.
  void (*thin_gemm)(int64_t rows, int64_t N, int64_t K, const T* x, const T* w, const T* bias, T* out, int64_t ldo);
  void (*axpy)(int64_t n, const T* x, T* y);  // y += x
};

constexpr int64_t kBigGemmScratch = 96 * (128 + 16);  // elements
constexpr int64_t kPanel = 64;                        // columns of a packed panel of B

enum class InstructionSet : int { kPortable, kAvx2, kAvx512 };
InstructionSet instruction_set();
template <class T> const Kernels<T>& kernels();

}  // namespace kruify

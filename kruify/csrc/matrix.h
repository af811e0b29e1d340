// A Kronecker matrix and the kinds of recurrence, as the kernels of both devices see them: plain data.
#pragma once

#include <stdint.h>

namespace kruify {

constexpr int kMaxGates = 8, kMaxStages = 3;

enum Precision : int { kFloat32, kTf32, kBf16 };  // as in ops/precision.py
enum Kind : int { kLstm, kGru, kRnnTanh, kRnnRelu, kModRelu, kModReluComplex };
constexpr const char* kKindNames[] = {"lstm", "gru", "rnn_tanh", "rnn_relu", "rnn_modrelu", "rnn_modrelu_complex"};

constexpr bool is_modrelu(Kind kind) { return kind == kModRelu || kind == kModReluComplex; }
constexpr int gates_of(Kind kind) { return kind == kLstm ? 4 : kind == kGru ? 3 : 1; }
// Columns of the workspace, in units of the hidden size.
constexpr int saved_of(Kind kind) { return kind == kLstm ? 5 : kind == kGru ? 4 : is_modrelu(kind) ? 1 : 0; }
constexpr int rows_per_bias(Kind kind) { return kind == kModReluComplex ? 2 : 1; }

enum class TermKind : int {
  kDense,    // one stage: a plain matrix
  kLowRank,  // (P x 1) (x) (1 x Q): two thin products
  kPair,     // two stages
  kChain,    // three stages
};

// W[gate] += sum_r stage0[g, r] (x) stage1[g, r] (x) ..., each stage (gates, rank, p, q). Gates may share the trailing
// stage of two or three, on CUDA that of outer products: it is then that of one gate, and so is what it makes of x.
template <class T> struct Term {
  int stages, gates, rank;
  bool shared;  // the trailing stage
  int gate[kMaxGates];
  int64_t p[kMaxStages], q[kMaxStages];
  const T* w[kMaxStages];
  TermKind kind;
  // For the CPU's kernels. `packed` is the stage as the forward pass reads it: the trailing one as (q, gates, rank, p),
  // the others as (gates, rank, q, p). `grad` is the offset of the gradient's sum in a thread's arena.
  T* packed[kMaxStages];
  int64_t grad[kMaxStages];

  int64_t products() const { return int64_t(gates) * rank; }
  int64_t trailing() const { return shared ? rank : products(); }  // products that the trailing stage tells apart
  int64_t place(int64_t product) const { return shared ? product % rank : product; }  // among those
  bool again(int64_t product) const { return shared && product >= rank; }  // whether another gate was there before
  int64_t size(int f) const { return (f == stages - 1 ? trailing() : products()) * p[f] * q[f]; }
};

// Blocks of `block` consecutive rows of one column, ascending by row; null where there are none.
template <class T> struct SparseResidual {
  const T* values;       // (blocks, block)
  const int32_t* index;  // (blocks, 2): first row of all gates' rows, column
  int blocks, block;
  // For the CPU's kernels, of single entries: as many rows as a vector has lanes side by side, in slices of rows of
  // like length; null where they were not made.
  int slices;
  const int* slice_start;  // (slices + 1,): in vectors of entries
  const int* slice_row;    // (slices * lanes, 2): gate and row, gate -1 where there is none
  const T* slice_values;   // (vectors, lanes), 0 where a row has ended
  const uint16_t* slice_columns;
  // For the CUDA kernels, on the device.
  const int* row_start;  // (rows + 1,) first block that starts at or below a row
  const int* by_column;  // the columns in ascending order
  const int64_t* blocks_by_column;
};

// All terms of outer products as two thin matrices: gate g is second[g] first[set of g], all gates of one set where
// they have `first` in common, else each of its own.
template <class T> struct LowRank {
  int sets, rank;           // rank 0: not made, or no such term
  const T *first, *second;  // (sets, rank, cols), (gates, rows, rank)
};

template <class T> struct Matrix {
  int gates;
  int64_t rows, cols;  // per gate
  int terms;
  Term<T>* term;
  int diagonal_gates;
  int diagonal_gate[kMaxGates];
  int64_t diagonal_size;
  const T* diagonal;  // (diagonal gates, diagonal_size), null where there is none
  SparseResidual<T> residual;
  const T* bias;  // (bias_size,), null where there is none
  int64_t bias_size;
  // For the CPU's kernels: offsets in a thread's arena of gradients and its size, and the elements of scratch that a
  // product with kTile samples needs, forward or backward.
  int64_t grad_diagonal, grad_residual, grad_bias, grad_size, scratch;
  LowRank<T> low_rank;  // for the CUDA kernels, on the device

  const Term<T>* begin() const { return term; }
  const Term<T>* end() const { return term + terms; }
};

}  // namespace kruify

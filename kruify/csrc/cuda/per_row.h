// Work on all rows of a matrix at once, one item per thread, for what the templates do not take: a stage of the
// product and its gradients, diagonal, sparse residual, previous states. An item is an index; the launch runs over all
// of them.
#pragma once

#include "general.h"

namespace kruify::cuda {

constexpr int64_t kThreadsWanted = 200000;  // enough to occupy any chip

// In how many pieces a sum over rows is taken where it has `items` results.
inline int64_t pieces_for(int64_t rows, int64_t items) {
  return greatest(1, least(least(rows, 512), kThreadsWanted / greatest(1, items)));
}

// Where the vectors of a (row, pair) start: pair = gate index * rank + r.
template <class T> struct View {
  T* data;
  int64_t row, pair, gate;  // strides; gate: of the layout's gate number
  KRUIFY_HD T* at(int64_t r, int p, int g) const { return data + r * row + p * pair + g * gate; }
};

enum Sum : int { kEach = 0, kRank = 1, kAll = 2 };

// out (+)= stage(in), for each pair, or summed over ranks, or over all pairs.
template <class T> struct ApplyStage {
  Op<T> op;
  bool transposed, accumulate;
  Sum sum;
  int gates, rank;
  int gate[kMaxGates];
  View<const T> in;
  View<T> out;
  int64_t rows;

  KRUIFY_HD int size() const { return transposed ? op.in() : op.out(); }
  KRUIFY_HD int groups() const { return sum == kEach ? gates * rank : sum == kRank ? gates : 1; }
  KRUIFY_HD int64_t items() const { return rows * groups() * size(); }
  KRUIFY_HD void run(int64_t item) const {
    const int i = static_cast<int>(item % size()), group = static_cast<int>(item / size() % groups());
    const int64_t row = item / size() / groups();
    const int count = gates * rank / groups();
    T total = 0;
    for (int pair = group * count; pair < (group + 1) * count; ++pair) {
      const T* from = in.at(row, pair, gate[pair / rank]);
      total += transposed ? op.apply_transposed(pair, from, i) : op.apply(pair, from, i);
    }
    const int first = group * count;
    T& to = out.at(row, first, gate[first / rank])[i];
    to = accumulate ? to + total : total;
  }
};

// Parts of a stage's gradient: part[piece, pair, p, q] = sum over the piece's rows, a, b of d[a, p, b] x[a, q, b].
template <class T> struct StageGradient {
  Op<T> op;
  int gates, rank;
  int gate[kMaxGates];
  View<const T> d, x;
  T* part;
  int64_t rows, pieces;

  KRUIFY_HD int64_t items() const { return pieces * gates * rank * op.P * op.Q; }
  KRUIFY_HD void run(int64_t item) const {
    const int q = static_cast<int>(item % op.Q), p = static_cast<int>(item / op.Q % op.P);
    const int pair = static_cast<int>(item / op.Q / op.P % (gates * rank));
    const int64_t piece = item / op.Q / op.P / (gates * rank);
    T total = 0;
    for (int64_t row = rows * piece / pieces; row < rows * (piece + 1) / pieces; ++row) {
      const T *left = d.at(row, pair, gate[pair / rank]), *right = x.at(row, pair, gate[pair / rank]);
      for (int a = 0; a < op.a; ++a)
        for (int b = 0; b < op.b; ++b)
          total += left[(static_cast<int64_t>(a) * op.P + p) * op.b + b] *
              right[(static_cast<int64_t>(a) * op.Q + q) * op.b + b];
    }
    part[item] = total;
  }
};

// y[row, e] (+)= bias[e] + diagonal + sparse residual: where a product starts.
template <class T> struct StartProduct {
  const T *bias, *x;
  Diagonal<T> diagonal;
  SparseResidual<T> residual;
  T* y;
  int64_t rows;
  int gates, height, width, diagonal_size;
  bool accumulate;

  KRUIFY_HD int64_t items() const { return rows * gates * height; }
  KRUIFY_HD void run(int64_t item) const {
    const int e = static_cast<int>(item % (static_cast<int64_t>(gates) * height)), g = e / height, i = e % height;
    const T* from = x + item / (static_cast<int64_t>(gates) * height) * width;
    T sum = bias ? bias[e] : T(0);
    if (const T* d = i < diagonal_size ? diagonal.of(g, diagonal_size) : nullptr) sum += d[i] * from[i];
    if (residual.values) sum += row_product(residual, e, from);
    y[item] = accumulate ? y[item] + sum : sum;
  }
};

// grad_x[row, i] (+)= what reaches it by diagonal and sparse residual.
template <class T> struct StartGradient {
  const T* grad;
  Diagonal<T> diagonal;
  SparseResidual<T> residual;
  T* grad_x;
  int64_t rows;
  int gates, height, width, diagonal_size;
  bool accumulate;

  KRUIFY_HD int64_t items() const { return rows * width; }
  KRUIFY_HD void run(int64_t item) const {
    const int i = static_cast<int>(item % width);
    const T* from = grad + item / width * gates * height;
    T sum = 0;
    for (int g = 0; i < diagonal_size && g < gates; ++g)
      if (const T* d = diagonal.of(g, diagonal_size)) sum += d[i] * from[static_cast<int64_t>(g) * height + i];
    if (residual.values) sum += column_product(residual, i, from);
    grad_x[item] = accumulate ? grad_x[item] + sum : sum;
  }
};

// part[piece, i] = sum over the piece's rows of term(row, i).
template <class T, class Term> struct RowSums {
  Term term;
  T* part;
  int64_t rows, pieces, size;
  KRUIFY_HD int64_t items() const { return pieces * size; }
  KRUIFY_HD void run(int64_t item) const {
    const int64_t piece = item / size, i = item % size;
    T sum = 0;
    for (int64_t row = rows * piece / pieces; row < rows * (piece + 1) / pieces; ++row) sum += term(row, i);
    part[item] = sum;
  }
};

// The terms of the gradients of a bias, the diagonal, the sparse residual's values and modReLU's bias.
template <class T> struct RowEntry {
  const T* x;  // (rows, size)
  int64_t size;
  KRUIFY_HD T operator()(int64_t row, int64_t i) const { return x[row * size + i]; }
};

template <class T> struct DiagonalGradient {
  const T *grad, *x;
  int gates, height, width, diagonal_size;
  int gate[kMaxGates];  // of each row of the diagonal
  KRUIFY_HD T operator()(int64_t row, int64_t item) const {
    const int i = static_cast<int>(item % diagonal_size), k = static_cast<int>(item / diagonal_size);
    return grad[(row * gates + gate[k]) * height + i] * x[row * width + i];
  }
};

template <class T> struct SparseGradient {
  const T *grad, *x;
  const int* index;
  int block, stride, width;
  KRUIFY_HD T operator()(int64_t row, int64_t item) const {
    const int i = static_cast<int>(item % block), k = static_cast<int>(item / block);
    return grad[row * stride + index[2 * k] + i] * x[row * width + index[2 * k + 1]];
  }
};

// What passed along z. Complex units have their imaginary parts `units` behind.
template <class T> struct ThresholdGradient {
  const T *grad, *z;  // (rows, size)
  int64_t size, units;
  KRUIFY_HD T operator()(int64_t row, int64_t i) const {
    const T *d = grad + row * size + i, *at = z + row * size + i;
    const T re = at[0], im = units < size ? at[units] : T(0), length = magnitude(re, im);
    if (length == T(0)) return 0;
    return d[0] * (re / length) + (units < size ? d[units] * (im / length) : T(0));
  }
};

// row_start[row] = the first block whose first row is `row` or below it. An index that would lead out of the matrix is
// refused here, before any other kernel reads it: the host would have to wait for the device to look at it.
struct SparseRows {
  const int* index;
  int* row_start;
  int blocks, block, gates, height, width;
  KRUIFY_HD int rows() const { return gates * height; }
  KRUIFY_HD int64_t items() const { return greatest(rows() + 1, blocks); }
  KRUIFY_HD void run(int64_t item) const {
    if (item < blocks) {
      const int row = index[2 * item], column = index[2 * item + 1];
      demand(row >= 0 && row < rows() && row % height + block <= height && column >= 0 && column < width,
          "kruify: a block of the sparse residual lies outside its gate");
      demand(item == 0 || index[2 * item - 2] <= row, "kruify: the sparse residual's index does not ascend by rows");
    }
    if (item > rows()) return;
    const int64_t row = item;
    int low = 0, high = blocks;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (index[2 * middle] < row) low = middle + 1;
      else high = middle;
    }
    row_start[row] = low;
  }
};

// The state that each row started from.
template <class T> struct PreviousStates {
  const T *out, *h0;
  T* before;
  Rows rows;
  int hidden;
  KRUIFY_HD int64_t items() const { return static_cast<int64_t>(rows.steps) * rows.batch * hidden; }
  KRUIFY_HD void run(int64_t item) const {
    const int i = static_cast<int>(item % hidden), sample = static_cast<int>(item / hidden % rows.batch);
    const int n = static_cast<int>(item / hidden / rows.batch), length = rows.length(sample);
    if (n >= length) return;
    before[rows.row(n, sample, length) * hidden + i] =
        n ? out[rows.row(n - 1, sample, length) * hidden + i] : h0[static_cast<int64_t>(sample) * hidden + i];
  }
};

// Adds parts in order: out[k, i] (+)= sum over pieces of part[k, piece, i].
template <class T> struct SumParts {
  const T* part;
  T* out;
  int64_t outer, pieces, size;
  bool accumulate;
  KRUIFY_HD int64_t items() const { return outer * size; }
  KRUIFY_HD void run(int64_t item) const {
    const T* from = part + item / size * pieces * size + item % size;
    T sum = accumulate ? out[item] : T(0);
    for (int64_t k = 0; k < pieces; ++k) sum += from[k * size];
    out[item] = sum;
  }
};

// The unit vectors first, first + 1, ... as rows.
template <class T> struct UnitRows {
  T* out;
  int64_t rows, first, size;
  KRUIFY_HD int64_t items() const { return rows * size; }
  KRUIFY_HD void run(int64_t item) const { out[item] = item % size == first + item / size ? T(1) : T(0); }
};

// to[i, first + row] = from[row, i]: columns of a dense matrix from its products with unit vectors.
template <class T> struct Columns {
  const T* from;
  T* to;
  int64_t rows, first, size, cols;
  KRUIFY_HD int64_t items() const { return rows * size; }
  KRUIFY_HD void run(int64_t item) const { to[item % size * cols + first + item / size] = from[item]; }
};

// y[row, e] = x[row, e] + bias[e] (null: 0): ready-made gates that still lack their bias.
template <class T> struct AddBias {
  const T *x, *bias;
  T* y;
  int64_t rows, size;
  KRUIFY_HD int64_t items() const { return rows * size; }
  KRUIFY_HD void run(int64_t item) const { y[item] = bias ? x[item] + bias[item % size] : x[item]; }
};

// Numbers from the host into device memory by way of a launch's parameters, so that a CUDA graph keeps them.
struct Upload {
  static constexpr int kMost = 960;
  int values[kMost];
  int count;
  int* to;
  KRUIFY_HD int64_t items() const { return count; }
  KRUIFY_HD void run(int64_t item) const { to[item] = values[item]; }
};

}  // namespace kruify::cuda

// Many small factors multiplied into one stage, one element per thread, and the derivative: `merge`.
#pragma once

#include <vector>

#include "per_row.h"

namespace kruify::cuda {

constexpr int kMaxFactors = 48;  // of one stage, the scale counted; factors above 1x1 are 31 at most

// The product of `count` factors, each (pairs, P, Q); a scale is a factor of 1x1.
template <class T> struct Chain {
  const T* factor[kMaxFactors];
  int P[kMaxFactors], Q[kMaxFactors];
  int count = 0, pairs = 0, rows = 1, cols = 1;

  void add(const T* data, int64_t p, int64_t q) {
    factor[count] = data, P[count] = static_cast<int>(p), Q[count++] = static_cast<int>(q);
    rows *= static_cast<int>(p), cols *= static_cast<int>(q);
  }
  // Element (row, column) of the product without factor `left_out` (-1: of all).
  KRUIFY_HD T element(int pair, int row, int column, int left_out) const {
    T product = 1;
    for (int k = count - 1; k >= 0; --k) {
      if (k != left_out) product *= factor[k][(static_cast<int64_t>(pair) * P[k] + row % P[k]) * Q[k] + column % Q[k]];
      row /= P[k], column /= Q[k];
    }
    return product;
  }
};

template <class T> struct MergeChain {
  Chain<T> chain;
  T* out;  // (pairs, rows, cols)
  KRUIFY_HD int64_t items() const { return static_cast<int64_t>(chain.pairs) * chain.rows * chain.cols; }
  KRUIFY_HD void run(int64_t item) const {
    const int column = static_cast<int>(item % chain.cols), row = static_cast<int>(item / chain.cols % chain.rows);
    out[item] = chain.element(static_cast<int>(item / chain.cols / chain.rows), row, column, -1);
  }
};

// Parts of the gradient of factor `which`: part[piece, pair, p, q], each over its share of the elements that hold (p,
// q).
template <class T> struct ChainGradient {
  Chain<T> chain;
  int which, below, beside;  // rows and columns of the factors behind `which`
  const T* grad;             // (pairs, rows, cols)
  T* part;
  int64_t pieces;

  KRUIFY_HD int64_t size() const { return static_cast<int64_t>(chain.pairs) * chain.P[which] * chain.Q[which]; }
  KRUIFY_HD int64_t items() const { return pieces * size(); }
  KRUIFY_HD void run(int64_t item) const {
    const int P = chain.P[which], Q = chain.Q[which], q = static_cast<int>(item % Q),
              p = static_cast<int>(item / Q % P);
    const int pair = static_cast<int>(item % size() / Q / P), across = chain.cols / Q;
    const int64_t piece = item / size(), elements = static_cast<int64_t>(chain.rows / P) * across;
    T sum = 0;
    for (int64_t e = elements * piece / pieces; e < elements * (piece + 1) / pieces; ++e) {
      const int r = static_cast<int>(e / across), c = static_cast<int>(e % across);
      const int row = (r / below * P + p) * below + r % below, column = (c / beside * Q + q) * beside + c % beside;
      sum += grad[(static_cast<int64_t>(pair) * chain.rows + row) * chain.cols + column] *
          chain.element(pair, row, column, which);
    }
    part[item] = sum;
  }
};

// The gradients of all factors of a chain, each into its place in `to`.
template <class T, class Machine>
void chain_backward(Machine& machine, const Chain<T>& chain, const T* grad, const std::vector<T*>& to) {
  int below = 1, beside = 1;
  for (int k = chain.count - 1; k >= 0; --k) {
    ChainGradient<T> item{chain, k, below, beside, grad, nullptr, 1};
    const int64_t elements = static_cast<int64_t>(chain.rows / chain.P[k]) * (chain.cols / chain.Q[k]);
    item.pieces = pieces_for((elements + 15) / 16, item.size());
    item.part = machine.template scratch<T>(item.items());
    machine.run(item);
    machine.run(SumParts<T>{item.part, to[k], 1, item.pieces, item.size(), false});
    below *= chain.P[k], beside *= chain.Q[k];
  }
}

}  // namespace kruify::cuda

// The parts of a matrix beside its terms, as the kernels read them.
#pragma once

#include "../matrix.h"
#include "host_device.h"

namespace kruify::cuda {

template <class T> int height_of(const Matrix<T>& m) { return m.gates * static_cast<int>(m.rows); }

template <class T> struct Diagonal {
  const T* values = nullptr;  // (diagonal gates, size), or null
  int row[kMaxGates] = {};    // of a gate, or -1
  KRUIFY_HD const T* of(int gate, int size) const {
    return values && row[gate] >= 0 ? values + static_cast<int64_t>(row[gate]) * size : nullptr;
  }
};

template <class T> Diagonal<T> diagonal_of(const Matrix<T>& m) {
  Diagonal<T> d{m.diagonal, {}};
  for (int& row : d.row) row = -1;
  for (int k = 0; k < m.diagonal_gates; ++k) d.row[m.diagonal_gate[k]] = k;
  return d;
}

// Row `row` of the sparse residual times x.
template <class T> KRUIFY_HD T row_product(const SparseResidual<T>& s, int row, const T* x) {
  T sum = 0;
  const int above = row - s.block + 1;
  for (int k = s.row_start[above > 0 ? above : 0]; k < s.row_start[row + 1]; ++k)
    sum += s.values[static_cast<int64_t>(k) * s.block + row - s.index[2 * k]] * x[s.index[2 * k + 1]];
  return sum;
}

// Column `column` of the sparse residual times y: its blocks lie together in blocks_by_column.
template <class T> KRUIFY_HD T column_product(const SparseResidual<T>& s, int column, const T* y) {
  int low = 0, high = s.blocks;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (s.by_column[middle] < column) low = middle + 1;
    else high = middle;
  }
  T sum = 0;
  for (; low < s.blocks && s.by_column[low] == column; ++low) {
    const int64_t k = s.blocks_by_column[low];
    for (int i = 0; i < s.block; ++i) sum += s.values[k * s.block + i] * y[s.index[2 * k] + i];
  }
  return sum;
}

}  // namespace kruify::cuda

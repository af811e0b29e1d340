// The sparse residual: blocks of `block` consecutive rows of one column.
//
// One sample leaves most lanes of a vector idle where blocks are short. With several samples the lanes are the samples:
// x, y and dy are transposed to (element, sample) once per call, and every number of the sparse residual is one
// multiply-add.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace kruify::KRUIFY_ISA {

// Whether lanes over samples beat lanes over the rows of a block, transposing included.
template <class T> inline bool samples_in_lanes(const SparseResidual<T>& r, int64_t nb) {
  return nb * ((r.block + kWidth<T> - 1) / kWidth<T>) >= int64_t(2) * r.block;
}

// to (n, kWidth) = x (nb, n) transposed; lanes beyond nb are zero.
template <class T> inline void samples_to_lanes(int64_t nb, int64_t n, const T* x, int64_t xs, T* to) {
  if (nb < kWidth<T>)
    for (int64_t i = 0; i < n; ++i) store(to + i * kWidth<T>, Vec<T>{});
  transpose(nb, n, x, xs, to, int64_t(kWidth<T>));
}

// y (nb, n) += from (n, kWidth) transposed.
template <class T> inline void add_lanes(int64_t nb, int64_t n, const T* from, T* y, int64_t ys) {
  constexpr int W = kWidth<T>;
  T part[W * W];
  for (int64_t i = 0; i < n; i += W) {
    const int count = int(min64(W, n - i));
    transpose(int64_t(count), int64_t(W), from + i * W, int64_t(W), part, int64_t(W));
    for (int64_t s = 0; s < nb; ++s)
      store_n(y + s * ys + i, load_n(y + s * ys + i, count) + load_n(part + s * W, count), count);
  }
}

// Blocks of one set of rows follow each other: they add up in a register before they touch memory.
template <class T, class F> KRUIFY_INLINE void for_runs(const SparseResidual<T>& r, F f) {
  for (int64_t first = 0, next; first < r.blocks; first = next) {
    next = first + 1;
    while (next < r.blocks && r.index[2 * next] == r.index[2 * first]) ++next;
    f(int64_t(r.index[2 * first]), first, next);
  }
}

template <class T>
inline void sparse_in_lanes(
    const Matrix<T>& m, int64_t nb, const T* x, int64_t xs, T* const* y, int64_t ys, T* scratch) {
  const SparseResidual<T> r = m.residual;  // a copy stays in registers
  constexpr int W = kWidth<T>;
  T *xt = scratch, *yt = xt + m.cols * W;
  samples_to_lanes(nb, m.cols, x, xs, xt);
  for (int64_t i = 0; i < m.gates * m.rows; ++i) store(yt + i * W, Vec<T>{});
  for_runs(r, [&](int64_t row, int64_t first, int64_t next) __attribute__((always_inline)) {
    for (int64_t i = 0; i < r.block; ++i) {
      Vec<T> even = load(yt + (row + i) * W), odd{};
      int64_t b = first;
      for (; b + 1 < next; b += 2) {
        even += r.values[b * r.block + i] * load(xt + r.index[2 * b + 1] * W);
        odd += r.values[(b + 1) * r.block + i] * load(xt + r.index[2 * b + 3] * W);
      }
      if (b < next) even += r.values[b * r.block + i] * load(xt + r.index[2 * b + 1] * W);
      store(yt + (row + i) * W, even + odd);
    }
  });
  for (int g = 0; g < m.gates; ++g) add_lanes(nb, m.rows, yt + g * m.rows * W, y[g], ys);
}

// Blocks of one number, one sample: a plain sparse product.
template <class T> inline void sparse_single(const Matrix<T>& m, const T* x, T* const* y) {
  const SparseResidual<T> r = m.residual;
  for_runs(r, [&](int64_t row, int64_t first, int64_t next) __attribute__((always_inline)) {
    T total[4] = {};
    int64_t b = first;
    for (; b + 4 <= next; b += 4)
      for (int k = 0; k < 4; ++k) total[k] += r.values[b + k] * x[r.index[2 * (b + k) + 1]];
    for (; b < next; ++b) total[0] += r.values[b] * x[r.index[2 * b + 1]];
    y[row / m.rows][row % m.rows] += (total[0] + total[1]) + (total[2] + total[3]);
  });
}

// The same in slices: a lane is a row.
template <class T> inline void sparse_slices(const Matrix<T>& m, const T* x, T* const* y) {
  const SparseResidual<T> r = m.residual;
  constexpr int W = kWidth<T>;
  for (int s = 0; s < r.slices; ++s) {
    Vec<T> total{};
    for (int64_t k = r.slice_start[s]; k < r.slice_start[s + 1]; ++k) {
      const uint16_t* column = r.slice_columns + k * W;
      Vec<T> v;
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) v[i] = x[column[i]];  // faster than a gather
      const Vec<T> value = load(r.slice_values + k * W), zero{};
      total += (value != zero ? v : zero) * value;  // x may be infinite where a row has ended
    }
    const int* row = r.slice_row + 2 * s * W;
    for (int i = 0; i < W; ++i)
      if (row[2 * i] >= 0) y[row[2 * i]][row[2 * i + 1]] += total[i];
  }
}

template <class T>
inline void sparse_in_rows(const Matrix<T>& m, int64_t nb, const T* x, int64_t xs, T* const* y, int64_t ys) {
  const SparseResidual<T> r = m.residual;
  for_runs(r, [&](int64_t row, int64_t first, int64_t next) __attribute__((always_inline)) {
    T* out = y[row / m.rows] + row % m.rows;
    for (int64_t s = 0; s < nb; ++s)
      for (int64_t i = 0; i < r.block; i += kWidth<T>) {
        const int lanes = int(min64(kWidth<T>, r.block - i));
        Vec<T> even = load_n(out + s * ys + i, lanes), odd{};
        int64_t b = first;
        for (; b + 1 < next; b += 2) {
          even += x[s * xs + r.index[2 * b + 1]] * load_n(r.values + b * r.block + i, lanes);
          odd += x[s * xs + r.index[2 * b + 3]] * load_n(r.values + (b + 1) * r.block + i, lanes);
        }
        if (b < next) even += x[s * xs + r.index[2 * b + 1]] * load_n(r.values + b * r.block + i, lanes);
        store_n(out + s * ys + i, even + odd, lanes);
      }
  });
}

// y[g] += S[g] x
template <class T>
inline void product_sparse(
    const Matrix<T>& m, int64_t nb, const T* x, int64_t xs, T* const* y, int64_t ys, T* scratch) {
  const SparseResidual<T> r = m.residual;
  T* part[kMaxGates];
  for (int64_t s = 0; s < nb; s += kWidth<T>) {
    const int64_t count = min64(kWidth<T>, nb - s);
    for (int g = 0; g < m.gates; ++g) part[g] = y[g] + s * ys;
    if (samples_in_lanes(r, count)) sparse_in_lanes(m, count, x + s * xs, xs, part, ys, scratch);
    else if (r.slices && count == 1) sparse_slices(m, x + s * xs, part);
    else if (r.block == 1 && count == 1) sparse_single(m, x + s * xs, part);
    else sparse_in_rows(m, count, x + s * xs, xs, part, ys);
  }
}

template <class T>
inline void backward_sparse_in_lanes(const Matrix<T>& m, int64_t nb, const T* x, int64_t xs, T* const* dy, int64_t ys,
    T* dx, int64_t dxs, T* sums, T* scratch) {
  const SparseResidual<T> r = m.residual;
  constexpr int W = kWidth<T>;
  T *xt = scratch, *dxt = xt + m.cols * W, *dyt = dxt + m.cols * W;
  samples_to_lanes(nb, m.cols, x, xs, xt);
  for (int g = 0; g < m.gates; ++g) samples_to_lanes(nb, m.rows, dy[g], ys, dyt + g * m.rows * W);
  for (int64_t i = 0; i < m.cols; ++i) store(dxt + i * W, Vec<T>{});
  for_runs(r, [&](int64_t row, int64_t first, int64_t next) __attribute__((always_inline)) {
    for (int64_t i = 0; i < r.block; ++i) {
      const Vec<T> d = load(dyt + (row + i) * W);
      for (int64_t b = first; b < next; ++b) {
        const int64_t column = r.index[2 * b + 1] * W;
        store(dxt + column, load(dxt + column) + r.values[b * r.block + i] * d);
        sums[b * r.block + i] += sum<T>(d * load(xt + column));
      }
    }
  });
  add_lanes(nb, m.cols, dxt, dx, dxs);
}

template <class T> inline void backward_sparse_in_rows(const Matrix<T>& m, const T* x, T* const* dy, T* dx, T* sums) {
  const SparseResidual<T> r = m.residual;
  if (r.block == 1) {
    for_runs(r, [&](int64_t row, int64_t first, int64_t next) __attribute__((always_inline)) {
      const T d = dy[row / m.rows][row % m.rows];
      for (int64_t b = first; b < next; ++b) {
        sums[b] += x[r.index[2 * b + 1]] * d;
        dx[r.index[2 * b + 1]] += r.values[b] * d;
      }
    });
    return;
  }
  for (int64_t b = 0; b < r.blocks; ++b) {
    const int64_t row = r.index[2 * b], column = r.index[2 * b + 1];
    const T *d = dy[row / m.rows] + row % m.rows, *v = r.values + b * r.block;
    Vec<T> total{};
    for (int64_t i = 0; i < r.block; i += kWidth<T>) {
      const int lanes = int(min64(kWidth<T>, r.block - i));
      const Vec<T> g = load_n(d + i, lanes);
      total += g * load_n(v + i, lanes);
      store_n(sums + b * r.block + i, load_n(sums + b * r.block + i, lanes) + x[column] * g, lanes);
    }
    dx[column] += sum<T>(total);
  }
}

// dx += sum_g S[g]^T dy[g]; sums (blocks, block) grow by these samples' share of the gradient.
template <class T>
inline void backward_sparse(const Matrix<T>& m, int64_t nb, const T* x, int64_t xs, T* const* dy, int64_t ys, T* dx,
    int64_t dxs, T* sums, T* scratch) {
  const SparseResidual<T> r = m.residual;
  T* part[kMaxGates];
  for (int64_t s = 0; s < nb; s += kWidth<T>) {
    const int64_t count = min64(kWidth<T>, nb - s);
    for (int g = 0; g < m.gates; ++g) part[g] = dy[g] + s * ys;
    if (samples_in_lanes(r, count)) {
      backward_sparse_in_lanes(m, count, x + s * xs, xs, part, ys, dx + s * dxs, dxs, sums, scratch);
      continue;
    }
    for (int64_t i = 0; i < count; ++i) {
      T* one[kMaxGates];
      for (int g = 0; g < m.gates; ++g) one[g] = part[g] + i * ys;
      backward_sparse_in_rows(m, x + (s + i) * xs, one, dx + (s + i) * dxs, sums);
    }
  }
}

}  // namespace kruify::KRUIFY_ISA

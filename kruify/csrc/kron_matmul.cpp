// The operators `kron_matmul` and `kron_matmul_backward`: the product of a Kronecker matrix with many rows.
#include <algorithm>
#include <tuple>

#include "linear.h"

namespace kruify {
namespace {

int64_t rows_of(const Tensor& x, int64_t columns) {
  STD_TORCH_CHECK(
      x.dim() >= 1 && x.size(x.dim() - 1) == columns, "kruify::kron_matmul: x must have ", columns, " columns");
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows = times(rows, x.size(d));
  return rows;
}

template <class T>
Tensor run(const Tensor& x_given, const std::vector<Tensor>& stages, const Optional& diagonal, const Optional& sparse,
    const Optional& index, const Optional& bias, const std::vector<int64_t>& layout) {
  const auto dtype = x_given.scalar_type();
  CheckedMatrix<T> w(stages, diagonal, sparse, index, bias, layout, dtype);
  const Matrix<T>& m = w.matrix;
  const int64_t rows = rows_of(x_given, m.cols), width = times(m.gates, m.rows);
  const Tensor x = x_given.is_contiguous() ? x_given : torch::stable::contiguous(x_given);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = width;
  Tensor y = empty_like(x, shape.data(), x.dim());
  Buffer<T> packed(w.packed_size);
  w.pack(packed.data());
  const int64_t tile = m.sparse ? kTile : 8, tiles = (rows + tile - 1) / tile;
  const int64_t workers = rows * width < (1 << 14) ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), tiles);
  Buffer<T> scratch(workers * m.scratch);
  parallel(workers, [&](int64_t worker) {
    for (int64_t i = worker; i < tiles; i += workers) {
      const int64_t first = i * tile, nb = std::min(tile, rows - first);
      T* out = mutable_pointer<T>(y) + first * width;
      T* gates[kMaxGates];
      for (int g = 0; g < m.gates; ++g) gates[g] = out + g * m.rows;
      for (int64_t r = 0; r < nb; ++r)
        if (m.bias) std::copy_n(m.bias, width, out + r * width);
        else std::fill_n(out + r * width, width, T(0));
      kernels<T>().product(
          m, nb, pointer<T>(x) + first * m.cols, m.cols, gates, width, scratch.data() + worker * m.scratch);
    }
  });
  return y;
}

Tensor kron_matmul(const Tensor& x, const std::vector<Tensor>& stages, const Optional& diagonal, const Optional& sparse,
    const Optional& index, const Optional& bias, const std::vector<int64_t>& layout, int64_t precision) {
  check_precision(precision);
  const bool single = floating("kron_matmul", x) == torch::headeronly::ScalarType::Float;
  return (single ? &run<float> : &run<double>)(x, stages, diagonal, sparse, index, bias, layout);
}

using Gradients = std::tuple<Tensor, std::vector<Tensor>>;

template <class T>
Gradients run_backward(const Tensor& grad_given, const Tensor& x_given, const std::vector<Tensor>& stages,
    const Optional& diagonal, const Optional& sparse, const Optional& index, const Optional& bias,
    const std::vector<int64_t>& layout) {
  const auto dtype = x_given.scalar_type();
  CheckedMatrix<T> w(stages, diagonal, sparse, index, bias, layout, dtype);
  const Matrix<T>& m = w.matrix;
  const int64_t rows = rows_of(x_given, m.cols), width = times(m.gates, m.rows);
  STD_TORCH_CHECK(grad_given.scalar_type() == dtype && grad_given.is_cpu() && rows_of(grad_given, width) == rows,
      "kruify::kron_matmul_backward: the gradient has another shape or dtype than the output");
  const Tensor x = x_given.is_contiguous() ? x_given : torch::stable::contiguous(x_given);
  const Tensor grad = grad_given.is_contiguous() ? grad_given : torch::stable::contiguous(grad_given);
  Tensor grad_x = empty_as(x);
  std::fill_n(mutable_pointer<T>(grad_x), grad_x.numel(), T(0));
  Buffer<T> packed(w.packed_size);
  w.pack(packed.data());
  const int64_t tile = m.sparse ? kTile : 1, tiles = (rows + tile - 1) / tile;
  const int64_t workers =
      rows * width < (1 << 14) ? 1 : std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), tiles));
  Buffer<T> arenas(workers * m.grad_size), scratch(workers * m.scratch);
  std::fill_n(arenas.data(), workers * m.grad_size, T(0));
  parallel(workers, [&](int64_t worker) {
    for (int64_t i = worker; i < tiles; i += workers) {
      const int64_t r = i * tile;
      T* gates[kMaxGates];
      // The kernels only read through these.
      for (int g = 0; g < m.gates; ++g) gates[g] = const_cast<T*>(pointer<T>(grad)) + r * width + g * m.rows;
      kernels<T>().product_backward(m, std::min(tile, rows - r), pointer<T>(x) + r * m.cols, m.cols, gates, width,
          mutable_pointer<T>(grad_x) + r * m.cols, m.cols, arenas.data() + worker * m.grad_size,
          scratch.data() + worker * m.scratch);
    }
  });
  return {grad_x, collect(w, arenas.data(), workers)};
}

Gradients kron_matmul_backward(const Tensor& grad, const Tensor& x, const std::vector<Tensor>& stages,
    const Optional& diagonal, const Optional& sparse, const Optional& index, const Optional& bias,
    const std::vector<int64_t>& layout, int64_t precision) {
  check_precision(precision);
  const bool single = floating("kron_matmul_backward", x) == torch::headeronly::ScalarType::Float;
  return (
      single ? &run_backward<float> : &run_backward<double>)(grad, x, stages, diagonal, sparse, index, bias, layout);
}

}  // namespace
}  // namespace kruify

STABLE_TORCH_LIBRARY_IMPL(kruify, CPU, m) {
  m.impl("kron_matmul", TORCH_BOX(&kruify::kron_matmul));
  m.impl("kron_matmul_forward", TORCH_BOX(&kruify::kron_matmul));
  m.impl("kron_matmul_backward", TORCH_BOX(&kruify::kron_matmul_backward));
}

// The operators `kron_matmul` and `kron_matmul_backward`: the product of a Kronecker matrix with many rows.
#include "operators.h"
#include "packed.h"

namespace kruify {
namespace {

constexpr int64_t kFew = 1 << 14;  // results below which threads do not pay

// Where each gate's results start in rows (gates * height), as the kernels take them.
template <class T> struct Gates {
  T* gate[kMaxGates];
  Gates(const Matrix<T>& m, T* rows) {
    for (int g = 0; g < m.gates; ++g) gate[g] = rows + g * m.rows;
  }
};

template <class T> Tensor product(const Tensor& x_given, const MatrixTensors& given, const Place& place) {
  const PackedMatrix<T> w(given, place);
  const Matrix<T>& m = w.matrix;
  const int64_t rows = rows_of("x", x_given, place, m.cols), width = m.gates * m.rows;
  const Tensor x = as_contiguous(x_given);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = width;
  Tensor y = empty(x, shape.data(), x.dim());
  const int64_t tile = m.residual.values ? kTile : 8, tiles = (rows + tile - 1) / tile;
  const int64_t workers = rows * width < kFew ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), tiles);
  Buffer<T> scratch(workers * m.scratch);
  parallel(workers, [&](int64_t worker) {
    for (int64_t i = worker; i < tiles; i += workers) {
      const int64_t first = i * tile, count = std::min(tile, rows - first);
      T* out = writable<T>(y) + first * width;
      for (int64_t r = 0; r < count; ++r)
        if (m.bias) std::copy_n(m.bias, width, out + r * width);
        else std::fill_n(out + r * width, width, T(0));
      kernels<T>().product(m, count, data<T>(x) + first * m.cols, m.cols, Gates<T>(m, out).gate, width,
          scratch.data() + worker * m.scratch);
    }
  });
  return y;
}

template <class T>
ProductGradients gradients(
    const Tensor& grad_given, const Tensor& x_given, const MatrixTensors& given, const Place& place) {
  const PackedMatrix<T> w(given, place);
  const Matrix<T>& m = w.matrix;
  const int64_t rows = rows_of("x", x_given, place, m.cols), width = m.gates * m.rows;
  STD_TORCH_CHECK(rows_of("the gradient", grad_given, place, width) == rows,
      "kruify::kron_matmul_backward: x and the gradient have another number of rows");
  const Tensor x = as_contiguous(x_given), grad = as_contiguous(grad_given);
  Tensor grad_x = empty(x);
  std::fill_n(writable<T>(grad_x), grad_x.numel(), T(0));
  const int64_t tile = m.residual.values ? kTile : 1, tiles = (rows + tile - 1) / tile;
  const int64_t threads = rows * width < kFew ? 1 : torch::stable::get_num_threads();
  const int64_t workers = std::max<int64_t>(1, std::min(threads, tiles));
  Buffer<T> arenas(workers * m.grad_size), scratch(workers * m.scratch);
  std::fill_n(arenas.data(), workers * m.grad_size, T(0));
  parallel(workers, [&](int64_t worker) {
    for (int64_t i = worker; i < tiles; i += workers) {
      const int64_t r = i * tile;
      const Gates<T> dy(m, const_cast<T*>(data<T>(grad)) + r * width);  // the kernels only read through it
      kernels<T>().product_backward(m, std::min(tile, rows - r), data<T>(x) + r * m.cols, m.cols, dy.gate, width,
          writable<T>(grad_x) + r * m.cols, m.cols, arenas.data() + worker * m.grad_size,
          scratch.data() + worker * m.scratch);
    }
  });
  return {grad_x, w.collect(arenas.data(), workers)};
}

Tensor run(const Tensor& x, const MatrixTensors& given, Precision) {
  const Place place = place_of("kron_matmul", x);
  return typed(place, [&](auto zero) { return product<decltype(zero)>(x, given, place); });
}

ProductGradients run_backward(const Tensor& grad, const Tensor& x, const MatrixTensors& given, Precision) {
  const Place place = place_of("kron_matmul_backward", x);
  return typed(place, [&](auto zero) { return gradients<decltype(zero)>(grad, x, given, place); });
}

}  // namespace
}  // namespace kruify

STABLE_TORCH_LIBRARY_IMPL(kruify, CPU, m) {
  m.impl("kron_matmul", TORCH_BOX(&kruify::kron_matmul<kruify::run>));
  m.impl("kron_matmul_forward", TORCH_BOX(&kruify::kron_matmul<kruify::run>));
  m.impl("kron_matmul_backward", TORCH_BOX(&kruify::kron_matmul_backward<kruify::run_backward>));
}

// The operators `dense` and `dense_backward`: the plain weight of a Kronecker matrix.
#include "checks.h"

namespace kruify {
namespace {

const Tensor& some_part(const std::vector<Tensor>& stages, const Optional& diagonal, const Optional& sparse) {
  STD_TORCH_CHECK(!stages.empty() || diagonal || sparse, "kruify::dense: a matrix without parts");
  return !stages.empty() ? stages[0] : diagonal ? *diagonal : *sparse;
}

template <class T>
Tensor run(const std::vector<Tensor>& stages, const Optional& diagonal, const Optional& sparse, const Optional& index,
    const std::vector<int64_t>& layout) {
  const Tensor& like = some_part(stages, diagonal, sparse);
  const CheckedMatrix<T> w(stages, diagonal, sparse, index, std::nullopt, layout, like.scalar_type());
  const int64_t rows = times(w.matrix.gates, w.matrix.rows);
  // W, and twice a gate of it in scratch memory, must be a size that can be counted in bytes.
  times(times(rows, w.matrix.cols), 4 * int64_t(sizeof(T)));
  Tensor out = empty_like(like, {rows, w.matrix.cols});
  Buffer<T> scratch(kernels<T>().dense_scratch(w.matrix));
  kernels<T>().dense(w.matrix, mutable_pointer<T>(out), scratch.data());
  return out;
}

Tensor dense(const std::vector<Tensor>& stages, const Optional& diagonal, const Optional& sparse, const Optional& index,
    const std::vector<int64_t>& layout) {
  const bool single = floating("dense", some_part(stages, diagonal, sparse)) == torch::headeronly::ScalarType::Float;
  return (single ? &run<float> : &run<double>)(stages, diagonal, sparse, index, layout);
}

template <class T>
std::vector<Tensor> run_backward(const Tensor& grad_given, const std::vector<Tensor>& stages, const Optional& diagonal,
    const Optional& sparse, const Optional& index, const std::vector<int64_t>& layout) {
  const auto dtype = some_part(stages, diagonal, sparse).scalar_type();
  const CheckedMatrix<T> w(stages, diagonal, sparse, index, std::nullopt, layout, dtype);
  const Tensor grad = checked("the gradient", grad_given, dtype, times(w.matrix.gates, w.matrix.rows), w.matrix.cols);
  const std::vector<Tensor> grads = w.empty_gradients();
  std::vector<T*> pointers;
  for (const Tensor& g : grads) pointers.push_back(mutable_pointer<T>(g));
  Buffer<T> scratch(kernels<T>().dense_scratch(w.matrix));
  kernels<T>().dense_backward(w.matrix, pointer<T>(grad), pointers.data(), scratch.data());
  return grads;
}

std::vector<Tensor> dense_backward(const Tensor& grad, const std::vector<Tensor>& stages, const Optional& diagonal,
    const Optional& sparse, const Optional& index, const std::vector<int64_t>& layout) {
  const bool single =
      floating("dense_backward", some_part(stages, diagonal, sparse)) == torch::headeronly::ScalarType::Float;
  return (single ? &run_backward<float> : &run_backward<double>)(grad, stages, diagonal, sparse, index, layout);
}

}  // namespace
}  // namespace kruify

STABLE_TORCH_LIBRARY_IMPL(kruify, CPU, m) {
  m.impl("dense", TORCH_BOX(&kruify::dense));
  m.impl("dense_backward", TORCH_BOX(&kruify::dense_backward));
}

// The operators `dense` and `dense_backward`: the plain weight of a Kronecker matrix.
#include "arguments.h"
#include "buffer.h"
#include "kernels.h"

namespace kruify {
namespace {

const Optional kNone;

const Tensor& some_part(const MatrixTensors& given) {
  STD_TORCH_CHECK(!given.stages.empty() || given.diagonal || given.residual, "kruify::dense: a matrix without parts");
  return !given.stages.empty() ? given.stages[0] : given.diagonal ? *given.diagonal : *given.residual;
}

template <class T> Tensor run(const MatrixTensors& given, const Place& place) {
  const CheckedMatrix<T> w(given, place);
  const int64_t rows = w.matrix.gates * w.matrix.rows;
  // W, and twice one gate of it in scratch memory, must be a size that can be counted in bytes.
  times(times(rows, w.matrix.cols), 4 * int64_t(sizeof(T)));
  Tensor out = empty(some_part(given), {rows, w.matrix.cols});
  Buffer<T> scratch(kernels<T>().dense_scratch(w.matrix));
  kernels<T>().dense(w.matrix, writable<T>(out), scratch.data());
  return out;
}

Tensor dense(const std::vector<Tensor>& stages, const Optional& diagonal, const Optional& residual,
    const Optional& index, const std::vector<int64_t>& layout) {
  const MatrixTensors given{stages, diagonal, residual, index, kNone, layout};
  const Place place = place_of("dense", some_part(given));
  return typed(place, [&](auto zero) { return run<decltype(zero)>(given, place); });
}

template <class T>
std::vector<Tensor> run_backward(const Tensor& grad_given, const MatrixTensors& given, const Place& place) {
  const CheckedMatrix<T> w(given, place);
  const Tensor grad = checked("the gradient", grad_given, place, w.matrix.gates * w.matrix.rows, w.matrix.cols);
  const std::vector<Tensor> grads = w.empty_gradients();
  Buffer<T> scratch(kernels<T>().dense_scratch(w.matrix));
  kernels<T>().dense_backward(w.matrix, data<T>(grad), pointers_to<T>(grads).data(), scratch.data());
  return grads;
}

std::vector<Tensor> dense_backward(const Tensor& grad, const std::vector<Tensor>& stages, const Optional& diagonal,
    const Optional& residual, const Optional& index, const std::vector<int64_t>& layout) {
  const MatrixTensors given{stages, diagonal, residual, index, kNone, layout};
  const Place place = place_of("dense_backward", some_part(given));
  return typed(place, [&](auto zero) { return run_backward<decltype(zero)>(grad, given, place); });
}

}  // namespace
}  // namespace kruify

STABLE_TORCH_LIBRARY_IMPL(kruify, CPU, m) {
  m.impl("dense", TORCH_BOX(&kruify::dense));
  m.impl("dense_backward", TORCH_BOX(&kruify::dense_backward));
}

// The operator `linear_backward`: both gradients of x W^T, for input projections over all steps.
#include <tuple>

#include "linear.h"

namespace kruify {
namespace {

using Gradients = std::tuple<Tensor, Tensor>;

template <class T>
Gradients run(const Tensor& grad_given, const Tensor& x_given, const Tensor& weight_given, bool needs_x, bool needs_weight) {
  const auto dtype = grad_given.scalar_type();
  const Tensor weight = checked("the weight", weight_given, dtype, -1, -1);
  const int64_t width = weight.size(0), inputs = weight.size(1);
  const Tensor grad = checked("the gradient", grad_given, dtype, -1, width);
  const int64_t rows = grad.size(0);
  const Tensor x = checked("x", x_given, dtype, rows, inputs);
  Tensor grad_x = empty_like(x, {needs_x ? rows : 0, inputs}), grad_weight = empty_like(x, {needs_weight ? width : 0, inputs});
  if (needs_x && rows && inputs)
    PackedB<T>(width, inputs, pointer<T>(weight), inputs, 1)
        .multiply(rows, pointer<T>(grad), width, 1, nullptr, mutable_pointer<T>(grad_x), inputs);
  if (needs_weight && width && inputs)
    PackedB<T>(rows, inputs, pointer<T>(x), inputs, 1)
        .multiply(width, pointer<T>(grad), 1, width, nullptr, mutable_pointer<T>(grad_weight), inputs);
  return {grad_x, grad_weight};
}

Gradients linear_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, bool needs_x, bool needs_weight) {
  const bool single = floating("linear_backward", grad) == torch::headeronly::ScalarType::Float;
  return (single ? &run<float> : &run<double>)(grad, x, weight, needs_x, needs_weight);
}

}  // namespace
}  // namespace kruify

STABLE_TORCH_LIBRARY_IMPL(kruify, CPU, m) { m.impl("linear_backward", TORCH_BOX(&kruify::linear_backward)); }

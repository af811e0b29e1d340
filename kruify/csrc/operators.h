// The operators as their schemas (in kruify/ops) have them: each hands its arguments on as one struct to `run`, the
// device's function.
#pragma once

#include "arguments.h"

namespace kruify {

using States = std::tuple<Tensor, Tensor, Tensor, Tensor>;                       // out, hT, cT, workspace
using StateGradients = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;  // of gates, h0, c0, matrix
using ProductGradients = std::tuple<Tensor, std::vector<Tensor>>;                // of x, matrix

template <Tensor (*run)(const Tensor&, const MatrixTensors&, Precision)>
Tensor kron_matmul(const Tensor& x, const std::vector<Tensor>& stages, const Optional& diagonal,
    const Optional& residual, const Optional& index, const Optional& bias, const std::vector<int64_t>& layout,
    int64_t precision) {
  return run(x, {stages, diagonal, residual, index, bias, layout}, precision_of(precision));
}

template <ProductGradients (*run)(const Tensor&, const Tensor&, const MatrixTensors&, Precision)>
ProductGradients kron_matmul_backward(const Tensor& grad, const Tensor& x, const std::vector<Tensor>& stages,
    const Optional& diagonal, const Optional& residual, const Optional& index, const Optional& bias,
    const std::vector<int64_t>& layout, int64_t precision) {
  return run(grad, x, {stages, diagonal, residual, index, bias, layout}, precision_of(precision));
}

template <States (*run)(const ForwardTensors&)>
States recurrence(const Tensor& x, const Optional& w_ih, const Optional& bias_ih, const Tensor& batch_sizes,
    const Tensor& h0, const Optional& c0, const std::vector<Tensor>& stages, const Optional& diagonal,
    const Optional& residual, const Optional& index, const Optional& bias, const std::vector<int64_t>& layout,
    const std::string& kind, bool reverse, bool training, int64_t precision) {
  return run({x, w_ih, bias_ih, batch_sizes, h0, c0, {stages, diagonal, residual, index, bias, layout}, kind_of(kind),
      reverse, training, precision_of(precision)});
}

template <StateGradients (*run)(const BackwardTensors&)>
StateGradients recurrence_backward(const Optional& grad_out, const Optional& grad_h, const Optional& grad_c,
    const Tensor& out, const Tensor& workspace, const Tensor& batch_sizes, const Tensor& h0, const Optional& c0,
    const std::vector<Tensor>& stages, const Optional& diagonal, const Optional& residual, const Optional& index,
    const Optional& bias, const std::vector<int64_t>& layout, const std::string& kind, bool reverse,
    int64_t precision) {
  return run({grad_out, grad_h, grad_c, out, workspace, batch_sizes, h0, c0,
      {stages, diagonal, residual, index, bias, layout}, kind_of(kind), reverse, precision_of(precision)});
}

}  // namespace kruify

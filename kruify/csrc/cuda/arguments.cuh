// What the operators demand of their arguments, and how a checked matrix becomes plain pointers.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "machine.cuh"

namespace kruify::cuda {

using torch::headeronly::ScalarType;
using Optional = std::optional<Tensor>;

// A contiguous tensor of this device, dtype and shape.
inline Tensor checked(const char* what, const Tensor& t, const Tensor& like, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index(), "kruify: ", what,
      " is not on the device of the other arguments");
  STD_TORCH_CHECK(
      t.scalar_type() == like.scalar_type(), "kruify: ", what, " has another dtype than the other arguments");
  STD_TORCH_CHECK(t.dim() == static_cast<int64_t>(shape.size()), "kruify: ", what, " must have ", shape.size(),
      " dimensions, got ", t.dim());
  int64_t k = 0;
  for (int64_t size : shape) {
    STD_TORCH_CHECK(size < 0 || t.size(k) == size, "kruify: ", what, " must have size ", size, " in dimension ", k,
        ", got ", t.size(k));
    ++k;
  }
  return torch::stable::contiguous(t);
}

template <class T> const T* data(const Tensor& t) { return static_cast<const T*>(t.data_ptr()); }
template <class T> const T* data(const Optional& t) { return t ? data<T>(*t) : nullptr; }
template <class T> T* writable(const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }

// Calls f with a zero of the tensors' type.
template <class F> auto typed(const Tensor& like, const F& f) {
  return like.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

inline Tensor empty(const Tensor& like, std::vector<int64_t> sizes) { return torch::stable::new_empty(like, sizes); }

// The tensors of a Kronecker matrix, checked; they live as long as this does.
struct MatrixArguments {
  MatrixLayout layout;
  std::vector<Tensor> stages;
  Optional diagonal, sparse, index, bias;

  MatrixArguments(const Tensor& like, const std::vector<Tensor>& given, const Optional& diagonal_,
      const Optional& sparse_, const Optional& index_, const Optional& bias_, const std::vector<int64_t>& code,
      int rows_a_bias = 1)
      : layout(decode_layout(code)) {
    const ScalarType dtype = like.scalar_type();
    STD_TORCH_CHECK(
        dtype == ScalarType::Float || dtype == ScalarType::Double, "kruify: the kernels take float32 and float64");
    STD_TORCH_CHECK(static_cast<int64_t>(layout.gates) * layout.rows < (int64_t{1} << 30), "kruify: a matrix of ",
        layout.gates, " x ", layout.rows, " rows");
    STD_TORCH_CHECK(static_cast<int>(given.size()) == layout.stages, "kruify: the layout has ", layout.stages,
        " stages, got ", given.size());
    for (const LayoutTerm& term : layout.terms) {
      int64_t rows = 1, cols = 1;
      for (int k = term.first; k < term.first + term.stages; ++k) {
        STD_TORCH_CHECK(given[k].dim() == 4, "kruify: stage ", k, " must have 4 dimensions (gates, rank, P, Q), got ",
            given[k].dim());
        stages.push_back(checked(
            "a stage", given[k], like, {static_cast<int64_t>(term.gates.size()), given[term.first].size(1), -1, -1}));
        STD_TORCH_CHECK(
            given[k].numel() < (int64_t{1} << 31), "kruify: stage ", k, " has ", given[k].numel(), " elements");
        rows *= given[k].size(2), cols *= given[k].size(3);
        STD_TORCH_CHECK(rows > 0 && cols > 0 && rows <= layout.rows && cols <= layout.cols,
            "kruify: stages of a term do not make ", layout.rows, " x ", layout.cols);
      }
      STD_TORCH_CHECK(rows == layout.rows && cols == layout.cols, "kruify: stages of a term make ", rows, " x ", cols,
          ", not ", layout.rows, " x ", layout.cols);
    }
    STD_TORCH_CHECK(
        diagonal_.has_value() == !layout.diagonal_gates.empty(), "kruify: the layout and the diagonal do not agree");
    if (diagonal_)
      diagonal = checked("the diagonal", *diagonal_, like,
          {static_cast<int64_t>(layout.diagonal_gates.size()), std::min(layout.rows, layout.cols)});
    STD_TORCH_CHECK(sparse_.has_value() == index_.has_value(), "kruify: a sparse residual needs its index");
    if (sparse_) {
      sparse = checked("the sparse residual", *sparse_, like, {-1, -1});
      STD_TORCH_CHECK(index_->is_cuda() && index_->get_device_index() == like.get_device_index() &&
              index_->scalar_type() == ScalarType::Int && index_->dim() == 2 && index_->size(0) == sparse->size(0) &&
              index_->size(1) == 2,
          "kruify: the sparse residual's index must be int32 of shape (blocks, 2) on the same device");
      index = torch::stable::contiguous(*index_);
      if (sparse->numel() == 0) sparse.reset(), index.reset();
    }
    if (bias_)
      bias = checked("the bias", *bias_, like, {static_cast<int64_t>(layout.gates) * layout.rows / rows_a_bias});
  }

  template <class T> Matrix<T> matrix(Machine& machine) const {
    Matrix<T> m;
    m.layout = layout;
    for (const Tensor& s : stages) {
      m.shapes.push_back({static_cast<int>(s.size(1)), static_cast<int>(s.size(2)), static_cast<int>(s.size(3))});
      m.stages.push_back(data<T>(s));
    }
    m.diagonal = data<T>(diagonal), m.bias = data<T>(bias);
    if (sparse) {
      m.sparse.values = data<T>(sparse), m.sparse.index = data<int>(index);
      m.sparse.blocks = static_cast<int>(sparse->size(0)), m.sparse.block = static_cast<int>(sparse->size(1));
      machine.sparse_index = *index;
    }
    return m;
  }
};

// New tensors for the matrix's gradients, in the operators' order, and pointers to them.
template <class T>
MatrixGradient<T> gradients(const MatrixArguments& m, const Optional& sparse, std::vector<Tensor>& tensors) {
  MatrixGradient<T> to;
  auto add = [&](const Tensor& like) {
    tensors.push_back(empty(like, {like.sizes().begin(), like.sizes().end()}));
    return writable<T>(tensors.back());
  };
  for (const Tensor& s : m.stages) to.stages.push_back(add(s));
  if (m.diagonal) to.diagonal = add(*m.diagonal);
  if (m.sparse) to.sparse = add(*m.sparse);
  else if (sparse) add(*sparse);  // without blocks: nothing to write
  if (m.bias) to.bias = add(*m.bias);
  return to;
}

}  // namespace kruify::cuda

// What the operators of both devices are given, and what they demand of it.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>

#include "layout.h"

namespace kruify {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

template <class T> const T* data(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }
template <class T> const T* data(const Optional& t) { return t ? data<T>(*t) : nullptr; }
template <class T> T* writable(const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }

inline int64_t times(int64_t a, int64_t b) {
  int64_t result;
  STD_TORCH_CHECK(!__builtin_mul_overflow(a, b, &result), "kruify: sizes overflow");
  return result;
}

// Where an operator's tensors are, and what they hold: the same for all of a call.
struct Place {
  bool cuda;
  int32_t device;  // number of the GPU
  ScalarType dtype;

  bool holds(const Tensor& t) const { return cuda ? t.is_cuda() && t.get_device_index() == device : t.is_cpu(); }
  Place with(ScalarType other) const { return {cuda, device, other}; }
};

inline Place place_of(const char* op, const Tensor& t) {
  const Place place{t.is_cuda(), t.get_device_index(), t.scalar_type()};
  STD_TORCH_CHECK(place.cuda || t.is_cpu(), "kruify::", op, " got tensors of several devices");
  STD_TORCH_CHECK(place.dtype == ScalarType::Float || place.dtype == ScalarType::Double, "kruify::", op,
      " takes float32 and float64");
  return place;
}

// Calls f with a zero of the tensors' type.
template <class F> auto typed(const Place& place, const F& f) {
  return place.dtype == ScalarType::Double ? f(double{}) : f(float{});
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// `t`, contiguous, if it is at `place` and has these sizes; -1 stands for any.
template <class... Sizes> Tensor checked(const char* what, const Tensor& t, const Place& place, Sizes... sizes) {
  STD_TORCH_CHECK(place.holds(t), "kruify: ", what, " is not on the device of the other arguments");
  STD_TORCH_CHECK(t.scalar_type() == place.dtype, "kruify: ", what, " has another dtype than the other arguments");
  const int64_t want[] = {int64_t(sizes)..., 0}, dims = sizeof...(sizes);
  STD_TORCH_CHECK(t.dim() == dims, "kruify: ", what, " must have ", dims, " dimensions, got ", t.dim());
  for (int64_t d = 0; d < dims; ++d)
    STD_TORCH_CHECK(want[d] < 0 || t.size(d) == want[d], "kruify: ", what, " has size ", t.size(d), " in dimension ", d,
        ", not ", want[d]);
  return as_contiguous(t);
}

template <class... Sizes> Optional checked(const char* what, const Optional& t, const Place& place, Sizes... sizes) {
  return t ? Optional(checked(what, *t, place, sizes...)) : std::nullopt;
}

// Of a contiguous tensor.
struct Strides {
  int64_t of[64];

  Strides(const int64_t* shape, int64_t dims) {
    STD_TORCH_CHECK(dims <= 64, "kruify: a tensor of ", dims, " dimensions");
    for (int64_t d = dims, stride = 1; d-- > 0; stride = times(stride, std::max<int64_t>(shape[d], 1))) of[d] = stride;
  }
};

// Uninitialised, contiguous, dtype and device of `like`; without the way through the dispatcher.
inline Tensor empty(const Tensor& like, const int64_t* shape, int64_t dims) {
  const Strides strides(shape, dims);
  int32_t dtype, device, number;
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &number));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, shape, strides.of, dtype, device, number, &result));
  return Tensor(result);
}
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return empty(like, sizes.begin(), int64_t(sizes.size()));
}
inline Tensor empty(const Tensor& like) { return empty(like, like.sizes().data(), like.dim()); }

// The numbers of `t`, contiguous, in another shape; without the way through the dispatcher.
inline Tensor reshaped(const Tensor& given, std::initializer_list<int64_t> sizes) {
  const Tensor t = as_contiguous(given);
  const Strides strides(sizes.begin(), int64_t(sizes.size()));
  int64_t numel = 1, offset;
  for (const int64_t size : sizes) numel = times(numel, size);
  STD_TORCH_CHECK(numel == t.numel(), "kruify: ", t.numel(), " numbers for ", numel);
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &offset));
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(t.get(), int64_t(sizes.size()), sizes.begin(), strides.of, offset, &result));
  return Tensor(result);
}

inline Precision precision_of(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number <= 2, "kruify: there is no precision ", number);
  return Precision(number);
}

inline Kind kind_of(const std::string& name) {
  const auto found = std::find(std::begin(kKindNames), std::end(kKindNames), name);
  STD_TORCH_CHECK(found != std::end(kKindNames), "kruify::recurrence: unknown kind '", name, "'");
  return Kind(found - std::begin(kKindNames));
}

constexpr int64_t kHuge = int64_t(1) << 31;  // more than an int counts

// A Kronecker matrix as the schemas have it.
struct MatrixTensors {
  const std::vector<Tensor>& stages;
  const Optional &diagonal, &residual, &index, &bias;
  const std::vector<int64_t>& layout;
};

// The same, checked, as plain pointers. One entry of the bias serves `rows_per_bias` rows.
template <class T> class CheckedMatrix {
 public:
  Matrix<T> matrix{};

  CheckedMatrix(const MatrixTensors& given, const Place& place, int rows_per_bias = 1) {
    Matrix<T>& m = matrix;
    const int64_t stages = read_layout(given.layout, m, terms_), rows = times(m.gates, m.rows);
    STD_TORCH_CHECK(int64_t(given.stages.size()) >= stages, "kruify: fewer stages than the layout names");
    STD_TORCH_CHECK(int64_t(given.stages.size()) == stages, "kruify: more stages than the layout names");
    STD_TORCH_CHECK(!place.cuda || rows < kHuge / 2, "kruify: a matrix of ", rows, " rows");
    parameters_.reserve(stages + 3);
    auto next = given.stages.begin();
    for (Term<T>& term : terms_) add_stages(term, next, place);
    STD_TORCH_CHECK(given.diagonal.has_value() == (m.diagonal_gates > 0), "kruify: layout and diagonal do not agree");
    if (given.diagonal)
      m.diagonal = add(checked("the diagonal", *given.diagonal, place, m.diagonal_gates, m.diagonal_size));
    STD_TORCH_CHECK(
        given.residual.has_value() == given.index.has_value(), "kruify: a sparse residual needs values and index");
    if (given.residual) {
      const T* values = add(checked("the sparse residual", *given.residual, place, -1, -1));
      const int64_t blocks = parameters_.back().size(0), block = parameters_.back().size(1);
      STD_TORCH_CHECK(
          blocks < kHuge && block >= 1 && block <= m.rows, "kruify: ", blocks, " sparse blocks of ", block, " rows");
      index_ = checked("the sparse residual's index", *given.index, place.with(ScalarType::Int), blocks, 2);
      if (blocks) m.residual = {values, data<int32_t>(*index_), int(blocks), int(block)};
      if (!place.cuda) check_index();  // on a GPU the kernels do: the host would have to wait for it
    }
    if (given.bias) {
      m.bias_size = rows / rows_per_bias;
      m.bias = add(checked("the bias", *given.bias, place, m.bias_size));
    }
  }
  CheckedMatrix(const CheckedMatrix&) = delete;

  const Optional& index() const { return index_; }

  // Empty gradients in the operators' order.
  std::vector<Tensor> empty_gradients() const {
    std::vector<Tensor> grads;
    grads.reserve(parameters_.size());
    for (const Tensor& t : parameters_) grads.push_back(empty(t));
    return grads;
  }

 protected:
  std::vector<Tensor> parameters_;  // contiguous, kept alive
  Optional index_;
  std::vector<Term<T>> terms_;

 private:
  void check_index() const {
    const SparseResidual<T>& r = matrix.residual;
    for (int64_t b = 0; b < r.blocks; ++b) {
      const int64_t row = r.index[2 * b], column = r.index[2 * b + 1];
      STD_TORCH_CHECK(row >= 0 && column >= 0 && column < matrix.cols && row < matrix.gates * matrix.rows &&
              row % matrix.rows + r.block <= matrix.rows,
          "kruify: sparse block ", b, " at (", row, ", ", column, ") lies outside its gate");
    }
  }
  const T* add(Tensor t) {
    parameters_.push_back(std::move(t));
    return data<T>(parameters_.back());
  }
  template <class Iterator> void add_stages(Term<T>& term, Iterator& next, const Place& place) {
    int64_t rows = 1, cols = 1;
    for (int f = 0; f < term.stages; ++f, ++next) {
      STD_TORCH_CHECK(next->dim() == 4, "kruify: a stage must have shape (gates, rank, P, Q)");
      const int64_t rank = f ? term.rank : next->size(1);
      STD_TORCH_CHECK(rank >= 1 && rank < kHuge, "kruify: a term needs a rank above 0");
      term.rank = int(rank);
      const bool outer = term.stages == 2 && f == 1 && term.q[0] == 1 && next->size(2) == 1;
      term.shared = (!place.cuda || outer) && f && f == term.stages - 1 && term.gates > 1 && next->size(0) == 1;
      term.w[f] = add(checked("a stage", *next, place, term.shared ? 1 : term.gates, rank, -1, -1));
      term.p[f] = next->size(2), term.q[f] = next->size(3);
      STD_TORCH_CHECK(term.p[f] >= 1 && term.q[f] >= 1, "kruify: a stage is empty");
      STD_TORCH_CHECK(!place.cuda || next->numel() < kHuge, "kruify: a stage of ", next->numel(), " elements");
      rows = times(rows, term.p[f]), cols = times(cols, term.q[f]);
    }
    const bool thin = term.stages == 2 && term.q[0] == 1 && term.p[1] == 1;
    const TermKind kinds[] = {TermKind::kDense, thin ? TermKind::kLowRank : TermKind::kPair, TermKind::kChain};
    term.kind = kinds[term.stages - 1];
    STD_TORCH_CHECK(rows == matrix.rows && cols == matrix.cols, "kruify: the stages of a term multiply to ", rows, "x",
        cols, ", not to ", matrix.rows, "x", matrix.cols);
  }
};

// Where a matrix's gradients go: those that hold anything, for a sparse residual may be without blocks.
template <class T> std::vector<T*> pointers_to(const std::vector<Tensor>& grads) {
  std::vector<T*> found;
  for (const Tensor& g : grads)
    if (g.numel()) found.push_back(writable<T>(g));
  return found;
}

// Rows of x or of a gradient (..., columns).
inline int64_t rows_of(const char* what, const Tensor& t, const Place& place, int64_t columns) {
  STD_TORCH_CHECK(place.holds(t) && t.scalar_type() == place.dtype, "kruify::kron_matmul: ", what,
      " has another device or dtype than the other arguments");
  STD_TORCH_CHECK(t.dim() >= 1 && t.size(t.dim() - 1) == columns, "kruify::kron_matmul: ", what, " must have ", columns,
      " columns");
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) rows = times(rows, t.size(d));
  return rows;
}

// The arguments of `recurrence`.
struct ForwardTensors {
  const Tensor& x;
  const Optional &w_ih, &bias_ih;
  const Tensor &batch_sizes, &h0;
  const Optional& c0;
  MatrixTensors matrix;
  Kind kind;
  bool reverse, training;
  Precision precision;
};

// The arguments of `recurrence_backward`.
struct BackwardTensors {
  const Optional &grad_out, &grad_h, &grad_c;
  const Tensor &out, &workspace, &batch_sizes, &h0;
  const Optional& c0;
  MatrixTensors matrix;
  Kind kind;
  bool reverse;
  Precision precision;
};

// The steps of a packed batch and the state it starts from, checked.
struct Sequences {
  int64_t batch, hidden, width, steps;  // width: of the gates
  Tensor h0, sizes;
  Optional c0;
  std::vector<int64_t> starts;  // (steps + 1,): the first row of each step

  template <class T>
  Sequences(Kind kind, const Matrix<T>& m, const Tensor& h0_given, const Optional& c0_given, const Tensor& sizes_given,
      const Place& place)
      : h0(checked("h0", h0_given, place, -1, m.rows)),
        sizes(checked("batch_sizes", sizes_given, {false, 0, ScalarType::Long}, -1)) {
    batch = h0.size(0), hidden = h0.size(1), width = gates_of(kind) * hidden, steps = sizes.numel();
    STD_TORCH_CHECK(m.gates == gates_of(kind) && m.cols == hidden, "kruify::recurrence: kind '", kKindNames[kind],
        "' takes a square matrix of ", gates_of(kind), " gates, not ", m.gates, " of ", m.rows, "x", m.cols);
    STD_TORCH_CHECK(
        hidden % rows_per_bias(kind) == 0, "kruify::recurrence: a complex state of ", hidden, " real numbers");
    STD_TORCH_CHECK(c0_given.has_value() == (kind == kLstm), "kruify::recurrence: c0 belongs to the LSTM alone");
    c0 = checked("c0", c0_given, place, batch, hidden);
    starts.assign(steps + 1, 0);
    const int64_t* size = data<int64_t>(sizes);
    STD_TORCH_CHECK(steps == 0 || size[0] == batch, "kruify::recurrence: batch_sizes starts with ", steps ? size[0] : 0,
        ", h0 has ", batch, " rows");
    for (int64_t t = 0; t < steps; ++t) {
      STD_TORCH_CHECK(size[t] >= 0 && size[t] <= (t ? size[t - 1] : batch),
          "kruify::recurrence: batch_sizes must never grow, got ", size[t], " at step ", t);
      starts[t + 1] = starts[t] + size[t];
    }
  }
  int64_t rows() const { return starts.back(); }
};

// A forward call: its arguments, checked, and what it fills. `columns` of x where an input matrix stands beside w_ih.
struct ForwardCall : Sequences {
  Tensor x;
  Optional w_ih, bias_ih;
  Tensor out, h, c, workspace;

  template <class T>
  ForwardCall(const ForwardTensors& given, const Matrix<T>& m, const Place& place, int64_t columns = 0)
      : Sequences(given.kind, m, given.h0, given.c0, given.batch_sizes, place),
        x(checked("x", given.x, place, rows(),
            given.w_ih    ? -1
                : columns ? columns
                          : width)),
        w_ih(checked("w_ih", given.w_ih, place, width, x.size(1))),
        bias_ih(checked("bias_ih", given.bias_ih, place, width)),
        out(empty(x, {rows(), hidden})),
        h(empty(h0)),
        c(c0 ? empty(*c0) : empty(x, {0})),
        workspace(empty(x, {given.training ? rows() : 0, saved_of(given.kind) * hidden})) {}
};

// A backward call: its arguments, checked, and the gradients of the state.
struct BackwardCall : Sequences {
  Optional grad_out, grad_h, grad_c;
  Tensor out, workspace, grad_h0, grad_c0;

  template <class T>
  BackwardCall(const BackwardTensors& given, const Matrix<T>& m, const Place& place)
      : Sequences(given.kind, m, given.h0, given.c0, given.batch_sizes, place),
        grad_out(checked("grad_out", given.grad_out, place, rows(), hidden)),
        grad_h(checked("grad_hT", given.grad_h, place, batch, hidden)),
        grad_c(c0 ? checked("grad_cT", given.grad_c, place, batch, hidden) : std::nullopt),
        out(checked("out", given.out, place, rows(), hidden)),
        workspace(checked("workspace", given.workspace, place, rows(), saved_of(given.kind) * hidden)),
        grad_h0(empty(h0)),
        grad_c0(c0 ? empty(*c0) : empty(h0, {0})) {}
};

}  // namespace kruify

// What the operators demand of their arguments, and how a checked matrix becomes plain pointers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "matrix.h"

namespace kruify {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Uninitialised memory, aligned for the widest vectors, with slack for tiles. A thread's last buffer is kept for the
// next call: fresh pages would cost more than the work of a single step.
template <class T> class Buffer {
 public:
  explicit Buffer(int64_t count) {
    STD_TORCH_CHECK(count >= 0 && count < (int64_t(1) << 46), "kruify: a buffer of ", count, " elements");
    bytes_ = (count * sizeof(T) + 64 + 63) / 64 * 64;
    for (auto& kept : cache().slots)
      if (kept.bytes >= bytes_ && kept.bytes <= 4 * bytes_ + 4096) {
        data_ = kept.data, bytes_ = kept.bytes;
        kept = {nullptr, 0};
        return;
      }
    data_ = std::aligned_alloc(64, bytes_);
    if (!data_) throw std::bad_alloc();
  }
  ~Buffer() {
    Slot mine{data_, bytes_};
    if (bytes_ <= kKeep)
      for (auto& kept : cache().slots)
        if (!kept.data) {
          kept = mine;
          return;
        }
    std::free(data_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return static_cast<T*>(data_); }

 private:
  static constexpr size_t kKeep = size_t(4) << 20;
  struct Slot {
    void* data;
    size_t bytes;
  };
  struct Cache {
    Slot slots[6] = {};
    ~Cache() {
      for (auto& s : slots) std::free(s.data);
    }
  };
  static Cache& cache() {
    static thread_local Cache instance;
    return instance;
  }
  void* data_;
  size_t bytes_;
};

template <class... Sizes>
Tensor checked(const char* what, const Tensor& t, torch::headeronly::ScalarType dtype, Sizes... sizes) {
  STD_TORCH_CHECK(t.is_cpu(), "kruify: ", what, " must be a CPU tensor");
  STD_TORCH_CHECK(t.scalar_type() == dtype, "kruify: ", what, " has another dtype than the other arguments");
  const int64_t want[] = {int64_t(sizes)..., 0};
  STD_TORCH_CHECK(t.dim() == int64_t(sizeof...(sizes)), "kruify: ", what, " must have ", sizeof...(sizes),
      " dimensions, got ", t.dim());
  for (int64_t d = 0; d < int64_t(sizeof...(sizes)); ++d)
    STD_TORCH_CHECK(want[d] < 0 || t.size(d) == want[d], "kruify: ", what, " has size ", t.size(d), " in dimension ", d,
        ", not ", want[d]);
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline int64_t times(int64_t a, int64_t b) {
  int64_t result;
  STD_TORCH_CHECK(!__builtin_mul_overflow(a, b, &result), "kruify: sizes overflow");
  return result;
}

// Uninitialised, contiguous, dtype and device of `like`; without the way through the dispatcher.
inline Tensor empty_like(const Tensor& like, const int64_t* shape, int64_t dims) {
  STD_TORCH_CHECK(dims <= 64, "kruify: a tensor of ", dims, " dimensions");
  int64_t strides[64], stride = 1;
  for (int64_t d = dims; d-- > 0; stride = times(stride, std::max<int64_t>(shape[d], 1))) strides[d] = stride;
  int32_t dtype;
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, shape, strides, dtype, aoti_torch_device_type_cpu(), 0, &result));
  return Tensor(result);
}

inline Tensor empty_like(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return empty_like(like, sizes.begin(), int64_t(sizes.size()));
}

inline Tensor empty_as(const Tensor& like) { return empty_like(like, like.sizes().data(), like.dim()); }

template <class T> const T* pointer(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }

template <class T> T* mutable_pointer(const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }

// The `stages, diagonal, sparse, sparse_index, bias, layout` of an operator, checked, with packed copies of the
// stages. One entry of the bias serves `rows_a_bias` rows.
template <class T> class CheckedMatrix {
 public:
  CheckedMatrix(const std::vector<Tensor>& stages, const Optional& diagonal, const Optional& sparse,
      const Optional& index, const Optional& bias, const std::vector<int64_t>& layout,
      torch::headeronly::ScalarType dtype, int64_t rows_a_bias = 1);
  CheckedMatrix(const CheckedMatrix&) = delete;

  Matrix<T> matrix{};
  int64_t packed_size = 0;

  // Empty gradients in the operators' order.
  std::vector<Tensor> empty_gradients() const;
  void pack(T* memory);

 private:
  std::vector<Tensor> tensors_;  // keeps contiguous copies alive
  std::vector<Tensor> parameters_;
  std::vector<Term<T>> terms_;
};

class LayoutReader {
 public:
  explicit LayoutReader(const std::vector<int64_t>& code) : code_(code) {}
  int64_t next(int64_t low, int64_t high, const char* what) {
    STD_TORCH_CHECK(at_ < code_.size(), "kruify: the layout ends before its ", what);
    const int64_t value = code_[at_++];
    STD_TORCH_CHECK(
        value >= low && value <= high, "kruify: the layout's ", what, " is ", value, ", not in ", low, "..", high);
    return value;
  }
  bool done() const { return at_ == code_.size(); }

 private:
  const std::vector<int64_t>& code_;
  size_t at_ = 0;
};

template <class T>
CheckedMatrix<T>::CheckedMatrix(const std::vector<Tensor>& stages, const Optional& diagonal, const Optional& sparse,
    const Optional& index, const Optional& bias, const std::vector<int64_t>& layout,
    torch::headeronly::ScalarType dtype, int64_t rows_a_bias) {
  constexpr int64_t kHuge = int64_t(1) << 31;
  LayoutReader read(layout);
  Matrix<T>& m = matrix;
  m.gates = int(read.next(1, kMaxGates, "gates"));
  m.rows = read.next(1, kHuge, "rows");
  m.cols = read.next(1, kHuge, "cols");
  m.diagonal_gates = int(read.next(0, m.gates, "number of diagonal gates"));
  for (int i = 0; i < m.diagonal_gates; ++i) m.diagonal_gate[i] = int(read.next(0, m.gates - 1, "diagonal gate"));
  m.terms = int(read.next(0, 4096, "number of terms"));
  terms_.reserve(m.terms);
  size_t next = 0;
  for (int t = 0; t < m.terms; ++t) {
    Term<T> term{};
    term.stages = int(read.next(1, kMaxStages, "number of stages"));
    term.gates = int(read.next(1, m.gates, "number of gates"));
    for (int i = 0; i < term.gates; ++i) {
      term.gate[i] = int(read.next(0, m.gates - 1, "gate"));
      STD_TORCH_CHECK(i == 0 || term.gate[i] > term.gate[i - 1], "kruify: the gates of a term must ascend");
    }
    STD_TORCH_CHECK(next + term.stages <= stages.size(), "kruify: fewer stages than the layout names");
    int64_t rows = 1, cols = 1;
    for (int f = 0; f < term.stages; ++f) {
      const Tensor& given = stages[next++];
      STD_TORCH_CHECK(given.dim() == 4, "kruify: a stage must have shape (gates, rank, P, Q)");
      const int64_t rank = f ? term.rank : given.size(1);
      STD_TORCH_CHECK(rank >= 1 && rank < kHuge, "kruify: a term needs a rank above 0");
      term.rank = int(rank);
      if (f && f == term.stages - 1) term.shared = term.gates > 1 && given.size(0) == 1;
      tensors_.push_back(checked("a stage", given, dtype, term.shared ? 1 : term.gates, rank, -1, -1));
      parameters_.push_back(tensors_.back());
      term.p[f] = given.size(2), term.q[f] = given.size(3);
      STD_TORCH_CHECK(term.p[f] >= 1 && term.q[f] >= 1, "kruify: a stage is empty");
      rows = times(rows, term.p[f]), cols = times(cols, term.q[f]);
      term.w[f] = pointer<T>(tensors_.back());
    }
    STD_TORCH_CHECK(rows == m.rows && cols == m.cols, "kruify: the stages of a term multiply to ", rows, "x", cols,
        ", not to ", m.rows, "x", m.cols);
    const bool thin = term.stages == 2 && term.q[0] == 1 && term.p[1] == 1;
    term.kind = term.stages == 1 ? TermKind::kDense
        : thin                   ? TermKind::kLowRank
        : term.stages == 2       ? TermKind::kPair
                                 : TermKind::kChain;
    const int64_t n = term.products();
    int64_t scratch = 0;
    if (term.kind == TermKind::kLowRank) scratch = times(n, 16) + 64;
    if (term.kind == TermKind::kPair)
      scratch = m.cols + times(2 * n, times(term.q[0], term.p[1])) + 32 * term.q[0];  // rows of T are padded
    if (term.kind == TermKind::kChain) {
      const int64_t tail = times(term.p[1], term.p[2]), t1 = times(times(term.q[0], term.q[1]), times(n, term.p[2]));
      scratch =
          times(2, t1) + times(n, times(term.q[0], tail)) + 2 * times(term.q[0], tail) + times(term.q[1], term.p[2]);
    }
    if (scratch > m.scratch) m.scratch = scratch;
    for (int f = 0; f < term.stages; ++f) {
      // A dense term's ranks are added up, in the packed copy and in the gradient.
      const int64_t count = term.kind == TermKind::kDense ? term.gates : f == term.stages - 1 ? term.trailing() : n;
      const int64_t size = times(count, times(term.p[f], term.q[f]));
      term.grad[f] = m.grad_size;
      m.grad_size += (size + 15) / 16 * 16;
      packed_size += (size + 15) / 16 * 16;
    }
    terms_.push_back(term);
  }
  STD_TORCH_CHECK(read.done() && next == stages.size(), "kruify: more stages or layout than the layout names");
  m.term = terms_.data();
  m.diagonal_size = m.rows < m.cols ? m.rows : m.cols;
  STD_TORCH_CHECK(diagonal.has_value() == (m.diagonal_gates > 0), "kruify: layout and diagonal do not agree");
  if (diagonal) {
    tensors_.push_back(checked("the diagonal", *diagonal, dtype, m.diagonal_gates, m.diagonal_size));
    parameters_.push_back(tensors_.back());
    m.diagonal = pointer<T>(tensors_.back());
    m.grad_diagonal = m.grad_size;
    m.grad_size += m.diagonal_gates * m.diagonal_size;
  }
  STD_TORCH_CHECK(sparse.has_value() == index.has_value(), "kruify: a sparse residual needs values and index");
  if (sparse) {
    STD_TORCH_CHECK(sparse->dim() == 2, "kruify: the sparse residual must have shape (blocks, block)");
    m.blocks = sparse->size(0), m.block = sparse->size(1);
    STD_TORCH_CHECK(m.block >= 1 && m.block <= m.rows, "kruify: sparse blocks of ", m.block, " rows");
    tensors_.push_back(checked("the sparse residual", *sparse, dtype, -1, -1));
    parameters_.push_back(tensors_.back());
    m.sparse = pointer<T>(tensors_.back());
    tensors_.push_back(checked("the sparse residual's index", *index, torch::headeronly::ScalarType::Int, m.blocks, 2));
    m.index = pointer<int32_t>(tensors_.back());
    for (int64_t b = 0; b < m.blocks; ++b) {
      const int64_t row = m.index[2 * b], column = m.index[2 * b + 1];
      STD_TORCH_CHECK(
          row >= 0 && column >= 0 && column < m.cols && row < m.gates * m.rows && row % m.rows + m.block <= m.rows,
          "kruify: sparse block ", b, " at (", row, ", ", column, ") lies outside its gate");
    }
    m.grad_sparse = m.grad_size;
    m.grad_size += times(m.blocks, m.block);
    m.scratch = std::max(m.scratch, kTile * (2 * m.cols + times(m.gates, m.rows)));  // samples in lanes: sparse.h
  }
  if (bias) {
    m.bias_size = m.gates * m.rows / rows_a_bias;
    tensors_.push_back(checked("the bias", *bias, dtype, m.bias_size));
    parameters_.push_back(tensors_.back());
    m.bias = pointer<T>(tensors_.back());
    m.grad_bias = m.grad_size;
    m.grad_size += m.bias_size;
  }
  m.scratch = (m.scratch + 15) / 16 * 16 + 16;
  m.grad_size = (m.grad_size + 15) / 16 * 16;
}

template <class T> void CheckedMatrix<T>::pack(T* memory) {
  for (Term<T>& term : terms_)
    for (int f = 0; f < term.stages; ++f) {
      term.packed[f] = memory;
      const int64_t size = term.kind == TermKind::kDense ? term.gates * term.p[f] * term.q[f] : term.size(f);
      memory += (size + 15) / 16 * 16;
    }
  kernels<T>().pack(matrix);
}

template <class T> std::vector<Tensor> CheckedMatrix<T>::empty_gradients() const {
  std::vector<Tensor> grads;
  grads.reserve(parameters_.size());
  for (const Tensor& t : parameters_) grads.push_back(empty_as(t));
  return grads;
}

// Sums the threads' arenas into the first, and writes the gradients out.
template <class T> std::vector<Tensor> collect(const CheckedMatrix<T>& w, T* arenas, int64_t count) {
  for (int64_t i = 1; i < count; ++i) kernels<T>().axpy(w.matrix.grad_size, arenas + i * w.matrix.grad_size, arenas);
  std::vector<Tensor> grads = w.empty_gradients();
  std::vector<T*> pointers;
  for (const Tensor& g : grads) pointers.push_back(mutable_pointer<T>(g));
  kernels<T>().unpack(w.matrix, arenas, pointers.data());
  return grads;
}

// Calls f(i) for i in [0, count) on torch's threads.
template <class F> void parallel(int64_t count, const F& f) {
  if (count == 1) return f(0);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// The precision that the products may have (ops/precision.py): on the CPU they have that of the tensors.
inline void check_precision(int64_t precision) {
  STD_TORCH_CHECK(precision >= 0 && precision <= 2, "kruify: there is no precision ", precision);
}

inline torch::headeronly::ScalarType floating(const char* op, const Tensor& t) {
  const auto dtype = t.scalar_type();
  STD_TORCH_CHECK(t.is_cpu(), "kruify::", op, " got tensors of several devices");
  STD_TORCH_CHECK(dtype == torch::headeronly::ScalarType::Float || dtype == torch::headeronly::ScalarType::Double,
      "kruify::", op, " takes float32 and float64");
  return dtype;
}

}  // namespace kruify

// A checked matrix as the CPU's kernels take it: with packed copies of its stages, and places for its gradients.
#pragma once

#include "arguments.h"
#include "buffer.h"
#include "kernels.h"

namespace kruify {

template <class T> class PackedMatrix : public CheckedMatrix<T> {
 public:
  // `often`: whether so many products follow that a sparse residual is worth an order of its own.
  PackedMatrix(const MatrixTensors& given, const Place& place, int rows_per_bias = 1, bool often = false)
      : CheckedMatrix<T>(given, place, rows_per_bias) {
    Matrix<T>& m = this->matrix;
    auto room = [&](int64_t size) {
      const int64_t at = m.grad_size;
      m.grad_size += (size + 15) / 16 * 16;
      return at;
    };
    for (Term<T>& term : this->terms_) {
      m.scratch = std::max(m.scratch, scratch_of(term));
      for (int f = 0; f < term.stages; ++f) term.grad[f] = room(packed_size(term, f));
    }
    packed_.emplace(m.grad_size);
    for (Term<T>& term : this->terms_)
      for (int f = 0; f < term.stages; ++f) term.packed[f] = packed_->data() + term.grad[f];
    kernels<T>().pack(m);
    m.grad_diagonal = room(m.diagonal_gates * m.diagonal_size);
    m.grad_residual = room(times(m.residual.blocks, m.residual.block));
    m.grad_bias = room(m.bias_size);
    if (m.residual.values)  // samples in lanes: sparse.h
      m.scratch = std::max(m.scratch, kTile * (2 * m.cols + times(m.gates, m.rows)));
    m.scratch = (m.scratch + 15) / 16 * 16 + 16;
    if (often && m.residual.block == 1 && m.cols <= 1 << 16) slice(m.residual);
  }

  // Sums the threads' arenas into the first, and writes the gradients out.
  std::vector<Tensor> collect(T* arenas, int64_t count) const {
    const int64_t size = this->matrix.grad_size;
    for (int64_t i = 1; i < count; ++i) kernels<T>().axpy(size, arenas + i * size, arenas);
    std::vector<Tensor> grads = this->empty_gradients();
    kernels<T>().unpack(this->matrix, arenas, pointers_to<T>(grads).data());
    return grads;
  }

 private:
  std::optional<Buffer<T>> packed_;
  std::vector<int> slice_start_, slice_row_;
  std::vector<T> slice_values_;
  std::vector<uint16_t> slice_columns_;

  // Rows of single entries, the longest first, side by side.
  void slice(SparseResidual<T>& r) {
    const int64_t lanes = kernels<T>().lanes, rows = this->matrix.rows;
    std::vector<std::pair<int, int>> runs;  // length, first entry
    for (int b = 0; b < r.blocks; ++b) {
      if (b == 0 || r.index[2 * b] != r.index[2 * b - 2]) runs.push_back({0, b});
      ++runs.back().first;
    }
    std::stable_sort(runs.begin(), runs.end(), [](auto a, auto b) { return a.first > b.first; });
    slice_start_ = {0};
    for (size_t s = 0; s < runs.size(); s += lanes) {
      const size_t end = std::min(runs.size(), s + lanes), vector = slice_start_.back();
      slice_start_.push_back(int(vector) + runs[s].first);
      slice_values_.resize(slice_start_.back() * lanes, T(0));
      slice_columns_.resize(slice_start_.back() * lanes, 0);
      slice_row_.resize(2 * (s + lanes), -1);
      for (size_t i = s; i < end; ++i) {
        const auto [length, first] = runs[i];
        slice_row_[2 * i] = int(r.index[2 * first] / rows), slice_row_[2 * i + 1] = int(r.index[2 * first] % rows);
        for (int k = 0; k < length; ++k) {
          slice_values_[(vector + k) * lanes + i - s] = r.values[first + k];
          slice_columns_[(vector + k) * lanes + i - s] = uint16_t(r.index[2 * (first + k) + 1]);
        }
      }
    }
    r.slices = int(slice_start_.size()) - 1, r.slice_start = slice_start_.data(), r.slice_row = slice_row_.data();
    r.slice_values = slice_values_.data(), r.slice_columns = slice_columns_.data();
  }

  // A dense term's ranks are added up, in the packed copy and in the gradient.
  static int64_t packed_size(const Term<T>& term, int f) {
    const int64_t count = term.kind == TermKind::kDense ? term.gates
        : f == term.stages - 1                          ? term.trailing()
                                                        : term.products();
    return times(count, times(term.p[f], term.q[f]));
  }
  int64_t scratch_of(const Term<T>& term) const {
    const int64_t n = term.products(), q0 = term.q[0], p1 = term.p[1];
    if (term.kind == TermKind::kLowRank) return times(n, 16) + 64;
    if (term.kind == TermKind::kPair) return this->matrix.cols + times(2 * n, times(q0, p1)) + 32 * q0;  // padded rows
    if (term.kind == TermKind::kDense) return 0;
    const int64_t tail = times(p1, term.p[2]), inner = times(times(q0, term.q[1]), times(n, term.p[2]));
    return times(2, inner) + times(n, times(q0, tail)) + 2 * times(q0, tail) + times(term.q[1], term.p[2]);
  }
};

}  // namespace kruify

// The operators' `int[] layout`, and what the kernels need to know of it. Host code; ops/layout.py is its original.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "general.h"

namespace kruify::cuda {

struct LayoutTerm {
  int first, stages;  // in the flat list of stages
  std::vector<int> gates;
};

struct MatrixLayout {
  int gates = 0, rows = 0, cols = 0, stages = 0;
  std::vector<int> diagonal_gates;
  std::vector<LayoutTerm> terms;
};

inline MatrixLayout decode_layout(const std::vector<int64_t>& code) {
  size_t at = 0;
  auto next = [&](int64_t low, int64_t high) {
    if (at >= code.size() || code[at] < low || code[at] > high)
      throw std::runtime_error("kruify: this is no operator layout");
    return static_cast<int>(code[at++]);
  };
  MatrixLayout m;
  m.gates = next(1, 1 << 20), m.rows = next(1, 1 << 30), m.cols = next(1, 1 << 30);
  auto gates = [&] {
    std::vector<int> list(next(0, m.gates));
    for (int& g : list) g = next(0, m.gates - 1);
    std::vector<int> sorted = list;
    std::sort(sorted.begin(), sorted.end());
    if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end())
      throw std::runtime_error("kruify: a layout names a gate twice in one part");
    return list;
  };
  m.diagonal_gates = gates();
  const int terms = next(0, 1 << 20);
  for (int k = 0; k < terms; ++k) {
    LayoutTerm term{m.stages, next(1, 1 << 20), {}};
    m.stages += term.stages;
    term.gates = gates();
    m.terms.push_back(term);
  }
  if (at != code.size()) throw std::runtime_error("kruify: this is no operator layout");
  return m;
}

struct StageShape {
  int rank, P, Q;
};

// A term's stages as ops in a cheap order: those that shrink the vector first, then the last one first.
template <class T> std::vector<Op<T>> order_ops(const std::vector<StageShape>& shapes, const T* const* data) {
  const int count = static_cast<int>(shapes.size());
  std::vector<int> order(count), size(count);
  for (int k = 0; k < count; ++k) order[k] = count - 1 - k, size[k] = shapes[k].Q;
  std::stable_sort(order.begin(), order.end(), [&](int i, int j) {
    return static_cast<int64_t>(shapes[i].P) * shapes[j].Q < static_cast<int64_t>(shapes[j].P) * shapes[i].Q;
  });
  std::vector<Op<T>> ops;
  for (int k : order) {
    Op<T> op{data[k], shapes[k].P, shapes[k].Q, 1, 1, k};
    for (int j = 0; j < k; ++j) op.a *= size[j];
    for (int j = k + 1; j < count; ++j) op.b *= size[j];
    size[k] = shapes[k].P;
    ops.push_back(op);
  }
  return ops;
}

// The matrix as the general recurrence takes it; false where it has more parts than one launch holds.
template <class T>
bool build_program(const MatrixLayout& m, const std::vector<StageShape>& shapes, const std::vector<const T*>& data,
    Program<T>& program) {
  program.hidden = m.rows, program.gates = m.gates, program.terms = 0, program.width = 0;
  for (int& row : program.diagonal_row) row = -1;
  if (m.gates > 4 || m.terms.size() > kMaxTerms) return false;
  for (size_t k = 0; k < m.diagonal_gates.size(); ++k) program.diagonal_row[m.diagonal_gates[k]] = static_cast<int>(k);
  int used = 0;
  for (const LayoutTerm& from : m.terms) {
    if (used + from.stages > kMaxOps) return false;
    Term& term = program.term[program.terms++];
    term.first = used, term.count = from.stages, term.gates = static_cast<int>(from.gates.size());
    term.rank = shapes[from.first].rank;
    std::copy(from.gates.begin(), from.gates.end(), term.gate);
    const std::vector<StageShape> own(shapes.begin() + from.first, shapes.begin() + from.first + from.stages);
    int k = 0;
    for (const Op<T>& op : order_ops<T>(own, data.data() + from.first)) {
      program.op[used++] = op;
      if (++k < from.stages)
        program.width =
            static_cast<int>(greatest(program.width, static_cast<int64_t>(op.out()) * term.gates * term.rank));
    }
  }
  return true;
}

}  // namespace kruify::cuda

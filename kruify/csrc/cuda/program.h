// A term's stages, and a matrix, as the general kernels take them. Host code.
#pragma once

#include <algorithm>
#include <vector>

#include "general.h"

namespace kruify::cuda {

// The stages as ops in a cheap order: those that shrink the vector first, then the last one first.
template <class T> std::vector<Op<T>> ops_of(const Term<T>& term) {
  std::vector<int> order(term.stages);
  for (int k = 0; k < term.stages; ++k) order[k] = term.stages - 1 - k;
  std::stable_sort(
      order.begin(), order.end(), [&](int i, int j) { return term.p[i] * term.q[j] < term.p[j] * term.q[i]; });
  int64_t size[kMaxStages];
  std::copy_n(term.q, term.stages, size);
  std::vector<Op<T>> ops;
  for (int k : order) {
    const int64_t products = k == term.stages - 1 ? term.trailing() : term.products();
    Op<T> op{term.w[k], static_cast<int>(products), static_cast<int>(term.p[k]), static_cast<int>(term.q[k]), 1, 1, k};
    for (int j = 0; j < k; ++j) op.a *= static_cast<int>(size[j]);
    for (int j = k + 1; j < term.stages; ++j) op.b *= static_cast<int>(size[j]);
    size[k] = term.p[k];
    ops.push_back(op);
  }
  return ops;
}

// The matrix as the general recurrence takes it. It may have no more terms than one launch holds.
template <class T> Program<T> program_of(const Matrix<T>& m) {
  Program<T> program{};
  program.hidden = static_cast<int>(m.rows), program.gates = m.gates;
  program.diagonal = diagonal_of(m), program.residual = m.residual, program.bias = m.bias;
  int used = 0;
  for (const Term<T>& from : m) {
    ProgramTerm& term = program.term[program.terms++];
    term.first = used, term.count = from.stages, term.gates = from.gates, term.rank = from.rank;
    std::copy_n(from.gate, from.gates, term.gate);
    for (const Op<T>& op : ops_of(from)) {
      program.op[used++] = op;
      // Of all but the last, whose result goes to the gates.
      if (used < term.first + term.count)
        program.width = static_cast<int>(greatest(program.width, op.out() * from.products()));
    }
  }
  return program;
}

}  // namespace kruify::cuda

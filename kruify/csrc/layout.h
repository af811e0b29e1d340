// The operators' `int[] layout` (ops/layout.py): which stage belongs to which term and gate. Host code, without torch.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "matrix.h"

namespace kruify {

class LayoutReader {
 public:
  explicit LayoutReader(const std::vector<int64_t>& code) : code_(code) {}
  int64_t next(int64_t low, int64_t high, const char* what) {
    if (at_ == code_.size()) throw std::runtime_error(std::string("kruify: the layout ends before its ") + what);
    const int64_t value = code_[at_++];
    if (value < low || value > high)
      throw std::runtime_error(std::string("kruify: the layout's ") + what + " is " + std::to_string(value) +
          ", not in " + std::to_string(low) + ".." + std::to_string(high));
    return value;
  }
  // `count` gates of a matrix of `all`, ascending.
  void gates(int count, int all, int* to) {
    for (int i = 0; i < count; ++i) to[i] = int(next(i ? to[i - 1] + 1 : 0, all - 1, "gate"));
  }
  bool done() const { return at_ == code_.size(); }

 private:
  const std::vector<int64_t>& code_;
  size_t at_ = 0;
};

// All of `m` that the layout tells; its terms, still without stages, go to `terms`. Returns the number of stages.
template <class T> int64_t read_layout(const std::vector<int64_t>& code, Matrix<T>& m, std::vector<Term<T>>& terms) {
  constexpr int64_t kHuge = int64_t(1) << 30;
  LayoutReader read(code);
  m.gates = int(read.next(1, kMaxGates, "number of gates"));
  m.rows = read.next(1, kHuge, "rows"), m.cols = read.next(1, kHuge, "cols");
  m.diagonal_gates = int(read.next(0, m.gates, "number of diagonal gates"));
  read.gates(m.diagonal_gates, m.gates, m.diagonal_gate);
  m.diagonal_size = m.rows < m.cols ? m.rows : m.cols;
  m.terms = int(read.next(0, 4096, "number of terms"));
  terms.assign(m.terms, {});
  int64_t stages = 0;
  for (Term<T>& term : terms) {
    stages += term.stages = int(read.next(1, kMaxStages, "number of stages"));
    term.gates = int(read.next(1, m.gates, "number of gates"));
    read.gates(term.gates, m.gates, term.gate);
  }
  if (!read.done()) throw std::runtime_error("kruify: the layout goes on after its last term");
  m.term = terms.data();
  return stages;
}

}  // namespace kruify

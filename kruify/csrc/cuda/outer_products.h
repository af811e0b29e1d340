// The terms of outer products of a matrix as the two thin matrices of LowRank (../matrix.h), and products with many
// rows by torch's own product of matrices. `machine` as in products.h.
#pragma once

#include <algorithm>
#include <vector>

#include "general.h"

namespace kruify::cuda {

template <class T> bool is_outer(const Term<T>& term) { return term.kind == TermKind::kLowRank; }

// Where one term's columns (gates, rank, height) and rows (gates or 1, rank, width) stand in the thin matrices.
struct OuterPlace {
  int gates, rank;
  bool shared;          // one gate's rows for all
  int gate[kMaxGates];  // of the matrix
  int at[kMaxGates];    // in that gate, the first of the term's ranks
  int sets, total;      // of the thin matrices
  int height, width;

  KRUIFY_HD int64_t columns() const { return static_cast<int64_t>(gates) * rank * height; }
  KRUIFY_HD int64_t second(int64_t item) const {  // of an element of the columns
    const int pair = static_cast<int>(item / height), g = pair / rank;
    return (static_cast<int64_t>(gate[g]) * height + item % height) * total + at[g] + pair % rank;
  }
  KRUIFY_HD int64_t first(int g, int k, int64_t j) const {
    return (static_cast<int64_t>(sets == 1 ? 0 : gate[g]) * total + at[g] + k) * width + j;
  }
};

// The places of all such terms, and the sizes of the thin matrices.
template <class T> std::vector<OuterPlace> outer_places(const Matrix<T>& m, LowRank<T>& sizes) {
  std::vector<OuterPlace> places;
  int used[kMaxGates] = {};
  bool common = true;
  for (const Term<T>& term : m) {
    if (!is_outer(term)) continue;
    OuterPlace p{.gates = term.gates, .rank = term.rank, .shared = term.shared};
    common = common && (term.shared || m.gates == 1) && term.gates == m.gates;
    for (int k = 0; k < term.gates; ++k) {
      p.gate[k] = term.gate[k], p.at[k] = used[term.gate[k]];
      used[term.gate[k]] += term.rank;
    }
    p.height = static_cast<int>(m.rows), p.width = static_cast<int>(m.cols);
    places.push_back(p);
  }
  sizes = {common ? 1 : m.gates, *std::max_element(used, used + m.gates), nullptr, nullptr};
  for (OuterPlace& p : places) p.sets = sizes.sets, p.total = sizes.rank;
  return places;
}

template <class T> struct PackOuter {
  OuterPlace place;
  const T *column, *row;
  T *first, *second;
  KRUIFY_HD int64_t rows() const { return static_cast<int64_t>(place.sets == 1 ? 1 : place.gates) * place.rank; }
  KRUIFY_HD int64_t items() const { return place.columns() + rows() * place.width; }
  KRUIFY_HD void run(int64_t item) const {
    if (item < place.columns()) {
      second[place.second(item)] = column[item];
      return;
    }
    item -= place.columns();
    const int pair = static_cast<int>(item / place.width), g = pair / place.rank, k = pair % place.rank;
    const int64_t j = item % place.width;
    first[place.first(g, k, j)] = row[static_cast<int64_t>(place.shared ? k : pair) * place.width + j];
  }
};

// The same for the gradients, the other way round: rows that gates have in common get the sum.
template <class T> struct UnpackOuter {
  OuterPlace place;
  const T *first, *second;
  T *column, *row;
  KRUIFY_HD int64_t rows() const { return static_cast<int64_t>(place.shared ? 1 : place.gates) * place.rank; }
  KRUIFY_HD int64_t items() const { return place.columns() + rows() * place.width; }
  KRUIFY_HD void run(int64_t item) const {
    if (item < place.columns()) {
      column[item] = second[place.second(item)];
      return;
    }
    item -= place.columns();
    const int pair = static_cast<int>(item / place.width), k = pair % place.rank;
    const int64_t j = item % place.width;
    const bool sum = place.shared && place.sets > 1;
    T total = 0;
    for (int g = sum ? 0 : pair / place.rank; g <= (sum ? place.gates - 1 : pair / place.rank); ++g)
      total += first[place.first(g, k, j)];
    row[item] = total;
  }
};

template <class T> struct Zeros {
  T* to;
  int64_t count;
  KRUIFY_HD int64_t items() const { return count; }
  KRUIFY_HD void run(int64_t item) const { to[item] = T(0); }
};

// A matrix in device memory, as `multiply` takes it.
template <class T> struct Dense {
  T* data;
  int64_t rows, cols, row, col;  // strides
  Dense turned() const { return {data, cols, rows, col, row}; }
};

// All terms of outer products, as two thin matrices.
template <class T, class Machine> void prepare_outer(Machine& machine, Matrix<T>& m) {
  if (m.low_rank.rank) return;
  const std::vector<OuterPlace> places = outer_places(m, m.low_rank);
  LowRank<T>& low = m.low_rank;
  if (!low.rank) return;
  const int64_t first_size = int64_t{low.sets} * low.rank * m.cols, second_size = int64_t{height_of(m)} * low.rank;
  T* first = machine.template scratch<T>(first_size + second_size);
  T* second = first + first_size;
  low.first = first, low.second = second;
  machine.run(Zeros<T>{first, first_size + second_size});  // gates may have fewer ranks than others
  auto place = places.begin();
  for (const Term<T>& term : m)
    if (is_outer(term)) machine.run(PackOuter<T>{*place++, term.w[0], term.w[1], first, second});
}

// The parts of the thin matrices: second (height, rank) of each set's gates, and z, (rows, rank) of each set.
template <class T> Dense<const T> second_of(const Matrix<T>& m, int set) {
  const LowRank<T>& low = m.low_rank;
  const int64_t height = height_of(m) / low.sets;
  return {low.second + set * height * low.rank, height, low.rank, low.rank, 1};
}
template <class T> Dense<const T> first_of(const Matrix<T>& m) {
  const LowRank<T>& low = m.low_rank;
  return {low.first, int64_t{low.sets} * low.rank, m.cols, m.cols, 1};
}
template <class T> Dense<T> columns_of(T* data, int64_t rows, int sets, int set, int64_t width) {
  return {data + set * width, rows, width, sets * width, 1};
}

// (rows, cols), one row after the other.
template <class T> Dense<T> whole(T* data, int64_t rows, int64_t cols) { return {data, rows, cols, cols, 1}; }

// y (rows, gates * height) = x (rows, cols) times them; false where there is none.
template <class T, class Machine> bool outer_product(Machine& machine, Matrix<T>& m, const T* x, int64_t rows, T* y) {
  prepare_outer(machine, m);
  const LowRank<T>& low = m.low_rank;
  if (!low.rank) return false;
  const int64_t narrow = int64_t{low.sets} * low.rank, height = height_of(m) / low.sets;
  T* z = machine.template scratch<T>(rows * narrow);
  machine.multiply(whole(z, rows, narrow), whole(x, rows, m.cols), first_of(m).turned());
  for (int set = 0; set < low.sets; ++set)
    machine.multiply(columns_of(y, rows, low.sets, set, height), columns_of<const T>(z, rows, low.sets, set, low.rank),
        second_of(m, set).turned());
  return true;
}

// The gradient of the narrow vector, (rows, sets * rank), from that of y.
template <class T, class Machine>
const T* narrow_gradient(Machine& machine, const Matrix<T>& m, const T* grad, int64_t rows) {
  const LowRank<T>& low = m.low_rank;
  T* dz = machine.template scratch<T>(rows * low.sets * low.rank);
  for (int set = 0; set < low.sets; ++set)
    machine.multiply(columns_of(dz, rows, low.sets, set, low.rank),
        columns_of(grad, rows, low.sets, set, height_of(m) / low.sets), second_of(m, set));
  return dz;
}

// grad_x (rows, cols) = what reaches x by them from the gradient of y; false where there is none.
template <class T, class Machine>
bool outer_transposed(Machine& machine, Matrix<T>& m, const T* grad, int64_t rows, T* grad_x) {
  prepare_outer(machine, m);
  const LowRank<T>& low = m.low_rank;
  if (!low.rank) return false;
  const T* dz = narrow_gradient(machine, m, grad, rows);
  machine.multiply(whole(grad_x, rows, m.cols), whole(dz, rows, int64_t{low.sets} * low.rank), first_of(m));
  return true;
}

// The gradients of their stages.
template <class T, class Machine>
void outer_gradients(Machine& machine, Matrix<T>& m, const T* grad, const T* x, int64_t rows, T* const* stages) {
  prepare_outer(machine, m);
  const LowRank<T>& low = m.low_rank;
  if (!low.rank) return;
  const int64_t narrow = int64_t{low.sets} * low.rank, height = height_of(m) / low.sets;
  const T* dz = narrow_gradient(machine, m, grad, rows);
  T* z = machine.template scratch<T>(rows * narrow);
  T *first = machine.template scratch<T>(narrow * m.cols),
    *second = machine.template scratch<T>(height_of(m) * low.rank);
  machine.multiply(whole(z, rows, narrow), whole(x, rows, m.cols), first_of(m).turned());
  machine.multiply(whole(first, narrow, m.cols), whole(dz, rows, narrow).turned(), whole(x, rows, m.cols));
  for (int set = 0; set < low.sets; ++set)
    machine.multiply(whole(second + set * height * low.rank, height, low.rank),
        columns_of(grad, rows, low.sets, set, height).turned(), columns_of<const T>(z, rows, low.sets, set, low.rank));
  LowRank<T> sizes{};
  const std::vector<OuterPlace> places = outer_places(m, sizes);
  auto place = places.begin();
  for (const Term<T>& term : m) {
    if (is_outer(term)) machine.run(UnpackOuter<T>{*place++, first, second, stages[0], stages[1]});
    stages += term.stages;
  }
}

}  // namespace kruify::cuda

// Products of a matrix with many rows, and their gradients, launch by launch, on a `machine` (machine.cuh):
//   run(item)                        runs item.run(k) for every k
//   scratch<T>(n)                    memory that lives as long as the machine
//   sort_columns(residual)             fills by_column and blocks_by_column
//   scoped(f)                          runs f; the scratch memory that it takes is given back
//   multiply(out, a, b)                 out = a b, by torch's own product (cuBLAS)
//   recurrence kernels, pair_product, pair_gradient: one launch each
// Nothing here waits for the device, so that a call can be captured in a CUDA graph.
#pragma once

#include <type_traits>

#include "outer_products.h"
#include "pair_gradient.h"
#include "pair_product.h"
#include "per_row.h"
#include "program.h"

namespace kruify::cuda {

// Where gradients go.
template <class T> struct MatrixGradient {
  std::vector<T*> stages;
  T *diagonal = nullptr, *residual = nullptr, *bias = nullptr;  // null where nobody asks
};

constexpr int64_t kScratchElements = int64_t{1} << 24;  // of one intermediate: more rows are taken in chunks

// x (rows, width) at an address that the two-stage kernels can load 16 bytes at a time from; copied where it is not.
template <class Machine> const float* aligned_rows(Machine& machine, const float* x, int64_t rows, int64_t width) {
  if (reinterpret_cast<uintptr_t>(x) % 16 == 0) return x;
  float* copy = machine.template scratch<float>(rows * width);
  machine.run(AddBias<float>{x, nullptr, copy, rows, width});
  return copy;
}

template <class T, class Machine> void prepare_sparse(Machine& machine, Matrix<T>& m, bool by_column) {
  SparseResidual<T>& s = m.residual;
  if (!s.values || s.row_start) return;
  int* starts = machine.template scratch<int>(height_of(m) + 1);
  machine.run(SparseRows{.index = s.index,
      .row_start = starts,
      .blocks = s.blocks,
      .block = s.block,
      .gates = m.gates,
      .height = static_cast<int>(m.rows),
      .width = static_cast<int>(m.cols)});
  s.row_start = starts;
  if (by_column) machine.sort_columns(s);
}

template <class T> bool is_pair(const Term<T>& term, AnyShape& s) {
  if (!std::is_same_v<T, float> || term.stages != 2) return false;
  s = {static_cast<int>(term.p[0]), static_cast<int>(term.q[0]), static_cast<int>(term.p[1]),
      static_cast<int>(term.q[1])};
  for (int n : {s.P1, s.Q1, s.P2, s.Q2})
    if (n % 4) return false;
  return true;
}

// One stage of a term; the other members of the item are the caller's.
template <class T, class Machine> void apply_stage(Machine& machine, const Term<T>& term, ApplyStage<T> item) {
  item.gates = term.gates, item.rank = term.rank;
  std::copy_n(term.gate, term.gates, item.gate);
  machine.run(item);
}

// y (rows, gates * height) = x (rows, cols) W^T + bias. `precision`: what the products of float32 may be rounded to.
template <class T, class Machine>
void product(Machine& machine, Matrix<T>& m, const T* x, int64_t rows, T* y, Precision precision) {
  if (rows == 0) return;
  const int height = static_cast<int>(m.rows), width = static_cast<int>(m.cols), stride = height_of(m);
  prepare_sparse(machine, m, false);
  const bool outer = outer_product(machine, m, x, rows, y);
  const bool beside = m.bias || m.diagonal || m.residual.values;
  const bool started = beside || outer || m.terms != 1 || m.term[0].gates != m.gates;
  if (beside || (started && !outer))
    machine.run(StartProduct<T>{.bias = m.bias,
        .x = x,
        .diagonal = diagonal_of(m),
        .residual = m.residual,
        .y = y,
        .rows = rows,
        .gates = m.gates,
        .height = height,
        .width = width,
        .diagonal_size = static_cast<int>(m.diagonal_size),
        .accumulate = outer});
  AnyShape s{};
  for (const Term<T>& term : m) {
    if (is_outer(term)) continue;
    if constexpr (std::is_same_v<T, float>) {
      PairProductPlan plan{};
      if (is_pair(term, s)) plan = pair_product_plan(s, term.rank, machine.chip, false, precision);
      if (plan.bytes) x = aligned_rows(machine, x, rows, width);
      for (int k = 0; plan.bytes && k < term.gates; ++k)
        machine.pair_product(s, plan,
            PairProduct{.a = term.w[0] + int64_t{k} * term.rank * s.P1 * s.Q1,
                .b = term.w[1] + int64_t{k} * term.rank * s.P2 * s.Q2,
                .x = x,
                .y = y + int64_t{term.gate[k]} * height,
                .rows = rows,
                .x_stride = width,
                .y_stride = stride,
                .accumulate = started},
            false);
      if (plan.bytes) continue;
    }
    const std::vector<Op<T>> ops = ops_of(term);
    const int last = term.stages - 1;
    int64_t most = 1;
    for (int k = 0; k < last; ++k) most = greatest(most, ops[k].out() * term.products());
    const int64_t chunk = least(rows, greatest(1, kScratchElements / most));
    T* buffer[2] = {};
    for (int k = 0; k < last; ++k) buffer[k] = machine.template scratch<T>(chunk * most);
    for (int64_t first = 0; first < rows; first += chunk) {
      View<const T> in{x + first * width, width, 0, 0};
      for (int k = 0; k <= last; ++k) {
        const int64_t size = ops[k].out();
        View<T> out{buffer[k & 1], size * term.products(), size, 0};
        if (k == last) out = {y + first * stride, stride, 0, height};
        apply_stage(machine, term,
            ApplyStage<T>{.op = ops[k],
                .transposed = false,
                .accumulate = k == last && started,
                .sum = k == last ? kRank : kEach,
                .in = in,
                .out = out,
                .rows = least(chunk, rows - first)});
        in = {out.data, out.row, out.pair, out.gate};
      }
    }
  }
}

// Adds parts (outer, pieces, size) up in order.
template <class T, class Machine>
void sum_parts(Machine& machine, const T* part, T* out, int64_t outer, int64_t pieces, int64_t size, bool accumulate) {
  machine.run(SumParts<T>{part, out, outer, pieces, size, accumulate});
}

// out[i] = sum over rows of term(row, i), i < size: in pieces, which are then added up.
template <class T, class Machine, class Term>
void sum_rows(Machine& machine, const Term& term, int64_t rows, T* out, int64_t size) {
  const int64_t pieces = pieces_for(rows, size);
  T* part = machine.template scratch<T>(pieces * size);
  machine.run(RowSums<T, Term>{term, part, rows, pieces, size});
  sum_parts(machine, part, out, 1, pieces, size, false);
}

// Gradients of a pair's factors by the two-stage kernel; false where it has no room.
template <class Machine>
bool pair_gradients(Machine& machine, const Matrix<float>& m, const Term<float>& term, AnyShape s, const float* grad,
    const float* x, int64_t rows, float* const* to, Precision precision) {
  const PairGradientPlan plan = pair_gradient_plan(s, machine.chip, precision);
  if (!plan.bytes) return false;
  const int64_t most = (2 * machine.chip.processors + term.rank - 1) / term.rank;
  const int64_t pieces = greatest(1, least((rows + plan.batch - 1) / plan.batch, most)), rank = term.rank;
  const int64_t size_a = static_cast<int64_t>(s.P1) * s.Q1, size_b = static_cast<int64_t>(s.P2) * s.Q2;
  float* part_a = machine.template scratch<float>(rank * pieces * plan.groups_a * size_a);
  float* part_b = machine.template scratch<float>(rank * pieces * plan.groups_b * size_b);
  for (int k = 0; k < term.gates; ++k) {
    machine.pair_gradient(s, plan,
        PairGradient{.a = term.w[0] + k * rank * size_a,
            .b = term.w[1] + k * rank * size_b,
            .d = grad + term.gate[k] * m.rows,
            .x = x,
            .part_a = part_a,
            .part_b = part_b,
            .d_stride = height_of(m),
            .x_stride = m.cols,
            .first = 0,
            .last = rows},
        static_cast<int>(pieces), term.rank);
    sum_parts(machine, part_a, to[0] + k * rank * size_a, rank, pieces * plan.groups_a, size_a, false);
    sum_parts(machine, part_b, to[1] + k * rank * size_b, rank, pieces * plan.groups_b, size_b, false);
  }
  return true;
}

// The gradient of x (rows, cols) through one term of two stages, added to grad_x; false where it has no room.
template <class Machine>
bool pair_transposed(Machine& machine, const Matrix<float>& m, const Term<float>& term, AnyShape s, const float* grad,
    int64_t rows, float* grad_x, Precision precision) {
  const PairProductPlan plan = pair_product_plan(s, term.rank, machine.chip, true, precision);
  for (int k = 0; plan.bytes && k < term.gates; ++k)
    machine.pair_product(s, plan,
        PairProduct{.a = term.w[0] + int64_t{k} * term.rank * s.P1 * s.Q1,
            .b = term.w[1] + int64_t{k} * term.rank * s.P2 * s.Q2,
            .x = grad + term.gate[k] * m.rows,
            .y = grad_x,
            .rows = rows,
            .x_stride = height_of(m),
            .y_stride = m.cols,
            .accumulate = true},
        true);
  return plan.bytes > 0;
}

// The gradients of one term, item by item: of x (null: not wanted), added to grad_x, and of the stages (null likewise;
// then x is not needed).
template <class T, class Machine>
void term_gradients(Machine& machine, const Matrix<T>& m, const Term<T>& term, const T* grad, const T* x, int64_t rows,
    T* grad_x, T* const* to) {
  const std::vector<Op<T>> ops = ops_of(term);
  const int count = term.stages;
  const int64_t pairs = term.products();
  int64_t total = 1, most = 1, parts = 0;
  for (int k = 0; k + 1 < count; ++k) total += ops[k].out() * pairs, most = greatest(most, ops[k].out() * pairs);
  const int64_t chunk = least(greatest(1, rows), greatest(1, kScratchElements / total));
  T* kept = machine.template scratch<T>(chunk * total);
  T* buffer[2] = {machine.template scratch<T>(chunk * most), machine.template scratch<T>(chunk * most)};
  for (const Op<T>& op : ops) parts = greatest(parts, pieces_for(chunk, pairs * op.P * op.Q) * pairs * op.P * op.Q);
  T* part = machine.template scratch<T>(parts);
  for (int64_t first = 0; first == 0 || first < rows; first += chunk) {
    const int64_t now = least(chunk, rows - first);
    View<const T> in[kMaxStages] = {{x + first * m.cols, m.cols, 0, 0}};  // what each op takes
    T* place = kept;
    for (int k = 0; to && k + 1 < count; ++k) {
      const int64_t size = ops[k].out();
      const View<T> out{place, size * pairs, size, 0};
      apply_stage(machine, term,
          ApplyStage<T>{.op = ops[k],
              .transposed = false,
              .accumulate = false,
              .sum = kEach,
              .in = in[k],
              .out = out,
              .rows = now});
      in[k + 1] = {place, size * pairs, size, 0};
      place += now * size * pairs;
    }
    View<const T> d{grad + first * height_of(m), height_of(m), 0, m.rows};
    for (int k = count - 1; k >= 0; --k) {
      const Op<T>& op = ops[k];
      if (to) {
        const int64_t size = pairs * op.P * op.Q;
        StageGradient<T> item{.op = op,
            .gates = term.gates,
            .rank = term.rank,
            .d = d,
            .x = in[k],
            .part = part,
            .rows = now,
            .pieces = pieces_for(now, size)};
        std::copy_n(term.gate, term.gates, item.gate);
        machine.run(item);
        sum_parts(machine, part, to[op.stage], 1, item.pieces, size, first > 0);
      }
      if (k) {
        const int64_t size = op.in();
        const View<T> out{buffer[k & 1], size * pairs, size, 0};
        apply_stage(machine, term,
            ApplyStage<T>{
                .op = op, .transposed = true, .accumulate = false, .sum = kEach, .in = d, .out = out, .rows = now});
        d = {out.data, out.row, out.pair, 0};
      } else if (grad_x) {
        apply_stage(machine, term,
            ApplyStage<T>{.op = op,
                .transposed = true,
                .accumulate = true,
                .sum = kAll,
                .in = d,
                .out = {grad_x + first * m.cols, m.cols, 0, 0},
                .rows = now});
      }
    }
  }
}

// grad_x (rows, cols) from the gradient (rows, gates * height) of x W^T.
template <class T, class Machine>
void product_transposed(Machine& machine, Matrix<T>& m, const T* grad, int64_t rows, T* grad_x, Precision precision) {
  if (rows == 0) return;
  prepare_sparse(machine, m, true);
  const bool outer = outer_transposed(machine, m, grad, rows, grad_x);
  if (!outer || m.diagonal || m.residual.values)
    machine.run(StartGradient<T>{.grad = grad,
        .diagonal = diagonal_of(m),
        .residual = m.residual,
        .grad_x = grad_x,
        .rows = rows,
        .gates = m.gates,
        .height = static_cast<int>(m.rows),
        .width = static_cast<int>(m.cols),
        .diagonal_size = static_cast<int>(m.diagonal_size),
        .accumulate = outer});
  for (const Term<T>& term : m) {
    if (is_outer(term)) continue;
    if constexpr (std::is_same_v<T, float>)
      if (AnyShape s{}; is_pair(term, s) && pair_transposed(machine, m, term, s, grad, rows, grad_x, precision))
        continue;
    term_gradients<T>(machine, m, term, grad, nullptr, rows, grad_x, nullptr);
  }
}

// Gradients of the matrix from that (rows, gates * height) of x W^T + bias.
template <class T, class Machine>
void product_gradients(Machine& machine, Matrix<T>& m, const T* grad, const T* x, int64_t rows,
    const MatrixGradient<T>& to, Precision precision) {
  const int height = static_cast<int>(m.rows), width = static_cast<int>(m.cols), stride = height_of(m);
  const int diagonal_size = static_cast<int>(m.diagonal_size);
  prepare_sparse(machine, m, true);
  if (to.bias) sum_rows(machine, RowEntry<T>{grad, stride}, rows, to.bias, stride);
  if (to.diagonal) {
    DiagonalGradient<T> term{grad, x, m.gates, height, width, diagonal_size};
    std::copy_n(m.diagonal_gate, m.diagonal_gates, term.gate);
    sum_rows(machine, term, rows, to.diagonal, m.diagonal_gates * m.diagonal_size);
  }
  if (to.residual) {
    const SparseResidual<T>& residual = m.residual;
    const SparseGradient<T> term{grad, x, residual.index, residual.block, stride, width};
    sum_rows(machine, term, rows, to.residual, static_cast<int64_t>(residual.blocks) * residual.block);
  }
  T* const* stages = to.stages.data();
  outer_gradients(machine, m, grad, x, rows, stages);
  for (const Term<T>& term : m) {
    bool done = is_outer(term);
    if constexpr (std::is_same_v<T, float>)
      if (AnyShape s{}; !done && is_pair(term, s))
        done = pair_gradients(machine, m, term, s, grad, x, rows, stages, precision);
    if (!done) term_gradients<T>(machine, m, term, grad, x, rows, nullptr, stages);
    stages += term.stages;
  }
}

// The matrix in full, (gates, height, cols), for a recurrence with more terms than a launch holds.
template <class T, class Machine> T* densify(Machine& machine, const Matrix<T>& m) {
  Matrix<T> products = m;
  products.bias = nullptr;
  const int64_t height = height_of(m), chunk = least(m.cols, greatest(1, kScratchElements / height));
  T* dense = machine.template scratch<T>(height * m.cols);
  T *units = machine.template scratch<T>(chunk * m.cols), *columns = machine.template scratch<T>(chunk * height);
  for (int64_t first = 0; first < m.cols; first += chunk) {
    const int64_t count = least(chunk, m.cols - first);
    machine.run(UnitRows<T>{units, count, first, m.cols});
    product(machine, products, units, count, columns, kFloat32);
    machine.run(Columns<T>{columns, dense, count, first, height, m.cols});
  }
  return dense;
}

}  // namespace kruify::cuda

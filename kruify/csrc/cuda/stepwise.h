// The recurrence step by step, for what no kernel keeps on the chip: a step's products for all rows of the batch at
// once, as products.h has them, and one launch for the rest. A step of low rank is two products of thin
// matrices and that launch. Nothing waits for the device, so that a CUDA graph can keep all of it.
#pragma once

#include <vector>

#include "instantiations.h"
#include "low_rank_plan.h"
#include "products.h"

namespace kruify::cuda {

// One step: the terms' products y (rows, G * H) and the states before (rows, H) -> those after. Running c and the last
// states are in args.c_last and args.h_last.
template <int G, class T> struct CellStep {
  ForwardArrays<T> args;
  const T* bias;
  Diagonal<T> diagonal;
  SparseResidual<T> residual;
  const T *y, *before;
  T* after;
  int64_t first;  // row of sample 0
  int rows, hidden;

  KRUIFY_HD int64_t items() const { return static_cast<int64_t>(rows) * hidden; }
  KRUIFY_HD void run(int64_t item) const {
    const int i = static_cast<int>(item % hidden);
    const int64_t b = item / hidden, row = first + b;
    const T* h = before + b * hidden;
    T gates[G], product[G], saved[5], c = G == 4 ? args.c_last[item] : T(0);
    for (int g = 0; g < G; ++g) {
      const int e = g * hidden + i;
      gates[g] = args.x[row * G * hidden + e], product[g] = y[b * G * hidden + e];
      if (bias) product[g] += bias[e];
      if (const T* d = diagonal.of(g, hidden)) product[g] += d[i] * h[i];
      if (residual.values) product[g] += row_product(residual, e, h);
    }
    const T now = cell_forward<G>(gates, product, h[i], c, args.kind, saved);
    after[item] = args.h_last[item] = args.out[row * hidden + i] = now;
    if (G == 4) args.c_last[item] = c;
    constexpr int kept = saved_of_gates(G);
    for (int k = 0; args.workspace && k < kept; ++k) args.workspace[(row * kept + k) * hidden + i] = saved[k];
  }
};

// The same backward: what came by W (rows, H) from the step after this one in time, and what passed by it, make the
// gradient of h. Running dc is in args.grad_c0.
template <int G, class T> struct CellStepBackward {
  BackwardArrays<T> args;
  Diagonal<T> diagonal;
  const T* by_w;
  T* carry;
  int64_t first, before;  // rows of sample 0 at this step and at the one before
  int rows, rows_before, hidden;

  KRUIFY_HD int64_t items() const { return static_cast<int64_t>(rows) * hidden; }
  KRUIFY_HD void run(int64_t item) const {
    const int i = static_cast<int>(item % hidden), b = static_cast<int>(item / hidden);
    T product[G], dc = G == 4 ? args.grad_c0[item] : T(0);
    T pass = unit_backward<G>(
        args, hidden, b < rows_before, first + b, before + b, b, i, carry[item] + by_w[item], dc, product);
    for (int g = 0; g < G; ++g)
      if (const T* d = diagonal.of(g, hidden)) pass += d[i] * product[g];
    carry[item] = pass;
    if (G == 4) args.grad_c0[item] = dc;
  }
};

// The steps in the order of the recurrence, by the rows of a packed batch.
struct Steps {
  const std::vector<int64_t>& starts;  // (steps + 1,)
  bool reverse;

  int count() const { return static_cast<int>(starts.size()) - 1; }
  // Of the step before the first: none.
  int64_t first(int n) const { return n < 0 ? 0 : starts[time(n)]; }
  int rows(int n) const { return n < 0 ? 0 : static_cast<int>(starts[time(n) + 1] - starts[time(n)]); }

 private:
  int time(int n) const { return reverse ? count() - 1 - n : n; }
};

// Whether step by step is expected to be faster than the general kernel.
template <class T> bool stepwise_pays(const Matrix<T>& m, Kind kind, int batch, const Chip& chip, Precision precision) {
  if (is_modrelu(kind)) return false;
  int64_t launches = 1, work = 0;
  for (const Term<T>& term : m) {
    launches += is_outer(term) ? 2 : greatest(term.gates, term.stages);
    for (const Op<T>& op : ops_of(term)) work += int64_t{op.products} * op.out() * op.Q;
  }
  return stepwise_clocks(launches, work, batch, chip, precision) < general_clocks(work, batch, chip);
}

template <class T, class Machine> void copy(Machine& machine, const T* from, int64_t size, T* to) {
  if (from) machine.run(AddBias<T>{from, nullptr, to, 1, size});
  else machine.run(Zeros<T>{to, size});
}

template <class T, class Machine>
void stepwise(Machine& machine, Matrix<T>& m, const ForwardArrays<T>& arrays, const Steps& steps, Precision precision) {
  prepare_sparse(machine, m, false);
  prepare_outer(machine, m);
  Matrix<T> terms = m;
  terms.bias = terms.diagonal = nullptr, terms.residual = {};
  const int64_t size = arrays.rows.batch * m.rows;
  T* states[2] = {machine.template scratch<T>(size), machine.template scratch<T>(size)};
  T* y = machine.template scratch<T>(arrays.rows.batch * int64_t{height_of(m)});
  for (T* to : {states[0], states[1], arrays.h_last}) copy(machine, arrays.h0, size, to);
  if (arrays.kind == kLstm) copy(machine, arrays.c0, size, arrays.c_last);
  for (int n = 0; n < steps.count(); ++n)
    machine.scoped([&] {
      product(machine, terms, states[n & 1], steps.rows(n), y, precision);
      with_gates(arrays.kind, [&](auto gates) {
        machine.run(CellStep<gates.value, T>{arrays, m.bias, diagonal_of(m), m.residual, y, states[n & 1],
            states[(n + 1) & 1], steps.first(n), steps.rows(n), static_cast<int>(m.rows)});
      });
    });
}

template <class T, class Machine>
void stepwise(
    Machine& machine, Matrix<T>& m, const BackwardArrays<T>& arrays, const Steps& steps, Precision precision) {
  prepare_sparse(machine, m, true);
  prepare_outer(machine, m);
  Matrix<T> products = m;
  products.diagonal = nullptr;  // the cell's
  const int64_t size = arrays.rows.batch * m.rows;
  T *by_w = machine.template scratch<T>(size), *carry = machine.template scratch<T>(size);
  copy<T>(machine, nullptr, size, by_w);
  copy(machine, arrays.grad_h, size, carry);
  if (arrays.kind == kLstm) copy(machine, arrays.grad_c, size, arrays.grad_c0);
  const T* grad = arrays.kind == kGru ? arrays.grad_product : arrays.grad_gates;
  for (int n = steps.count() - 1; n >= 0; --n)
    machine.scoped([&] {
      with_gates(arrays.kind, [&](auto gates) {
        machine.run(CellStepBackward<gates.value, T>{arrays, diagonal_of(m), by_w, carry, steps.first(n),
            steps.first(n - 1), steps.rows(n), steps.rows(n - 1), static_cast<int>(m.rows)});
      });
      product_transposed(machine, products, grad + steps.first(n) * height_of(m), steps.rows(n), by_w, precision);
    });
  machine.run(AddBias<T>{carry, by_w, arrays.grad_h0, 1, size});
}

}  // namespace kruify::cuda

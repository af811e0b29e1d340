// What an operator does on a `machine` (products.h): which kernels a recurrence takes.
#pragma once

#include <utility>

#include "instantiations.h"
#include "low_rank_backward.h"
#include "pair_backward.h"
#include "pair_forward.h"
#include "products.h"
#include "stepwise.h"

namespace kruify::cuda {

// The general kernels' view of a matrix.
template <class T, class Machine> Program<T> program_on(Machine& machine, Matrix<T>& m, bool backward) {
  if (m.terms <= kMaxTerms) {
    prepare_sparse(machine, m, backward);
    return program_of(m);
  }
  Term<T> whole{.stages = 1, .gates = m.gates, .rank = 1, .p = {m.rows}, .q = {m.cols}, .w = {densify(machine, m)}};
  for (int g = 0; g < m.gates; ++g) whole.gate[g] = g;
  const Matrix<T> full{.gates = m.gates, .rows = m.rows, .cols = m.cols, .terms = 1, .term = &whole, .bias = m.bias};
  return program_of(full);
}

// Whether the two-stage kernels take this recurrence: one term of two stages for all gates, and a diagonal.
template <class T> bool is_pair_recurrence(const Matrix<T>& m, AnyShape& s) {
  return !m.residual.values && m.terms == 1 && m.term[0].gates == m.gates && is_pair(m.term[0], s) && pair_takes(s);
}

// The plan of the low-rank kernel, and what it takes beside outer products and a diagonal: one term of two square
// stages for all gates, and a sparse residual. cluster == 0: not this.
template <class Machine>
LowRankPlan low_rank_plan_for(
    Machine& machine, Matrix<float>& m, Kind kind, int batch, bool backward, Precision precision, Beside& beside) {
  const Term<float>* pair = nullptr;
  int others = 0;
  for (const Term<float>& term : m)
    if (!is_outer(term)) pair = &term, ++others;
  AnyShape s{};
  if (others == m.terms || others > 1 || is_modrelu(kind)) return {};
  if (pair && (pair->gates != m.gates || !is_pair(*pair, s) || !pair_takes(s))) return {};
  prepare_outer(machine, m);
  LowRankSizes sizes{static_cast<int>(m.rows), m.gates, m.low_rank.sets, m.low_rank.rank};
  if (pair) sizes.pair = pair->rank, sizes.P1 = s.P1, sizes.P2 = s.P2;
  if (m.residual.values) sizes.blocks = m.residual.blocks, sizes.block = m.residual.block;
  const LowRankPlan plan =
      low_rank_plan(sizes, {m.bias != nullptr, m.diagonal != nullptr}, batch, machine.chip, backward, precision);
  if (plan.cluster) {
    prepare_sparse(machine, m, backward);
    beside = {pair ? pair->w[0] : nullptr, pair ? pair->w[1] : nullptr, m.residual};
  }
  return plan;
}

// modReLU's bias belongs to the cell: the matrix is left without one. Returns what the cell gets.
template <class T> const T* take_threshold(Matrix<T>& m, Kind kind) {
  return is_modrelu(kind) ? std::exchange(m.bias, nullptr) : nullptr;
}

// `starts`: the first row of each step, and the number of rows. `precision`: what the products of float32 may be
// rounded to. The arrays' kind and threshold are filled in here.
template <class T, class Machine>
void recurrence(Machine& machine, Matrix<T>& m, Kind kind, ForwardArrays<T> arrays, const std::vector<int64_t>& starts,
    Precision precision) {
  if (arrays.rows.batch == 0) return;
  arrays.kind = kind, arrays.threshold = take_threshold(m, kind);
  if constexpr (std::is_same_v<T, float>) {
    if (AnyShape s{}; is_pair_recurrence(m, s)) {
      const Term<T>& term = m.term[0];
      const int batch = arrays.rows.batch;
      PairPlan plan = pair_plan(s, m.gates, term.rank, batch, machine.chip, false, precision);
      if (plan.cluster) {
        arrays.x = aligned_rows(machine, arrays.x, starts.back(), height_of(m));
        const int numbers = m.gates * s.P1 * plan.share;
        if (m.bias) hold(plan, &PairPlan::bias, numbers, batch, machine.chip);
        if (m.diagonal) hold(plan, &PairPlan::diagonal, numbers, batch, machine.chip);
        return machine.pair_recurrence(s, plan, PairForward{arrays, term.w[0], term.w[1], diagonal_of(m), m.bias});
      }
    }
  }
  if constexpr (std::is_same_v<T, float>) {
    Beside beside{};
    const LowRankPlan plan = low_rank_plan_for(machine, m, kind, arrays.rows.batch, false, precision, beside);
    if (plan.cluster) {
      arrays.x = aligned_rows(machine, arrays.x, starts.back(), height_of(m));
      return machine.low_rank_recurrence(plan, LowRankForward{arrays, m.low_rank, diagonal_of(m), m.bias, beside});
    }
  }
  if (stepwise_pays(m, kind, arrays.rows.batch, machine.chip, precision))
    return stepwise(machine, m, arrays, Steps{starts, arrays.rows.reverse}, precision);
  machine.general_recurrence(program_on(machine, m, false), arrays);
}

// The arrays' grad_product is made here.
template <class T, class Machine>
void recurrence_backward(Machine& machine, Matrix<T>& m, Kind kind, BackwardArrays<T> arrays,
    const std::vector<int64_t>& starts, MatrixGradient<T> to, Precision precision) {
  const int64_t total = starts.back();
  arrays.kind = kind, arrays.threshold = take_threshold(m, kind);
  arrays.grad_product = kind == kGru ? machine.template scratch<T>(total * height_of(m)) : nullptr;
  if (arrays.rows.batch) {
    bool done = false;
    if constexpr (std::is_same_v<T, float>) {
      const int batch = arrays.rows.batch;
      Beside beside{};
      if (AnyShape s{}; is_pair_recurrence(m, s)) {
        const Term<T>& term = m.term[0];
        const PairPlan plan = pair_plan(s, m.gates, term.rank, batch, machine.chip, true, precision);
        done = plan.cluster > 0;
        if (done) machine.pair_recurrence(s, plan, PairBackward{arrays, term.w[0], term.w[1], diagonal_of(m)});
      } else if (LowRankPlan plan = low_rank_plan_for(machine, m, kind, batch, true, precision, beside); plan.cluster) {
        done = true;
        machine.low_rank_recurrence(plan, LowRankBackward{arrays, m.low_rank, diagonal_of(m), beside});
      }
    }
    if (!done && stepwise_pays(m, kind, arrays.rows.batch, machine.chip, precision))
      stepwise(machine, m, arrays, Steps{starts, arrays.rows.reverse}, precision);
    else if (!done) machine.general_recurrence(program_on(machine, m, true), arrays);
  }
  if (T* out = is_modrelu(kind) ? std::exchange(to.bias, nullptr) : nullptr) {
    const int64_t units = m.rows / rows_per_bias(kind);
    sum_rows(machine, ThresholdGradient<T>{arrays.grad_gates, arrays.workspace, m.rows, units}, total, out, units);
  }
  T* before = machine.template scratch<T>(total * m.cols);
  machine.run(PreviousStates<T>{arrays.out, arrays.h0, before, arrays.rows, static_cast<int>(m.cols)});
  product_gradients<T>(
      machine, m, kind == kGru ? arrays.grad_product : arrays.grad_gates, before, total, to, precision);
}

}  // namespace kruify::cuda

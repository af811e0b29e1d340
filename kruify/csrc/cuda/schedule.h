// What an operator does, launch by launch, on a `machine`: the GPU (machine.cuh), or the CPU in tests/cuda. A machine
//   run(item)                        runs item.run(k) for every k
//   scratch<T>(n)                    memory that lives as long as the machine
//   sort_columns(sparse) ...        fills by_column and blocks_by_column
//   recurrence kernels, pair_product, pair_gradient: one launch each
// Nothing here waits for the device, so that a call can be captured in a CUDA graph.
#pragma once

#include <type_traits>
#include <utility>

#include "chain.h"
#include "instantiations.h"
#include "matrix_layout.h"
#include "pair_backward.h"
#include "pair_forward.h"
#include "pair_gradient.h"
#include "pair_product.h"
#include "per_row.h"

namespace kruify::cuda {

template <class T> struct Matrix {
  MatrixLayout layout;
  std::vector<StageShape> shapes;
  std::vector<const T*> stages;  // each (gates of its term, rank, P, Q)
  const T *diagonal = nullptr, *bias = nullptr;
  SparseResidual<T> sparse{};  // values, index, blocks, block from the caller; the rest by prepare_sparse

  int diagonal_size() const { return std::min(layout.rows, layout.cols); }
  int height() const { return layout.gates * layout.rows; }
};

// Where gradients go; null where nobody asks.
template <class T> struct MatrixGradient {
  std::vector<T*> stages;
  T *diagonal = nullptr, *sparse = nullptr, *bias = nullptr;
};

constexpr int64_t kScratchElements = int64_t{1} << 24;  // of one intermediate: more rows are taken in chunks

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class T, class Machine> void prepare_sparse(Machine& machine, Matrix<T>& m, bool by_column) {
  if (!m.sparse.values || m.sparse.row_start) return;
  int* starts = machine.template scratch<int>(m.height() + 1);
  machine.run(SparseRows{
      m.sparse.index, starts, m.sparse.blocks, m.sparse.block, m.layout.gates, m.layout.rows, m.layout.cols});
  m.sparse.row_start = starts;
  if (by_column) machine.sort_columns(m.sparse.index, m.sparse.blocks, m.sparse.by_column, m.sparse.blocks_by_column);
}

// The diagonal's row of each gate, on the device.
template <class T, class Machine> const int* diagonal_rows(Machine& machine, const Matrix<T>& m) {
  if (!m.diagonal) return nullptr;
  std::vector<int> rows(m.layout.gates, -1);
  for (size_t k = 0; k < m.layout.diagonal_gates.size(); ++k) rows[m.layout.diagonal_gates[k]] = static_cast<int>(k);
  return machine.upload(rows);
}

template <class T> std::vector<Op<T>> ops_of(const Matrix<T>& m, const LayoutTerm& term) {
  const std::vector<StageShape> own(m.shapes.begin() + term.first, m.shapes.begin() + term.first + term.stages);
  return order_ops<T>(own, m.stages.data() + term.first);
}

template <class T> bool is_pair(const Matrix<T>& m, const LayoutTerm& term, AnyShape& s) {
  if constexpr (!std::is_same_v<T, float>) return false;
  if (term.stages != 2) return false;
  const StageShape &a = m.shapes[term.first], &b = m.shapes[term.first + 1];
  s = {a.P, a.Q, b.P, b.Q};
  for (int n : {s.P1, s.Q1, s.P2, s.Q2})
    if (n % 4) return false;
  return true;
}

// One stage for all gates of a term, in launches of at most kMaxGates gates.
template <class T, class Machine>
void apply_stage(Machine& machine, const LayoutTerm& term, const Op<T>& op, int rank, bool transposed, Sum sum,
    bool accumulate, View<const T> in, View<T> out, int64_t rows) {
  const int gates = static_cast<int>(term.gates.size());
  for (int first = 0; first < gates; first += kMaxGates) {
    ApplyStage<T> item{op, transposed, accumulate || (sum == kAll && first > 0), sum,
        std::min(kMaxGates, gates - first), rank, {}, in, out, rows};
    item.op.data += static_cast<int64_t>(first) * rank * op.P * op.Q;
    item.in.data += first * rank * in.pair;
    item.out.data += first * rank * out.pair;
    std::copy_n(term.gates.begin() + first, item.gates, item.gate);
    machine.run(item);
  }
}

// y (rows, gates * height) = x (rows, cols) W^T + bias. `precision`: what the products of float32 may be rounded to.
template <class T, class Machine>
void product(Machine& machine, Matrix<T>& m, const T* x, int64_t rows, T* y, Precision precision) {
  if (rows == 0) return;
  const MatrixLayout& layout = m.layout;
  prepare_sparse(machine, m, false);
  bool started = false;
  AnyShape s{};
  if (m.bias || m.diagonal || m.sparse.values || layout.terms.size() != 1 ||
      static_cast<int>(layout.terms[0].gates.size()) != layout.gates) {
    machine.run(StartProduct<T>{m.bias, m.diagonal, x, m.sparse, diagonal_rows(machine, m), y, rows, layout.gates,
        layout.rows, layout.cols, m.diagonal_size()});
    started = true;
  }
  for (const LayoutTerm& term : layout.terms) {
    const int rank = m.shapes[term.first].rank, pairs = static_cast<int>(term.gates.size()) * rank;
    if constexpr (std::is_same_v<T, float>) {
      const PairProductPlan plan = is_pair(m, term, s) && aligned(x)
          ? pair_product_plan(s, rank, machine.chip, false, precision)
          : PairProductPlan{};
      if (plan.bytes) {
        for (size_t k = 0; k < term.gates.size(); ++k)
          machine.pair_product(s, plan,
              PairProduct{m.stages[term.first] + k * rank * s.P1 * s.Q1,
                  m.stages[term.first + 1] + k * rank * s.P2 * s.Q2, x,
                  y + static_cast<int64_t>(term.gates[k]) * layout.rows, rows, layout.cols, m.height(), started},
              false);
        continue;
      }
    }
    const std::vector<Op<T>> ops = ops_of(m, term);
    int64_t width = 1;
    for (size_t k = 0; k + 1 < ops.size(); ++k) width = greatest(width, static_cast<int64_t>(ops[k].out()) * pairs);
    const int64_t chunk = least(rows, greatest(1, kScratchElements / width));
    T* buffer[2] = {ops.size() > 1 ? machine.template scratch<T>(chunk * width) : nullptr,
        ops.size() > 2 ? machine.template scratch<T>(chunk * width) : nullptr};
    for (int64_t first = 0; first < rows; first += chunk) {
      const int64_t count = least(chunk, rows - first);
      View<const T> in{x + first * layout.cols, layout.cols, 0, 0};
      for (size_t k = 0; k < ops.size(); ++k) {
        const bool last = k + 1 == ops.size();
        const int64_t size = ops[k].out();
        View<T> out{buffer[k & 1], size * pairs, size, 0};
        if (last) out = {y + first * m.height(), m.height(), 0, layout.rows};
        apply_stage(machine, term, ops[k], rank, false, last ? kRank : kEach, last && started, in, out, count);
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

// Gradients of x (rows, cols; null: not wanted) and of the matrix, from the gradient (rows, gates * height) of x W^T +
// bias.
template <class T, class Machine>
void product_backward(Machine& machine, Matrix<T>& m, const T* grad, const T* x, int64_t rows, T* grad_x,
    const MatrixGradient<T>& to, Precision precision) {
  const MatrixLayout& layout = m.layout;
  const int height = m.height();
  prepare_sparse(machine, m, true);
  AnyShape s{};
  if (grad_x && rows)
    machine.run(StartGradient<T>{m.diagonal, grad, m.sparse, diagonal_rows(machine, m), grad_x, rows, layout.gates,
        layout.rows, layout.cols, m.diagonal_size()});
  if (to.bias) {
    const int64_t pieces = pieces_for(rows, height);
    T* part = machine.template scratch<T>(pieces * height);
    machine.run(SumRows<T>{grad, part, rows, pieces, height});
    sum_parts(machine, part, to.bias, 1, pieces, height, false);
  }
  if (to.diagonal) {
    const int64_t count = layout.diagonal_gates.size(), size = count * m.diagonal_size(),
                  pieces = pieces_for(rows, size);
    T* part = machine.template scratch<T>(pieces * size);
    machine.run(DiagonalGradient<T>{grad, x, machine.upload(layout.diagonal_gates), part, rows, pieces,
        static_cast<int>(count), layout.gates, layout.rows, layout.cols, m.diagonal_size()});
    sum_parts(machine, part, to.diagonal, 1, pieces, size, false);
  }
  if (to.sparse) {
    const int64_t size = static_cast<int64_t>(m.sparse.blocks) * m.sparse.block, pieces = pieces_for(rows, size);
    T* part = machine.template scratch<T>(pieces * size);
    machine.run(SparseGradient<T>{
        grad, x, m.sparse.index, part, rows, pieces, m.sparse.blocks, m.sparse.block, height, layout.cols});
    sum_parts(machine, part, to.sparse, 1, pieces, size, false);
  }
  for (const LayoutTerm& term : layout.terms) {
    const int rank = m.shapes[term.first].rank, gates = static_cast<int>(term.gates.size()), pairs = gates * rank;
    bool x_done = !grad_x, matrix_done = false;
    if constexpr (std::is_same_v<T, float>) {
      if (is_pair(m, term, s)) {
        const float *a = m.stages[term.first], *b = m.stages[term.first + 1];
        const PairProductPlan plan = pair_product_plan(s, rank, machine.chip, true, precision);
        if (grad_x && plan.bytes) {
          for (int k = 0; k < gates; ++k)
            machine.pair_product(s, plan,
                PairProduct{a + static_cast<int64_t>(k) * rank * s.P1 * s.Q1,
                    b + static_cast<int64_t>(k) * rank * s.P2 * s.Q2,
                    grad + static_cast<int64_t>(term.gates[k]) * layout.rows, grad_x, rows, height, layout.cols, true},
                true);
          x_done = true;
        }
        const PairGradientPlan sums = pair_gradient_plan(s, machine.chip, precision);
        if (sums.bytes) {
          const int64_t pieces =
              greatest(1, least((rows + sums.batch - 1) / sums.batch, (2 * machine.chip.processors + rank - 1) / rank));
          const int64_t size_a = static_cast<int64_t>(s.P1) * s.Q1, size_b = static_cast<int64_t>(s.P2) * s.Q2;
          float* part_a = machine.template scratch<float>(rank * pieces * sums.groups_a * size_a);
          float* part_b = machine.template scratch<float>(rank * pieces * sums.groups_b * size_b);
          for (int k = 0; k < gates; ++k) {
            const PairGradient args{a + k * rank * size_a, b + k * rank * size_b,
                grad + static_cast<int64_t>(term.gates[k]) * layout.rows, x, part_a, part_b, height, layout.cols, 0,
                rows};
            machine.pair_gradient(s, sums, args, static_cast<int>(pieces), rank);
            sum_parts(machine, part_a, to.stages[term.first] + k * rank * size_a, rank, pieces * sums.groups_a, size_a,
                false);
            sum_parts(machine, part_b, to.stages[term.first + 1] + k * rank * size_b, rank, pieces * sums.groups_b,
                size_b, false);
          }
          matrix_done = true;
        }
      }
    }
    if (x_done && matrix_done) continue;
    const std::vector<Op<T>> ops = ops_of(m, term);
    const int count = static_cast<int>(ops.size());
    int64_t total = 1, width = 1, parts = 0;
    for (int k = 0; k + 1 < count; ++k)
      total += static_cast<int64_t>(ops[k].out()) * pairs,
          width = greatest(width, static_cast<int64_t>(ops[k].out()) * pairs);
    const int64_t chunk = least(greatest(1, rows), greatest(1, kScratchElements / total));
    T* kept = machine.template scratch<T>(chunk * total);
    T* buffer[2] = {machine.template scratch<T>(chunk * width), machine.template scratch<T>(chunk * width)};
    for (const Op<T>& op : ops)
      parts = greatest(parts, pieces_for(chunk, static_cast<int64_t>(pairs) * op.P * op.Q) * pairs * op.P * op.Q);
    T* part = machine.template scratch<T>(parts);
    for (int64_t first = 0; first == 0 || first < rows; first += chunk) {
      const int64_t now = least(chunk, rows - first);
      std::vector<View<const T>> in{{x + first * layout.cols, layout.cols, 0, 0}};  // what each op takes
      T* place = kept;
      for (int k = 0; k + 1 < count; ++k) {
        const int64_t size = ops[k].out();
        const View<T> out{place, size * pairs, size, 0};
        apply_stage(machine, term, ops[k], rank, false, kEach, false, in.back(), out, now);
        in.push_back({place, size * pairs, size, 0});
        place += now * size * pairs;
      }
      View<const T> d{grad + first * height, height, 0, layout.rows};
      for (int k = count - 1; k >= 0; --k) {
        const Op<T>& op = ops[k];
        const int stage = term.first + op.stage;
        if (!matrix_done) {
          const int64_t size = static_cast<int64_t>(op.P) * op.Q;
          for (int g = 0; g < gates; g += kMaxGates) {
            StageGradient<T> item{op, std::min(kMaxGates, gates - g), rank, {}, d, in[k], part, now, 0};
            item.pieces = pieces_for(now, item.gates * rank * size);
            item.d.data += g * rank * d.pair, item.x.data += g * rank * in[k].pair;
            std::copy_n(term.gates.begin() + g, item.gates, item.gate);
            machine.run(item);
            sum_parts(
                machine, part, to.stages[stage] + g * rank * size, 1, item.pieces, item.gates * rank * size, first > 0);
          }
        }
        if (k) {
          const int64_t size = op.in();
          const View<T> out{buffer[k & 1], size * pairs, size, 0};
          apply_stage(machine, term, op, rank, true, kEach, false, d, out, now);
          d = {out.data, out.row, out.pair, 0};
        } else if (!x_done) {
          apply_stage(machine, term, op, rank, true, kAll, true, d,
              View<T>{grad_x + first * layout.cols, layout.cols, 0, 0}, now);
        }
      }
    }
  }
}

// The matrix in full as one term of one stage, for a recurrence with more parts than a launch holds.
template <class T, class Machine> Matrix<T> densify(Machine& machine, Matrix<T>& m) {
  Matrix<T> products = m;
  products.bias = nullptr;
  const int64_t cols = m.layout.cols, height = m.height(), chunk = least(cols, greatest(1, kScratchElements / height));
  T* dense = machine.template scratch<T>(height * cols);
  T *units = machine.template scratch<T>(chunk * cols), *columns = machine.template scratch<T>(chunk * height);
  for (int64_t first = 0; first < cols; first += chunk) {
    const int64_t count = least(chunk, cols - first);
    machine.run(UnitRows<T>{units, count, first, cols});
    product(machine, products, units, count, columns, kFloat32);
    machine.run(Columns<T>{columns, dense, count, first, height, cols});
  }
  Matrix<T> full;
  full.layout = {m.layout.gates, m.layout.rows, m.layout.cols, 1, {}, {{0, 1, {}}}};
  for (int g = 0; g < m.layout.gates; ++g) full.layout.terms[0].gates.push_back(g);
  full.shapes = {{1, m.layout.rows, m.layout.cols}};
  full.stages = {dense};
  full.bias = m.bias;
  return full;
}

// Whether the two-stage kernels take this recurrence: one term of two stages for all gates in order, and a diagonal.
template <class T> bool is_pair_recurrence(const Matrix<T>& m, AnyShape& s) {
  if (!std::is_same_v<T, float> || m.sparse.values || m.layout.terms.size() != 1 || !is_pair(m, m.layout.terms[0], s) ||
      !pair_takes(s))
    return false;
  const std::vector<int>& gates = m.layout.terms[0].gates;
  if (static_cast<int>(gates.size()) != m.layout.gates) return false;
  for (int g = 0; g < m.layout.gates; ++g)
    if (gates[g] != g) return false;
  return true;
}

template <class T> Diagonal diagonal_of(const Matrix<T>& m) {
  Diagonal d{nullptr, {-1, -1, -1, -1}};
  if constexpr (std::is_same_v<T, float>) d.values = m.diagonal;
  for (size_t k = 0; k < m.layout.diagonal_gates.size(); ++k) d.row[m.layout.diagonal_gates[k]] = static_cast<int>(k);
  return d;
}

// The general kernels' view of a matrix, formed in full where it has too many parts.
template <class T, class Machine> Program<T> program_of(Machine& machine, Matrix<T>& m, bool backward) {
  Program<T> program{};
  if (!build_program<T>(m.layout, m.shapes, m.stages, program)) {
    Matrix<T> full = densify(machine, m);
    program = {};
    build_program<T>(full.layout, full.shapes, full.stages, program);
    program.bias = m.bias;
    return program;
  }
  prepare_sparse(machine, m, backward);
  program.diagonal = m.diagonal, program.sparse = m.sparse, program.bias = m.bias;
  return program;
}

// modReLU's bias belongs to the cell: the matrix is left without one. Returns what the cell gets.
template <class T> const T* take_threshold(Matrix<T>& m, Kind kind) {
  return is_modrelu(kind) ? std::exchange(m.bias, nullptr) : nullptr;
}

// x: (S, gates * H), the input's share of the gates. `precision`: what the products of float32 may be rounded to.
template <class T, class Machine>
void recurrence(Machine& machine, Matrix<T>& m, Kind kind, GeneralForward<T> args, Precision precision) {
  if (args.rows.batch == 0) return;
  args.kind = kind, args.threshold = take_threshold(m, kind);
  AnyShape s{};
  if constexpr (std::is_same_v<T, float>) {
    if (is_pair_recurrence(m, s) && aligned(args.x)) {
      const PairPlan plan =
          pair_plan(s, m.layout.gates, m.shapes[0].rank, args.rows.batch, machine.chip, false, precision);
      if (plan.cluster)
        return machine.pair_recurrence(s, plan, kind,
            PairForward{m.stages[0], m.stages[1], diagonal_of(m), m.bias, args.x, args.h0, args.c0, args.out,
                args.h_last, args.c_last, args.workspace, args.rows, kind, args.threshold});
    }
  }
  machine.general_recurrence(program_of(machine, m, false), kind, args);
}

// Gradients; grad_product is scratch that only the GRU needs. `total`: rows S.
template <class T, class Machine>
void recurrence_backward(Machine& machine, Matrix<T>& m, Kind kind, GeneralBackward<T> args, int64_t total,
    MatrixGradient<T> to, Precision precision) {
  args.kind = kind, args.threshold = take_threshold(m, kind);
  if (kind == kGru) args.grad_product = machine.template scratch<T>(total * m.height());
  if (args.rows.batch) {
    AnyShape s{};
    PairPlan plan{};
    if constexpr (std::is_same_v<T, float>) {
      if (is_pair_recurrence(m, s))
        plan = pair_plan(s, m.layout.gates, m.shapes[0].rank, args.rows.batch, machine.chip, true, precision);
      if (plan.cluster)
        machine.pair_recurrence_backward(s, plan, kind,
            PairBackward{m.stages[0], m.stages[1], diagonal_of(m), args.grad_out, args.grad_h, args.grad_c, args.out,
                args.workspace, args.h0, args.c0, args.grad_gates, args.grad_product, args.grad_h0, args.grad_c0,
                args.rows, kind, args.threshold});
    }
    if (!plan.cluster) machine.general_recurrence_backward(program_of(machine, m, true), kind, args);
  }
  if (T* out = is_modrelu(kind) ? std::exchange(to.bias, nullptr) : nullptr) {
    const int64_t units = m.layout.rows / rows_a_bias(kind), pieces = pieces_for(total, units);
    T* part = machine.template scratch<T>(pieces * units);
    machine.run(ThresholdGradient<T>{args.grad_gates, args.workspace, part, total, pieces, m.layout.rows, units});
    sum_parts(machine, part, out, 1, pieces, units, false);
  }
  T* before = machine.template scratch<T>(total * m.layout.cols);
  machine.run(PreviousStates<T>{args.out, args.h0, before, args.rows, m.layout.cols});
  product_backward<T>(
      machine, m, kind == kGru ? args.grad_product : args.grad_gates, before, total, nullptr, to, precision);
}

}  // namespace kruify::cuda

// The whole backward sequence of one row of the batch for two stages, from its last step to its first.
//
//   d[g][p2, p1]    = gradient of the gates' W h, by the cell's derivative        phase 1
//   U[g, r][q1, p2] = sum_p1 A[g, r][p1, q1] d[g][p2, p1]                         phase 2
//   V[q1, q2]       = sum_{g, r, p2} U[g, r][q1, p2] B[g, r][p2, q2]              phase 3
//
// A block knows d for its own p2 alone, so V is a partial sum over the cluster (and over groups of gates, to occupy all
// threads): each partial sum is written to the block that owns the unit, and added there in one fixed order. `Numbers`
// as in the forward pass: with tensor cores the factors, d and U are rounded, sums and what the host gets are float32.
#pragma once

#include "pair_forward.h"

namespace kruify::cuda {

struct PairBackward : BackwardArrays<float> {
  const float *a, *b;
  Diagonal<float> diagonal;
};

template <int G, class Numbers, class Shape> struct PairBackwardPhases {
  static constexpr bool exact = Numbers::precision == kFloat32;
  Shape s;
  const PairPlan& p;
  const PairBackward& args;
  int sample, length;

  KRUIFY_HD float* at(const Thread& t, int offset) const { return reinterpret_cast<float*>(t.memory) + offset; }
  KRUIFY_HD int hidden() const { return s.P1 * s.P2; }
  KRUIFY_HD int units() const { return s.P1 * p.share; }
  static KRUIFY_HD int words(int n) { return row_words(Numbers::precision, n); }

  KRUIFY_HD void load(const Thread& t) const {
    load_rows<Numbers, true>(t, at(t, p.a), args.a, G * p.rank, s.P1, s.Q1, 0, s.P1);
    load_rows<Numbers, true>(t, at(t, p.b), args.b, G * p.rank, s.P2, s.Q2, t.rank * p.share, p.share);
    const int64_t row = static_cast<int64_t>(sample) * hidden();
    for (int u = t.id; u < units(); u += t.count) {
      const Split e = split<Shape>(u, p.share, p.shift);
      const int64_t i = row + e.quotient * s.P2 + t.rank * p.share + e.remainder;
      at(t, p.carry)[u] = args.grad_h ? args.grad_h[i] : 0.0f;
      if constexpr (G == 4) at(t, p.c)[u] = args.grad_c ? args.grad_c[i] : 0.0f;
    }
    for (int e = t.id; e < p.groups * hidden(); e += t.count) at(t, p.v)[e] = 0.0f;
  }

  // The gradient of a unit's h: what came by W, in fixed order, and what passed by it.
  KRUIFY_HD float gradient(const Thread& t, int unit) const {
    float sum = at(t, p.carry)[unit];
    KRUIFY_UNROLL_BY(2)
    for (int part = 0; part < t.ranks * p.groups; ++part) sum += at(t, p.v)[part * units() + unit];
    return sum;
  }

  KRUIFY_HD void modrelu(const Thread& t, int step) const {
    const int64_t row = args.rows.row(step, sample, length) * hidden();
    const int parts = rows_per_bias(args.kind), count = units() / parts;
    for (int u = t.id; u < count; u += t.count) {
      const Split e = split<Shape>(u, p.share, p.shift);
      const int i = e.quotient * s.P2 + t.rank * p.share + e.remainder;
      float z[2] = {}, d[2] = {};
      KRUIFY_UNROLL
      for (int k = 0; k < 2; ++k) {
        if (k == parts) break;
        const int unit = i + k * (hidden() / 2);
        z[k] = args.workspace[row + unit], d[k] = gradient(t, u + k * count);
        if (args.grad_out) d[k] += args.grad_out[row + unit];
      }
      modrelu_backward(z, args.threshold ? args.threshold[i] : 0.0f, d);
      KRUIFY_UNROLL
      for (int k = 0; k < 2; ++k) {
        if (k == parts) break;
        const int unit = i + k * (hidden() / 2);
        const float* diagonal = args.diagonal.of(0, hidden());
        args.grad_gates[row + unit] = d[k];
        Numbers::put(at(t, p.d) + e.remainder * words(s.P1), e.quotient + k * (s.P1 / 2), d[k]);
        at(t, p.carry)[u + k * count] = diagonal ? diagonal[unit] * d[k] : 0.0f;
      }
    }
  }

  KRUIFY_HD void cell(const Thread& t, int step) const {
    if (G == 1 && is_modrelu(args.kind)) return modrelu(t, step);
    const int64_t row = args.rows.row(step, sample, length);
    const int64_t before = step ? args.rows.row(step - 1, sample, length) : 0;
    for (int u = t.id; u < units(); u += t.count) {
      const Split e = split<Shape>(u, p.share, p.shift);
      const int i = e.quotient * s.P2 + t.rank * p.share + e.remainder;
      float product[G], c = G == 4 ? at(t, p.c)[u] : 0.0f;
      float carry = unit_backward<G>(args, hidden(), step, row, before, sample, i, gradient(t, u), c, product);
      KRUIFY_UNROLL
      for (int g = 0; g < G; ++g) {
        Numbers::put(at(t, p.d) + (g * p.share + e.remainder) * words(s.P1), e.quotient, product[g]);
        if (const float* d = args.diagonal.of(g, hidden())) carry += d[i] * product[g];
      }
      at(t, p.carry)[u] = carry;
      if constexpr (G == 4) at(t, p.c)[u] = c;
    }
  }

  // Asks for what the next step (the one before in time) will read, while the products run.
  KRUIFY_HD void ask(const Thread& t, int step) const {
    if (step < 1) return;
    const int64_t row = args.rows.row(step - 1, sample, length);
    constexpr int kept = saved_of_gates(G);
    for (int u = t.id * 4; u < units(); u += t.count * 4) {
      const Split e = split<Shape>(u, p.share, p.shift);
      if (e.remainder % 8 && p.share > 4) continue;  // one request per sector
      const int64_t i = e.quotient * s.P2 + t.rank * p.share + e.remainder;
      KRUIFY_UNROLL
      for (int k = 0; k < kept; ++k) prefetch(args.workspace + (row * kept + k) * hidden() + i);
      if (args.grad_out) prefetch(args.grad_out + row * hidden() + i);
      if (G < 4) prefetch((G == 1 && is_modrelu(args.kind) ? args.workspace : args.out) + row * hidden() + i);
    }
  }

  KRUIFY_HD void first_factor(const Thread& t) const {
    products<Numbers, Shape>(
        t, G * p.rank, s.Q1, p.share, s.P1,
        [&](int pair, const auto& add) {
          add(at(t, p.a) + pair * s.Q1 * words(s.P1), at(t, p.d) + pair / p.rank * p.share * words(s.P1));
        },
        [&](int pair, int row, int column, auto... values) {
          Numbers::put(at(t, p.u) + (pair * s.Q1 + row) * words(p.share), column, values...);
        },
        p.shift);
  }
  template <class Block> KRUIFY_HD void second_factor(const Block& block, const Thread& t) const {
    products<Numbers, Shape>(
        t, p.groups, s.Q1, s.Q2, p.share,
        [&](int group, const auto& add) {
          for (int pair = group; pair < G * p.rank; pair += p.groups)
            add(at(t, p.u) + pair * s.Q1 * words(p.share), at(t, p.b) + pair * s.Q2 * words(p.share));
        },
        [&](int group, int row, int column, auto... values) {
          const Split owner = split<Shape>(column, p.share, p.shift);
          float* to = block.remote(t, owner.quotient, at(t, p.v)) + (t.rank * p.groups + group) * units();
          write_values(to + row * p.share + owner.remainder, false, values...);
        });
  }

  KRUIFY_HD void finish(const Thread& t) const {
    for (int u = t.id; u < units(); u += t.count) {
      const Split e = split<Shape>(u, p.share, p.shift);
      const int64_t to = static_cast<int64_t>(sample) * hidden() + e.quotient * s.P2 + t.rank * p.share + e.remainder;
      args.grad_h0[to] = gradient(t, u);
      if constexpr (G == 4) args.grad_c0[to] = at(t, p.c)[u];
    }
  }
};

template <int G, class Numbers, class Shape, class Block>
KRUIFY_HD void pair_recurrence(Block& block, Shape s, const PairPlan& p, const PairBackward& args, int sample) {
  const int length = args.rows.length(sample);
  const PairBackwardPhases<G, Numbers, Shape> phases{s, p, args, sample, length};
  block.each([&](const Thread& t) { phases.load(t); });
  block.cluster_barrier();
  for (int n = length - 1; n >= 0; --n) {
    block.each([&, n](const Thread& t) { phases.cell(t, n); });
    block.barrier();
    block.cluster_arrive_relaxed();  // this block has read its partial sums: the others may write new ones
    block.each([&, n](const Thread& t) {
      phases.ask(t, n);
      phases.first_factor(t);
    });
    block.barrier();
    block.cluster_wait();
    block.each([&](const Thread& t) { phases.second_factor(block, t); });
    block.cluster_barrier();
  }
  block.each([&](const Thread& t) { phases.finish(t); });
  block.end();
}

}  // namespace kruify::cuda

// The whole forward sequence of one row of the batch, for W = sum_r A[g, r] (x) B[g, r]: two stages, float32.
//
//   T[g, r][p2, q1] = sum_q2 B[g, r][p2, q2] h[q1, q2]          phase 1
//   gate[g][p1, p2] = x + sum_{r, q1} A[g, r][p1, q1] T[p2, q1] phase 2
//   h, c = cell(gates)                                          phase 3
//
// Three barriers per step, and one of the cluster. Everything but x, out and what the backward pass wants
// stays on the chip. `Numbers` says how the operands of phases 1 and 2 lie in shared memory (mma.h): float32, or
// rounded, for tensor cores; h of the block's own units, c and all sums are float32.
#pragma once

#include "general.h"
#include "pair_plan.h"

namespace kruify::cuda {

// `x` is 16-byte aligned.
struct PairForward : ForwardArrays<float> {
  const float *a, *b;  // (G, rank, P1, Q1), (G, rank, P2, Q2)
  Diagonal<float> diagonal;
  const float* bias;  // (G * H,), or null
};

// A share of a (pairs, rows, cols) array, rows first.. of every pair, into padded rows; `Transposed`: of its columns,
// to[pair][col][row].
template <class Numbers, bool Transposed = false>
KRUIFY_HD void load_rows(
    const Thread& t, float* to, const float* from, int pairs, int rows, int cols, int first, int count) {
  const int width = row_words(Numbers::precision, Transposed ? count : cols);
  for (int e = t.id; e < pairs * count * cols; e += t.count) {
    const int k = e % cols, row = e / cols % count, pair = e / (cols * count);
    const float value = from[(static_cast<int64_t>(pair) * rows + first + row) * cols + k];
    if constexpr (Transposed) Numbers::put(to + (pair * cols + k) * width, row, value);
    else Numbers::put(to + (pair * count + row) * width, k, value);
  }
}

template <int G, class Numbers, class Shape> struct PairForwardPhases {
  static constexpr bool exact = Numbers::precision == kFloat32;
  Shape s;
  const PairPlan& p;
  const PairForward& args;
  int sample, length;

  KRUIFY_HD float* at(const Thread& t, int offset) const { return reinterpret_cast<float*>(t.memory) + offset; }
  KRUIFY_HD int hidden() const { return s.P1 * s.P2; }
  KRUIFY_HD int units() const { return s.P1 * p.share; }
  static KRUIFY_HD int words(int n) { return row_words(Numbers::precision, n); }
  KRUIFY_HD float* h(const Thread& t, int step) const { return at(t, p.h) + (step & 1) * s.Q1 * words(s.Q2); }
  KRUIFY_HD float* x(const Thread& t, int step) const {
    return at(t, p.x) + (step & (p.depth - 1)) * G * units();  // depth: 1, 2 or 4
  }

  // What is added to a gate of unit i, the block's number u: bias and diagonal, from shared memory where they found
  // room.
  KRUIFY_HD float added(const Thread& t, int gate, int u, int i, float before) const {
    float sum = 0.0f;
    if (args.bias) sum = p.bias >= 0 ? at(t, p.bias)[gate * units() + u] : args.bias[gate * hidden() + i];
    if (const float* d = args.diagonal.of(gate, hidden()))
      sum += (p.diagonal >= 0 ? at(t, p.diagonal)[gate * units() + u] : d[i]) * before;
    return sum;
  }

  KRUIFY_HD void load(const Thread& t) const {
    load_rows<Numbers>(t, at(t, p.a), args.a, G * p.rank, s.P1, s.Q1, 0, s.P1);
    load_rows<Numbers>(t, at(t, p.b), args.b, G * p.rank, s.P2, s.Q2, t.rank * p.share, p.share);
    const int64_t row = static_cast<int64_t>(sample) * hidden();
    for (int e = t.id; e < hidden(); e += t.count)
      Numbers::put(h(t, 0) + e / s.Q2 * words(s.Q2), e % s.Q2, args.h0[row + e]);
    if constexpr (G == 4 || !exact) {
      for (int u = t.id; u < units(); u += t.count) {
        const Split e = split<Shape>(u, p.share, p.shift);
        const int64_t i = row + e.quotient * s.P2 + t.rank * p.share + e.remainder;
        if constexpr (G == 4) at(t, p.c)[u] = args.c0[i];
        if constexpr (!exact) at(t, p.state)[u] = args.h0[i];
      }
    }
    for (int e = t.id; e < G * units(); e += t.count) {
      const int gate = e / units(), u = e % units();
      const Split place = split<Shape>(u, p.share, p.shift);
      const int i = place.quotient * s.P2 + t.rank * p.share + place.remainder;
      if (p.bias >= 0 && args.bias) at(t, p.bias)[e] = args.bias[gate * hidden() + i];
      const float* d = args.diagonal.of(gate, hidden());
      if (p.diagonal >= 0 && d) at(t, p.diagonal)[e] = d[i];
    }
  }

  // Starts to fetch the input gates of one step; an empty group keeps the number of groups equal to that of steps.
  KRUIFY_HD void fetch(const Thread& t, int step) const {
    if (step < length) {
      const float* from = args.x + args.rows.row(step, sample, length) * (G * hidden()) + t.rank * p.share;
      for (int e = t.id; e < G * units() / 4; e += t.count) {
        const Split place = split<Shape>(e, p.share / 4, p.shift - 2);  // (g, p1), four p2
        fetch_quad(x(t, step) + e * 4, from + place.quotient * s.P2 + place.remainder * 4);
      }
    }
    fetch_commit();
  }

  KRUIFY_HD void second_factor(const Thread& t, int step) const {
    products<Numbers, Shape, true>(
        t, G * p.rank, p.share, s.Q1, s.Q2,
        [&](int pair, const auto& add) { add(at(t, p.b) + pair * p.share * words(s.Q2), h(t, step)); },
        [&](int pair, int row, int column, auto... values) {
          Numbers::put(at(t, p.t) + (pair * p.share + row) * words(s.Q1), column, values...);
        },
        p.shift);
    // This thread's part of the step's input gates is there; the barrier makes it everybody's.
    if (p.depth == 4) fetch_wait<3>();
    else if (p.depth == 2) fetch_wait<1>();
    else fetch_wait<0>();
  }
  KRUIFY_HD void first_factor(const Thread& t, int step) const {
    products<Numbers, Shape>(
        t, G, s.P1, p.share, s.Q1,
        [&](int gate, const auto& add) {
          for (int pair = gate * p.rank; pair < (gate + 1) * p.rank; ++pair)
            add(at(t, p.a) + pair * s.P1 * words(s.Q1), at(t, p.t) + pair * p.share * words(s.Q1));
        },
        [&](int gate, int row, int column, auto... values) {
          float* to = (apart(gate) ? at(t, p.y) : x(t, step) + gate * units()) + row * p.share + column;
          write_values(to, false, values...);
        },
        p.shift,
        [&](int gate, int row, int column) {
          return apart(gate) ? 0.0f : x(t, step)[gate * units() + row * p.share + column];
        });
  }
  // The GRU's reset gate stands between the two shares of the third gate.
  static KRUIFY_HD bool apart(int gate) { return G == 3 && gate == 2; }

  // The new state of a unit into the h of every block.
  template <class Block>
  KRUIFY_HD void spread(const Block& block, const Thread& t, int step, int place, int p2, float now) const {
    KRUIFY_UNROLL_BY(2)
    for (int rank = 0; rank < t.ranks; ++rank) Numbers::put(block.remote(t, rank, h(t, step + 1)) + place, p2, now);
  }

  template <class Block> KRUIFY_HD void modrelu(const Block& block, const Thread& t, int step) const {
    const int parts = rows_per_bias(args.kind), count = units() / parts;
    for (int u = t.id; u < count; u += t.count) {
      const Split e = split<Shape>(u, p.share, p.shift);
      const int p2 = t.rank * p.share + e.remainder, i = e.quotient * s.P2 + p2;
      float z[2] = {}, now[2];
      KRUIFY_UNROLL
      for (int k = 0; k < 2; ++k) {
        if (k == parts) break;
        const int own = u + k * count, place = (e.quotient + k * (s.P1 / 2)) * words(s.Q2) + p2;
        float& sum = x(t, step)[own];
        const float before = exact ? h(t, step)[place] : at(t, p.state)[own];
        z[k] = sum += added(t, 0, own, i + k * (hidden() / 2), before);
      }
      modrelu_forward(z, args.threshold ? args.threshold[i] : 0.0f, now);
      KRUIFY_UNROLL
      for (int k = 0; k < 2; ++k) {
        if (k == parts) break;
        spread(block, t, step, (e.quotient + k * (s.P1 / 2)) * words(s.Q2), p2, now[k]);
        if constexpr (!exact) at(t, p.state)[u + k * count] = now[k];
      }
    }
  }

  // The step's new state; what `store` will need of the gates stands in their place.
  template <class Block> KRUIFY_HD void cell(const Block& block, const Thread& t, int step) const {
    if (G == 1 && is_modrelu(args.kind)) return modrelu(block, t, step);
    for (int u = t.id; u < units(); u += t.count) {
      const Split e = split<Shape>(u, p.share, p.shift);
      const int p2 = t.rank * p.share + e.remainder, i = e.quotient * s.P2 + p2;
      const int place = e.quotient * words(s.Q2);
      const float before = exact ? h(t, step)[place + p2] : at(t, p.state)[u];
      float gates[G], product[G], saved[5];
      KRUIFY_UNROLL
      for (int g = 0; g < G; ++g) {
        gates[g] = x(t, step)[g * units() + u];
        product[g] = (apart(g) ? at(t, p.y)[u] : 0.0f) + added(t, g, u, i, before);
      }
      float c = G == 4 ? at(t, p.c)[u] : 0.0f;
      const float now = cell_forward<G>(gates, product, before, c, args.kind, saved);
      spread(block, t, step, place, p2, now);
      if constexpr (!exact) at(t, p.state)[u] = now;
      if constexpr (G == 4) at(t, p.c)[u] = c;
      if (G > 1 && args.workspace) {
        KRUIFY_UNROLL
        for (int g = 0; g < G; ++g) x(t, step)[g * units() + u] = saved[g];
        if constexpr (G == 3) at(t, p.y)[u] = saved[3];
      }
    }
  }

  // The step's results to global memory, by the threads that have them: behind the arrival at the cluster's barrier,
  // which would wait for these stores.
  KRUIFY_HD void store(const Thread& t, int step) const {
    const int64_t row = args.rows.row(step, sample, length);
    const bool modrelu = G == 1 && is_modrelu(args.kind);
    const int count = modrelu ? units() / rows_per_bias(args.kind) : units();  // a complex unit is one thread's
    for (int first = t.id; first < count; first += t.count) {
      for (int u = first; u < units(); u += count) {
        const Split e = split<Shape>(u, p.share, p.shift);
        const int p2 = t.rank * p.share + e.remainder, i = e.quotient * s.P2 + p2;
        args.out[row * hidden() + i] = exact ? h(t, step + 1)[e.quotient * words(s.Q2) + p2] : at(t, p.state)[u];
        if (!args.workspace) continue;
        if (modrelu) args.workspace[row * hidden() + i] = x(t, step)[u];
        constexpr int kept = saved_of_gates(G);
        KRUIFY_UNROLL
        for (int k = 0; k < kept; ++k)
          args.workspace[(row * kept + k) * hidden() + i] =
              k < G ? x(t, step)[k * units() + u] : at(t, G == 4 ? p.c : p.y)[u];
      }
    }
  }

  KRUIFY_HD void finish(const Thread& t) const {
    for (int u = t.id; u < units(); u += t.count) {
      const Split e = split<Shape>(u, p.share, p.shift);
      const int p2 = t.rank * p.share + e.remainder, i = e.quotient * s.P2 + p2;
      const int64_t to = static_cast<int64_t>(sample) * hidden() + i;
      args.h_last[to] = exact ? h(t, length)[e.quotient * words(s.Q2) + p2] : at(t, p.state)[u];
      if constexpr (G == 4) args.c_last[to] = at(t, p.c)[u];
    }
  }
};

template <int G, class Numbers, class Shape, class Block>
KRUIFY_HD void pair_recurrence(Block& block, Shape s, const PairPlan& p, const PairForward& args, int sample) {
  const int length = args.rows.length(sample);
  const PairForwardPhases<G, Numbers, Shape> phases{s, p, args, sample, length};
  block.each([&](const Thread& t) {
    for (int n = 0; n < p.depth - 1; ++n) phases.fetch(t, n);
    phases.load(t);
  });
  block.cluster_barrier();  // nobody writes into a block that has not started
  for (int n = 0; n < length; ++n) {
    block.each([&, n](const Thread& t) {
      phases.fetch(t, n + p.depth - 1);
      phases.second_factor(t, n);
    });
    block.barrier();
    block.each([&, n](const Thread& t) { phases.first_factor(t, n); });
    block.barrier();
    block.each([&, n](const Thread& t) { phases.cell(block, t, n); });
    block.cluster_arrive();
    block.each([&, n](const Thread& t) { phases.store(t, n); });
    block.cluster_wait();
    block.barrier();  // what is stored is not fetched over; in one block, h is there
  }
  block.each([&](const Thread& t) { phases.finish(t); });
  block.end();
}

}  // namespace kruify::cuda

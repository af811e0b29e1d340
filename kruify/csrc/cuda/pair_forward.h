// The whole forward sequence of one row of the batch, for W = sum_r A[g, r] (x) B[g, r]: two stages, float32.
//
//   T[g, r][p2, q1] = sum_q2 B[g, r][p2, q2] h[q1, q2]          phase 1
//   gate[g][p1, p2] = x + sum_{r, q1} A[g, r][p1, q1] T[p2, q1] phase 2
//   h, c = cell(gates)                                          phase 3
//
// Three barriers per step, the last one across the cluster. Everything but x, out and what the backward pass wants
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

// A share of a (pairs, rows, cols) array into padded rows: rows first.. of every pair.
template <class Numbers = Exact<4>>
KRUIFY_HD void load_rows(
    const Thread& t, float* to, const float* from, int pairs, int rows, int cols, int first, int count) {
  for (int e = t.id; e < pairs * count * cols; e += t.count) {
    const int k = e % cols, row = e / cols % count, pair = e / (cols * count);
    Numbers::put(to + (pair * count + row) * row_words(Numbers::precision, cols), k,
        from[(static_cast<int64_t>(pair) * rows + first + row) * cols + k]);
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
  KRUIFY_HD float* x(const Thread& t, int step) const { return at(t, p.x) + step % p.depth * G * units(); }

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
  }

  // Sends for the input gates of a step; an empty group keeps the count of groups equal to that of steps.
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
    if constexpr (exact) second_factor_exact(t, step);
    else second_factor_tensor(t, step);
    // This thread's part of the step's input gates is there; the barrier makes it everybody's.
    if (p.depth == 4) fetch_wait<3>();
    else if (p.depth == 2) fetch_wait<1>();
    else fetch_wait<0>();
  }
  KRUIFY_HD void first_factor(const Thread& t, int step) const {
    if constexpr (exact) first_factor_exact(t, step);
    else first_factor_tensor(t, step);
  }

  KRUIFY_HD void second_factor_exact(const Thread& t, int step) const {
    constexpr int NT = Numbers::tile;
    const int columns = p.share / NT, rows = s.Q1 / kTileRows, shift = p.shift - (NT == 4 ? 2 : 1);
    for (int e = t.id; e < G * p.rank * rows * columns; e += t.count) {
      const Split left = split<Shape>(e, columns, shift);
      const int column = left.remainder, row = left.quotient % rows, pair = left.quotient / rows;
      float sum[kTileRows][NT] = {};
      tile_fma<NT, Shape::turns>(h(t, step) + row * (s.Q2 + kPad), rows * (s.Q2 + kPad),
          at(t, p.b) + (pair * p.share + column) * (s.Q2 + kPad), columns * (s.Q2 + kPad), s.Q2, sum);
      float* to = at(t, p.t) + (pair * p.share + column) * (s.Q1 + kPad) + row;
      KRUIFY_UNROLL
      for (int i = 0; i < kTileRows; ++i) {
        KRUIFY_UNROLL
        for (int j = 0; j < NT; ++j) to[j * columns * (s.Q1 + kPad) + i * rows] = sum[i][j];
      }
    }
  }
  KRUIFY_HD void second_factor_tensor(const Thread& t, int step) const {
    const int width = words(s.Q2), depth = s.Q2 / Numbers::numbers;
    share_tiles(
        t, 1, G * p.rank * p.share, s.Q1,
        [&](int, int row, int column, int lane, auto& sum) {
          warp_tile<Numbers>(lane, at(t, p.b) + row * width, width, h(t, step) + column * width, width, depth, sum);
        },
        [&](int, int row, int column, float first, float second) {
          Numbers::put_pair(at(t, p.t) + row * words(s.Q1), column, first, second);
        });
  }

  KRUIFY_HD void first_factor_exact(const Thread& t, int step) const {
    constexpr int NT = Numbers::tile;
    const int columns = p.share / NT, rows = s.P1 / kTileRows, shift = p.shift - (NT == 4 ? 2 : 1);
    for (int e = t.id; e < G * rows * columns; e += t.count) {
      const Split left = split<Shape>(e, columns, shift);
      const int column = left.remainder, row = left.quotient % rows, gate = left.quotient / rows;
      float sum[kTileRows][NT] = {};
      for (int r = 0; r < p.rank; ++r) {
        const int pair = gate * p.rank + r;
        tile_fma<NT, Shape::turns>(at(t, p.a) + (pair * s.P1 + row) * (s.Q1 + kPad), rows * (s.Q1 + kPad),
            at(t, p.t) + (pair * p.share + column) * (s.Q1 + kPad), columns * (s.Q1 + kPad), s.Q1, sum);
      }
      const bool apart = G == 3 && gate == 2;  // the GRU's reset gate stands between the two shares
      float* to = (apart ? at(t, p.y) : x(t, step) + gate * units()) + row * p.share + column;
      KRUIFY_UNROLL
      for (int i = 0; i < kTileRows; ++i) {
        KRUIFY_UNROLL
        for (int j = 0; j < NT; ++j) {
          float& place = to[i * rows * p.share + j * columns];
          place = apart ? sum[i][j] : place + sum[i][j];
        }
      }
    }
  }
  KRUIFY_HD void first_factor_tensor(const Thread& t, int step) const {
    const int width = words(s.Q1), depth = s.Q1 / Numbers::numbers;
    share_tiles(
        t, G, s.P1, p.share,
        [&](int gate, int row, int column, int lane, auto& sum) {
          for (int pair = gate * p.rank; pair < (gate + 1) * p.rank; ++pair)
            warp_tile<Numbers>(lane, at(t, p.a) + (pair * s.P1 + row) * width, width,
                at(t, p.t) + (pair * p.share + column) * width, width, depth, sum);
        },
        [&](int gate, int row, int column, float first, float second) {
          const bool apart = G == 3 && gate == 2;
          float* to = (apart ? at(t, p.y) : x(t, step) + gate * units()) + row * p.share + column;
          to[0] = apart ? first : to[0] + first;
          to[1] = apart ? second : to[1] + second;
        });
  }

  template <class Block> KRUIFY_HD void modrelu(const Block& block, const Thread& t, int step) const {
    const int64_t row = args.rows.row(step, sample, length);
    const int parts = rows_per_bias(args.kind), count = units() / parts;
    for (int u = t.id; u < count; u += t.count) {
      const Split e = split<Shape>(u, p.share, p.shift);
      const int p2 = t.rank * p.share + e.remainder, i = e.quotient * s.P2 + p2;
      float z[2] = {}, now[2];
      for (int k = 0; k < parts; ++k) {
        const int unit = i + k * (hidden() / 2), place = (e.quotient + k * (s.P1 / 2)) * words(s.Q2) + p2;
        z[k] = x(t, step)[u + k * count];
        if (const float* d = args.diagonal.of(0, hidden()))
          z[k] += d[unit] * (exact ? h(t, step)[place] : at(t, p.state)[u + k * count]);
        if (args.workspace) args.workspace[row * hidden() + unit] = z[k];
      }
      modrelu_forward(z, args.threshold ? args.threshold[i] : 0.0f, now);
      for (int k = 0; k < parts; ++k) {
        const int place = (e.quotient + k * (s.P1 / 2)) * words(s.Q2);
        for (int rank = 0; rank < t.ranks; ++rank)
          Numbers::put(block.remote(t, rank, h(t, step + 1)) + place, p2, now[k]);
        if constexpr (!exact) at(t, p.state)[u + k * count] = now[k];
        args.out[row * hidden() + i + k * (hidden() / 2)] = now[k];
      }
    }
  }

  template <class Block> KRUIFY_HD void cell(const Block& block, const Thread& t, int step) const {
    if (G == 1 && is_modrelu(args.kind)) return modrelu(block, t, step);
    const int64_t row = args.rows.row(step, sample, length);
    for (int u = t.id; u < units(); u += t.count) {
      const Split e = split<Shape>(u, p.share, p.shift);
      const int p2 = t.rank * p.share + e.remainder, i = e.quotient * s.P2 + p2;
      const int place = e.quotient * words(s.Q2);
      const float before = exact ? h(t, step)[place + p2] : at(t, p.state)[u];
      float gates[G], product[G], saved[5];
      KRUIFY_UNROLL
      for (int g = 0; g < G; ++g) {
        gates[g] = x(t, step)[g * units() + u];
        product[g] = G == 3 && g == 2 ? at(t, p.y)[u] : 0.0f;
        if (args.bias) product[g] += args.bias[g * hidden() + i];
        if (const float* d = args.diagonal.of(g, hidden())) product[g] += d[i] * before;
      }
      float c = G == 4 ? at(t, p.c)[u] : 0.0f;
      const float now = cell_forward<G>(gates, product, before, c, args.kind, saved);
      for (int rank = 0; rank < t.ranks; ++rank) Numbers::put(block.remote(t, rank, h(t, step + 1)) + place, p2, now);
      if constexpr (!exact) at(t, p.state)[u] = now;
      args.out[row * hidden() + i] = now;
      if constexpr (G == 4) at(t, p.c)[u] = c;
      if (G > 1 && args.workspace) {
        constexpr int kept = saved_of_gates(G);
        KRUIFY_UNROLL
        for (int k = 0; k < kept; ++k) args.workspace[(row * kept + k) * hidden() + i] = saved[k];
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
    block.cluster_barrier();
  }
  block.each([&](const Thread& t) { phases.finish(t); });
  block.end();
}

}  // namespace kruify::cuda

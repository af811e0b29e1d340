// The product of many rows with two stages, y[row, gate] (+)= (sum_r A[gate, r] (x) B[gate, r]) x[row], and the
// gradient of x. A block keeps one gate's factors and takes a few rows at a time. `Numbers` as in the recurrence.
#pragma once

#include "pair_backward.h"
#include "pair_forward.h"

namespace kruify::cuda {

struct PairProductPlan {
  Precision precision;
  int rank, batch, threads;  // batch: rows at a time
  int a, b, x, t;            // offsets in floats; x: two buffers forward, one backward
  int bytes;
};

// bytes == 0 says that it does not fit. Sizes that tensor cores do not take stay float32, and so does what has no room.
inline PairProductPlan pair_product_plan(
    AnyShape s, int rank, Chip chip, bool backward, Precision precision = kFloat32) {
  const bool exact = precision == kFloat32;
  const int unit = exact ? 4 : 16, at_once = exact ? 256 : 8;  // tiles, by threads or by warps
  const bool takes = s.P1 % unit == 0 && s.Q1 % unit == 0 && s.P2 % unit == 0 && s.Q2 % unit == 0;
  auto words = [&](int n) { return row_words(precision, n); };
  for (int batch : {8, 4, 2, 1}) {
    if (!takes) break;
    PairProductPlan p{};
    p.precision = precision, p.rank = rank, p.batch = batch, p.threads = 256;
    const int64_t tiles = backward ? int64_t{s.Q1 / unit} * (s.Q2 / unit) : int64_t{s.P1 / unit} * (s.P2 / unit);
    if (batch > 1 && batch / 2 * tiles >= at_once) continue;
    Room room;
    auto take = [&](int64_t matrices, int rows, int columns) { return room.take(matrices * rows * words(columns)); };
    if (!backward) {
      p.a = take(rank, s.P1, s.Q1), p.b = take(rank, s.P2, s.Q2);
      p.x = take(2 * batch, s.Q1, s.Q2), p.t = take(static_cast<int64_t>(batch) * rank, s.P2, s.Q1);
    } else {
      p.a = take(rank, s.Q1, s.P1), p.b = take(rank, s.Q2, s.P2);
      p.x = take(batch, s.P2, s.P1), p.t = take(static_cast<int64_t>(batch) * rank, s.Q1, s.P2);
    }
    p.bytes = room.bytes();
    if (p.bytes <= chip.shared_memory) return p;
  }
  return exact ? PairProductPlan{} : pair_product_plan(s, rank, chip, backward);
}

struct PairProduct {
  const float *a, *b;  // one gate: (rank, P1, Q1), (rank, P2, Q2)
  const float* x;      // forward: (rows, Q1 * Q2), 16-byte aligned; backward: the gate's gradient, x_stride apart
  float* y;            // y_stride apart
  int64_t rows, x_stride, y_stride;
  bool accumulate;
};

template <class Numbers> struct PairProductPhases {
  static constexpr bool exact = Numbers::precision == kFloat32;
  AnyShape s;
  const PairProductPlan& p;
  const PairProduct& args;

  KRUIFY_HD float* at(const Thread& t, int offset) const { return reinterpret_cast<float*>(t.memory) + offset; }
  static KRUIFY_HD int words(int n) { return row_words(Numbers::precision, n); }
  KRUIFY_HD float* x(const Thread& t, int64_t turn) const {
    return at(t, p.x) + (turn & 1) * p.batch * s.Q1 * words(s.Q2);
  }

  KRUIFY_HD void fetch(const Thread& t, int64_t first, int64_t turn) const {
    const int quads = s.Q1 * s.Q2 / 4;
    for (int e = t.id; e < p.batch * quads; e += t.count) {
      const int n = e / quads, k = e % quads * 4;
      float* to = x(t, turn) + (n * s.Q1 + k / s.Q2) * words(s.Q2);
      const bool there = first + n < args.rows;
      if constexpr (exact) {
        if (there) fetch_quad(to + k % s.Q2, args.x + (first + n) * args.x_stride + k);
      } else {
        const Quad values = there ? load_quad(args.x + (first + n) * args.x_stride + k) : Quad{};
        Numbers::put(to, k % s.Q2, values.v[0], values.v[1]);
        Numbers::put(to, k % s.Q2 + 2, values.v[2], values.v[3]);
      }
    }
    fetch_commit();
  }
  KRUIFY_HD void second_factor(const Thread& t, int64_t first, int64_t turn) const {
    inner(t, first, s.P2, s.Q1, s.Q2, at(t, p.b), x(t, turn));
  }
  KRUIFY_HD void first_factor(const Thread& t, int64_t first) const {
    outer(t, first, s.P1, s.P2, s.Q1, at(t, p.a), 0, at(t, p.t), 1);
  }
  KRUIFY_HD void first_transposed(const Thread& t, int64_t first) const {
    inner(t, first, s.Q1, s.P2, s.P1, at(t, p.a), at(t, p.x));
  }
  KRUIFY_HD void second_transposed(const Thread& t, int64_t first) const {
    outer(t, first, s.Q1, s.Q2, s.P2, at(t, p.t), 1, at(t, p.b), 0);
  }

  // How many rows of a batch there are.
  KRUIFY_HD int there(int64_t first) const { return static_cast<int>(least(p.batch, args.rows - first)); }

  // t[n, r][m][k'] = sum_k factor[r][m][k] x[n][k'][k], for all rows of a batch and ranks.
  KRUIFY_HD void inner(
      const Thread& t, int64_t first, int rows, int columns, int depth, const float* factor, const float* from) const {
    products<Numbers, AnyShape>(
        t, there(first) * p.rank, rows, columns, depth,
        [&](int e, const auto& add) {
          add(factor + e % p.rank * rows * words(depth), from + e / p.rank * columns * words(depth));
        },
        [&](int e, int row, int column, auto... values) {
          Numbers::put(at(t, p.t) + (e * rows + row) * words(columns), column, values...);
        });
  }
  // y[n][m][k'] (+)= sum_{r, k} left[m][k] right[k'][k]: one of them is the factor's (r), the other t's (n, r).
  KRUIFY_HD void outer(const Thread& t, int64_t first, int rows, int columns, int depth, const float* left,
      int left_moves, const float* right, int right_moves) const {
    products<Numbers, AnyShape>(
        t, there(first), rows, columns, depth,
        [&](int n, const auto& add) {
          for (int r = 0; r < p.rank; ++r)
            add(left + (left_moves * n * p.rank + r) * rows * words(depth),
                right + (right_moves * n * p.rank + r) * columns * words(depth));
        },
        [&](int n, int row, int column, auto... values) {
          float* to = args.y + (first + n) * args.y_stride + row * columns + column;
          write_values(to, args.accumulate, values...);
        });
  }

  // The gradient of x: the same with the factors transposed, the first one first.
  KRUIFY_HD void take_gradient(const Thread& t, int64_t first) const {
    const int size = s.P1 * s.P2;
    for (int e = t.id; e < p.batch * size; e += t.count) {
      const int n = e / size, p1 = e % size / s.P2, p2 = e % s.P2;
      const float value = first + n < args.rows ? args.x[(first + n) * args.x_stride + e % size] : 0.0f;
      Numbers::put(at(t, p.x) + (n * s.P2 + p2) * words(s.P1), p1, value);
    }
  }
};

// Rows first, first + stride, ... in batches: `index` of `blocks` blocks.
template <class Numbers, class Block>
KRUIFY_HD void pair_product(
    Block& block, AnyShape s, const PairProductPlan& p, const PairProduct& args, int index, int blocks) {
  const PairProductPhases<Numbers> phases{s, p, args};
  const int64_t stride = static_cast<int64_t>(blocks) * p.batch;
  int64_t first = static_cast<int64_t>(index) * p.batch, turn = 0;
  block.each([&, first](const Thread& t) {
    phases.fetch(t, first, 0);
    load_rows<Numbers>(t, phases.at(t, p.a), args.a, p.rank, s.P1, s.Q1, 0, s.P1);
    load_rows<Numbers>(t, phases.at(t, p.b), args.b, p.rank, s.P2, s.Q2, 0, s.P2);
  });
  for (; first < args.rows; first += stride, ++turn) {
    block.each([&, first, turn](const Thread& t) {
      phases.fetch(t, first + stride, turn + 1);
      fetch_wait<1>();
    });
    block.barrier();
    block.each([&, first, turn](const Thread& t) { phases.second_factor(t, first, turn); });
    block.barrier();
    block.each([&, first](const Thread& t) { phases.first_factor(t, first); });
    // The next product goes into t behind the next barrier, and into the x read above only a turn later.
  }
  block.end();
}

template <class Numbers, class Block>
KRUIFY_HD void pair_product_backward(
    Block& block, AnyShape s, const PairProductPlan& p, const PairProduct& args, int index, int blocks) {
  const PairProductPhases<Numbers> phases{s, p, args};
  const int64_t stride = static_cast<int64_t>(blocks) * p.batch;
  block.each([&](const Thread& t) {
    load_rows<Numbers, true>(t, phases.at(t, p.a), args.a, p.rank, s.P1, s.Q1, 0, s.P1);
    load_rows<Numbers, true>(t, phases.at(t, p.b), args.b, p.rank, s.P2, s.Q2, 0, s.P2);
  });
  for (int64_t first = static_cast<int64_t>(index) * p.batch; first < args.rows; first += stride) {
    block.each([&, first](const Thread& t) { phases.take_gradient(t, first); });
    block.barrier();
    block.each([&, first](const Thread& t) { phases.first_transposed(t, first); });
    block.barrier();
    block.each([&, first](const Thread& t) { phases.second_transposed(t, first); });
  }
  block.end();
}

}  // namespace kruify::cuda

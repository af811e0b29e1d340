// The bare product of many rows with two stages, y[row, gate] (+)= (sum_r A[gate, r] (x) B[gate, r]) x[row], and the
// gradient of x. A block keeps one gate's factors and takes a few rows at a time.
#pragma once

#include "pair_forward.h"
#include "pair_backward.h"

namespace kruify::cuda {

struct PairProductPlan {
  int rank, batch, threads;  // batch: rows at a time
  int a, b, x, t;            // offsets in floats; x: two buffers forward, one backward
  int bytes;
};

inline PairProductPlan pair_product_plan(AnyShape s, int rank, Chip chip, bool backward) {
  for (int batch : {8, 4, 2, 1}) {
    PairProductPlan p{};
    p.rank = rank, p.batch = batch, p.threads = 256;
    const int tiles = backward ? (s.Q1 / 4) * (s.Q2 / 4) : (s.P1 / 4) * (s.P2 / 4);
    if (batch > 1 && batch / 2 * tiles >= p.threads) continue;
    int used = 0;
    auto take = [&](int floats) {
      const int at = used;
      used += floats;
      return at;
    };
    if (!backward) {
      p.a = take(rank * s.P1 * (s.Q1 + kPad)), p.b = take(rank * s.P2 * (s.Q2 + kPad));
      p.x = take(2 * batch * s.Q1 * (s.Q2 + kPad)), p.t = take(batch * rank * s.P2 * (s.Q1 + kPad));
    } else {
      p.a = take(rank * s.Q1 * (s.P1 + kPad)), p.b = take(rank * s.Q2 * (s.P2 + kPad));
      p.x = take(batch * s.P2 * (s.P1 + kPad)), p.t = take(batch * rank * s.Q1 * (s.P2 + kPad));
    }
    p.bytes = used * 4;
    if (p.bytes <= chip.shared_memory) return p;
  }
  return {};
}

struct PairProduct {
  const float *a, *b;  // one gate: (rank, P1, Q1), (rank, P2, Q2)
  const float* x;      // forward: (rows, Q1 * Q2), 16-byte aligned; backward: the gate's gradient, x_stride apart
  float* y;            // y_stride apart
  int64_t rows, x_stride, y_stride;
  bool accumulate;
};

struct PairProductPhases {
  AnyShape s;
  const PairProductPlan& p;
  const PairProduct& args;

  KRUIFY_HD float* at(const Thread& t, int offset) const { return reinterpret_cast<float*>(t.memory) + offset; }
  KRUIFY_HD float* x(const Thread& t, int64_t turn) const { return at(t, p.x) + (turn & 1) * p.batch * s.Q1 * (s.Q2 + kPad); }

  KRUIFY_HD void fetch(const Thread& t, int64_t first, int64_t turn) const {
    const int quads = s.Q1 * s.Q2 / 4;
    for (int e = t.id; e < p.batch * quads; e += t.count) {
      const int n = e / quads, k = e % quads * 4;
      if (first + n < args.rows)
        fetch_quad(x(t, turn) + (n * s.Q1 + k / s.Q2) * (s.Q2 + kPad) + k % s.Q2, args.x + (first + n) * args.x_stride + k);
    }
    fetch_commit();
  }
  KRUIFY_HD void second_factor(const Thread& t, int64_t first, int64_t turn) const {
    const int columns = s.P2 / 4, rows = s.Q1 / 4, width = s.Q2 + kPad;
    for (int e = t.id; e < p.batch * p.rank * rows * columns; e += t.count) {
      const int column = e % columns, row = e / columns % rows, r = e / (columns * rows) % p.rank;
      const int n = e / (columns * rows * p.rank);
      if (first + n >= args.rows) break;
      float sum[kTileRows][4] = {};
      tile_fma<4, AnyShape::turns>(x(t, turn) + (n * s.Q1 + row) * width, rows * width, at(t, p.b) + (r * s.P2 + column) * width,
                  columns * width, s.Q2, sum);
      float* to = at(t, p.t) + ((n * p.rank + r) * s.P2 + column) * (s.Q1 + kPad) + row;
      for (int i = 0; i < kTileRows; ++i)
        for (int j = 0; j < 4; ++j) to[j * columns * (s.Q1 + kPad) + i * rows] = sum[i][j];
    }
  }
  KRUIFY_HD void first_factor(const Thread& t, int64_t first) const {
    const int columns = s.P2 / 4, rows = s.P1 / 4, width = s.Q1 + kPad;
    for (int e = t.id; e < p.batch * rows * columns; e += t.count) {
      const int column = e % columns, row = e / columns % rows, n = e / (columns * rows);
      if (first + n >= args.rows) break;
      float sum[kTileRows][4] = {};
      for (int r = 0; r < p.rank; ++r)
        tile_fma<4, AnyShape::turns>(at(t, p.a) + (r * s.P1 + row) * width, rows * width, at(t, p.t) + ((n * p.rank + r) * s.P2 + column) * width,
                    columns * width, s.Q1, sum);
      float* to = args.y + (first + n) * args.y_stride;
      for (int i = 0; i < kTileRows; ++i)
        for (int j = 0; j < 4; ++j) {
          float& place = to[(row + i * rows) * s.P2 + column + j * columns];
          place = args.accumulate ? place + sum[i][j] : sum[i][j];
        }
    }
  }

  // The gradient of x: the same with the factors transposed, the first one first.
  KRUIFY_HD void take_gradient(const Thread& t, int64_t first) const {
    const int size = s.P1 * s.P2;
    for (int e = t.id; e < p.batch * size; e += t.count) {
      const int n = e / size, p1 = e % size / s.P2, p2 = e % s.P2;
      if (first + n >= args.rows) break;
      at(t, p.x)[(n * s.P2 + p2) * (s.P1 + kPad) + p1] = args.x[(first + n) * args.x_stride + e % size];
    }
  }
  KRUIFY_HD void first_transposed(const Thread& t, int64_t first) const {
    const int columns = s.P2 / 4, rows = s.Q1 / 4, width = s.P1 + kPad;
    for (int e = t.id; e < p.batch * p.rank * rows * columns; e += t.count) {
      const int column = e % columns, row = e / columns % rows, r = e / (columns * rows) % p.rank;
      const int n = e / (columns * rows * p.rank);
      if (first + n >= args.rows) break;
      float sum[kTileRows][4] = {};
      tile_fma<4, AnyShape::turns>(at(t, p.a) + (r * s.Q1 + row) * width, rows * width, at(t, p.x) + (n * s.P2 + column) * width,
                  columns * width, s.P1, sum);
      float* to = at(t, p.t) + ((n * p.rank + r) * s.Q1 + row) * (s.P2 + kPad) + column;
      for (int i = 0; i < kTileRows; ++i)
        for (int j = 0; j < 4; ++j) to[i * rows * (s.P2 + kPad) + j * columns] = sum[i][j];
    }
  }
  KRUIFY_HD void second_transposed(const Thread& t, int64_t first) const {
    const int columns = s.Q2 / 4, rows = s.Q1 / 4, width = s.P2 + kPad;
    for (int e = t.id; e < p.batch * rows * columns; e += t.count) {
      const int column = e % columns, row = e / columns % rows, n = e / (columns * rows);
      if (first + n >= args.rows) break;
      float sum[kTileRows][4] = {};
      for (int r = 0; r < p.rank; ++r)
        tile_fma<4, AnyShape::turns>(at(t, p.t) + ((n * p.rank + r) * s.Q1 + row) * width, rows * width, at(t, p.b) + (r * s.Q2 + column) * width,
                    columns * width, s.P2, sum);
      float* to = args.y + (first + n) * args.y_stride;
      for (int i = 0; i < kTileRows; ++i)
        for (int j = 0; j < 4; ++j) {
          float& place = to[(row + i * rows) * s.Q2 + column + j * columns];
          place = args.accumulate ? place + sum[i][j] : sum[i][j];
        }
    }
  }
};

// Rows first, first + stride, ... in batches: `index` of `blocks` blocks.
template <class Block>
KRUIFY_HD void pair_product(Block& block, AnyShape s, const PairProductPlan& p, const PairProduct& args, int index, int blocks) {
  const PairProductPhases phases{s, p, args};
  const int64_t stride = static_cast<int64_t>(blocks) * p.batch;
  int64_t first = static_cast<int64_t>(index) * p.batch, turn = 0;
  block.each([&, first](const Thread& t) {
    phases.fetch(t, first, 0);
    load_rows(t, phases.at(t, p.a), args.a, p.rank, s.P1, s.Q1, 0, s.P1);
    load_rows(t, phases.at(t, p.b), args.b, p.rank, s.P2, s.Q2, 0, s.P2);
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

template <class Block>
KRUIFY_HD void pair_product_backward(Block& block, AnyShape s, const PairProductPlan& p, const PairProduct& args, int index, int blocks) {
  const PairProductPhases phases{s, p, args};
  const int64_t stride = static_cast<int64_t>(blocks) * p.batch;
  block.each([&](const Thread& t) {
    load_columns(t, phases.at(t, p.a), args.a, p.rank, s.P1, s.Q1, 0, s.P1);
    load_columns(t, phases.at(t, p.b), args.b, p.rank, s.P2, s.Q2, 0, s.P2);
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

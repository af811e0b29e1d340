// Gradients of two stages over many rows, for one pair (gate, r), from d (rows, P1 * P2) and x (rows, Q1 * Q2):
//
//   dA[p1, q1] = sum_{row, p2} d[p1, p2] T[q1, p2],   T[q1, p2] = sum_q2 x[q1, q2] B[p2, q2]
//   dB[p2, q2] = sum_{row, q1} U[p2, q1] x[q1, q2],   U[p2, q1] = sum_p1 d[p1, p2] A[p1, q1]
//
// A block takes one piece of the rows, keeps both sums in registers, and writes them as one part; the parts are added
// afterwards in one order. No atomics. `Numbers` as in the recurrence: with tensor cores all operands are rounded, d
// and x too, and both sums are float32.
#pragma once

#include "pair_product.h"

namespace kruify::cuda {

struct PairGradientPlan {
  Precision precision;
  int batch, threads;
  int groups_a, groups_b;        // threads' groups; each takes every n-th row of a batch and writes a part of its own
  int a, b, d, dt, x, xt, t, u;  // offsets in floats
  int bytes;
};

constexpr int kWarpTiles = 2;  // tiles of 16 x 16 that a warp keeps of each sum

// bytes == 0 says that it does not fit. Sizes that tensor cores do not take stay float32, and so does what has no room.
inline PairGradientPlan pair_gradient_plan(AnyShape s, Chip chip, Precision precision = kFloat32) {
  const bool exact = precision == kFloat32;
  const int unit = exact ? 4 : 16, most = exact ? 256 : 8 * kWarpTiles,
            at_once = exact ? 256 : 8;  // tiles, by threads or by warps
  const int64_t tiles_a = int64_t{s.P1 / unit} * (s.Q1 / unit), tiles_b = int64_t{s.P2 / unit} * (s.Q2 / unit);
  const bool takes = s.P1 % unit == 0 && s.Q1 % unit == 0 && s.P2 % unit == 0 && s.Q2 % unit == 0 && tiles_a <= most &&
      tiles_b <= most;
  auto words = [&](int n) { return row_words(precision, n); };
  for (int batch : {8, 4, 2, 1}) {
    if (!takes) break;
    PairGradientPlan p{};
    p.precision = precision, p.batch = batch, p.threads = 256;
    p.groups_a = static_cast<int>(greatest(1, least(batch, at_once / tiles_a))),
    p.groups_b = static_cast<int>(greatest(1, least(batch, at_once / tiles_b)));
    if (batch > 1 && batch / 2 * (s.Q1 / unit) * (s.P2 / unit) >= at_once) continue;
    Room room;
    auto take = [&](int64_t matrices, int rows, int columns) { return room.take(matrices * rows * words(columns)); };
    p.a = take(1, s.Q1, s.P1), p.b = take(1, s.P2, s.Q2);
    p.d = take(batch, s.P1, s.P2), p.dt = take(batch, s.P2, s.P1);
    p.x = take(batch, s.Q1, s.Q2), p.xt = take(batch, s.Q2, s.Q1);
    p.t = take(batch, s.Q1, s.P2), p.u = take(batch, s.P2, s.Q1);
    p.bytes = room.bytes();
    if (p.bytes <= chip.shared_memory) return p;
  }
  return exact ? PairGradientPlan{} : pair_gradient_plan(s, chip);
}

struct PairGradient {
  const float *a, *b;      // of this pair
  const float *d, *x;      // of its gate; rows d_stride and x_stride apart
  float *part_a, *part_b;  // (groups, P1 * Q1), (groups, P2 * Q2) of this piece
  int64_t d_stride, x_stride, first, last;
};

// What the block of one piece and one r works on.
KRUIFY_HD PairGradient piece_of(
    PairGradient args, AnyShape s, const PairGradientPlan& p, int piece, int pieces, int r) {
  const int64_t size_a = static_cast<int64_t>(s.P1) * s.Q1, size_b = static_cast<int64_t>(s.P2) * s.Q2,
                rows = args.last;
  const int64_t part = static_cast<int64_t>(r) * pieces + piece;
  args.a += r * size_a, args.b += r * size_b;
  args.part_a += part * p.groups_a * size_a, args.part_b += part * p.groups_b * size_b;
  args.first = rows * piece / pieces, args.last = rows * (piece + 1) / pieces;
  return args;
}

template <class Numbers> struct PairGradientPhases {
  static constexpr bool exact = Numbers::precision == kFloat32;
  AnyShape s;
  const PairGradientPlan& p;
  const PairGradient& args;

  struct Sums {
    float a[4][4], b[4][4];  // a thread's tile of 4 x 4, or its share of kWarpTiles tiles of two times 16 x 8
  };

  static KRUIFY_HD int words(int n) { return row_words(Numbers::precision, n); }
  KRUIFY_HD float* at(const Thread& t, int offset) const { return reinterpret_cast<float*>(t.memory) + offset; }

  // Rows into shared memory, as they are and transposed; zeros behind the last one.
  KRUIFY_HD void take(const Thread& t, int64_t first) const {
    const int size_d = s.P1 * s.P2, size_x = s.Q1 * s.Q2;
    for (int e = t.id; e < p.batch * size_d; e += t.count) {
      const int n = e / size_d, k = e % size_d, p1 = k / s.P2, p2 = k % s.P2;
      const float value = first + n < args.last ? args.d[(first + n) * args.d_stride + k] : 0.0f;
      Numbers::put(at(t, p.d) + (n * s.P1 + p1) * words(s.P2), p2, value);
      Numbers::put(at(t, p.dt) + (n * s.P2 + p2) * words(s.P1), p1, value);
    }
    for (int e = t.id; e < p.batch * size_x; e += t.count) {
      const int n = e / size_x, k = e % size_x, q1 = k / s.Q2, q2 = k % s.Q2;
      const float value = first + n < args.last ? args.x[(first + n) * args.x_stride + k] : 0.0f;
      Numbers::put(at(t, p.x) + (n * s.Q1 + q1) * words(s.Q2), q2, value);
      Numbers::put(at(t, p.xt) + (n * s.Q2 + q2) * words(s.Q1), q1, value);
    }
  }
  KRUIFY_HD void inner(const Thread& t) const {
    products<Numbers, AnyShape>(
        t, p.batch, s.Q1, s.P2, s.Q2,
        [&](int n, const auto& add) { add(at(t, p.x) + n * s.Q1 * words(s.Q2), at(t, p.b)); },
        [&](int n, int row, int column, auto... values) {
          Numbers::put(at(t, p.t) + (n * s.Q1 + row) * words(s.P2), column, values...);
        });
    products<Numbers, AnyShape>(
        t, p.batch, s.P2, s.Q1, s.P1,
        [&](int n, const auto& add) { add(at(t, p.dt) + n * s.P2 * words(s.P1), at(t, p.a)); },
        [&](int n, int row, int column, auto... values) {
          Numbers::put(at(t, p.u) + (n * s.P2 + row) * words(s.Q1), column, values...);
        });
  }
  KRUIFY_HD void outer(const Thread& t, Sums& sums) const {
    add(t, at(t, p.d), s.P1, at(t, p.t), s.Q1, s.P2, p.groups_a, sums.a);
    add(t, at(t, p.u), s.P2, at(t, p.xt), s.Q2, s.Q1, p.groups_b, sums.b);
  }
  KRUIFY_HD void write(const Thread& t, const Sums& sums) const {
    if constexpr (exact) {
      write_exact(t, sums.a, args.part_a, s.P1 / 4, s.Q1 / 4, p.groups_a);
      write_exact(t, sums.b, args.part_b, s.P2 / 4, s.Q2 / 4, p.groups_b);
    } else {
      write_tiles(t, sums.a, args.part_a, s.P1, s.Q1, p.groups_a);
      write_tiles(t, sums.b, args.part_b, s.P2, s.Q2, p.groups_b);
    }
  }

  // Calls f(group, row, column, k) for the tiles of a warp: its k-th stands in rows row.. and columns column.. of a
  // sum.
  template <class F> KRUIFY_HD void warp_tiles(const Thread& t, int rows, int columns, int groups, const F& f) const {
    const int across = columns / 16, tiles = rows / 16 * across;
    KRUIFY_UNROLL
    for (int k = 0; k < kWarpTiles; ++k) {
      const int e = t.id / 32 + t.count / 32 * k, group = e / tiles, tile = e % tiles;
      if (group < groups) f(group, tile / across * 16, tile % across * 16, k);
    }
  }
  // sum += A B^T over the rows of a batch that the thread's or warp's group takes; A (rows, depth), B (columns, depth)
  // of each.
  KRUIFY_HD void add(const Thread& t, const float* a, int rows, const float* b, int columns, int depth, int groups,
      float (&sum)[4][4]) const {
    const int width = words(depth);
    if constexpr (exact) {
      const int down = rows / 4, across = columns / 4, tile = t.id % (down * across), group = t.id / (down * across);
      for (int n = group; group < groups && n < p.batch; n += groups)
        tile_fma<4, AnyShape::turns>(a + (n * rows + tile / across) * width, down * width,
            b + (n * columns + tile % across) * width, across * width, depth, sum);
    } else {
      warp_tiles(t, rows, columns, groups, [&](int group, int row, int column, int k) {
        float tile[2][4];
        copy(sum + 2 * k, tile);
        for (int n = group; n < p.batch; n += groups)
          warp_tile<Numbers>(t.id % 32, a + (n * rows + row) * width, width, b + (n * columns + column) * width, width,
              depth / Numbers::numbers, tile);
        copy(tile, sum + 2 * k);
      });
    }
  }
  KRUIFY_HD void write_tiles(
      const Thread& t, const float (&sum)[4][4], float* part, int rows, int columns, int groups) const {
    warp_tiles(t, rows, columns, groups, [&](int group, int row, int column, int k) {
      const int lane = t.id % 32;
      KRUIFY_UNROLL
      for (int j = 0; j < 2; ++j) {
        KRUIFY_UNROLL
        for (int i = 0; i < 4; ++i)
          part[(static_cast<int64_t>(group) * rows + row + lane / 4 + i / 2 * 8) * columns + column + j * 8 +
              lane % 4 * 2 + i % 2] = sum[2 * k + j][i];
      }
    });
  }
  static KRUIFY_HD void copy(const float (*from)[4], float (*to)[4]) {
    KRUIFY_UNROLL
    for (int j = 0; j < 2; ++j) {
      KRUIFY_UNROLL
      for (int i = 0; i < 4; ++i) to[j][i] = from[j][i];
    }
  }

  KRUIFY_HD void write_exact(
      const Thread& t, const float (&sum)[4][4], float* part, int rows, int columns, int groups) const {
    const int tile = t.id % (rows * columns), group = t.id / (rows * columns);
    if (group >= groups) return;
    KRUIFY_UNROLL
    for (int i = 0; i < kTileRows; ++i) {
      KRUIFY_UNROLL
      for (int j = 0; j < 4; ++j)
        part[(group * rows * 4 + tile / columns + i * rows) * columns * 4 + tile % columns + j * columns] = sum[i][j];
    }
  }
};

template <class Numbers, class Block>
KRUIFY_HD void pair_gradient(Block& block, AnyShape s, const PairGradientPlan& p, const PairGradient& args) {
  const PairGradientPhases<Numbers> phases{s, p, args};
  typename Block::template PerThread<typename PairGradientPhases<Numbers>::Sums> sums;
  block.each([&](const Thread& t) {
    sums.of(t) = {};
    load_rows<Numbers, true>(t, phases.at(t, p.a), args.a, 1, s.P1, s.Q1, 0, s.P1);
    load_rows<Numbers>(t, phases.at(t, p.b), args.b, 1, s.P2, s.Q2, 0, s.P2);
  });
  for (int64_t first = args.first; first < args.last; first += p.batch) {
    block.barrier();
    block.each([&, first](const Thread& t) { phases.take(t, first); });
    block.barrier();
    block.each([&](const Thread& t) { phases.inner(t); });
    block.barrier();
    block.each([&](const Thread& t) { phases.outer(t, sums.of(t)); });
  }
  block.each([&](const Thread& t) { phases.write(t, sums.of(t)); });
  block.end();
}

}  // namespace kruify::cuda

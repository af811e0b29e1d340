// Where the two-stage kernels keep what in shared memory, how many threads and blocks per row, and what fits.
//
// A cluster of C blocks works on one row of the batch and splits p2, the second stage's output index: each block then
// owns rows / C hidden units with all their gates, needs all of h and of A but only its share of B, and the only thing
// that blocks exchange is h (forward) or partial sums of its gradient (backward).
#pragma once

#include "gates.h"
#include "mma.h"

namespace kruify::cuda {

struct Chip {
  int processors;     // streaming multiprocessors
  int shared_memory;  // bytes that a block may have
  bool clusters;      // compute capability 9.0 and above
  int at_once[4];     // clusters of 1, 2, 4, 8 blocks that run at one time, each block with a processor of its own
};

// Shared memory dealt out piece by piece, counted in floats. Matrices may be far larger than any chip has room for:
// then the offsets mean nothing, and `bytes` says 2^31 - 1.
struct Room {
  int64_t used = 0;
  int take(int64_t floats) {
    const int at = static_cast<int>(least(used, INT32_MAX));
    used += round_up(floats, 4);
    return at;
  }
  int bytes() const { return static_cast<int>(least(used * 4, INT32_MAX)); }
};

struct PairPlan {
  Precision precision;               // of the products; beyond float32 on tensor cores
  int rank, cluster, threads, tile;  // tile: columns of a thread's tile in float32, 2 or 4
  int share, shift;                  // P2 / cluster, and its logarithm (-1: no power of two)
  int depth;                         // steps of input gates on their way or in use
  int groups;                        // backward: in how many parts the sum over gates and ranks runs
  // offsets in floats
  int a, b, h, t, x, y, c;  // forward: factors, h (two buffers), after the second factor, gates, W_hn h, c
  int state;                // forward, beyond float32: the block's own units of h, not rounded
  int bias, diagonal;       // forward, or -1: no room
  int d, u, v, carry;       // backward: gate gradients, after the first factor, partial sums, what passes by W
  int bytes;
};

inline int logarithm(int n) {
  int shift = 0;
  while ((1 << shift) < n) ++shift;
  return (1 << shift) == n ? shift : -1;
}

// The layout for one cluster size; `bytes` says whether it fits.
template <class Shape>
PairPlan pair_layout(Shape s, int gates, int rank, int cluster, bool backward, Precision precision = kFloat32) {
  PairPlan p{};
  p.precision = precision, p.rank = rank, p.cluster = cluster, p.share = s.P2 / cluster, p.shift = logarithm(p.share);
  const int units = s.P1 * p.share;
  p.tile = gates * (s.P1 / kTileRows) * (p.share / 4) >= 256 ? 4 : 2;
  const bool exact = precision == kFloat32;  // else a warp takes a tile of 16 x 16
  const int tiles = exact ? gates * (s.P1 / kTileRows) * (p.share / p.tile) : 32 * gates * (s.P1 / 16) * (p.share / 16);
  p.threads = static_cast<int>(least(512, greatest(128, round_up(tiles, 32))));
  auto words = [&](int n) { return row_words(precision, n); };
  const int64_t pairs = static_cast<int64_t>(gates) * rank;
  Room room;
  auto take = [&](int64_t floats) { return room.take(floats); };
  if (!backward) {
    p.depth = gates * units <= 2048 ? 4 : gates * units <= 4096 ? 2 : 1;
    p.a = take(pairs * s.P1 * words(s.Q1));
    p.b = take(pairs * p.share * words(s.Q2));
    p.h = take(int64_t{2} * s.Q1 * words(s.Q2));
    p.t = take(pairs * p.share * words(s.Q1));
    p.x = take(static_cast<int64_t>(p.depth) * gates * units);
    p.y = take(gates == 3 ? units : 0);
    p.c = take(gates == 4 ? units : 0);
    p.state = take(exact ? 0 : units);
    p.bias = p.diagonal = -1;
  } else {
    const int groups = (exact ? p.threads * kTileRows * p.tile : p.threads / 32 * 256) / (s.Q1 * s.Q2);
    p.groups = static_cast<int>(greatest(1, least(groups, pairs)));
    p.a = take(pairs * s.Q1 * words(s.P1));
    p.b = take(pairs * s.Q2 * words(p.share));
    p.d = take(static_cast<int64_t>(gates) * p.share * words(s.P1));
    p.u = take(pairs * s.Q1 * words(p.share));
    p.v = take(static_cast<int64_t>(p.groups) * s.Q1 * s.Q2);
    p.c = take(gates == 4 ? units : 0);
    p.carry = take(units);
  }
  p.bytes = room.bytes();
  return p;
}

// Whether the two-stage kernels take such a matrix at all.
inline bool pair_takes(AnyShape s) {
  for (int n : {s.P1, s.Q1, s.P2, s.Q2})
    if (n < 4 || n % 4) return false;
  return s.P1 == s.Q1 && s.P2 == s.Q2;
}

// How many times the chip has to be filled for all rows.
inline int64_t waves(const PairPlan& p, int batch, const Chip& chip) {
  const int64_t threads = 2048 / p.threads, memory = chip.shared_memory / greatest(1, p.bytes);
  const int64_t at_once = chip.at_once[logarithm(p.cluster)] * greatest(1, least(threads, memory));
  return (batch + at_once - 1) / at_once;
}

// What every step reads of a block's own gates, `numbers` of them, into shared memory, where there is room and as many
// blocks run at one time.
inline void hold(PairPlan& p, int PairPlan::* place, int numbers, int batch, const Chip& chip) {
  PairPlan larger = p;
  larger.*place = p.bytes / 4, larger.bytes += static_cast<int>(round_up(numbers, 4)) * 4;
  if (larger.bytes <= chip.shared_memory && waves(larger, batch, chip) <= waves(p, batch, chip)) p = larger;
}

// The plan for this batch: that which fills the chip the fewest times, with the smallest cluster, and a larger one
// while every row still has multiprocessors of its own. `precision` is what the products may be rounded to: sizes that
// are no multiples of 16, what does not fit, and what float32 does in fewer turns, stay float32. cluster == 0 says that
// no size fits: the general kernel has to serve.
template <class Shape>
PairPlan pair_plan(Shape s, int gates, int rank, int batch, Chip chip, bool backward, Precision precision = kFloat32) {
  PairPlan best{};
  const int largest = chip.clusters ? 8 : 1, unit = precision == kFloat32 ? 4 : 16;
  for (int cluster = 1; cluster <= largest && s.P1 % unit == 0 && s.P2 % (unit * cluster) == 0; cluster *= 2) {
    const PairPlan p = pair_layout(s, gates, rank, cluster, backward, precision);
    if (p.bytes > chip.shared_memory || !chip.at_once[logarithm(cluster)]) continue;
    const int64_t before = best.cluster ? waves(best, batch, chip) : INT64_MAX, now = waves(p, batch, chip);
    const bool worth = static_cast<int64_t>(batch) * cluster <= chip.processors && s.P1 * p.share >= 128;
    if (now < before || (now == before && worth)) best = p;
  }
  if (precision != kFloat32) {
    const PairPlan exact = pair_plan(s, gates, rank, batch, chip, backward);
    if (!best.cluster || (exact.cluster && waves(exact, batch, chip) < waves(best, batch, chip))) return exact;
  }
  return best;
}

// Whether a batch of any size runs on the two-stage kernels: forward, and where asked for backward.
inline bool pair_fits(AnyShape s, int gates, int rank, Chip chip, bool training, Precision precision) {
  if (!pair_takes(s)) return false;
  auto fits = [&](bool backward) { return pair_plan(s, gates, rank, 1, chip, backward, precision).cluster > 0; };
  return fits(false) && (!training || fits(true));
}

}  // namespace kruify::cuda

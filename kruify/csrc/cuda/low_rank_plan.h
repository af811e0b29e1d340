// Where the low-rank recurrence keeps what in shared memory, how many blocks and rows of the batch go together, and
// what that is expected to cost.
//
// A cluster of C blocks works on `rows` rows of the batch. Each block owns H / C hidden units with all their gates, and
// of both thin matrices what belongs to them, so that blocks exchange only partial sums of the narrow vector: as many
// numbers as the rank, not as the state. What may stand beside (low_rank_beside.h) needs all of h, or sums of all of
// it.
#pragma once

#include "pair_plan.h"

namespace kruify::cuda {

struct LowRankSizes {
  int hidden, gates;
  int sets, rank;     // of LowRank
  int pair, P1, P2;   // beside it: products of the term of two square stages for each gate, 0: no such term; its stages
  int blocks, block;  // and blocks of the sparse residual, 0: none; rows of a block
};

// Division of numbers e, e * size < 2^32, by a size that is known when the launch is planned.
struct Divider {
  int size;
  uint64_t inverse;  // 2^32 / size, rounded up
  static Divider by(int64_t size) {
    return {
        static_cast<int>(size), ((uint64_t{1} << 32) + static_cast<uint64_t>(size) - 1) / static_cast<uint64_t>(size)};
  }
  KRUIFY_HD Split split(int e) const {
    const int quotient = static_cast<int>(static_cast<uint32_t>(e) * inverse >> 32);
    return {quotient, e - quotient * size};
  }
};

struct LowRankPlan {
  Precision precision;  // of the products; beyond float32 on tensor cores
  int hidden, gates, sets;
  int rank, share;  // of a set, and hidden units of a block, as multiples of a tile: what is beyond is 0
  int cluster, rows, threads;
  int slices;             // in which the sums over a block's units run
  int partial;            // sums of a block that make one number of the narrow vector
  int depth;              // of the second product's sums: the rank of a set, or backward of all
  int pair, P1, P2, own;  // of LowRankSizes (without a pair P1 is all of h, P2 is 1), and P1 / cluster
  int blocks, block;      // of the sparse residual: how many a block of the cluster has room for
  int stretch;            // floats of h of one row, as what stands beside reads it
  Divider by_share, by_quads, by_width, by_depth, by_rows, by_p2;  // by_quads: fours of a share
  // offsets in floats
  int first, second;       // the matrix that makes the narrow vector, and that which takes it
  int in, part, parts, z;  // what is multiplied, partial sums of the block, of the cluster (two buffers), the vector
  int x, y, c, state;      // forward: gates (two buffers), W_hn h, c, h of the block's units where `in` is rounded
  int bias, diagonal;      // forward, or -1: none
  int dh;                  // backward
  int a, b, t, whole;      // the pair's stages and what is between them; forward: h of all units
  int d, flat, back;       // backward: d for the pair and for the residual, partial sums of dh
  int values, index, ranges, held, counts;  // the residual's blocks, and where those of a row or column are
  int lengths;                              // of the rows, in steps
  int bytes;

  KRUIFY_HD int narrow() const { return sets * rank; }
  KRUIFY_HD int width() const { return share / slices; }
  KRUIFY_HD bool beside() const { return pair || blocks; }
  KRUIFY_HD int parts_of_dh() const { return (pair > 0) + (blocks > 0); }
};

// The most threads of a block: with more, what stands beside would not find enough registers.
constexpr int low_rank_threads(bool beside) { return beside ? 384 : 512; }

struct LowRankExtras {
  bool bias, diagonal;
};

// The room of what stands beside. A fourth more blocks of the residual than its even share; those of one that has even
// more stay in global memory.
inline void lay_beside(LowRankPlan& p, const LowRankSizes& s, bool backward, Room& room) {
  p.pair = s.pair, p.block = s.block;
  p.P1 = s.pair ? s.P1 : s.hidden, p.P2 = s.pair ? s.P2 : 1, p.own = p.P1 / p.cluster, p.by_p2 = Divider::by(p.P2);
  p.stretch = p.pair ? p.P2 * row_words(kFloat32, p.P1) : static_cast<int>(round_up(s.hidden, 4));
  p.blocks = p.cluster == 1 ? s.blocks : static_cast<int>(least(s.blocks, s.blocks / p.cluster * int64_t{5} / 4 + 16));
  if (!p.beside()) return;
  auto padded = [](int n) { return int64_t{row_words(kFloat32, n)}; };
  const int64_t pairs = int64_t{s.gates} * s.pair, gates = int64_t{s.gates} * p.rows, buffers = p.cluster > 1 ? 2 : 1;
  if (s.pair) {
    p.a = room.take(pairs * (backward ? p.P1 * padded(p.own) : p.own * padded(p.P1)));
    p.b = room.take(pairs * p.P2 * padded(p.P2));
    p.t = room.take(p.rows * pairs * (backward ? p.P2 * padded(p.own) : p.own * padded(p.P2)));
    p.d = room.take(backward ? gates * p.own * padded(p.P2) : 0);
  }
  if (s.blocks) {
    p.values = room.take(int64_t{p.blocks} * p.block);
    p.index = room.take(int64_t{p.blocks} * (backward ? 1 : 2));
    p.ranges = room.take(backward ? p.hidden + 1 : int64_t{2} * s.gates * p.share);
    p.held = room.take(1);
    p.flat = room.take(backward ? gates * (p.share + 1) : 0);
    p.counts = room.take(backward ? p.threads : 0);
  }
  if (backward) p.back = room.take(buffers * p.cluster * p.parts_of_dh() * p.rows * p.share);
  else p.whole = room.take(buffers * p.rows * p.stretch);
}

inline LowRankPlan low_rank_layout(
    const LowRankSizes& s, LowRankExtras extras, int cluster, int rows, bool backward, Precision precision) {
  LowRankPlan p{};
  const bool exact = precision == kFloat32;
  const int unit = exact ? 4 : 16, wide = exact ? (rows == 1 ? 1 : 4) : 16;  // rows and columns of a tile
  p.precision = precision, p.hidden = s.hidden, p.gates = s.gates, p.sets = s.sets, p.cluster = cluster, p.rows = rows;
  p.share = static_cast<int>(round_up((s.hidden + cluster - 1) / cluster, unit));
  p.rank = static_cast<int>(round_up(s.rank, unit));
  const int out = backward ? 1 : s.gates, in = backward ? s.gates : 1;
  const int64_t tile = exact ? 1 : 32, across = rows / wide;
  const int64_t second = tile * out * (p.share / unit) * across;
  const int64_t first = tile * (backward ? int64_t{s.gates} * p.rank : p.narrow()) / unit * across;
  const int most = low_rank_threads(s.pair || s.blocks);
  p.threads = static_cast<int>(least(most, greatest(128, round_up(greatest(first, second), 32))));
  p.slices = 1;
  while (first * p.slices * 2 <= p.threads && p.share % (p.slices * 2 * unit) == 0) p.slices *= 2;
  p.partial = backward && s.sets == 1 ? s.gates * p.slices : p.slices;
  p.depth = backward ? p.narrow() : p.rank;
  auto words = [&](int n) { return int64_t{row_words(precision, n)}; };
  const int64_t units = int64_t{p.share} * rows, vector = int64_t{p.narrow()} * rows;
  Room room;
  p.first = room.take((backward ? int64_t{s.gates} * p.rank : p.narrow()) * p.slices * words(p.width()));
  p.second = room.take(int64_t{out} * p.share * words(p.depth));
  p.in = room.take(int64_t{in} * p.slices * rows * words(p.width()));
  p.part = room.take(p.partial * vector);
  p.parts = room.take(cluster > 1 ? 2 * cluster * vector : 0);
  p.z = room.take(p.narrow() / p.depth * rows * words(p.depth));
  p.c = room.take(s.gates == 4 ? units : 0);
  p.bias = p.diagonal = -1;
  if (backward) {
    p.dh = room.take(units);
  } else {
    p.x = room.take(2 * s.gates * units);
    p.y = room.take(s.gates == 3 ? units : 0);
    p.state = room.take(exact ? 0 : units);
    if (extras.bias) p.bias = room.take(int64_t{s.gates} * p.share);
    if (extras.diagonal) p.diagonal = room.take(int64_t{s.gates} * p.share);
  }
  p.lengths = room.take(rows);
  p.by_share = Divider::by(p.share), p.by_width = Divider::by(p.width()), p.by_depth = Divider::by(p.depth);
  p.by_quads = Divider::by(p.share / 4), p.by_rows = Divider::by(rows);
  lay_beside(p, s, backward, room);
  // A block owns whole rows of the pair's first stage, in tiles of four.
  const bool splits = !s.pair || (s.P1 % (4 * cluster) == 0 && p.share * cluster == s.hidden);
  p.bytes = splits && (!s.blocks || s.block <= p.share) ? room.bytes() : INT32_MAX;
  return p;
}

// The plans are compared by a model until a GPU has measured them. A multiprocessor reads 128 bytes of shared memory a
// clock and does 128 multiply-adds in float32 (CUDA C++ Programming Guide, "Arithmetic Instructions"; eight times as
// many in TF32, sixteen in bf16, by the H100's data sheet); its share of the L2 cache gives 24 bytes (H100: about 5.5
// TB/s at 1.755 GHz). What barriers, exchange and cell cost is assumed: five barriers and what a chain of shared
// memory, cell and transcendental functions waits (some tens of clocks each), two ways through the cluster's network
// (about 180 clocks each, arXiv:2402.13499) behind a fence, a launch of cuDNN's persistent kernel.
// benchmarks/cuda_resources.py prints what follows of it.
constexpr int64_t kMultiplyAdds = 128, kSharedBytes = 128, kCacheBytes = 24;
constexpr int64_t kStepClocks = 1500, kClusterClocks = 1000, kDenseClocks = 4000;

inline int64_t speed(Precision precision) { return precision == kFloat32 ? 1 : precision == kTf32 ? 8 : 16; }

// What stands beside reads two bytes of shared memory for each multiply-add of a pair, in tiles of 4 x 4, and sixteen
// for one of the residual, whose lanes meet in banks.
inline int64_t beside_clocks(const LowRankPlan& p) {
  const int64_t pair = int64_t{p.gates} * p.pair * p.own * p.P2 * (p.P1 + p.P2);
  return p.rows * (2 * pair + 16 * int64_t{p.blocks} * p.block) / kSharedBytes;
}

inline int64_t assumed_clocks(const LowRankPlan& p) { return kStepClocks + (p.cluster > 1 ? kClusterClocks : 0); }

// How many times the chip has to be filled for all rows.
inline int64_t turns(const LowRankPlan& p, int batch, const Chip& chip) {
  const int64_t clusters = (batch + p.rows - 1) / p.rows, at_once = chip.at_once[logarithm(p.cluster)];
  return (clusters + at_once - 1) / at_once;
}

// Clocks of a step of all rows.
inline int64_t low_rank_clocks(const LowRankPlan& p, int batch, const Chip& chip) {
  const int64_t weights = int64_t{p.share} * (p.narrow() + int64_t{p.gates} * p.rank);
  const int64_t passes = p.precision != kFloat32 ? (p.rows + 15) / 16 : (p.rows + 3) / 4;
  const int64_t bytes = weights * (p.precision == kBf16 ? 2 : 4) * passes / kSharedBytes;
  const int64_t work = weights * p.rows / (kMultiplyAdds * speed(p.precision));
  return turns(p, batch, chip) * (greatest(bytes, work) + beside_clocks(p) + assumed_clocks(p));
}

// The same with the dense weight, read from the L2 cache.
inline int64_t dense_clocks(const LowRankSizes& s, int batch, const Chip& chip, Precision precision) {
  const int64_t weights = int64_t{s.gates} * s.hidden * s.hidden;
  const int64_t work = weights * batch / (kMultiplyAdds * speed(precision) * chip.processors);
  return greatest(work, weights * (precision == kBf16 ? 2 : 4) / (kCacheBytes * chip.processors)) + kDenseClocks;
}

// The same step by step (stepwise.h): `launches`, or of every row `work` multiply-adds, one for each number of the
// matrix. A launch of the host is taken for about 5 us, one that a CUDA graph keeps (ops/graphs.py) for 1.5 us.
constexpr int64_t kLaunchClocks = 8000, kKeptClocks = 2500;

inline int64_t stepwise_clocks(
    int64_t launches, int64_t work, int batch, const Chip& chip, Precision precision, bool kept = false) {
  const int64_t bytes = 4 * work / (kCacheBytes * chip.processors);
  const int64_t products = greatest(bytes, work * batch / (kMultiplyAdds * speed(precision) * chip.processors));
  return kept ? kKeptClocks * launches + products : greatest(kLaunchClocks * launches, products);
}

inline int64_t stepwise_clocks(const LowRankSizes& s, int batch, const Chip& chip, Precision precision, bool kept) {
  const int64_t pair = int64_t{s.gates} * s.pair * s.hidden * (int64_t{s.P1} + s.P2);
  const int64_t work = int64_t{s.hidden} * s.rank * (s.sets + s.gates) + pair + int64_t{s.blocks} * s.block;
  return stepwise_clocks(2 + s.sets + (s.pair ? s.gates : 0), work, batch, chip, precision, kept);
}

// The same in the general kernel, a block for each row and its loads one by one.
inline int64_t general_clocks(int64_t work, int batch, const Chip& chip) {
  return (batch + chip.processors - 1) / chip.processors * (work / 16 + kStepClocks);
}

inline bool low_rank_takes(const LowRankSizes& s) {
  const bool pair = pair_takes({s.P1, s.P1, s.P2, s.P2}) && int64_t{s.P1} * s.P2 == s.hidden && s.pair <= 1 << 16;
  return s.gates <= kMaxGates && (s.sets == 1 || s.sets == s.gates) && s.rank > 0 && s.rank <= 1 << 16 &&
      s.hidden % 4 == 0 && s.hidden <= 1 << 16 && (!s.pair || pair) && s.blocks >= 0 && s.block <= 1 << 16;
}

// The plan with the fewest clocks; cluster == 0 says that none fits. Tensor cores take 16 rows together, and outer
// products alone: what stands beside is float32 in any case, and most of the work.
inline LowRankPlan low_rank_plan(
    const LowRankSizes& s, LowRankExtras extras, int batch, const Chip& chip, bool backward, Precision precision) {
  LowRankPlan best{};
  if (!low_rank_takes(s)) return best;
  int64_t fewest = INT64_MAX;
  for (Precision with : {kFloat32, precision}) {
    for (int cluster = 1; cluster <= 8 && chip.at_once[logarithm(cluster)]; cluster *= 2) {
      for (int rows : {1, 4, 8, 16}) {
        if (with != kFloat32 && (rows != 16 || s.pair || s.blocks)) continue;
        const LowRankPlan p = low_rank_layout(s, extras, cluster, rows, backward, with);
        if (p.bytes > chip.shared_memory || p.bytes == INT32_MAX) continue;
        const int64_t clocks = low_rank_clocks(p, batch, chip);
        if (clocks < fewest) best = p, fewest = clocks;
      }
    }
  }
  return best;
}

// Whether a forward recurrence of low rank is one launch; else it goes step by step.
inline bool low_rank_fits(const LowRankSizes& s, int batch, const Chip& chip, Precision precision) {
  return chip.shared_memory && low_rank_plan(s, {true, true}, batch, chip, false, precision).cluster;
}

// Whether a recurrence of low rank is expected to be faster than torch's with the dense weight: in one kernel where it
// fits, else step by step, with launches that a CUDA graph keeps or not.
inline bool low_rank_pays(
    const LowRankSizes& s, int batch, const Chip& chip, bool training, bool kept, Precision precision) {
  const int64_t numbers = int64_t{s.gates} * s.hidden * s.hidden;
  if (!chip.shared_memory || s.gates > kMaxGates || s.rank < 1 || s.rank > s.hidden || s.hidden > 1 << 16) return false;
  if (s.pair && (s.pair > s.hidden || int64_t{s.P1} * s.P2 != s.hidden)) return false;
  if (int64_t{s.blocks} * s.block > numbers) return false;
  const int64_t dense = dense_clocks(s, batch, chip, precision);
  const int64_t steps = stepwise_clocks(s, batch, chip, precision, kept);
  for (bool backward : {false, true}) {
    if (backward && !training) break;
    const LowRankPlan p = low_rank_plan(s, {true, true}, batch, chip, backward, precision);
    if ((p.cluster ? low_rank_clocks(p, batch, chip) : steps) > dense) return false;
  }
  return true;
}

}  // namespace kruify::cuda

// Where the low-rank recurrence keeps what in shared memory, how many blocks and rows of the batch go together, and
// what that is expected to cost.
//
// A cluster of C blocks works on `rows` rows of the batch. Each block owns H / C hidden units with all their gates, and
// of both thin matrices what belongs to them, so that blocks exchange only partial sums of the narrow vector: as many
// numbers as the rank, not as the state.
#pragma once

#include "pair_plan.h"

namespace kruify::cuda {

struct LowRankSizes {
  int hidden, gates;
  int sets, rank;  // of LowRank
};

struct LowRankPlan {
  Precision precision;  // of the products; beyond float32 on tensor cores
  int hidden, gates, sets;
  int rank, share;  // of a set, and hidden units of a block, as multiples of a tile: what is beyond is 0
  int cluster, rows, threads;
  int slices;   // in which the sums over a block's units run
  int partial;  // sums of a block that make one number of the narrow vector
  int depth;    // of the second product's sums: the rank of a set, or backward of all
  // offsets in floats
  int first, second;       // the matrix that makes the narrow vector, and that which takes it
  int in, part, parts, z;  // what is multiplied, partial sums of the block, of the cluster (two buffers), the vector
  int x, y, c, state;      // forward: gates (two buffers), W_hn h, c, h of the block's units where `in` is rounded
  int bias, diagonal;      // forward, or -1: none
  int dh;                  // backward
  int lengths;             // of the rows, in steps
  int bytes;

  KRUIFY_HD int narrow() const { return sets * rank; }
  KRUIFY_HD int width() const { return share / slices; }
};

struct LowRankExtras {
  bool bias, diagonal;
};

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
  p.threads = static_cast<int>(least(512, greatest(128, round_up(greatest(first, second), 32))));
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
  p.bytes = room.bytes();
  return p;
}

// The plans are compared by a model until a GPU has measured them. A multiprocessor reads 128 bytes of shared memory a
// clock and does 128 multiply-adds in float32 (eight times as many in TF32, sixteen in bf16); its share of the L2 cache
// gives 24 bytes (H100: about 5.5 TB/s). The constants are what barriers, exchange and cell are taken to cost.
constexpr int64_t kMultiplyAdds = 128, kSharedBytes = 128, kCacheBytes = 24;
constexpr int64_t kStepClocks = 1500, kClusterClocks = 1000, kDenseClocks = 4000;

inline int64_t speed(Precision precision) { return precision == kFloat32 ? 1 : precision == kTf32 ? 8 : 16; }

// Clocks of a step of all rows.
inline int64_t low_rank_clocks(const LowRankPlan& p, int batch, const Chip& chip) {
  const int64_t clusters = (batch + p.rows - 1) / p.rows, at_once = chip.at_once[logarithm(p.cluster)];
  const int64_t weights = int64_t{p.share} * (p.narrow() + int64_t{p.gates} * p.rank);
  const int64_t passes = p.precision != kFloat32 ? (p.rows + 15) / 16 : (p.rows + 3) / 4;
  const int64_t bytes = weights * (p.precision == kBf16 ? 2 : 4) * passes / kSharedBytes;
  const int64_t work = weights * p.rows / (kMultiplyAdds * speed(p.precision));
  return (clusters + at_once - 1) / at_once *
      (greatest(bytes, work) + kStepClocks + (p.cluster > 1 ? kClusterClocks : 0));
}

// The same with the dense weight, read from the L2 cache.
inline int64_t dense_clocks(const LowRankSizes& s, int batch, const Chip& chip, Precision precision) {
  const int64_t weights = int64_t{s.gates} * s.hidden * s.hidden;
  const int64_t work = weights * batch / (kMultiplyAdds * speed(precision) * chip.processors);
  return greatest(work, weights * (precision == kBf16 ? 2 : 4) / (kCacheBytes * chip.processors)) + kDenseClocks;
}

// The same step by step (stepwise.h): `launches` of the host, about 5 us each, or of every row `work` multiply-adds,
// one for each number of the matrix.
inline int64_t stepwise_clocks(int64_t launches, int64_t work, int batch, const Chip& chip, Precision precision) {
  const int64_t bytes = 4 * work / (kCacheBytes * chip.processors);
  return greatest(
      8000 * launches, greatest(bytes, work * batch / (kMultiplyAdds * speed(precision) * chip.processors)));
}

// The same in the general kernel, a block for each row and its loads one by one.
inline int64_t general_clocks(int64_t work, int batch, const Chip& chip) {
  return (batch + chip.processors - 1) / chip.processors * (work / 16 + kStepClocks);
}

inline bool low_rank_takes(const LowRankSizes& s) {
  return s.gates <= kMaxGates && (s.sets == 1 || s.sets == s.gates) && s.rank > 0 && s.rank <= 1 << 16 &&
      s.hidden % 4 == 0 && s.hidden <= 1 << 16;
}

// The plan with the fewest clocks; cluster == 0 says that none fits. Tensor cores take 16 rows together.
inline LowRankPlan low_rank_plan(
    const LowRankSizes& s, LowRankExtras extras, int batch, const Chip& chip, bool backward, Precision precision) {
  LowRankPlan best{};
  if (!low_rank_takes(s)) return best;
  int64_t fewest = INT64_MAX;
  for (Precision with : {kFloat32, precision}) {
    for (int cluster = 1; cluster <= 8 && chip.at_once[logarithm(cluster)]; cluster *= 2) {
      for (int rows : {1, 4, 8, 16}) {
        if (with != kFloat32 && rows != 16) continue;
        const LowRankPlan p = low_rank_layout(s, extras, cluster, rows, backward, with);
        if (p.bytes > chip.shared_memory || p.bytes == INT32_MAX) continue;
        const int64_t clocks = low_rank_clocks(p, batch, chip);
        if (clocks < fewest) best = p, fewest = clocks;
      }
    }
  }
  return best;
}

// Whether a recurrence of low rank is expected to be faster than torch's with the dense weight: in one kernel where it
// fits, else step by step.
inline bool low_rank_pays(const LowRankSizes& s, int batch, const Chip& chip, bool training, Precision precision) {
  if (!chip.shared_memory || s.gates > kMaxGates || s.rank < 1 || s.rank > s.hidden || s.hidden > 1 << 16) return false;
  const int64_t dense = dense_clocks(s, batch, chip, precision);
  const int64_t work = int64_t{s.hidden} * s.rank * (s.sets + s.gates);
  for (bool backward : {false, true}) {
    if (backward && !training) break;
    const LowRankPlan p = low_rank_plan(s, {true, true}, batch, chip, backward, precision);
    if ((p.cluster ? low_rank_clocks(p, batch, chip) : stepwise_clocks(2 + s.sets, work, batch, chip, precision)) >
        dense)
      return false;
  }
  return true;
}

}  // namespace kruify::cuda

// What a launch of the two-stage or the low-rank recurrence takes, by the code that plans it: for the tests and for
// benchmarks/cuda_resources.py, which compiles this file alone.
#include "cuda/low_rank_plan.h"

using namespace kruify;
using namespace kruify::cuda;

namespace {

Chip chip_like(int processors, int shared_memory, int clusters) {
  return {processors, shared_memory, clusters != 0,
      {processors, clusters ? processors / 2 : 0, clusters ? processors / 4 : 0, clusters ? processors / 8 : 0}};
}

}  // namespace

// found: cluster (0: none fits), threads, columns of a tile, bytes of shared memory, precision.
extern "C" __attribute__((visibility("default"))) void shim_plan(int gates, int rows1, int rows2, int rank, int batch,
    int backward, int precision, int processors, int shared_memory, int clusters, int* found) {
  const Chip chip = chip_like(processors, shared_memory, clusters);
  const PairPlan p =
      pair_plan(AnyShape{rows1, rows1, rows2, rows2}, gates, rank, batch, chip, backward != 0, Precision(precision));
  found[0] = p.cluster, found[1] = p.threads, found[2] = p.tile, found[3] = p.bytes, found[4] = p.precision;
}

// sizes: hidden, gates, sets, rank, pair, P1, P2, blocks, block. found: cluster (0: none fits), rows of the batch,
// bytes of shared memory; then clocks of a step of all rows by the model (where none fits: step by step in a CUDA
// graph), those of them that are taken for barriers, exchange and cell, and clocks with the dense weight; clocks in
// which a launch reads a block's share of the thin matrices; and what a launch of the host and one of a CUDA graph are
// taken for.
extern "C" __attribute__((visibility("default"))) void shim_low_rank(const int* sizes, int batch, int backward,
    int precision, int processors, int shared_memory, int clusters, int64_t* found) {
  const Chip chip = chip_like(processors, shared_memory, clusters);
  const LowRankSizes s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], sizes[8]};
  const LowRankPlan p = low_rank_plan(s, {true, true}, batch, chip, backward != 0, Precision(precision));
  found[0] = p.cluster, found[5] = dense_clocks(s, batch, chip, Precision(precision));
  found[3] = stepwise_clocks(s, batch, chip, Precision(precision), true);
  if (!p.cluster) return;
  found[1] = p.rows, found[2] = p.bytes, found[3] = low_rank_clocks(p, batch, chip);
  found[4] = turns(p, batch, chip) * assumed_clocks(p);
  found[6] = turns(p, batch, chip) * p.share * (p.narrow() + p.gates * p.rank) * 4 / kCacheBytes;
  found[7] = kLaunchClocks, found[8] = kKeptClocks;
}

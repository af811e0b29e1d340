// What a launch of the two-stage recurrence takes, by the code that plans it: for the tests and for
// benchmarks/cuda_resources.py, which compiles this file alone.
#include "cuda/pair_plan.h"

using namespace kruify;
using namespace kruify::cuda;

// found: cluster (0: none fits), threads, columns of a tile, bytes of shared memory, precision.
extern "C" __attribute__((visibility("default"))) void shim_plan(int gates, int rows1, int rows2, int rank, int batch,
    int backward, int precision, int processors, int shared_memory, int clusters, int* found) {
  const Chip chip{
      processors, shared_memory, clusters != 0, {processors, processors / 2, processors / 4, processors / 8}};
  const PairPlan p =
      pair_plan(AnyShape{rows1, rows1, rows2, rows2}, gates, rank, batch, chip, backward != 0, Precision(precision));
  found[0] = p.cluster, found[1] = p.threads, found[2] = p.tile, found[3] = p.bytes, found[4] = p.precision;
}

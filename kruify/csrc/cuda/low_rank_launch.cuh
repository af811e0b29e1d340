// One cluster for some rows of the batch, all steps in one launch: the launches of the low-rank recurrence, forward and
// backward, of outer products alone and with what stands beside them. Each of the four files that include this compiles
// the templates of one of them.
#pragma once

#include "block.cuh"
#include "instantiations.h"
#include "launch.cuh"
#include "launches.h"

namespace kruify::cuda {

namespace {

template <int G, class Numbers, bool Sums>
__global__ void __launch_bounds__(low_rank_threads(Sums), 1)
    low_rank_forward_kernel(const __grid_constant__ LowRankPlan p, const __grid_constant__ LowRankForward args) {
  DeviceBlock block = DeviceBlock::here(dynamic_shared_memory());
  low_rank_recurrence<G, Numbers, Sums>(block, p, args, static_cast<int>(blockIdx.x) / p.cluster * p.rows);
}

template <int G, class Numbers, bool Sums>
__global__ void __launch_bounds__(low_rank_threads(Sums), 1)
    low_rank_backward_kernel(const __grid_constant__ LowRankPlan p, const __grid_constant__ LowRankBackward args) {
  DeviceBlock block = DeviceBlock::here(dynamic_shared_memory());
  low_rank_recurrence<G, Numbers, Sums>(block, p, args, static_cast<int>(blockIdx.x) / p.cluster * p.rows);
}

template <int G, class Numbers, bool Sums> auto kernel_for(const LowRankForward&) {
  return low_rank_forward_kernel<G, Numbers, Sums>;
}
template <int G, class Numbers, bool Sums> auto kernel_for(const LowRankBackward&) {
  return low_rank_backward_kernel<G, Numbers, Sums>;
}

template <bool Sums, class Arguments>
void launch_template(const LowRankPlan& p, const Arguments& args, cudaStream_t stream) {
  with_gates(args.kind, [&](auto gates) {
    with_columns<Sums>(p, [&](auto numbers) {
      const int clusters = (args.rows.batch + p.rows - 1) / p.rows;
      launch(kernel_for<gates.value, decltype(numbers), Sums>(args), dim3(clusters * p.cluster), p.threads, p.bytes,
          p.cluster, stream, "the low-rank recurrence", p, args);
    });
  });
}

}  // namespace

}  // namespace kruify::cuda

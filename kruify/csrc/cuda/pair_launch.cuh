// One cluster per row of the batch, all steps in one launch: the launches of the two-stage recurrence, forward and
// backward, in float32 and on tensor cores. Each of the four files that include this compiles the templates of one of
// them.
#pragma once

#include "block.cuh"
#include "instantiations.h"
#include "launch.cuh"
#include "launches.h"

namespace kruify::cuda {

namespace {

template <int G, class Numbers, class Shape>
__global__ void __launch_bounds__(512, 1)
    pair_forward_kernel(const Shape s, const __grid_constant__ PairPlan p, const __grid_constant__ PairForward args) {
  DeviceBlock block = DeviceBlock::here(dynamic_shared_memory());
  pair_recurrence<G, Numbers>(block, s, p, args, static_cast<int>(blockIdx.x) / block.thread.ranks);
}

template <int G, class Numbers, class Shape>
__global__ void __launch_bounds__(512, 1)
    pair_backward_kernel(const Shape s, const __grid_constant__ PairPlan p, const __grid_constant__ PairBackward args) {
  DeviceBlock block = DeviceBlock::here(dynamic_shared_memory());
  pair_recurrence<G, Numbers>(block, s, p, args, static_cast<int>(blockIdx.x) / block.thread.ranks);
}

template <int G, class Numbers, class Shape> auto kernel_for(const PairForward&) {
  return pair_forward_kernel<G, Numbers, Shape>;
}
template <int G, class Numbers, class Shape> auto kernel_for(const PairBackward&) {
  return pair_backward_kernel<G, Numbers, Shape>;
}

template <bool Tensor, class Arguments>
void launch_template(AnyShape s, const PairPlan& p, const Arguments& args, cudaStream_t stream, const char* what) {
  with_template<Tensor>(s, p, args.kind, [&](auto gates, auto numbers, auto shape) {
    const auto kernel = kernel_for<gates.value, decltype(numbers), decltype(shape)>(args);
    launch(kernel, dim3(args.rows.batch * p.cluster), p.threads, p.bytes, p.cluster, stream, what, shape, p, args);
  });
}

}  // namespace

}  // namespace kruify::cuda

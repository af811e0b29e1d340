// Two stages over many rows: the product, its gradient, and the gradients of the factors.
#include "block.cuh"
#include "launch.cuh"
#include "launches.h"

namespace kruify::cuda {

namespace {

template <class Numbers>
__global__ void __launch_bounds__(256, 1) product_kernel(
    const AnyShape s, const __grid_constant__ PairProductPlan p, const __grid_constant__ PairProduct args) {
  DeviceBlock block = DeviceBlock::here(dynamic_shared_memory());
  pair_product<Numbers>(block, s, p, args, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
}

template <class Numbers>
__global__ void __launch_bounds__(256, 1) product_backward_kernel(
    const AnyShape s, const __grid_constant__ PairProductPlan p, const __grid_constant__ PairProduct args) {
  DeviceBlock block = DeviceBlock::here(dynamic_shared_memory());
  pair_product_backward<Numbers>(block, s, p, args, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
}

template <class Numbers>
__global__ void __launch_bounds__(256, 1) gradient_kernel(
    const AnyShape s, const __grid_constant__ PairGradientPlan p, const __grid_constant__ PairGradient args) {
  DeviceBlock block = DeviceBlock::here(dynamic_shared_memory());
  pair_gradient<Numbers>(block, s, p,
      piece_of(args, s, p, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x), static_cast<int>(blockIdx.y)));
}

}  // namespace

void launch_pair_product(
    AnyShape s, const PairProductPlan& p, const PairProduct& args, bool backward, int blocks, cudaStream_t stream) {
  with_precision(p.precision, [&](auto numbers) {
    const auto kernel = backward ? product_backward_kernel<decltype(numbers)> : product_kernel<decltype(numbers)>;
    launch(kernel, dim3(blocks), p.threads, p.bytes, 1, stream, "the two-stage product", s, p, args);
  });
}

void launch_pair_gradient(
    AnyShape s, const PairGradientPlan& p, const PairGradient& args, int pieces, int rank, cudaStream_t stream) {
  with_precision(p.precision, [&](auto numbers) {
    launch(gradient_kernel<decltype(numbers)>, dim3(pieces, rank), p.threads, p.bytes, 1, stream,
        "the gradients of two stages", s, p, args);
  });
}

}  // namespace kruify::cuda

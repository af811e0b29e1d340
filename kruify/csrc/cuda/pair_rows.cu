// Two stages over many rows: the bare product, its gradient, and the gradients of the factors.
#include "block.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace kruify::cuda {

namespace {

__global__ void __launch_bounds__(256, 1) product_kernel(const AnyShape s, const __grid_constant__ PairProductPlan p, const __grid_constant__ PairProduct args) {
  extern __shared__ __align__(16) char memory[];
  DeviceBlock block = DeviceBlock::here(memory);
  pair_product(block, s, p, args, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
}

__global__ void __launch_bounds__(256, 1) product_backward_kernel(const AnyShape s, const __grid_constant__ PairProductPlan p, const __grid_constant__ PairProduct args) {
  extern __shared__ __align__(16) char memory[];
  DeviceBlock block = DeviceBlock::here(memory);
  pair_product_backward(block, s, p, args, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
}

__global__ void __launch_bounds__(256, 1) gradient_kernel(const AnyShape s, const __grid_constant__ PairGradientPlan p, const __grid_constant__ PairGradient args) {
  extern __shared__ __align__(16) char memory[];
  DeviceBlock block = DeviceBlock::here(memory);
  pair_gradient(block, s, p, piece_of(args, s, p, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x), static_cast<int>(blockIdx.y)));
}

}  // namespace

void launch_pair_product(AnyShape s, const PairProductPlan& p, const PairProduct& args, bool backward, int blocks, cudaStream_t stream) {
  launch(backward ? product_backward_kernel : product_kernel, dim3(blocks), p.threads, p.bytes, 1, stream, "the two-stage product", s, p, args);
}

void launch_pair_gradient(AnyShape s, const PairGradientPlan& p, const PairGradient& args, int pieces, int rank, cudaStream_t stream) {
  launch(gradient_kernel, dim3(pieces, rank), p.threads, p.bytes, 1, stream, "the gradients of two stages", s, p, args);
}

}  // namespace kruify::cuda

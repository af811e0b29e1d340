// The two-stage recurrence, forward: one cluster a row of the batch, all steps in one launch.
#include "block.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "pair_forward.h"

namespace kruify::cuda {

namespace {

template <int G, int NT, class Shape>
__global__ void __launch_bounds__(512, 1) pair_forward_kernel(const Shape s, const __grid_constant__ PairPlan p, const __grid_constant__ PairForward args) {
  extern __shared__ __align__(16) char memory[];
  DeviceBlock block = DeviceBlock::here(memory);
  pair_forward<G, NT>(block, s, p, args, static_cast<int>(blockIdx.x) / block.thread.ranks);
}

template <int G, class Shape>
void launch_shape(Shape s, const PairPlan& p, const PairForward& args, cudaStream_t stream) {
  const auto kernel = p.tile == 4 ? pair_forward_kernel<G, 4, Shape> : pair_forward_kernel<G, 2, Shape>;
  launch(kernel, dim3(args.rows.batch * p.cluster), p.threads, p.bytes, p.cluster, stream, "the two-stage recurrence (forward)", s, p, args);
}

}  // namespace

void launch_pair_forward(AnyShape s, const PairPlan& p, Kind kind, const PairForward& args, cudaStream_t stream) {
  with_shape(s, true, [&](auto shape) {
    if (kind == kLstm) launch_shape<4>(shape, p, args, stream);
    else if (kind == kGru) launch_shape<3>(shape, p, args, stream);
    else launch_shape<1>(shape, p, args, stream);
  });
}

}  // namespace kruify::cuda

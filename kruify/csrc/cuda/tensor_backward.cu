// The two-stage recurrence, backward, on tensor cores.
#include "pair_launch.cuh"

namespace kruify::cuda {

void launch_tensor_backward(AnyShape s, const PairPlan& p, Kind kind, const PairBackward& args, cudaStream_t stream) {
  launch_pair<true>(s, p, kind, args, stream, "the two-stage recurrence on tensor cores (backward)");
}

}  // namespace kruify::cuda

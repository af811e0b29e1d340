// The two-stage recurrence, forward, on tensor cores.
#include "pair_launch.cuh"

namespace kruify::cuda {

void launch_tensor_forward(AnyShape s, const PairPlan& p, Kind kind, const PairForward& args, cudaStream_t stream) {
  launch_pair<true>(s, p, kind, args, stream, "the two-stage recurrence on tensor cores (forward)");
}

}  // namespace kruify::cuda

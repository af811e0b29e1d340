// The two-stage recurrence, forward, on tensor cores.
#include "pair_launch.cuh"

namespace kruify::cuda {

void launch_tensor(AnyShape s, const PairPlan& p, const PairForward& args, cudaStream_t stream) {
  launch_template<true>(s, p, args, stream, "the two-stage recurrence on tensor cores (forward)");
}

}  // namespace kruify::cuda

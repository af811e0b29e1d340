// The two-stage recurrence, backward, on tensor cores.
#include "pair_launch.cuh"

namespace kruify::cuda {

void launch_tensor(AnyShape s, const PairPlan& p, const PairBackward& args, cudaStream_t stream) {
  launch_template<true>(s, p, args, stream, "the two-stage recurrence on tensor cores (backward)");
}

}  // namespace kruify::cuda

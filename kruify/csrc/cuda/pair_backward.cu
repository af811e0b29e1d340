// The two-stage recurrence, backward, in float32.
#include "pair_launch.cuh"

namespace kruify::cuda {

void launch_pair(AnyShape s, const PairPlan& p, const PairBackward& args, cudaStream_t stream) {
  if (p.precision != kFloat32) return launch_tensor(s, p, args, stream);
  launch_template<false>(s, p, args, stream, "the two-stage recurrence (backward)");
}

}  // namespace kruify::cuda

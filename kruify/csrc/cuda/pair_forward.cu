// The two-stage recurrence, forward, in float32.
#include "pair_launch.cuh"

namespace kruify::cuda {

void launch_pair(AnyShape s, const PairPlan& p, const PairForward& args, cudaStream_t stream) {
  if (p.precision != kFloat32) return launch_tensor(s, p, args, stream);
  launch_template<false>(s, p, args, stream, "the two-stage recurrence (forward)");
}

}  // namespace kruify::cuda

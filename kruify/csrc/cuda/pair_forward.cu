// The two-stage recurrence, forward, in float32.
#include "pair_launch.cuh"

namespace kruify::cuda {

void launch_pair_forward(AnyShape s, const PairPlan& p, Kind kind, const PairForward& args, cudaStream_t stream) {
  if (p.precision != kFloat32) return launch_tensor_forward(s, p, kind, args, stream);
  launch_pair<false>(s, p, kind, args, stream, "the two-stage recurrence (forward)");
}

}  // namespace kruify::cuda

// The two-stage recurrence, backward, in float32.
#include "pair_launch.cuh"

namespace kruify::cuda {

void launch_pair_backward(AnyShape s, const PairPlan& p, Kind kind, const PairBackward& args, cudaStream_t stream) {
  if (p.precision != kFloat32) return launch_tensor_backward(s, p, kind, args, stream);
  launch_pair<false>(s, p, kind, args, stream, "the two-stage recurrence (backward)");
}

}  // namespace kruify::cuda

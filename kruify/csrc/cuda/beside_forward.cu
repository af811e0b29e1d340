// The low-rank recurrence and what stands beside it, forward.
#include "low_rank_launch.cuh"

namespace kruify::cuda {

void launch_beside(const LowRankPlan& p, const LowRankForward& args, cudaStream_t stream) {
  launch_template<true>(p, args, stream);
}

}  // namespace kruify::cuda

// The low-rank recurrence and what stands beside it, backward.
#include "low_rank_launch.cuh"

namespace kruify::cuda {

void launch_beside(const LowRankPlan& p, const LowRankBackward& args, cudaStream_t stream) {
  launch_template<true>(p, args, stream);
}

}  // namespace kruify::cuda

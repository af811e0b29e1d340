// The low-rank recurrence, forward.
#include "low_rank_launch.cuh"

namespace kruify::cuda {

void launch_low_rank(const LowRankPlan& p, const LowRankForward& args, cudaStream_t stream) {
  if (p.beside()) return launch_beside(p, args, stream);
  launch_template<false>(p, args, stream);
}

}  // namespace kruify::cuda

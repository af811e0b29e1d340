// The low-rank recurrence, backward.
#include "low_rank_launch.cuh"

namespace kruify::cuda {

void launch_low_rank(const LowRankPlan& p, const LowRankBackward& args, cudaStream_t stream) {
  if (p.beside()) return launch_beside(p, args, stream);
  launch_template<false>(p, args, stream);
}

}  // namespace kruify::cuda

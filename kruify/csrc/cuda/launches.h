// The kernels' launches, one translation unit each, so that they compile side by side.
#pragma once

#include <cuda_runtime.h>

#include "schedule.h"

namespace kruify::cuda {

void launch_pair(AnyShape s, const PairPlan& p, const PairForward& args, cudaStream_t stream);
void launch_pair(AnyShape s, const PairPlan& p, const PairBackward& args, cudaStream_t stream);
// What the two above call where the plan's precision is not float32.
void launch_tensor(AnyShape s, const PairPlan& p, const PairForward& args, cudaStream_t stream);
void launch_tensor(AnyShape s, const PairPlan& p, const PairBackward& args, cudaStream_t stream);

void launch_low_rank(const LowRankPlan& p, const LowRankForward& args, cudaStream_t stream);
void launch_low_rank(const LowRankPlan& p, const LowRankBackward& args, cudaStream_t stream);
// What the two above call where something stands beside the outer products.
void launch_beside(const LowRankPlan& p, const LowRankForward& args, cudaStream_t stream);
void launch_beside(const LowRankPlan& p, const LowRankBackward& args, cudaStream_t stream);

// Arrays: ForwardArrays<T> or BackwardArrays<T>. scratch: general_scratch elements per row in global memory, or null
// where `bytes` of shared memory hold them.
template <class T, class Arrays>
void launch_general(const Program<T>& m, const Arrays& args, T* scratch, int bytes, cudaStream_t stream);

void launch_pair_product(
    AnyShape s, const PairProductPlan& p, const PairProduct& args, bool backward, int blocks, cudaStream_t stream);
void launch_pair_gradient(
    AnyShape s, const PairGradientPlan& p, const PairGradient& args, int pieces, int rank, cudaStream_t stream);

}  // namespace kruify::cuda

// The kernels' launches, one translation unit each, so that they compile side by side.
#pragma once

#include <cuda_runtime.h>

#include "schedule.h"

namespace kruify::cuda {

void launch_pair_forward(AnyShape s, const PairPlan& p, Kind kind, const PairForward& args, cudaStream_t stream);
void launch_pair_backward(AnyShape s, const PairPlan& p, Kind kind, const PairBackward& args, cudaStream_t stream);
// What the two above call where the plan's precision is not float32.
void launch_tensor_forward(AnyShape s, const PairPlan& p, Kind kind, const PairForward& args, cudaStream_t stream);
void launch_tensor_backward(AnyShape s, const PairPlan& p, Kind kind, const PairBackward& args, cudaStream_t stream);

// scratch: general_scratch elements a row in global memory, or null where `bytes` of shared memory hold them.
template <class T>
void launch_general_forward(
    const Program<T>& m, Kind kind, const GeneralForward<T>& args, T* scratch, int bytes, cudaStream_t stream);
template <class T>
void launch_general_backward(
    const Program<T>& m, Kind kind, const GeneralBackward<T>& args, T* scratch, int bytes, cudaStream_t stream);

void launch_pair_product(
    AnyShape s, const PairProductPlan& p, const PairProduct& args, bool backward, int blocks, cudaStream_t stream);
void launch_pair_gradient(
    AnyShape s, const PairGradientPlan& p, const PairGradient& args, int pieces, int rank, cudaStream_t stream);

}  // namespace kruify::cuda

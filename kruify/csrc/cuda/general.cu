// The recurrence for every structure: one block a row of the batch, all steps in one launch.
#include "block.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace kruify::cuda {

namespace {

template <class T> __device__ __forceinline__ char* memory_of(const Program<T>& m, T* scratch) {
  extern __shared__ __align__(16) char shared[];
  return scratch ? reinterpret_cast<char*>(scratch + blockIdx.x * general_scratch(m)) : shared;
}

template <int G, class T>
__global__ void __launch_bounds__(512, 1) general_forward_kernel(
    const __grid_constant__ Program<T> m, const __grid_constant__ GeneralForward<T> args, T* scratch) {
  DeviceBlock block = DeviceBlock::here(memory_of(m, scratch));
  general_forward<G>(block, m, args, static_cast<int>(blockIdx.x));
}

template <int G, class T>
__global__ void __launch_bounds__(512, 1) general_backward_kernel(
    const __grid_constant__ Program<T> m, const __grid_constant__ GeneralBackward<T> args, T* scratch) {
  DeviceBlock block = DeviceBlock::here(memory_of(m, scratch));
  general_backward<G>(block, m, args, static_cast<int>(blockIdx.x));
}

int threads_for(int hidden, int gates) {
  return static_cast<int>(least(512, greatest(64, round_up(static_cast<int64_t>(hidden) * gates / 2, 32))));
}

}  // namespace

template <class T>
void launch_general_forward(
    const Program<T>& m, Kind kind, const GeneralForward<T>& args, T* scratch, int bytes, cudaStream_t stream) {
  const auto kernel = kind == kLstm ? general_forward_kernel<4, T>
      : kind == kGru                ? general_forward_kernel<3, T>
                                    : general_forward_kernel<1, T>;
  launch(kernel, dim3(args.rows.batch), threads_for(m.hidden, m.gates), bytes, 1, stream,
      "the general recurrence (forward)", m, args, scratch);
}

template <class T>
void launch_general_backward(
    const Program<T>& m, Kind kind, const GeneralBackward<T>& args, T* scratch, int bytes, cudaStream_t stream) {
  const auto kernel = kind == kLstm ? general_backward_kernel<4, T>
      : kind == kGru                ? general_backward_kernel<3, T>
                                    : general_backward_kernel<1, T>;
  launch(kernel, dim3(args.rows.batch), threads_for(m.hidden, m.gates), bytes, 1, stream,
      "the general recurrence (backward)", m, args, scratch);
}

template void launch_general_forward<float>(
    const Program<float>&, Kind, const GeneralForward<float>&, float*, int, cudaStream_t);
template void launch_general_forward<double>(
    const Program<double>&, Kind, const GeneralForward<double>&, double*, int, cudaStream_t);
template void launch_general_backward<float>(
    const Program<float>&, Kind, const GeneralBackward<float>&, float*, int, cudaStream_t);
template void launch_general_backward<double>(
    const Program<double>&, Kind, const GeneralBackward<double>&, double*, int, cudaStream_t);

}  // namespace kruify::cuda

// The recurrence for every structure: one block per row of the batch, all steps in one launch.
#include "block.cuh"
#include "launch.cuh"
#include "launches.h"

namespace kruify::cuda {

namespace {

template <class T> __device__ __forceinline__ char* memory_of(const Program<T>& m, T* scratch) {
  return scratch ? reinterpret_cast<char*>(scratch + blockIdx.x * general_scratch(m)) : dynamic_shared_memory();
}

template <int G, class T, class Arrays>
__global__ void __launch_bounds__(512, 1)
    general_kernel(const __grid_constant__ Program<T> m, const __grid_constant__ Arrays args, T* scratch) {
  DeviceBlock block = DeviceBlock::here(memory_of(m, scratch));
  general_recurrence<G>(block, m, args, static_cast<int>(blockIdx.x));
}

int threads_for(int hidden, int gates) {
  return static_cast<int>(least(512, greatest(64, round_up(static_cast<int64_t>(hidden) * gates / 2, 32))));
}

}  // namespace

template <class T, class Arrays>
void launch_general(const Program<T>& m, const Arrays& args, T* scratch, int bytes, cudaStream_t stream) {
  with_gates(args.kind, [&](auto gates) {
    launch(general_kernel<gates.value, T, Arrays>, dim3(args.rows.batch), threads_for(m.hidden, m.gates), bytes, 1,
        stream, "the general recurrence", m, args, scratch);
  });
}

#define KRUIFY_ENTRY(T, Arrays) \
  template void launch_general<T, Arrays<T>>(const Program<T>&, const Arrays<T>&, T*, int, cudaStream_t);
KRUIFY_ENTRY(float, ForwardArrays)
KRUIFY_ENTRY(float, BackwardArrays)
KRUIFY_ENTRY(double, ForwardArrays)
KRUIFY_ENTRY(double, BackwardArrays)

}  // namespace kruify::cuda

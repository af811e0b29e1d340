// Launching kernels and saying what went wrong.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "pair_plan.h"

namespace kruify::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the error is told here; it must not be found again by the next call
  throw std::runtime_error(std::string("kruify: ") + what + " failed: " + cudaGetErrorString(error));
}

// The shared memory that a block may have on the current GPU.
inline int most_shared_memory() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "asking for the GPU");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "asking the GPU for its size");
  return bytes;
}

// `cluster` blocks together, each with `bytes` of shared memory. Neither allocates nor waits.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 blocks, int threads, int bytes, int cluster, cudaStream_t stream,
    const char* what, const Arguments&... arguments) {
  // Always the most there is: another thread may be about to launch the same kernel with more or less than `bytes`.
  if (bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_memory()), what);
  cudaLaunchConfig_t config{};
  config.gridDim = blocks, config.blockDim = dim3(threads), config.dynamicSmemBytes = bytes, config.stream = stream;
  cudaLaunchAttribute attribute{};
  if (cluster > 1) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
    config.attrs = &attribute, config.numAttrs = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), what);
}

}  // namespace kruify::cuda

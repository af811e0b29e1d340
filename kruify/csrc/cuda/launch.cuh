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

// `cluster` blocks together, each with `bytes` of shared memory. Neither allocates nor waits.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 blocks, int threads, int bytes, int cluster, cudaStream_t stream, const char* what,
            const Arguments&... arguments) {
  if (bytes > 48 * 1024) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), what);
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

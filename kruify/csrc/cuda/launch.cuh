// Launching kernels and saying what went wrong.
#pragma once

#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "pair_plan.h"

namespace kruify::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the error is told here; it must not be found again by the next call
  throw std::runtime_error(std::string("kruify: ") + what + " failed: " + cudaGetErrorString(error));
}

// Lets a kernel have all the shared memory of a block on the current GPU: once, since another thread may be about to
// launch it with more or less than this one.
template <class... Parameters> void allow_shared_memory(void (*kernel)(Parameters...), const char* what) {
  static std::mutex mutex;
  static std::set<std::pair<int, void (*)(Parameters...)>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "asking for the GPU");
  if (known.count({device, kernel})) return;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "asking the GPU for its size");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), what);
  known.insert({device, kernel});
}

// `cluster` blocks together, each with `bytes` of shared memory. Neither allocates nor waits.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 blocks, int threads, int bytes, int cluster, cudaStream_t stream,
    const char* what, const Arguments&... arguments) {
  if (bytes > 48 * 1024) allow_shared_memory(kernel, what);
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

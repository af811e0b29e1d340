// In place of CUDA's own header: what kruify/csrc/cuda asks of the compiler and of the runtime, on a CPU. runtime.cpp
// runs the launches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs
void __syncthreads();
void __syncwarp();

typedef struct ShimStream* cudaStream_t;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209
};
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMultiProcessorCount
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaFuncAttributes {
  int ptxVersion;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

namespace shim {
struct Launch {
  const char* kernel;  // the types of its parameters
  const void* function;
  dim3 grid;
  unsigned threads, cluster;
  size_t bytes, parameters;
};
cudaError_t run(const Launch& launch, const std::function<void()>& thread);
cudaError_t allow(const void* function, int bytes);
cudaError_t occupancy(int* count, const void* function, unsigned cluster, size_t bytes);
bool has_code();
}  // namespace shim

template <class... P> cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int bytes) {
  return shim::allow(reinterpret_cast<const void*>(kernel), bytes);
}
template <class... P> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, void (*)(P...)) {
  found->ptxVersion = 90;
  return shim::has_code() ? cudaSuccess : cudaErrorNoKernelImageForDevice;
}
template <class... P>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, void (*kernel)(P...), const cudaLaunchConfig_t* c) {
  return shim::occupancy(count, reinterpret_cast<const void*>(kernel), c->attrs->val.clusterDim.x, c->dynamicSmemBytes);
}
template <class... P, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(P...), Given&&... given) {
  unsigned cluster = 1;
  for (unsigned k = 0; k < c->numAttrs; ++k) cluster = c->attrs[k].val.clusterDim.x;
  const std::tuple<P...> parameters(std::forward<Given>(given)...);
  return shim::run({__PRETTY_FUNCTION__, reinterpret_cast<const void*>(kernel), c->gridDim, c->blockDim.x, cluster,
                       c->dynamicSmemBytes, (sizeof(P) + ... + size_t{0})},
      [&] { std::apply(kernel, parameters); });
}

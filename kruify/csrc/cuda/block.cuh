// A block of a running kernel, as the phases see it.
#pragma once

#include "host_device.h"

namespace kruify::cuda {

struct DeviceBlock {
  Thread thread;

  // State that a thread keeps from phase to phase, in registers.
  template <class State> struct PerThread {
    State state;
    __device__ __forceinline__ State& of(const Thread&) { return state; }
  };

  __device__ static __forceinline__ DeviceBlock here(char* memory) {
    Thread t{static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x), 0, 1, memory};
#if __CUDA_ARCH__ >= 900
    unsigned rank, ranks;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(ranks));
    t.rank = static_cast<int>(rank), t.ranks = static_cast<int>(ranks);
#endif
    return {t};
  }
  template <class Phase> __device__ __forceinline__ void each(const Phase& phase) const { phase(thread); }
  __device__ __forceinline__ void barrier() const { __syncthreads(); }
  __device__ __forceinline__ void end() const {}
  __device__ __forceinline__ void cluster_barrier() const {
    if (thread.ranks > 1) {
      cluster_arrive();
      cluster_wait();
    } else {
      __syncthreads();
    }
  }
  // Between these two a block goes on, while the others may still be on their way to the barrier.
  __device__ __forceinline__ void cluster_arrive() const {
#if __CUDA_ARCH__ >= 900
    if (thread.ranks > 1) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
  }
  __device__ __forceinline__ void cluster_wait() const {
#if __CUDA_ARCH__ >= 900
    if (thread.ranks > 1) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
  }
  // The same place in the shared memory of another block of the cluster.
  template <class T> __device__ __forceinline__ T* remote(const Thread& t, int rank, T* local) const {
#if __CUDA_ARCH__ >= 900
    if (t.ranks > 1) {
      T* there;
      asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(local), "r"(rank));
      return there;
    }
#endif
    return local;
  }
};

}  // namespace kruify::cuda

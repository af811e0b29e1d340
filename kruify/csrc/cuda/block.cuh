// A block of a running kernel, as the phases see it.
#pragma once

#include <cuda_runtime.h>

#include "host_device.h"

namespace kruify::cuda {

// Dynamic shared memory and clusters on a CPU: tests/cuda/shim.
char* emulate_shared_memory();
int emulate_cluster_rank();
int emulate_cluster_size();
void emulate_cluster_arrive();
void emulate_cluster_wait();
void* emulate_remote(int rank, void* local);

// The launch's dynamic shared memory.
__device__ __forceinline__ char* dynamic_shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) char memory[];
  return memory;
#else
  return emulate_shared_memory();
#endif
}

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
#elif !defined(__CUDACC__)
    t.rank = emulate_cluster_rank(), t.ranks = emulate_cluster_size();
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
#elif !defined(__CUDACC__)
    if (thread.ranks > 1) emulate_cluster_arrive();
#endif
  }
  // The same where the others wait for this block's reads alone, which a barrier of the block has ended: it waits for
  // no store.
  __device__ __forceinline__ void cluster_arrive_relaxed() const {
#if __CUDA_ARCH__ >= 900
    if (thread.ranks > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#elif !defined(__CUDACC__)
    if (thread.ranks > 1) emulate_cluster_arrive();
#endif
  }
  __device__ __forceinline__ void cluster_wait() const {
#if __CUDA_ARCH__ >= 900
    if (thread.ranks > 1) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#elif !defined(__CUDACC__)
    if (thread.ranks > 1) emulate_cluster_wait();
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
#elif !defined(__CUDACC__)
    if (t.ranks > 1) return static_cast<T*>(emulate_remote(rank, local));
#endif
    return local;
  }
};

}  // namespace kruify::cuda

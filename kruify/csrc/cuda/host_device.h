// What lets one source be a CUDA kernel and a plain C++ function: every header of this folder compiles with g++ alone.
//
// A kernel is written as a sequence of phases: `block.each(f)` runs f(thread) in every thread of a block, and
// `block.barrier()` stands between phases.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>

#if defined(__CUDACC__)
#define KRUIFY_HD __host__ __device__ __forceinline__
#define KRUIFY_UNROLL _Pragma("unroll")
#define KRUIFY_PRAGMA(text) _Pragma(#text)
#define KRUIFY_UNROLL_BY(n) KRUIFY_PRAGMA(unroll n)
#else
#define KRUIFY_HD inline
#define KRUIFY_UNROLL
#define KRUIFY_UNROLL_BY(n)
#endif

namespace kruify::cuda {

// One thread of a block: what a phase may know about where it runs.
struct Thread {
  int id, count;    // within the block
  int rank, ranks;  // of the block within its cluster
  char* memory;     // the block's shared memory (or its scratch in global memory)
};

// Stops what goes wrong. On the GPU that is the kernel: the message goes to stderr, and the next call that waits for
// the device raises.
KRUIFY_HD void demand(bool right, const char* what) {
  if (right) return;
#if defined(__CUDA_ARCH__)
  __assert_fail(what, __FILE__, __LINE__, "kruify");
#else
  throw std::runtime_error(what);
#endif
}

// What a GPU traps on.
inline void demand_aligned(const void* p, int bytes) {
  demand(reinterpret_cast<uintptr_t>(p) % bytes == 0, "a misaligned load of several numbers");
}

struct alignas(16) Quad {
  float v[4];
};

KRUIFY_HD Quad load_quad(const float* p) {
#if defined(__CUDA_ARCH__)
  const float4 q = *reinterpret_cast<const float4*>(p);
  return {{q.x, q.y, q.z, q.w}};
#else
  demand_aligned(p, 16);
  return {{p[0], p[1], p[2], p[3]}};
#endif
}

// What the instructions of a GPU do on a CPU: tests/cuda/shim.
void emulate_fetch(float* shared, const float* global);
void emulate_commit();
void emulate_wait(int pending);

// 16 bytes from global to shared memory without waiting for them; both addresses are multiples of 16.
KRUIFY_HD void fetch_quad(float* shared, const float* global) {
#if defined(__CUDA_ARCH__)
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
#else
  emulate_fetch(shared, global);
#endif
}

KRUIFY_HD void fetch_commit() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulate_commit();
#endif
}

// Waits until at most `pending` of this thread's latest groups are still on their way.
template <int pending> KRUIFY_HD void fetch_wait() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#else
  emulate_wait(pending);
#endif
}

KRUIFY_HD void prefetch(const void* global) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
#else
  (void)global;
#endif
}

constexpr KRUIFY_HD int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr KRUIFY_HD int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr KRUIFY_HD int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace kruify::cuda

// named_barrier.cuh: barriers over some of a thread block's warps (PTX ISA, "bar"; sm_80 and
// later).
#pragma once
#include <cstdint>

namespace sparsekern::ptx {

// Barrier over a subset of a CTA's warps (ids 1..15; 0 is __syncthreads).
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// What these threads wrote before is seen by those that sync on the barrier.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace sparsekern::ptx

// cp_async.cuh: copies of 16 or 8 bytes from global to shared memory that no register waits for (PTX
// ISA, "cp.async"; sm_80 and later).
#pragma once
#include <cstdint>

namespace sparsekern::ptx {

// Copies the first `bytes` (0 to 16) of 16 bytes and zeroes the rest; nothing else is read.
__device__ __forceinline__ void cp_async_16(uint32_t smem, const void* gmem, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(smem), "l"(gmem),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_16(uint32_t smem, const void* gmem) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(smem), "l"(gmem)
               : "memory");
}

// The same of 8 bytes, from and to addresses that 8 divides.
__device__ __forceinline__ void cp_async_8(uint32_t smem, const void* gmem, int bytes) {
  asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], 8, %2;" ::"r"(smem), "l"(gmem),
               "r"(bytes)
               : "memory");
}

// Closes a group of this thread's copies; it may be empty.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's latest groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace sparsekern::ptx

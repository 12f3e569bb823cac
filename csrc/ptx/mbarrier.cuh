// mbarrier.cuh: shared-memory barriers that count both threads and bytes (PTX ISA, "mbarrier";
// sm_90).
//
// A pipeline stage has two of them: `full` (the producer arrives once and announces the bytes that
// the copy engine will deliver) and `empty` (the consumers arrive when they have finished reading).
// Waiting is by phase parity: a fresh barrier has phase 0, so the first wait on `full` uses parity
// 0 and the first wait on `empty` uses parity 1, which passes at once because "the phase before the
// first" counts as complete.
#pragma once
#include <cstdint>

namespace sparsekern::ptx {

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes the initialised barriers visible to the copy engine and to the other CTAs of the cluster.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// How many threads of a warp say that it has read a stage: one, after __syncwarp or after a wait
// that the warps share. compute-sanitizer's racecheck does not follow that and reports every stage
// that is filled again (NOTES.md); built with -DSPARSEKERN_RACECHECK all of them arrive.
#ifdef SPARSEKERN_RACECHECK
constexpr int kArrivalsPerWarp = 32;
#else
constexpr int kArrivalsPerWarp = 1;
#endif

__device__ __forceinline__ void mbarrier_arrive_warp(uint32_t barrier) {
  if constexpr (kArrivalsPerWarp == 1) {
    __syncwarp();
    if (threadIdx.x % 32 != 0) return;
  }
  mbarrier_arrive(barrier);
}

__device__ __forceinline__ void mbarrier_arrive_expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Arrives on a barrier of any CTA of the cluster; `barrier` is a shared::cluster address (see
// map_to_cta). For "I have finished reading": it publishes no writes. The form with
// .release.cluster would cost a MEMBAR.ALL.GPU per call.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Spins until the phase with the given parity is complete (try_wait sleeps in hardware between
// polls).
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra WAIT;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

}  // namespace sparsekern::ptx

// tma.cuh: the asynchronous copy engine (PTX ISA, "cp.async.bulk" and "cp.async.bulk.tensor";
// sm_90).
//
// Two kinds of copy, both issued by one thread and completing on an mbarrier by byte count:
//   bulk_copy    contiguous bytes, 16-byte aligned: the packed weights, which lie in gmem as smem
//                wants them
//   tensor_copy  a box of a 2-D tensor described by a CUtensorMap: activations, swizzled;
//                out-of-bounds reads as zero
// The *_multicast forms deliver the same bytes to the same offset in every CTA of `cta_mask`, and
// signal the barrier at the same offset in each of them.
#pragma once
#include <cuda.h>

#include <cstdint>

namespace sparsekern::ptx {

enum class L2Hint : uint64_t {  // cache-policy words as CUTLASS and the driver use them
  kEvictNormal = 0x1000000000000000ull,
  kEvictFirst = 0x12F0000000000000ull,  // streamed once: packed weights in decode
  kEvictLast = 0x14F0000000000000ull,   // reread by every CTA: activations
};

__device__ __forceinline__ void bulk_copy(uint32_t smem, const void* gmem, uint32_t bytes,
                                          uint32_t barrier, L2Hint hint) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(smem),
      "l"(gmem), "r"(bytes), "r"(barrier), "l"(static_cast<uint64_t>(hint))
      : "memory");
}

__device__ __forceinline__ void bulk_copy_multicast(uint32_t smem, const void* gmem, uint32_t bytes,
                                                    uint32_t barrier, uint16_t cta_mask,
                                                    L2Hint hint) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      ".L2::cache_hint [%0], [%1], %2, [%3], %4, %5;" ::"r"(smem),
      "l"(gmem), "r"(bytes), "r"(barrier), "h"(cta_mask), "l"(static_cast<uint64_t>(hint))
      : "memory");
}

// Box at (x, y) = (innermost index, row) of the map's tensor.
__device__ __forceinline__ void tensor_copy(uint32_t smem, const CUtensorMap* map, int x, int y,
                                            uint32_t barrier, L2Hint hint) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(smem),
      "l"(map), "r"(x), "r"(y), "r"(barrier), "l"(static_cast<uint64_t>(hint))
      : "memory");
}

__device__ __forceinline__ void tensor_copy_multicast(uint32_t smem, const CUtensorMap* map, int x,
                                                      int y, uint32_t barrier, uint16_t cta_mask,
                                                      L2Hint hint) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(smem),
      "l"(map), "r"(x), "r"(y), "r"(barrier), "h"(cta_mask), "l"(static_cast<uint64_t>(hint))
      : "memory");
}

// The way back: a box from smem, written through the async proxy, to the tensor at (x, y); what
// lies outside the tensor is left out. The copies of one thread complete in groups.
__device__ __forceinline__ void tensor_store(const CUtensorMap* map, int x, int y, uint32_t smem,
                                             L2Hint hint) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%1, %2}], [%3], "
      "%4;" ::"l"(map),
      "r"(x), "r"(y), "r"(smem), "l"(static_cast<uint64_t>(hint))
      : "memory");
}
// By every thread that wrote to the box, before the barrier that precedes the store.
__device__ __forceinline__ void fence_before_tensor_store() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void tensor_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until at most kPending groups of this thread still read smem ...
template <int kPending>
__device__ __forceinline__ void tensor_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// ... or are not complete.
template <int kPending>
__device__ __forceinline__ void tensor_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

}  // namespace sparsekern::ptx

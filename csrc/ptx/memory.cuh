// memory.cuh: shared memory by its 32-bit address, and accesses of global memory that order
// others (PTX ISA, "ld", "st", "atom", "cvta"; sm_80 and later).
#pragma once
#include <cstdint>

namespace sparsekern::ptx {

__device__ __forceinline__ uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ uint32_t load_shared_u32(uint32_t smem) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(smem) : "memory");
  return v;
}

__device__ __forceinline__ uint2 load_shared_u64(uint32_t smem) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(smem) : "memory");
  return v;
}

__device__ __forceinline__ uint4 load_shared_u128(uint32_t smem) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(smem)
               : "memory");
  return v;
}

__device__ __forceinline__ void store_shared_f32(uint32_t smem, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(smem), "f"(v) : "memory");
}

__device__ __forceinline__ float load_shared_f32(uint32_t smem) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(smem) : "memory");
  return v;
}

__device__ __forceinline__ float2 load_shared_float2(uint32_t smem) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(smem) : "memory");
  return v;
}

__device__ __forceinline__ float4 load_shared_float4(uint32_t smem) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(smem)
               : "memory");
  return v;
}

__device__ __forceinline__ void store_shared_int4(uint32_t smem, int4 v) {
  asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

__device__ __forceinline__ int4 load_shared_int4(uint32_t smem) {
  int4 v;
  asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(smem)
               : "memory");
  return v;
}

template <int kCount>
__device__ __forceinline__ void load_shared(float (&v)[kCount], uint32_t smem) {
  static_assert(kCount % 4 == 0);
#pragma unroll
  for (int i = 0; i < kCount; i += 4)
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v[i]), "=f"(v[i + 1]), "=f"(v[i + 2]), "=f"(v[i + 3])
                 : "r"(smem + i * 4)
                 : "memory");
}

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* gmem) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(gmem) : "memory");
  return v;
}

// What others have written, and published before they added theirs, is seen after this.
__device__ __forceinline__ uint32_t atomic_add_acquire(uint32_t* gmem, uint32_t add) {
  uint32_t before;
  asm volatile("atom.acquire.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(gmem), "r"(add)
               : "memory");
  return before;
}

}  // namespace sparsekern::ptx

// mma_sp.cuh: one warp's sparse tensor-core product, D[16,8] += A[16,32] · B[32,8], A 2:4-sparse
// along K (PTX ISA, "mma.sp::ordered_metadata.m16n8k32"; sm_80 and later), with the matrix loads
// that feed it.
//
// With g = lane / 4 and t = lane % 4 a lane holds
//   a[0..3]  compressed A: rows g, g+8, g, g+8; of the 16 kept columns 2t, 2t+1 for a[0], a[1] and
//            8+2t, 9+2t for a[2], a[3]
//   b[r]     B rows (dense k) 8r+2t, 8r+2t+1 of column g
//   d[0..3]  (row g, columns 2t, 2t+1), (row g+8, same)
// Metadata: the lanes with t / 2 == kSelector supply it. Word of lane (g, t): low half row g, high
// half row g+8, four nibbles each for dense k 16·(t%2) .. +15. So one register per lane serves two
// k-steps: selector 0, then selector 1.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace sparsekern::ptx {

#define SK_MMA_SP(TYPE)                                                                          \
  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." TYPE "." TYPE       \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, " \
               "%12, %13;"                                                                       \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]),    \
                 "r"(b[3]), "r"(metadata), "n"(kSelector))

template <class T, int kSelector>
__device__ __forceinline__ void mma_sp(float (&d)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[4], uint32_t metadata) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    SK_MMA_SP("bf16");
  } else {
    SK_MMA_SP("f16");
  }
}
#undef SK_MMA_SP

// Four 8x8 matrices of 16-bit elements; lane i supplies the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem)
               : "memory");
}

// Stores four 8x8 matrices transposed: what a lane holds as (row g, columns 2t, 2t+1) lands in
// column g of the destination. This turns an accumulator fragment [out_features, tokens] into rows
// of y [tokens, out_features].
__device__ __forceinline__ void stmatrix_x4_transposed(uint32_t smem, uint32_t r0, uint32_t r1,
                                                       uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem),
               "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

__device__ __forceinline__ uint32_t load_shared_u32(uint32_t smem) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(smem) : "memory");
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

}  // namespace sparsekern::ptx

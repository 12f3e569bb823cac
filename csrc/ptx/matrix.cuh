// matrix.cuh: 8x8 matrices of 16-bit elements between shared memory and the registers of a warp
// (PTX ISA, "ldmatrix", sm_80 and later; "stmatrix", sm_90).
#pragma once
#include <cstdint>

namespace sparsekern::ptx {

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

}  // namespace sparsekern::ptx

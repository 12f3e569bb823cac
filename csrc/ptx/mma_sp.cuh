// mma_sp.cuh: one warp's sparse tensor-core product, D[16,8] += A[16,32] · B[32,8], A 2:4-sparse
// along K (PTX ISA, "mma.sp::ordered_metadata.m16n8k32"; sm_80 and later). matrix.cuh
// has the loads that feed it.
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
#include <cstdint>
#include <type_traits>

#include "core/dtype.h"

namespace sparsekern::ptx {

template <class T, int kSelector>
__device__ __forceinline__ void mma_sp(float (&d)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[4], uint32_t metadata) {
#define SK_MMA_SP(enumerator, name, type, bits, TYPE, ...)                                         \
  if constexpr (std::is_same_v<T, type> && bits == 16)                                             \
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." TYPE "." TYPE       \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, " \
                 "%12, %13;"                                                                       \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]),    \
                   "r"(b[3]), "r"(metadata), "n"(kSelector));
  SK_DTYPES(SK_MMA_SP)
#undef SK_MMA_SP
}

}  // namespace sparsekern::ptx

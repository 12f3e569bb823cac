// mma_sp.cuh: one warp's sparse tensor-core product, D[16,8] += A[16,K] · B[K,8], A 2:4-sparse
// along K, which is 32 at 16 bits and 64 at 8 (PTX ISA, "mma.sp::ordered_metadata.m16n8k32" and
// "m16n8k64"; sm_80 and later, e4m3 sm_89 and later). matrix.cuh has the loads that feed it.
//
// With g = lane / 4 and t = lane % 4 a lane holds at 16 bits
//   a[0..3]  compressed A: rows g, g+8, g, g+8; of the 16 kept columns 2t, 2t+1 for a[0], a[1] and
//            8+2t, 9+2t for a[2], a[3]
//   b[r]     B rows (dense k) 8r+2t, 8r+2t+1 of column g
//   d[0..3]  (row g, columns 2t, 2t+1), (row g+8, same)
// and at 8 bits the same bytes: a of the 32 kept columns 4t .. 4t+3 and 16+4t .. 19+4t, b[r] rows
// 16r+4t .. 16r+4t+3. int8 is summed in int32, the others in float32: e4m3 as the tensor cores do.
//
// Metadata at 16 bits: the lanes with t / 2 == kSelector supply it. Word of lane (g, t): low half
// row g, high half row g+8, four nibbles each for dense k 16·(t%2) .. +15. So one register per lane
// serves two k-steps: selector 0, then selector 1. At 8 bits all lanes supply it, selector 0: eight
// nibbles of row g + 8·(t%2) for dense k 32·(t/2) .. +31.
#pragma once
#include <cstdint>
#include <type_traits>

#include "core/dtype.h"

namespace sparsekern::ptx {

template <class T, int kSelector, class Accumulator>
__device__ __forceinline__ void mma_sp(Accumulator (&d)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[4], uint32_t metadata) {
#define SK_RUN(SHAPE, SUM, TYPE, constraint)                                                    \
  asm volatile("mma.sp::ordered_metadata.sync.aligned." SHAPE ".row.col." SUM "." TYPE "." TYPE \
               "." SUM                                                                          \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, "                      \
               "{%0, %1, %2, %3}, %12, %13;"                                                    \
               : constraint(d[0]), constraint(d[1]), constraint(d[2]), constraint(d[3])         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]),   \
                 "r"(b[3]), "r"(metadata), "n"(kSelector))
#define SK_MMA_SP(enumerator, name, type, bits, TYPE, accumulator, ...)                           \
  if constexpr (std::is_same_v<T, type>) {                                                        \
    static_assert(std::is_same_v<Accumulator, accumulator> && bits >= 8);                         \
    static_assert(kSelector == 0 || bits == 16);                                                  \
    if constexpr (bits == 16) SK_RUN("m16n8k32", "f32", TYPE, "+f");                              \
    else if constexpr (std::is_same_v<Accumulator, float>) SK_RUN("m16n8k64", "f32", TYPE, "+f"); \
    else SK_RUN("m16n8k64", "s32", TYPE, "+r");                                                   \
  }
  SK_DTYPES(SK_MMA_SP)
#undef SK_MMA_SP
#undef SK_RUN
}

}  // namespace sparsekern::ptx

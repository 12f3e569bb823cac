// permute.cuh: bits and bytes of registers, and values of 8 bits as values of 16 (PTX ISA, "prmt",
// "lop3"; "cvt", sm_89 and later).
#pragma once
#include <cstdint>

namespace sparsekern::ptx {

// Digit i of `selector` says what byte i of the result is: 0 to 3 a byte of a, 4 to 7 of b; plus 8,
// that byte's sign, eight times.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t v;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(selector));
  return v;
}

// (a & mask) | bits, one instruction whatever of them is constant.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) {
  uint32_t v;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(v) : "r"(a), "r"(mask), "r"(bits));
  return v;
}

// Four e4m3: of the low half and of the high half of a word.
__device__ __forceinline__ void e4m3x4_to_f16x2(uint32_t& low, uint32_t& high, uint32_t word) {
  asm("{\n"
      ".reg .b16 l, h;\n"
      "mov.b32 {l, h}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, l;\n"
      "cvt.rn.f16x2.e4m3x2 %1, h;\n"
      "}"
      : "=r"(low), "=r"(high)
      : "r"(word));
}

}  // namespace sparsekern::ptx

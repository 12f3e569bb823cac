// elect.cuh: one lane of a warp (PTX ISA, "elect.sync"; sm_90).
#pragma once
#include <cstdint>

namespace sparsekern::ptx {

// True in one lane, the same each time, where all 32 are there. Unlike lane_idx == 0 it tells the
// compiler that one lane runs what follows, which then needs no loop around a copy.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xFFFFFFFF;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(elected));
  return elected != 0;
}

}  // namespace sparsekern::ptx

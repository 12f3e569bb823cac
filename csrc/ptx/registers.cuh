// registers.cuh: hints that save registers: uniform values, special registers read again, integers
// converted late, and the register budget of a warpgroup (PTX ISA, "setmaxnreg"; sm_90a).
#pragma once
#include <cstdint>

namespace sparsekern::ptx {

// Lane 0's value for the whole warp. The compiler then knows that it is uniform, and keeps what
// follows from it (stages, descriptors) in uniform registers, which accumulators do not need.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// threadIdx.x, read anew: where no register is left to keep it or what follows from it.
__device__ __forceinline__ uint32_t thread_idx_again() {
  uint32_t idx;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(idx));
  return idx;
}

// A sum as float32. Of integers just here: the compiler would convert all that a loop may need
// before the loop, and has no registers for them.
__device__ __forceinline__ float as_float_here(float sum) { return sum; }
__device__ __forceinline__ float as_float_here(int32_t sum) {
  float v;
  asm volatile("cvt.rn.f32.s32 %0, %1;" : "=f"(v) : "r"(sum));
  return v;
}

template <int kRegisters>
__device__ __forceinline__ void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace sparsekern::ptx

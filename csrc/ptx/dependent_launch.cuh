// dependent_launch.cuh: programmatic dependent launch (PTX ISA, "griddepcontrol"; sm_90): a kernel
// launched with that attribute may start before its predecessor in the stream has finished.
//
// Whatever the predecessor may have written, or may still read, is touched only after
// wait_for_predecessor; let_successor_start says that the next such kernel may begin to fill freed
// SMs. Before compute capability 9.0 both do nothing, and a launch must not have the attribute.
// Chains with kernels of others: notes/pdl.md.
#pragma once

namespace sparsekern::ptx {

__device__ __forceinline__ void wait_for_predecessor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_successor_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace sparsekern::ptx

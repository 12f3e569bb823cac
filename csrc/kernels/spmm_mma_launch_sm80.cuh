// spmm_mma_launch_sm80.cuh: host side of the mma.sp kernel: checks, launch, the list of
// configurations. Templates over the dtype; spmm_mma*_sm80.cu instantiate them, so that they
// compile in parallel.
#pragma once
#include "spmm_mma_sm80.cuh"

#include "../configs.h"

namespace sparsekern::mma {

constexpr const char* kOp = "sparsekern.linear (mma)";

// Shared memory beyond 48 KiB must be asked for, once per kernel and device.
template <class Cfg>
Status allow_shared_memory() {
  constexpr int kDevices = 64;
  static bool allowed[kDevices] = {};
  int device = 0;
  SK_CUDA(kOp, cudaGetDevice(&device));
  SK_CHECK_REL(kOp, device, <, kDevices, "Use a lower device index.");
  if (!allowed[device])
    SK_CUDA(kOp,
            cudaFuncSetAttribute(spmm_mma_sm80_kernel<Cfg>,
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, Cfg::kSmemBytes));
  allowed[device] = true;
  return {};
}

template <class Cfg>
Status launch(const LinearProblem& p, cudaStream_t stream) {
  const Params<typename Cfg::T> params = make_params<Cfg>(p);
  const int64_t blocks = static_cast<int64_t>(params.row_blocks) * params.token_blocks;
  SK_CHECK_REL(kOp, blocks, <, int64_t{1} << 31, "Split the tokens.");
  SK_RETURN_IF_ERROR(allow_shared_memory<Cfg>());
  const dim3 grid(static_cast<unsigned>(blocks));
  spmm_mma_sm80_kernel<Cfg><<<grid, Cfg::kThreads, Cfg::kSmemBytes, stream>>>(params);
  return launch_status(kOp, "spmm_mma_sm80_kernel", grid, dim3(Cfg::kThreads), Cfg::kSmemBytes);
}

template <class T>
Status launch_config(const LinearProblem& p, int config, cudaStream_t stream) {
  SK_CHECK_MULTIPLE(kOp, reinterpret_cast<uintptr_t>(p.x), uintptr_t{16},
                    "Copy x to aligned memory.");
  SK_CHECK_MULTIPLE(kOp, p.x_stride, int64_t{8}, "Make x contiguous, or pad in_features to 8.");
  SK_CHECK_REL(kOp, p.in_features, >, 0, "The sum is empty: fill y with activation(bias).");
  switch (config) {
#define SK_CASE(index, rows, tokens, warps_m, warps_n, warps_k, stages) \
  case index:                                                           \
    return launch<Config<T, rows, tokens, warps_m, warps_n, warps_k, stages>>(p, stream);
    SK_MMA_CONFIGS(SK_CASE)
#undef SK_CASE
  }
  return make_status(StatusKind::value, kOp, ": expected a config index below ", kMmaConfigs,
                     ", got ", config, ". See sparsekern._C.mma_configs().");
}

}  // namespace sparsekern::mma

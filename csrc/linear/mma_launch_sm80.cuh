// mma_launch_sm80.cuh: host side of the mma.sp kernel: checks, launch, the list of
// configurations. Templates over the dtype; spmm_mma*_sm80.cu instantiate them, so that they
// compile in parallel.
#pragma once
#include "linear/mma_sm80.cuh"

#include "linear/configs.h"

namespace sparsekern::mma {

constexpr const char* kOp = "sparsekern.linear (mma)";

// What is asked once per kernel and device: shared memory beyond 48 KiB must be allowed; a kernel
// that was compiled for 9.0 or later waits for its predecessor where it must (dependent_launch.cuh).
struct Prepared {
  bool done, waits;
};

template <class Cfg>
Status prepare(bool& waits) {
  constexpr int kDevices = 64;
  static Prepared prepared[kDevices] = {};
  const auto kernel = spmm_mma_sm80_kernel<Cfg>;
  int device = 0;
  SK_CUDA(kOp, cudaGetDevice(&device));
  SK_CHECK_REL(kOp, device, <, kDevices, "Use a lower device index.");
  if (!prepared[device].done) {
    SK_CUDA(kOp, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      Cfg::kSmemBytes));
    cudaFuncAttributes attributes;
    SK_CUDA(kOp, cudaFuncGetAttributes(&attributes, kernel));
    prepared[device] = {true, attributes.ptxVersion >= 90};
  }
  waits = prepared[device].waits;
  return {};
}

template <class Cfg>
Status launch(const LinearProblem& p, cudaStream_t stream) {
  const Params<typename Cfg::T> params = make_params<Cfg>(p);
  const int64_t blocks = static_cast<int64_t>(params.row_blocks) * params.token_blocks;
  SK_CHECK_REL(kOp, blocks, <, int64_t{1} << 31, "Split the tokens.");
  bool waits = false;
  SK_RETURN_IF_ERROR(prepare<Cfg>(waits));
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(Cfg::kThreads);
  config.dynamicSmemBytes = Cfg::kSmemBytes;
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = waits ? 1 : 0;
  (void)cudaLaunchKernelEx(&config, spmm_mma_sm80_kernel<Cfg>, params);
  return launch_status(kOp, "spmm_mma_sm80_kernel", config.gridDim, config.blockDim,
                       Cfg::kSmemBytes);
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

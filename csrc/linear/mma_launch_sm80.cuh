// mma_launch_sm80.cuh: host side of the mma.sp kernel: checks and the launch. Templates over the
// element type, which linear/instantiate compiles in parallel.
#pragma once
#include "core/device.h"
#include "core/tensor_map.h"
#include "linear/configs.h"
#include "linear/launch.h"
#include "linear/mma_sm80.cuh"

namespace sparsekern::mma {

constexpr const char* kOp = "sparsekern.linear (mma)";

template <class Cfg>
Status launch(const LinearProblem& p, cudaStream_t stream) {
  static KernelStates states;
  const DeviceKernel kernel(kOp, "spmm_mma_sm80_kernel", spmm_mma_sm80_kernel<Cfg>, states);
  const Params<Cfg> params = make_params<Cfg>(p);
  const int64_t blocks = static_cast<int64_t>(params.row_blocks) * params.token_blocks;
  SK_CHECK_REL(kOp, blocks, <, int64_t{1} << 31, "Split the tokens.");
  LaunchShape shape = {Cfg::kThreads, Cfg::kSmemBytes};
  SK_RETURN_IF_ERROR(kernel.prepare(shape.smem_bytes, shape.dependent));
  shape.dependent &= !p.weight_is_new;
  return kernel.launch(shape, blocks, stream, params);
}

template <class T, class X, class Y>
Status linear(const LinearProblem& p, int config, cudaStream_t stream) {
  static_assert(std::is_same_v<T, X> && (std::is_same_v<T, Y> || Element<T>::kStorageBits == 8));
  if (p.tokens == 0 || p.out_features == 0) return {};
  SK_RETURN_IF_ERROR(check_x(kOp, p, Element<X>::kStorageBits / 2));
  SK_CHECK_REL(kOp, p.in_features, >, 0, "The sum is empty: fill y with activation(bias).");
  switch (config) {
#define SK_CASE(index, ...)                                              \
  case index:                                                            \
    if constexpr (Element<T>::kStorageBits == 16 || index < SK_MMA_BOTH) \
      return launch<Config<T, Y, __VA_ARGS__>>(p, stream);               \
    break;
    SK_MMA_CONFIGS(SK_CASE)
#undef SK_CASE
  }
  return unknown_config(kOp, kMmaConfigs, config);
}

}  // namespace sparsekern::mma

// splitk_sm90.cu: host side of the split kernel: the list of tiles, the launch.
#include "linear/splitk_sm90.cuh"

#include "linear/configs.h"
#include "core/tensor_map.h"

namespace sparsekern {
namespace {

constexpr const char* kOp = "sparsekern.linear (split)";

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
            cudaFuncSetAttribute(split::spmm_split_sm90_kernel<Cfg>,
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, Cfg::kSmemBytes));
  allowed[device] = true;
  return {};
}

// Fewer splits than kSplits where K has not as many column tiles.
template <class T, int kPanels, int kTokens, int kSplits>
Status launch(const LinearProblem& p, cudaStream_t stream) {
  using Cfg = split::Config<T, kPanels, kTokens, kSplits>;
  const tile64::Extent extent = tile64::Extent::of(p.out_features, p.in_features);
  if constexpr (kSplits > 1) {
    if (extent.k_tiles < kSplits) return launch<T, kPanels, kTokens, kSplits / 2>(p, stream);
  }
  CUtensorMap x_map;
  const int columns = tile64::ceil_div(p.tokens, kTokens);
  const int column_tokens = tile64::ceil_div(tile64::ceil_div(p.tokens, columns), 8) * 8;
  SK_RETURN_IF_ERROR(make_activation_map(kOp, x_map, p, column_tokens));
  split::Params<T> params = {};
  params.values = static_cast<const uint8_t*>(p.values);
  params.metadata = static_cast<const uint8_t*>(p.metadata);
  params.out = output_segment<T>(p);
  params.extent = extent;
  params.tokens = p.tokens;
  params.column_tokens = column_tokens;
  params.tile_rows = tile64::ceil_div(p.out_features, Cfg::kRows);
  params.only_round = p.activation == Activation::kNone && p.residual == nullptr &&
                      params.out.aligned && p.out_features % 8 == 0;
  const int64_t tiles = static_cast<int64_t>(params.tile_rows) * columns;
  SK_CHECK_REL(kOp, tiles * kSplits, <, int64_t{1} << 31, "Split the tokens.");
  SK_RETURN_IF_ERROR(allow_shared_memory<Cfg>());

  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(tiles * kSplits));
  config.blockDim = dim3(split::kThreads);
  config.dynamicSmemBytes = Cfg::kSmemBytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {kSplits, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  config.attrs = attributes;
  config.numAttrs = 2;
  (void)cudaLaunchKernelEx(&config, split::spmm_split_sm90_kernel<Cfg>, x_map, params);
  return launch_status(kOp, "spmm_split_sm90_kernel", config.gridDim, config.blockDim,
                       Cfg::kSmemBytes);
}

template <class T>
Status launch_config(const LinearProblem& p, int config, cudaStream_t stream) {
  switch (config) {
#define SK_CASE(index, panels, tokens, splits) \
  case index:                                  \
    return launch<T, panels, tokens, splits>(p, stream);
    SK_SPLIT_CONFIGS(SK_CASE)
#undef SK_CASE
  }
  return make_status(StatusKind::value, kOp, ": expected a config index below ", kSplitConfigs,
                     ", got ", config, ". See sparsekern._C.split_configs().");
}

}  // namespace

Status launch_split(const LinearProblem& p, int config, cudaStream_t stream) {
  if (p.tokens == 0) return {};
  return p.dtype == DType::kBFloat16 ? launch_config<__nv_bfloat16>(p, config, stream)
                                     : launch_config<__half>(p, config, stream);
}

}  // namespace sparsekern

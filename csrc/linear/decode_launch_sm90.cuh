// decode_launch_sm90.cuh: host side of the decode kernel: occupancy, launch, and the choice of
// the token tile. Templates over dtype and number of weights; spmm_decode*_sm90.cu instantiate
// them, so that they compile in parallel.
#pragma once
#include "linear/decode_sm90.cuh"

#include "linear/configs.h"
#include "core/tensor_map.h"

namespace sparsekern::decode {

constexpr const char* kOp = "sparsekern.linear (decode)";

inline cudaLaunchConfig_t launch_config(int ctas, int smem_bytes, cudaStream_t stream,
                                        cudaLaunchAttribute (&attributes)[2], int ranks) {
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(ranks), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(ctas);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return config;
}

// How many clusters the current device can hold at once; asked once per kernel and device.
template <class Cfg, int kRanks>
Status resident_clusters(int& count) {
  constexpr int kDevices = 64;
  static int cache[kDevices] = {};
  int device = 0;
  SK_CUDA(kOp, cudaGetDevice(&device));
  SK_CHECK_REL(kOp, device, <, kDevices, "Use a lower device index.");
  if (cache[device] == 0) {
    const auto kernel = spmm_decode_sm90_kernel<Cfg, kRanks>;
    SK_CUDA(kOp, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      Cfg::kSmemBytes));
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config =
        launch_config(kRanks * 1024, Cfg::kSmemBytes, nullptr, attributes, kRanks);
    config.numAttrs = 1;
    SK_CUDA(kOp, cudaOccupancyMaxActiveClusters(&cache[device], kernel, &config));
  }
  SK_CHECK_REL(kOp, cache[device], >, 0,
               "Use a GPU whose SMs hold a whole cluster (not a MIG slice).");
  count = cache[device];
  return {};
}

template <class Cfg, int kRanks>
Status launch(const LinearProblem& p, const void* up_values, const void* up_metadata,
              cudaStream_t stream) {
  CUtensorMap x_map;
  SK_RETURN_IF_ERROR(make_activation_map(kOp, x_map, p, Cfg::kTokens));
  Params<typename Cfg::T> params = {};
  params.values[0] = static_cast<const uint8_t*>(p.values);
  params.values[1] = static_cast<const uint8_t*>(up_values);
  params.metadata[0] = static_cast<const uint8_t*>(p.metadata);
  params.metadata[1] = static_cast<const uint8_t*>(up_metadata);
  params.out = output_segment<typename Cfg::T>(p);
  params.extent = tile64::Extent::of(p.out_features, p.in_features);
  params.row_blocks = tile64::ceil_div(params.extent.panels, Cfg::kPanels);
  params.tokens = p.tokens;
  int resident = 0;
  SK_RETURN_IF_ERROR((resident_clusters<Cfg, kRanks>(resident)));
  const bool persistent = kRanks == 1 && resident < params.row_blocks;
  const int clusters = persistent ? resident : params.row_blocks;
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config =
      launch_config(clusters * kRanks, Cfg::kSmemBytes, stream, attributes, kRanks);
  (void)cudaLaunchKernelEx(&config, spmm_decode_sm90_kernel<Cfg, kRanks>, x_map, params);
  return launch_status(kOp, "spmm_decode_sm90_kernel", config.gridDim, config.blockDim,
                       Cfg::kSmemBytes);
}

template <class T, int kTokenTiles, int kWeights>
Status launch_index(const LinearProblem& p, const void* up_values, const void* up_metadata,
                    int config, cudaStream_t stream) {
  switch (config) {
#define SK_CASE(index, panels, split)                                                         \
  case index:                                                                                 \
    return launch<Config<T, kTokenTiles, kWeights, panels>, split>(p, up_values, up_metadata, \
                                                                   stream);
    SK_DECODE_CONFIGS(SK_CASE)
#undef SK_CASE
  }
  return make_status(StatusKind::value, kOp, ": expected config 0 (automatic) to ", kDecodeConfigs,
                     ", got ", config, ". See sparsekern._C.decode_configs().");
}

template <class T, int kWeights>
Status launch_for_tokens(const LinearProblem& p, const void* up_values, const void* up_metadata,
                         int config, cudaStream_t stream) {
  constexpr int kMaxTokens = kWeights == 1 ? 64 : 32;
  SK_CHECK_REL(kOp, p.tokens, <=, kMaxTokens, "Use the prefill kernel.");
  if (p.tokens == 0) return {};
  if (p.tokens <= 8) return launch_index<T, 1, kWeights>(p, up_values, up_metadata, config, stream);
  if (p.tokens <= 16)
    return launch_index<T, 2, kWeights>(p, up_values, up_metadata, config, stream);
  if (p.tokens <= 32)
    return launch_index<T, 4, kWeights>(p, up_values, up_metadata, config, stream);
  if constexpr (kWeights == 1)
    return launch_index<T, 8, 1>(p, up_values, up_metadata, config, stream);
  return {};
}

}  // namespace sparsekern::decode

// spmm_decode_sm90.cu: host side of the decode kernel: choose the token tile and the split of K, launch.
#include "spmm_decode_sm90.cuh"

#include "../tensor_map.h"

namespace sparsekern {
namespace {

constexpr const char* kOp = "sparsekern.linear (decode)";

cudaLaunchConfig_t launch_config(int ctas, int smem_bytes, cudaStream_t stream, cudaLaunchAttribute (&attributes)[2],
                                 int ranks) {
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(ranks), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(ctas);
  config.blockDim = dim3(decode::kThreads);
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
    const auto kernel = decode::spmm_decode_sm90_kernel<Cfg, kRanks>;
    SK_CUDA(kOp, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Cfg::kSmemBytes));
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = launch_config(kRanks * 1024, Cfg::kSmemBytes, nullptr, attributes, kRanks);
    config.numAttrs = 1;
    SK_CUDA(kOp, cudaOccupancyMaxActiveClusters(&cache[device], kernel, &config));
  }
  count = cache[device];
  return {};
}

template <class Cfg, int kRanks>
Status launch(const LinearProblem& p, const void* up_values, const void* up_metadata, cudaStream_t stream) {
  CUtensorMap x_map;
  SK_RETURN_IF_ERROR(make_activation_map(kOp, x_map, p, Cfg::kTokens));
  decode::Params<typename Cfg::T> params = {};
  params.values[0] = static_cast<const uint8_t*>(p.values);
  params.values[1] = static_cast<const uint8_t*>(up_values);
  params.metadata[0] = static_cast<const uint8_t*>(p.metadata);
  params.metadata[1] = static_cast<const uint8_t*>(up_metadata);
  params.out = output_segment<typename Cfg::T>(p);
  params.extent = tile64::Extent::of(p.out_features, p.in_features);
  params.tokens = p.tokens;
  int resident = 0;
  SK_RETURN_IF_ERROR((resident_clusters<Cfg, kRanks>(resident)));
  const bool persistent = kRanks == 1 && resident < params.extent.superpanels;
  const int clusters = persistent ? resident : params.extent.superpanels;
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config =
      launch_config(clusters * kRanks, Cfg::kSmemBytes, stream, attributes, kRanks);
  (void)cudaLaunchKernelEx(&config, decode::spmm_decode_sm90_kernel<Cfg, kRanks>, x_map, params);
  return launch_status(kOp, "spmm_decode_sm90_kernel", config.gridDim, config.blockDim, Cfg::kSmemBytes);
}

// Enough CTAs to keep the memory busy (more tokens: also the tensor cores), and no more: each split adds a reduction.
// Measured: NOTES.md, decode.
int choose_split(const tile64::Extent& extent, int tokens) {
  constexpr int kEnough = 32, kMost = 96;
  if (tokens <= 16 && extent.superpanels >= kEnough) return 1;
  int split = 1;
  while (split < 8 && extent.superpanels * split * 2 <= kMost && extent.k_tiles >= 4 * split) split *= 2;
  return split;
}

template <class Cfg>
Status launch_split(const LinearProblem& p, const void* up_values, const void* up_metadata, int split,
                    cudaStream_t stream) {
  if (split == 0) split = choose_split(tile64::Extent::of(p.out_features, p.in_features), p.tokens);
  switch (split) {
    case 1: return launch<Cfg, 1>(p, up_values, up_metadata, stream);
    case 2: return launch<Cfg, 2>(p, up_values, up_metadata, stream);
    case 4: return launch<Cfg, 4>(p, up_values, up_metadata, stream);
    case 8: return launch<Cfg, 8>(p, up_values, up_metadata, stream);
  }
  return make_status(StatusKind::value, kOp, ": expected split in 0 (automatic), 1, 2, 4, 8, got ", split,
                     ". Pass 0.");
}

template <class T, int kWeights>
Status launch_for_tokens(const LinearProblem& p, const void* up_values, const void* up_metadata,
                         int split, cudaStream_t stream) {
  constexpr int kMaxTokens = kWeights == 1 ? 64 : 32;
  SK_CHECK_REL(kOp, p.tokens, <=, kMaxTokens, "Use the prefill kernel.");
  if (p.tokens == 0) return {};
  if (p.tokens <= 8)
    return launch_split<decode::Config<T, 1, kWeights>>(p, up_values, up_metadata, split, stream);
  if (p.tokens <= 16)
    return launch_split<decode::Config<T, 2, kWeights>>(p, up_values, up_metadata, split, stream);
  if (p.tokens <= 32)
    return launch_split<decode::Config<T, 4, kWeights>>(p, up_values, up_metadata, split, stream);
  if constexpr (kWeights == 1)
    return launch_split<decode::Config<T, 8, kWeights>>(p, up_values, up_metadata, split, stream);
  return {};
}

}  // namespace

Status launch_decode(const LinearProblem& p, int split, cudaStream_t stream) {
  return p.dtype == DType::kBFloat16
             ? launch_for_tokens<__nv_bfloat16, 1>(p, nullptr, nullptr, split, stream)
             : launch_for_tokens<__half, 1>(p, nullptr, nullptr, split, stream);
}

Status launch_decode_gated(const GatedProblem& g, int split, cudaStream_t stream) {
  return g.gate.dtype == DType::kBFloat16
             ? launch_for_tokens<__nv_bfloat16, 2>(g.gate, g.up_values, g.up_metadata, split, stream)
             : launch_for_tokens<__half, 2>(g.gate, g.up_values, g.up_metadata, split, stream);
}

}  // namespace sparsekern

// decode_launch_sm90.cuh: host side of the decode kernel: its launch, and the choice of the token
// tile. Templates over the element types and the number of weights, which linear/instantiate
// compiles in parallel.
#pragma once
#include "core/device.h"
#include "core/tensor_map.h"
#include "linear/configs.h"
#include "linear/decode_sm90.cuh"
#include "linear/launch.h"

namespace sparsekern::decode {

constexpr const char* kOp = "sparsekern.linear (decode)";

// The rows of the table that a weight of so many bits has.
constexpr int configs_of(int storage_bits) {
  return storage_bits == 16 ? kDecodeConfigs.rows : SK_DECODE_NARROW;
}

// kSplit: the kernel's, or 0 where it has all. Half of it where the GPU has no room for so large a
// cluster.
template <class Cfg, int kSplit>
Status launch(const LinearProblem& p, int split, cudaStream_t stream) {
  static KernelStates states;
  const DeviceKernel kernel(kOp, "spmm_decode_sm90_kernel", spmm_decode_sm90_kernel<Cfg, kSplit>,
                            states);
  const LaunchShape shape = {Cfg::kThreads, Cfg::kSmemBytes, split, !p.weight_is_new};
  if constexpr (kSplit > kPortableCluster) {
    int clusters = 0;
    SK_RETURN_IF_ERROR(kernel.clusters_that_fit(shape, clusters));
    if (clusters == 0) return launch<Cfg, kSplit / 2>(p, split / 2, stream);
  }
  CUtensorMap x_map;
  SK_RETURN_IF_ERROR(make_activation_map(kOp, x_map, p, Cfg::kTokens));
  Params<Cfg> params = make_params<Cfg>(p);
  params.ranks = split;
  int resident = 0;
  SK_RETURN_IF_ERROR(kernel.resident_clusters(shape, resident));
  const bool persistent = split == 1 && resident < params.row_blocks;
  const int clusters = persistent ? resident : params.row_blocks;
  return kernel.launch(shape, int64_t{clusters} * split, stream, x_map, params);
}

template <class Cfg, int kSplit>
Status launch_split(const LinearProblem& p, cudaStream_t stream) {
  return launch<Cfg, kLaunchedSplit<Cfg> ? 0 : kSplit>(p, kSplit, stream);
}

template <class W, class X, class Y, int kTokenTiles, int kWeights, int kScaleGroup>
Status launch_config(const LinearProblem& p, int config, cudaStream_t stream) {
  constexpr int kConfigs = kWeights == 2 ? SK_DECODE_GATED : configs_of(Element<W>::kStorageBits);
  constexpr bool kFewTokens = kTokenTiles * 8 <= kPairedTokens;
  switch (config) {
#define SK_CASE(index, panels, split, paired)                                         \
  case index:                                                                         \
    if constexpr (index < kConfigs)                                                   \
      return launch_split<Config<W, X, Y, kTokenTiles, kWeights, panels, kScaleGroup, \
                                 kFewTokens ? paired : kAlone>,                       \
                          split>(p, stream);                                          \
    break;
    SK_DECODE_CONFIGS(SK_CASE)
#undef SK_CASE
  }
  return unknown_config(kOp, kDecodeConfigs, config);
}

template <class W, class X, class Y, int kWeights, int kScaleGroup = 0>
Status launch_for_tokens(const LinearProblem& p, int config, cudaStream_t stream) {
  constexpr int kMaxTokens = kWeights == 1 ? 64 : 32;
  SK_CHECK_REL(kOp, p.tokens, <=, kMaxTokens, "Use the prefill kernel.");
  if (p.tokens == 0) return {};
  if (p.tokens <= 8) return launch_config<W, X, Y, 1, kWeights, kScaleGroup>(p, config, stream);
  if (p.tokens <= 16) return launch_config<W, X, Y, 2, kWeights, kScaleGroup>(p, config, stream);
  if (p.tokens <= 32) return launch_config<W, X, Y, 4, kWeights, kScaleGroup>(p, config, stream);
  if constexpr (kWeights == 1) return launch_config<W, X, Y, 8, 1, kScaleGroup>(p, config, stream);
  return {};
}

template <class W, class X, class Y>
Status linear(const LinearProblem& p, int config, cudaStream_t stream) {
  if constexpr (std::is_same_v<W, Int4>) {
    if (p.scale_group == 64) return launch_for_tokens<W, X, Y, 1, 64>(p, config, stream);
    if (p.scale_group == 128) return launch_for_tokens<W, X, Y, 1, 128>(p, config, stream);
  }
  return launch_for_tokens<W, X, Y, 1>(p, config, stream);
}

template <class W, class X, class Y>
Status gated(const LinearProblem& p, int config, cudaStream_t stream) {
  return launch_for_tokens<W, X, Y, 2>(p, config, stream);
}

}  // namespace sparsekern::decode

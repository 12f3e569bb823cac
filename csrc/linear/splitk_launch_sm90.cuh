// splitk_launch_sm90.cuh: host side of the split kernel: its launch. Templates over the element
// type, which linear/instantiate compiles in parallel.
#pragma once
#include "core/device.h"
#include "core/tensor_map.h"
#include "linear/configs.h"
#include "linear/launch.h"
#include "linear/splitk_sm90.cuh"

namespace sparsekern::split {

constexpr const char* kOp = "sparsekern.linear (split)";

// Fewer splits than kSplits where K has not as many column tiles, or the GPU no room for so large a
// cluster.
template <class T, class Y, int kPanels, int kTokens, int kSplits>
Status launch(const LinearProblem& p, cudaStream_t stream) {
  using Cfg = Config<T, Y, kPanels, kTokens, kSplits>;
  const auto extent = tile64::Extent::of<typename Cfg::Tile>(p.out_features, p.in_features);
  if constexpr (kSplits > 1) {
    if (extent.k_tiles < kSplits) return launch<T, Y, kPanels, kTokens, kSplits / 2>(p, stream);
  }
  static KernelStates states;
  const DeviceKernel kernel(kOp, "spmm_split_sm90_kernel", spmm_split_sm90_kernel<Cfg>, states);
  LaunchShape shape = {kThreads, Cfg::kSmemBytes, kSplits};
  if constexpr (kSplits > kPortableCluster) {
    int clusters = 0;
    SK_RETURN_IF_ERROR(kernel.clusters_that_fit(shape, clusters));
    if (clusters == 0) return launch<T, Y, kPanels, kTokens, kSplits / 2>(p, stream);
  }
  CUtensorMap x_map;
  const int columns = tile64::ceil_div(p.tokens, kTokens);
  const int column_tokens = tile64::ceil_div(tile64::ceil_div(p.tokens, columns), 8) * 8;
  SK_RETURN_IF_ERROR(make_activation_map(kOp, x_map, p, column_tokens));
  Params<typename Cfg::Output> params = {};
  params.values = static_cast<const uint8_t*>(p.weight.values);
  params.metadata = static_cast<const uint8_t*>(p.weight.metadata);
  params.out = make_epilogue<Y, Cfg::kScaled>(p);
  params.extent = extent;
  params.tokens = p.tokens;
  params.column_tokens = column_tokens;
  params.tile_rows = tile64::ceil_div(p.out_features, Cfg::kRows);
  params.only_round = only_adds_bias(params.out);
  params.whole_pieces = params.out.aligned && p.out_features % 8 == 0;
  const int64_t tiles = static_cast<int64_t>(params.tile_rows) * columns;
  SK_CHECK_REL(kOp, tiles * kSplits, <, int64_t{1} << 31, "Split the tokens.");
  SK_RETURN_IF_ERROR(kernel.prepare(shape.smem_bytes, shape.dependent));
  shape.dependent &= !p.weight_is_new;
  return kernel.launch(shape, tiles * kSplits, stream, x_map, params);
}

template <class T, class X, class Y>
Status linear(const LinearProblem& p, int config, cudaStream_t stream) {
  static_assert(std::is_same_v<T, X>);
  if (p.tokens == 0) return {};
  switch (config) {
#define SK_CASE(index, panels, tokens, splits)                             \
  case index:                                                              \
    if constexpr (Element<T>::kStorageBits == 16 || index < SK_SPLIT_BOTH) \
      return launch<T, Y, panels, tokens, splits>(p, stream);              \
    break;
    SK_SPLIT_CONFIGS(SK_CASE)
#undef SK_CASE
  }
  return unknown_config(kOp, kSplitConfigs, config);
}

}  // namespace sparsekern::split

// splitk_launch_sm90.cuh: host side of the split kernel: its launch. Templates over the element
// type, which linear/instantiate compiles in parallel.
#pragma once
#include "core/device.h"
#include "core/tensor_map.h"
#include "linear/configs.h"
#include "linear/launch.h"
#include "linear/splitk_sm90.cuh"
#include "linear/workspace.h"

namespace sparsekern::split {

constexpr const char* kOp = "sparsekern.linear (split)";

// How many columns of tiles: as few as tokens of a tile allow. Where one row of tiles has all of the
// weight and x is larger, as many as run at once, down to half as wide.
inline int choose_columns(int tokens, int most_tokens, int out_features, int rows, int resident) {
  const int fewest = tile64::ceil_div(tokens, most_tokens);
  if (out_features > rows || out_features >= tokens || resident <= fewest) return fewest;
  const int most = tile64::ceil_div(tokens, most_tokens / 2);
  return resident < most ? resident : most;
}

// How many clusters share each tile: as many as are resident, as long as each thread block keeps a
// few column tiles.
inline int choose_clusters(int64_t tiles, int resident, int k_tiles, int splits) {
  constexpr int kFewestTiles = 4, kMost = 16;
  int64_t clusters = tiles > 0 ? resident / tiles : 0;
  clusters = clusters < kMost ? clusters : kMost;
  const int most = k_tiles / (splits * kFewestTiles);
  return static_cast<int>(clusters < most ? clusters : most);
}

// Fewer splits than kSplits where K has not as many column tiles, or the GPU no room for so large a
// cluster. Where no two clusters would share a tile, or without a workspace, the kernel that never
// does.
template <class T, class Y, int kPanels, int kTokens, int kSplits, bool kAcross>
Status launch(const LinearProblem& p, cudaStream_t stream) {
  using Cfg = Config<T, Y, kPanels, kTokens, kSplits, kAcross>;
  const auto extent = tile64::Extent::of<typename Cfg::Tile>(p.out_features, p.in_features);
  if constexpr (kSplits > 1) {
    if (extent.k_tiles < kSplits)
      return launch<T, Y, kPanels, kTokens, kSplits / 2, false>(p, stream);
  }
  static KernelStates states;
  const DeviceKernel kernel(kOp, "spmm_split_sm90_kernel", spmm_split_sm90_kernel<Cfg>, states);
  LaunchShape shape = {kThreads, Cfg::kSmemBytes, kSplits};
  int resident = 0;
  SK_RETURN_IF_ERROR(kernel.clusters_that_fit(shape, resident));
  if constexpr (kSplits > kPortableCluster) {
    if (resident == 0) return launch<T, Y, kPanels, kTokens, kSplits / 2, false>(p, stream);
  }
  CUtensorMap x_map;
  const int tile_rows = tile64::ceil_div(p.out_features, Cfg::kRows);
  int columns =
      choose_columns(p.tokens, kTokens, p.out_features, Cfg::kRows, kAcross ? 0 : resident);
  const int column_tokens = tile64::ceil_div(tile64::ceil_div(p.tokens, columns), 8) * 8;
  columns = tile64::ceil_div(p.tokens, column_tokens);
  SK_RETURN_IF_ERROR(make_activation_map(kOp, x_map, p, column_tokens));
  Params<typename Cfg::Output> params = {};
  params.values = static_cast<const uint8_t*>(p.weight.values);
  params.metadata = static_cast<const uint8_t*>(p.weight.metadata);
  params.out = make_epilogue<Y, Cfg::kScaled>(p);
  params.extent = extent;
  params.tokens = p.tokens;
  params.column_tokens = column_tokens;
  params.tile_rows = tile_rows;
  params.x_hint = prefill::x_hint(tile_rows);
  params.only_round = only_adds_bias(params.out);
  params.whole_pieces = params.out.aligned && p.out_features % 8 == 0;
  const int64_t tiles = static_cast<int64_t>(tile_rows) * columns;
  SK_CHECK_REL(kOp, tiles * kSplits, <, int64_t{1} << 31, "Split the tokens.");
  int64_t clusters = tiles;
  if constexpr (kAcross) {
    // An SM holds one thread block, and those of all clusters are resident: no more than there are
    // SMs, each with the sums of at most one tile and at most a counter per consumer, which a
    // workspace has memory for.
    static_assert(2 * Cfg::kSmemBytes > prefill::kSmemCapacity);
    static_assert(Cfg::kSumBytes <= kPrefillTileBytes);
    params.clusters = choose_clusters(tiles, p.workspace ? resident : 0, extent.k_tiles, kSplits);
    if (params.clusters < 2) return launch<T, Y, kPanels, kTokens, kSplits, false>(p, stream);
    params.counters = static_cast<uint32_t*>(p.workspace);
    params.partials =
        reinterpret_cast<float4*>(static_cast<uint8_t*>(p.workspace) + kPrefillCounterBytes);
    clusters *= params.clusters;
  }
  SK_RETURN_IF_ERROR(kernel.prepare(shape.smem_bytes, shape.dependent));
  shape.dependent &= !p.weight_is_new;
  return kernel.launch(shape, clusters * kSplits, stream, x_map, params);
}

template <class T, class X, class Y>
Status linear(const LinearProblem& p, int config, cudaStream_t stream) {
  static_assert(std::is_same_v<T, X>);
  if (p.tokens == 0) return {};
  switch (config) {
#define SK_CASE(index, panels, tokens, splits, across)                     \
  case index:                                                              \
    if constexpr (Element<T>::kStorageBits == 16 || index < SK_SPLIT_BOTH) \
      return launch<T, Y, panels, tokens, splits, across>(p, stream);      \
    break;
    SK_SPLIT_CONFIGS(SK_CASE)
#undef SK_CASE
  }
  return unknown_config(kOp, kSplitConfigs, config);
}

}  // namespace sparsekern::split

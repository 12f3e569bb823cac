// prefill_launch_sm90.cuh: host side of the prefill kernel: the cut of the last wave and the
// launch. Templates over the element type, which linear/instantiate compiles in parallel.
#pragma once
#include "core/device.h"
#include "core/tensor_map.h"
#include "linear/configs.h"
#include "linear/launch.h"
#include "linear/prefill_sm90.cuh"
#include "linear/workspace.h"

namespace sparsekern::prefill {

constexpr const char* kOp = "sparsekern.linear (prefill)";

// Into how many parts of K to cut each tile of the last wave: as many as there are clusters for, as
// long as each part keeps a few column tiles and every CTA of the tile has a token block to finish.
inline int choose_splits(int rest, int resident, int k_tiles, int token_blocks) {
  constexpr int kFewestTiles = 4;
  int splits = rest == 0 ? 1 : resident / rest;
  splits = splits < token_blocks ? splits : token_blocks;
  splits = splits < k_tiles / kFewestTiles ? splits : k_tiles / kFewestTiles;
  return splits < 1 ? 1 : splits;
}

// The column tiles of all tiles of the last wave, when streaming them gives every cluster a few; 0
// when there is nothing to share out, or so much that products of it would not fit 32 bits.
inline int choose_stream(int rest, int resident, int k_tiles) {
  constexpr int kFewestTiles = 4;
  const int64_t units = static_cast<int64_t>(rest) * k_tiles;
  const bool fits = (units + 1) * (resident + 1) < int64_t{1} << 31;
  return fits && units >= static_cast<int64_t>(kFewestTiles) * resident ? static_cast<int>(units)
                                                                        : 0;
}

template <class T, class Y, int kPanels, int kTokens, bool kStreamed, bool kPromoted>
Status launch(const LinearProblem& p, ClusterShape cluster, cudaStream_t stream) {
  using Cfg = Config<T, Y, kPanels, kTokens, kStreamed, kPromoted>;
  static_assert(Cfg::kRows * kTokens * sizeof(float) <= kPrefillTileBytes);
  static_assert(kTokens % 16 == 0);
  static KernelStates states;
  // As many clusters as can be resident, which take the tiles in turn.
  const DeviceKernel kernel(kOp, "spmm_prefill_sm90_kernel", spmm_prefill_sm90_kernel<Cfg>, states);
  LaunchShape shape = {kThreads, Cfg::kSmemBytes, cluster.m * cluster.n, !p.weight_is_new};
  void* const workspace = p.workspace;
  CUtensorMap x_map;
  SK_RETURN_IF_ERROR(make_activation_map(kOp, x_map, p, kTokens / cluster.m));
  CUtensorMap y_map = x_map;
  Params<typename Cfg::Output> params = {};
  params.values = static_cast<const uint8_t*>(p.weight.values);
  params.metadata = static_cast<const uint8_t*>(p.weight.metadata);
  params.out = make_epilogue<Y, Cfg::kScaled>(p);
  params.only_round = only_adds_bias(params.out);
  params.whole_boxes = params.only_round && params.out.aligned;
  if (params.whole_boxes) SK_RETURN_IF_ERROR(make_output_map(kOp, y_map, p, kBlockTokens));
  params.extent = tile64::Extent::of<typename Cfg::Tile>(p.out_features, p.in_features);
  params.tokens = p.tokens;
  params.cluster = cluster;
  params.tile_rows = tile64::ceil_div(p.out_features, Cfg::kRows * cluster.m);
  params.tile_columns = tile64::ceil_div(p.tokens, kTokens * cluster.n);
  params.group_m = 8 / cluster.m;
  params.x_hint = x_hint(params.tile_rows);
  for (int n = 0; n < cluster.n; ++n) params.row_mask |= 1u << (n * cluster.m);

  int resident = 0;
  SK_RETURN_IF_ERROR(kernel.resident_clusters(shape, resident));
  const int64_t tiles = static_cast<int64_t>(params.tile_rows) * params.tile_columns;
  SK_CHECK_REL(kOp, tiles, <, int64_t{1} << 31, "Split the tokens.");
  const int rest = static_cast<int>(tiles % resident);
  int64_t rest_items = 0;
  if constexpr (kStreamed) {
    params.stream_units = workspace ? choose_stream(rest, resident, params.extent.k_tiles) : 0;
    if (params.stream_units == 0)
      return launch<T, Y, kPanels, kTokens, false, kPromoted>(p, cluster, stream);
    params.splits = 1;
    rest_items = int64_t{2} * resident;
  } else {
    params.splits =
        workspace ? choose_splits(rest, resident, params.extent.k_tiles, Cfg::kBlocks) : 1;
    if (params.splits > 1) rest_items = int64_t{rest} * params.splits;
  }
  const bool shared = rest_items > 0;
  params.whole_tiles = static_cast<int>(tiles) - (shared ? rest : 0);
  const int64_t items = params.whole_tiles + rest_items;
  params.clusters = items < resident ? static_cast<int>(items) : resident;
  params.counters = static_cast<uint32_t*>(workspace);
  params.partials =
      reinterpret_cast<float4*>(static_cast<uint8_t*>(workspace) + kPrefillCounterBytes);

  // Clusters that wait for each other must all be resident, whatever else runs on the GPU.
  shape.cooperative = shared;
  return kernel.launch(shape, int64_t{params.clusters} * shape.cluster, stream, x_map, y_map,
                       params);
}

template <class T, class X, class Y>
Status linear(const LinearProblem& p, int config, cudaStream_t stream) {
  static_assert(std::is_same_v<T, X>);
  if (p.tokens == 0) return {};
  switch (config) {
#define SK_CASE(index, panels, tokens, cluster_m, cluster_n, streamed, promoted)                  \
  case index:                                                                                     \
    if constexpr (!promoted || Element<T>::kPromotes)                                             \
      return launch<T, Y, panels, tokens, streamed, promoted>(p, {cluster_m, cluster_n}, stream); \
    break;
    SK_PREFILL_CONFIGS(SK_CASE)
#undef SK_CASE
  }
  return unknown_config(kOp, kPrefillConfigs, config);
}

}  // namespace sparsekern::prefill

// prefill_launch_sm90.cuh: host side of the prefill kernel: occupancy, the cut of the last
// wave, the launch, the list of tiles. Templates over the dtype; spmm_prefill*_sm90.cu instantiate
// them, so that they compile in parallel.
#pragma once
#include "linear/prefill_sm90.cuh"

#include "linear/configs.h"
#include "core/tensor_map.h"

namespace sparsekern::prefill {

constexpr const char* kOp = "sparsekern.linear (prefill)";

// Persistent grid: as many clusters as can be resident, asked once per kernel, cluster size and
// device.
template <class Cfg>
Status resident_clusters(int cluster_ctas, int& count) {
  constexpr int kDevices = 64, kSizes = 9;  // clusters of up to 8
  static int cache[kDevices][kSizes] = {};
  int device = 0;
  SK_CUDA(kOp, cudaGetDevice(&device));
  SK_CHECK_REL(kOp, device, <, kDevices, "Use a lower device index.");
  SK_CHECK_REL(kOp, cluster_ctas, <, kSizes, "Use a smaller cluster.");
  int& cached = cache[device][cluster_ctas];
  if (cached == 0) {
    const auto kernel = spmm_prefill_sm90_kernel<Cfg>;
    SK_CUDA(kOp, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      Cfg::kSmemBytes));
    cudaLaunchConfig_t launch = {};
    launch.gridDim = dim3(cluster_ctas * 1024);
    launch.blockDim = dim3(kThreads);
    launch.dynamicSmemBytes = Cfg::kSmemBytes;
    cudaLaunchAttribute attribute[1];
    attribute[0].id = cudaLaunchAttributeClusterDimension;
    attribute[0].val.clusterDim = {static_cast<unsigned>(cluster_ctas), 1, 1};
    launch.attrs = attribute;
    launch.numAttrs = 1;
    SK_CUDA(kOp, cudaOccupancyMaxActiveClusters(&cached, kernel, &launch));
  }
  SK_CHECK_REL(kOp, cached, >, 0, "Use a GPU whose SMs hold a whole cluster (not a MIG slice).");
  count = cached;
  return {};
}

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

// The workspace: counters, then the partial sums of at most one tile per SM. The largest tile of
// configs.h has 256 rows and 7 blocks of 32 tokens.
constexpr size_t kTileBytes = 256 * 224 * sizeof(float);

template <class T, int kPanels, int kTokens, bool kStreamed>
Status launch(const LinearProblem& p, ClusterShape cluster, void* workspace, cudaStream_t stream) {
  using Cfg = Config<T, kPanels, kTokens, kStreamed>;
  static_assert(Cfg::kRows * kTokens * sizeof(float) <= kTileBytes);
  static_assert(kTokens % 16 == 0);
  CUtensorMap x_map;
  SK_RETURN_IF_ERROR(make_activation_map(kOp, x_map, p, kTokens / cluster.m));
  CUtensorMap y_map = x_map;
  Params<T> params = {};
  params.values = static_cast<const uint8_t*>(p.values);
  params.metadata = static_cast<const uint8_t*>(p.metadata);
  params.out = output_segment<T>(p);
  params.whole_boxes =
      p.activation == Activation::kNone && p.residual == nullptr && params.out.aligned;
  if (params.whole_boxes) SK_RETURN_IF_ERROR(make_output_map(kOp, y_map, p, kBlockTokens));
  params.extent = tile64::Extent::of(p.out_features, p.in_features);
  params.tokens = p.tokens;
  params.cluster = cluster;
  params.tile_rows = tile64::ceil_div(p.out_features, Cfg::kRows * cluster.m);
  params.tile_columns = tile64::ceil_div(p.tokens, kTokens * cluster.n);
  params.group_m = 8 / cluster.m;
  for (int n = 0; n < cluster.n; ++n) params.row_mask |= 1u << (n * cluster.m);

  const int cluster_ctas = cluster.m * cluster.n;
  int resident = 0;
  SK_RETURN_IF_ERROR(resident_clusters<Cfg>(cluster_ctas, resident));
  const int64_t tiles = static_cast<int64_t>(params.tile_rows) * params.tile_columns;
  SK_CHECK_REL(kOp, tiles, <, int64_t{1} << 31, "Split the tokens.");
  const int rest = static_cast<int>(tiles % resident);
  int64_t rest_items = 0;
  if constexpr (kStreamed) {
    params.stream_units = workspace ? choose_stream(rest, resident, params.extent.k_tiles) : 0;
    if (params.stream_units == 0)
      return launch<T, kPanels, kTokens, false>(p, cluster, workspace, stream);
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

  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(params.clusters * cluster_ctas);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = Cfg::kSmemBytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[3];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(cluster_ctas), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  // Clusters that wait for each other must all be resident, whatever else runs on the GPU.
  attributes[2].id = cudaLaunchAttributeCooperative;
  attributes[2].val.cooperative = 1;
  config.attrs = attributes;
  config.numAttrs = shared ? 3 : 2;
  (void)cudaLaunchKernelEx(&config, spmm_prefill_sm90_kernel<Cfg>, x_map, y_map, params);
  return launch_status(kOp, "spmm_prefill_sm90_kernel", config.gridDim, config.blockDim,
                       Cfg::kSmemBytes);
}

template <class T>
Status launch_config(const LinearProblem& p, int config, void* workspace, cudaStream_t stream) {
  switch (config) {
#define SK_CASE(index, panels, tokens, cluster_m, cluster_n, streamed) \
  case index:                                                          \
    return launch<T, panels, tokens, streamed>(p, {cluster_m, cluster_n}, workspace, stream);
    SK_PREFILL_CONFIGS(SK_CASE)
#undef SK_CASE
  }
  return make_status(StatusKind::value, kOp, ": expected a config index below ", kPrefillConfigs,
                     ", got ", config, ". See sparsekern._C.prefill_configs().");
}

}  // namespace sparsekern::prefill

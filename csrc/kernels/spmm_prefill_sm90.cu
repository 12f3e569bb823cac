// spmm_prefill_sm90.cu: host side of the prefill kernel: the list of tiles, the choice among them, the launch.
#include "spmm_prefill_sm90.cuh"

#include "../configs.h"
#include "../tensor_map.h"

namespace sparsekern {
namespace {

constexpr const char* kOp = "sparsekern.linear (prefill)";

// Persistent grid: as many clusters as can be resident, asked once per kernel, cluster size and device.
template <class Cfg>
Status resident_clusters(int cluster_ctas, int& count) {
  constexpr int kDevices = 64, kSizes = 5;
  static int cache[kDevices][kSizes] = {};
  int device = 0;
  SK_CUDA(kOp, cudaGetDevice(&device));
  SK_CHECK_REL(kOp, device, <, kDevices, "Use a lower device index.");
  SK_CHECK_REL(kOp, cluster_ctas, <, kSizes, "Use a smaller cluster.");
  int& cached = cache[device][cluster_ctas];
  if (cached == 0) {
    const auto kernel = prefill::spmm_prefill_sm90_kernel<Cfg>;
    SK_CUDA(kOp, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Cfg::kSmemBytes));
    cudaLaunchConfig_t launch = {};
    launch.gridDim = dim3(cluster_ctas * 1024);
    launch.blockDim = dim3(prefill::kThreads);
    launch.dynamicSmemBytes = Cfg::kSmemBytes;
    cudaLaunchAttribute attribute[1];
    attribute[0].id = cudaLaunchAttributeClusterDimension;
    attribute[0].val.clusterDim = {static_cast<unsigned>(cluster_ctas), 1, 1};
    launch.attrs = attribute;
    launch.numAttrs = 1;
    SK_CUDA(kOp, cudaOccupancyMaxActiveClusters(&cached, kernel, &launch));
  }
  count = cached;
  return {};
}

template <class T, int kPanels, int kTokens>
Status launch(const LinearProblem& p, prefill::ClusterShape cluster, cudaStream_t stream) {
  using Cfg = prefill::Config<T, kPanels, kTokens>;
  CUtensorMap x_map;
  SK_RETURN_IF_ERROR(make_activation_map(kOp, x_map, p, kTokens / cluster.m));
  prefill::Params<T> params = {};
  params.values = static_cast<const uint8_t*>(p.values);
  params.metadata = static_cast<const uint8_t*>(p.metadata);
  params.out = output_segment<T>(p);
  params.extent = tile64::Extent::of(p.out_features, p.in_features);
  params.tokens = p.tokens;
  params.cluster = cluster;
  params.tile_rows = tile64::ceil_div(p.out_features, Cfg::kRows * cluster.m);
  params.tile_columns = tile64::ceil_div(p.tokens, kTokens * cluster.n);
  params.group_m = 8 / cluster.m;

  const int cluster_ctas = cluster.m * cluster.n;
  int resident = 0;
  SK_RETURN_IF_ERROR(resident_clusters<Cfg>(cluster_ctas, resident));
  const int64_t tiles = static_cast<int64_t>(params.tile_rows) * params.tile_columns;
  SK_CHECK_REL(kOp, tiles, <, int64_t{1} << 31, "Split the tokens.");
  params.clusters = tiles < resident ? static_cast<int>(tiles) : resident;

  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(params.clusters * cluster_ctas);
  config.blockDim = dim3(prefill::kThreads);
  config.dynamicSmemBytes = Cfg::kSmemBytes;
  config.stream = stream;
  cudaLaunchAttribute attribute[1];
  attribute[0].id = cudaLaunchAttributeClusterDimension;
  attribute[0].val.clusterDim = {static_cast<unsigned>(cluster_ctas), 1, 1};
  config.attrs = attribute;
  config.numAttrs = 1;
  (void)cudaLaunchKernelEx(&config, prefill::spmm_prefill_sm90_kernel<Cfg>, x_map, params);
  return launch_status(kOp, "spmm_prefill_sm90_kernel", config.gridDim, config.blockDim, Cfg::kSmemBytes);
}

template <class T>
Status launch_config(const LinearProblem& p, int config, cudaStream_t stream) {
  switch (config) {
#define SK_CASE(index, panels, tokens, cluster_m, cluster_n) \
  case index: return launch<T, panels, tokens>(p, {cluster_m, cluster_n}, stream);
    SK_PREFILL_CONFIGS(SK_CASE)
#undef SK_CASE
  }
  return make_status(StatusKind::value, kOp, ": expected a config index below ", kPrefillConfigs, ", got ", config,
                     ". See sparsekern._C.prefill_configs().");
}

}  // namespace

Status launch_prefill(const LinearProblem& p, int config, cudaStream_t stream) {
  if (p.tokens == 0) return {};
  return p.dtype == DType::kBFloat16 ? launch_config<__nv_bfloat16>(p, config, stream)
                                     : launch_config<__half>(p, config, stream);
}

}  // namespace sparsekern

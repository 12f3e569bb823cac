// narrow_launch_sm90.cuh: host side of the narrow kernel: its launch. Templates over the element
// type, which linear/instantiate compiles in parallel.
#pragma once
#include "core/device.h"
#include "core/tensor_map.h"
#include "linear/configs.h"
#include "linear/launch.h"
#include "linear/narrow_sm90.cuh"

namespace sparsekern::narrow {

constexpr const char* kOp = "sparsekern.linear (narrow)";

// What the kernel is told, and how many clusters there are.
template <class Cfg>
Params<typename Cfg::X> make_params(const LinearProblem& p, int cluster_rows, int parts,
                                    int64_t& clusters) {
  Params<typename Cfg::X> params = {};
  params.values = static_cast<const uint8_t*>(p.weight.values);
  params.metadata = static_cast<const uint8_t*>(p.weight.metadata);
  params.out = make_epilogue<typename Cfg::X, true>(p);
  params.extent = tile64::Extent::of<typename Cfg::Tile>(p.out_features, p.in_features);
  params.tokens = p.tokens;
  params.columns = tile64::ceil_div(p.tokens, Cfg::kTokens);
  params.column_tokens = tile64::ceil_div(tile64::ceil_div(p.tokens, params.columns), 8) * 8;
  params.slice_tokens = tile64::ceil_div(params.column_tokens / 8, cluster_rows) * 8;
  params.cluster_rows = cluster_rows;
  params.parts = parts;
  clusters = int64_t{tile64::ceil_div(params.extent.groups, cluster_rows)} * params.columns;
  return params;
}

template <class X, int kTokens, int kScaleGroup>
Status launch(const LinearProblem& p, int cluster_rows, int parts, cudaStream_t stream) {
  using Cfg = Config<X, kTokens, kScaleGroup>;
  static KernelStates states;
  const DeviceKernel kernel(kOp, "spmm_narrow_sm90_kernel", spmm_narrow_sm90_kernel<Cfg>, states);
  LaunchShape shape = {kThreads, Cfg::kSmemBytes, cluster_rows * parts};
  int64_t clusters = 0;
  const Params<X> params = make_params<Cfg>(p, cluster_rows, parts, clusters);
  CUtensorMap x_map;
  SK_RETURN_IF_ERROR(make_activation_map(kOp, x_map, p, params.slice_tokens));
  SK_CHECK_REL(kOp, clusters * shape.cluster, <, int64_t{1} << 31, "Split the tokens.");
  SK_RETURN_IF_ERROR(kernel.prepare(shape.smem_bytes, shape.dependent));
  shape.dependent &= !p.weight_is_new;
  return kernel.launch(shape, clusters * shape.cluster, stream, x_map, params);
}

template <class X, int kScaleGroup>
Status launch_config(const LinearProblem& p, int config, cudaStream_t stream) {
  switch (config) {
#define SK_CASE(index, tokens, cluster_rows, parts)                                  \
  case index:                                                                        \
    static_assert(cluster_rows * parts <= kPortableCluster && parts <= kMostParts && \
                  tokens / 8 % cluster_rows == 0);                                   \
    return launch<X, tokens, kScaleGroup>(p, cluster_rows, parts, stream);
    SK_NARROW_CONFIGS(SK_CASE)
#undef SK_CASE
  }
  return unknown_config(kOp, kNarrowConfigs, config);
}

template <class W, class X, class Y>
Status linear(const LinearProblem& p, int config, cudaStream_t stream) {
  static_assert(std::is_same_v<W, Int4> && std::is_same_v<X, Y>);
  if (p.tokens == 0 || p.out_features == 0) return {};
  if (p.scale_group == 64) return launch_config<X, 64>(p, config, stream);
  if (p.scale_group == 128) return launch_config<X, 128>(p, config, stream);
  return launch_config<X, 0>(p, config, stream);
}

}  // namespace sparsekern::narrow

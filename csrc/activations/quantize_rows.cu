// quantize_rows.cu: checks a problem, cuts its rows (quantize_rows.cuh) and launches.
#include "activations/quantize_rows.cuh"

#include <algorithm>

#include "core/device.h"

namespace sparsekern {
namespace {

using namespace quantize_rows;

constexpr const char* kOp = "sparsekern.quantize_rows";
constexpr int kBlockWarps = 8;   // of a thread block that short rows share
constexpr int kFewBlocks = 132;  // as long as there are no more tokens, each has its own

// How a row is cut.
struct Cut {
  int chunks;  // of a thread; 0: an element at a time
  int warps;
};

// The fewest chunks with which eight warps hold a row, and from eight chunks on sixteen.
Cut cut_row(int features) {
  const int chunks = features / kChunkValues;
  for (const int each : {2, 4, 8, 16}) {
    const int warps = (chunks + each * kWarpThreads - 1) / (each * kWarpThreads);
    if (warps <= (each < 8 ? kBlockWarps : kMaxWarps)) return {each, std::max(warps, 1)};
  }
  return {0, kMaxWarps};
}

// A row may be absent: then its address is null and its stride does not count.
bool aligned_rows(const QuantizeRowsProblem& p) {
  const auto fits = [](const void* address, int64_t stride, int element_bytes) {
    const int bytes = kChunkValues * element_bytes;
    return address == nullptr ||
           (reinterpret_cast<uintptr_t>(address) % bytes == 0 && stride % kChunkValues == 0);
  };
  return p.features % kChunkValues == 0 && fits(p.x.data, p.x.stride, 2) &&
         fits(p.up, p.up_stride, 2) && fits(p.norm_weight, 0, 2) &&
         fits(p.residual, p.residual_stride, 2) && fits(p.y, p.y_stride, 2) &&
         fits(p.q, p.q_stride, 1);
}

template <class T, class Q, RowSource kSource, int kChunks>
Status launch(const Params& params, int warps, cudaStream_t stream) {
  static KernelStates states;
  const DeviceKernel kernel(kOp, "quantize_rows_kernel",
                            &quantize_rows_kernel<T, Q, kSource, kChunks>, states);
  int rows = 1;
  if (kChunks > 0)
    rows = static_cast<int>(
        std::clamp<int64_t>(params.tokens / kFewBlocks, 1, std::max(1, kBlockWarps / warps)));
  LaunchShape shape = {rows * warps * kWarpThreads, 0};
  SK_RETURN_IF_ERROR(kernel.prepare(shape.smem_bytes, shape.dependent));
  const int64_t blocks = (params.tokens + rows - 1) / rows;
  SK_CHECK_REL(kOp, blocks, <, int64_t{1} << 31, "Split x.");
  return kernel.launch(shape, blocks, stream, params);
}

template <class T, class Q, RowSource kSource>
Status launch_cut(const Params& params, Cut cut, cudaStream_t stream) {
  switch (cut.chunks) {
    case 2:
      return launch<T, Q, kSource, 2>(params, cut.warps, stream);
    case 4:
      return launch<T, Q, kSource, 4>(params, cut.warps, stream);
    case 8:
      return launch<T, Q, kSource, 8>(params, cut.warps, stream);
    case 16:
      return launch<T, Q, kSource, 16>(params, cut.warps, stream);
    default:
      return launch<T, Q, kSource, 0>(params, cut.warps, stream);
  }
}

template <class T, class Q>
Status launch_source(RowSource source, const Params& params, Cut cut, cudaStream_t stream) {
  switch (source) {
    case RowSource::kNorm:
      return launch_cut<T, Q, RowSource::kNorm>(params, cut, stream);
    case RowSource::kGated:
      return launch_cut<T, Q, RowSource::kGated>(params, cut, stream);
    default:
      return launch_cut<T, Q, RowSource::kPlain>(params, cut, stream);
  }
}

}  // namespace

Status launch_quantize_rows(const QuantizeRowsProblem& p, cudaStream_t stream) {
  if (p.tokens == 0) return {};
  SK_CHECK_REL(kOp, p.tokens, >, 0, "Pass the rows of x.");
  SK_CHECK_REL(kOp, p.features, >=, 0, "Pass the columns of x.");
  const Cut cut = aligned_rows(p) ? cut_row(p.features) : Cut{0, kBlockWarps};
  Params params;
  params.x = p.x.data, params.x_stride = p.x.stride;
  params.up = p.up, params.up_stride = p.up_stride;
  params.norm_weight = p.norm_weight, params.eps = p.eps;
  params.residual = p.residual, params.residual_stride = p.residual_stride;
  params.y = p.y, params.y_stride = p.y_stride;
  params.q = static_cast<uint8_t*>(p.q), params.q_stride = p.q_stride;
  params.scale = p.scale;
  params.tokens = p.tokens, params.features = p.features;
  params.warps = cut.warps;
  Status status;
  bool known_storage = false;
  const bool known_x = with_type<__half, __nv_bfloat16>(p.x.dtype, [&](auto x) {
    known_storage = with_type<__nv_fp8_e4m3, int8_t>(p.storage, [&](auto q) {
      using T = typename decltype(x)::Of;
      using Q = typename LevelsOf<typename decltype(q)::Of>::Of;
      (void)(status = launch_source<T, Q>(p.source, params, cut, stream));
    });
  });
  if (known_x && known_storage) return status;
  if (known_x)
    return make_status(StatusKind::type, kOp, ": expected storage float8_e4m3fn or int8, got ",
                       info(p.storage).name, ". Choose one of them.");
  return make_status(StatusKind::type, kOp, ": expected x of float16 or bfloat16, got ",
                     info(p.x.dtype).name, ". Convert x.");
}

}  // namespace sparsekern

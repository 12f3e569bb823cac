// naive_sm90.cu: the shortest wgmma.sp kernel that is right: the text to read first, and the
// oracle on the device.
//
//   D[M,N] = A[M,K] · B[K,N], A 2:4-sparse.
//   M = out_features   N = tokens   K = in_features (dense count)
//
// One warpgroup computes 64 rows x 64 tokens. It walks along K in tiles of 64: copy a tile of the
// packed weight and a tile of x to shared memory with ordinary loads and stores, issue two wgmma.sp
// (32 of K each), wait, repeat. No pipeline, no copy engine, no cluster, no split of K. What the
// fast kernels change is only when and by whom the tiles are copied.
#include "layout/tile64.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/wgmma_sp.cuh"
#include "linear/epilogue.cuh"

namespace sparsekern {
namespace {

constexpr int kThreads = 128, kTokens = 64;

template <class T>
struct NaiveParams {
  const T* x;
  const uint8_t* values;
  const uint8_t* metadata;
  OutputSegment<T> out;
  tile64::Extent extent;
  int64_t x_stride;
  int tokens, in_features;
};

template <class T>
__global__ void __launch_bounds__(kThreads) spmm_naive_sm90_kernel(const NaiveParams<T> p) {
  __shared__ __align__(1024) uint8_t
      x_tile[kTokens * 128];  // token rows of 128 bytes, 16-byte chunks XORed with token % 8
  __shared__ __align__(1024) uint8_t values[tile64::kValueBytes];
  const int panel = blockIdx.x, first_token = blockIdx.y * kTokens;

  float d[kTokens / 2];
  for (int k_tile = 0; k_tile < p.extent.k_tiles; ++k_tile) {
    const size_t tile = p.extent.first_tile(panel / tile64::kPanelsPerSuperpanel, k_tile) +
                        panel % tile64::kPanelsPerSuperpanel;
    for (int i = threadIdx.x; i < tile64::kValueBytes; i += kThreads)
      values[i] = p.values[tile * tile64::kValueBytes + i];
    for (int i = threadIdx.x; i < kTokens * tile64::kDenseK; i += kThreads) {
      const int token = i / tile64::kDenseK, k = i % tile64::kDenseK;
      const int column = k_tile * tile64::kDenseK + k;
      const bool inside = first_token + token < p.tokens && column < p.in_features;
      const int chunk = (k / 8) ^ (token % 8);
      reinterpret_cast<T*>(x_tile)[token * 64 + chunk * 8 + k % 8] =
          inside ? p.x[(first_token + token) * p.x_stride + column] : from_float<T>(0.0f);
    }
    const uint32_t metadata =
        reinterpret_cast<const uint32_t*>(p.metadata + tile * tile64::kMetadataBytes)[threadIdx.x];
    asm volatile("fence.proxy.async.shared::cta;" ::
                     : "memory");  // wgmma reads smem through the async proxy
    __syncthreads();

    const uint64_t a = tile64::weight_descriptor(ptx::smem_address(values));
    const uint64_t b = tile64::x_descriptor(ptx::smem_address(x_tile));
    ptx::wgmma_fence();
    ptx::WgmmaSp<T, kTokens>::template run<0>(d, a, b, metadata, k_tile > 0);
    ptx::WgmmaSp<T, kTokens>::template run<1>(d, a + tile64::kWeightStep, b + tile64::kXStep,
                                              metadata, 1);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    __syncthreads();  // before the tiles are overwritten
  }

  // PTX ISA, "Register fragments for wgmma": d[i] is row 16w + g + 8 ((i / 2) % 2), column 8 (i /
  // 4) + 2t + i % 2.
  const int warp_idx = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll  // d must be indexed by constants
  for (int i = 0; i < kTokens / 2; ++i) {
    const int row = panel * tile64::kRows + warp_idx * 16 + g + i / 2 % 2 * 8;
    const int token = first_token + i / 4 * 8 + 2 * t + i % 2;
    if (row >= p.out.out_features || token >= p.tokens) continue;
    float v = activate(d[i] + (p.out.bias ? to_float(p.out.bias[row]) : 0.0f), p.out.activation);
    if (p.out.residual) v += to_float(p.out.residual[token * p.out.residual_stride + row]);
    p.out.y[token * p.out.y_stride + row] = from_float<T>(v);
  }
}

template <class T>
Status launch(const LinearProblem& p, cudaStream_t stream) {
  const NaiveParams<T> params = {static_cast<const T*>(p.x),
                                 static_cast<const uint8_t*>(p.values),
                                 static_cast<const uint8_t*>(p.metadata),
                                 output_segment<T>(p),
                                 tile64::Extent::of(p.out_features, p.in_features),
                                 p.x_stride,
                                 p.tokens,
                                 p.in_features};
  const dim3 grid(params.extent.panels, tile64::ceil_div(p.tokens, kTokens));
  spmm_naive_sm90_kernel<T><<<grid, kThreads, 0, stream>>>(params);
  return launch_status("sparsekern.linear (naive)", "spmm_naive_sm90_kernel", grid, dim3(kThreads),
                       0);
}

}  // namespace

Status launch_naive(const LinearProblem& p, cudaStream_t stream) {
  if (p.tokens == 0 || p.out_features == 0) return {};
  SK_CHECK_REL("sparsekern.linear (naive)", p.tokens, <, 65536 * kTokens, "Split the tokens.");
  return p.dtype == DType::kBFloat16 ? launch<__nv_bfloat16>(p, stream) : launch<__half>(p, stream);
}

}  // namespace sparsekern

// naive_sm90.cu: the shortest wgmma.sp kernel that is right: the text to read first, and the
// oracle on the device.
//
//   D[M,N] = A[M,K] · B[K,N], A 2:4-sparse.
//   M = out_features   N = tokens   K = in_features (dense count)
//
// One warpgroup computes 64 rows x 64 tokens. It walks along K in tiles of 64 (128 at 8 bits): copy
// a tile of the packed weight and a tile of x to shared memory with ordinary loads and stores,
// issue two wgmma.sp (half of K each), wait, repeat. No pipeline, no copy engine, no cluster, no
// split of K. What the fast kernels change is only when and by whom the tiles are copied.
#include <type_traits>

#include "layout/tile64.cuh"
#include "linear/epilogue.cuh"
#include "linear/launch.h"
#include "ptx/memory.cuh"
#include "ptx/wgmma_sp.cuh"

namespace sparsekern::naive {

constexpr const char* kOp = "sparsekern.linear (naive)";
constexpr int kThreads = 128, kTokens = 64;

// T: type of x and of the weight's values. Y: of y.
template <class T, class Y>
struct Params {
  const T* x;
  const uint8_t* values;
  const uint8_t* metadata;
  Epilogue<Y, true> out;
  tile64::Extent extent;
  int64_t x_stride;
  int tokens, in_features;
};

template <class T, class Y>
__global__ void __launch_bounds__(kThreads) spmm_naive_sm90_kernel(const Params<T, Y> p) {
  using Tile = tile64::Tile<Element<T>::kStorageBits>;
  using Wgmma = ptx::WgmmaSp<T, kTokens>;
  constexpr int kChunk = Tile::kChunkValues;  // elements of 16 bytes
  __shared__ __align__(1024) uint8_t
      x_tile[kTokens * 128];  // token rows of 128 bytes, 16-byte chunks XORed with token % 8
  __shared__ __align__(1024) uint8_t values[Tile::kValueBytes];
  __shared__ float sums[kTokens][tile64::kRows + 1];
  const int panel = blockIdx.x, first_token = blockIdx.y * kTokens;

  typename Element<T>::Accumulator d[kTokens / 2];
  for (int k_tile = 0; k_tile < p.extent.k_tiles; ++k_tile) {
    const size_t tile = p.extent.first_tile(panel / tile64::kPanelsPerGroup, k_tile) +
                        panel % tile64::kPanelsPerGroup;
    for (int i = threadIdx.x; i < Tile::kValueBytes; i += kThreads)
      values[i] = p.values[tile * Tile::kValueBytes + i];
    for (int i = threadIdx.x; i < kTokens * Tile::kDenseK; i += kThreads) {
      const int token = i / Tile::kDenseK, k = i % Tile::kDenseK;
      const int column = k_tile * Tile::kDenseK + k;
      const bool inside = first_token + token < p.tokens && column < p.in_features;
      const int chunk = (k / kChunk) ^ (token % 8);
      reinterpret_cast<T*>(x_tile)[token * Tile::kDenseK + chunk * kChunk + k % kChunk] =
          inside ? p.x[(first_token + token) * p.x_stride + column] : T{};
    }
    const uint32_t* words =
        reinterpret_cast<const uint32_t*>(p.metadata + tile * Tile::kMetadataBytes) + threadIdx.x;
    const uint32_t metadata[2] = {words[0], words[Tile::word(1) * kThreads]};
    asm volatile("fence.proxy.async.shared::cta;" ::
                     : "memory");  // wgmma reads smem through the async proxy
    __syncthreads();

    const uint64_t a = tile64::weight_descriptor(ptx::smem_address(values));
    const uint64_t b = tile64::x_descriptor(ptx::smem_address(x_tile));
    ptx::wgmma_fence();
    Wgmma::template run<0>(d, a, b, metadata[0], k_tile > 0);
    Wgmma::template run<Tile::selector(1)>(d, a + tile64::kWeightStep, b + tile64::kXStep,
                                           metadata[1], 1);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    __syncthreads();  // before the tiles are overwritten
  }

  // PTX ISA, "Register fragments for wgmma": d[i] is row 16w + g + 8 ((i / 2) % 2), column 8 (i /
  // 4) + 2t + i % 2.
  const int warp_idx = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll  // d must be indexed by constants
  for (int i = 0; i < kTokens / 2; ++i)
    sums[i / 4 * 8 + 2 * t + i % 2][warp_idx * 16 + g + i / 2 % 2 * 8] = static_cast<float>(d[i]);
  __syncthreads();
  for (int i = threadIdx.x; i < kTokens * tile64::kRows; i += kThreads) {
    const int token = i / tile64::kRows, row = i % tile64::kRows;
    if (first_token + token < p.tokens)
      p.out.store_one(sums[token][row], first_token + token, panel * tile64::kRows + row);
  }
}

template <class T, class X, class Y>
Status linear(const LinearProblem& p, int config, cudaStream_t stream) {
  static_assert(std::is_same_v<T, X>);
  if (config != 0) return unknown_config(kOp, kNaiveConfigs, config);
  if (p.tokens == 0 || p.out_features == 0) return {};
  SK_CHECK_REL(kOp, p.tokens, <, 65536 * kTokens, "Split the tokens.");
  Params<T, Y> params = {};
  params.x = static_cast<const T*>(p.x.data);
  params.values = static_cast<const uint8_t*>(p.weight.values);
  params.metadata = static_cast<const uint8_t*>(p.weight.metadata);
  params.out = make_epilogue<Y, true>(p);
  params.extent =
      tile64::Extent::of<tile64::Tile<Element<T>::kStorageBits>>(p.out_features, p.in_features);
  params.x_stride = p.x.stride;
  params.tokens = p.tokens;
  params.in_features = p.in_features;
  const dim3 grid(params.extent.panels, tile64::ceil_div(p.tokens, kTokens));
  spmm_naive_sm90_kernel<T, Y><<<grid, kThreads, 0, stream>>>(params);
  return launch_status(kOp, "spmm_naive_sm90_kernel", grid, dim3(kThreads), 0);
}

SK_PLAIN(SK_INSTANTIATE_LINEAR, linear)
SK_W8A8(SK_INSTANTIATE_LINEAR, linear)

}  // namespace sparsekern::naive

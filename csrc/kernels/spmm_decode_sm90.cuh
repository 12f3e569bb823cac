// spmm_decode_sm90.cuh: D[M,N] = A[M,K] · B[K,N] for 1 to 64 tokens, A 2:4-sparse. Hopper: copy engine + mma.sp.
//
//   M = out_features   N = tokens   K = in_features (dense count)      specification: sparsekern/reference.py, linear
//
// At these N the weights are the only traffic that counts: 9/16 of the dense bytes, each read once. So the kernel is a
// copy loop with a little arithmetic in its shadow:
//
//   one CTA      = one superpanel of 256 rows and one slice of K
//   one stage    = 64 dense columns: [x tile | 16 KiB values | 2 KiB metadata], a tensor copy and two bulk copies
//   one cluster  = the 1, 2, 4 or 8 CTAs that share a superpanel; each takes 1/C of K, partial sums meet in shared memory
//
// Few superpanels (a 4096-row weight has 16) would leave most SMs idle, hence the split of K; the reduction reads the
// neighbours' shared memory in rank order, so the result does not depend on timing. Up to 190 KiB per SM are in flight.
//
// Roles (288 threads)
//   warps 0-7   consumers: warp w owns rows 32w..32w+31 of the superpanel (two m16 tiles) and all tokens
//   warp 8      producer: one lane issues the copies
//
// Barriers      filled by                      released by         arrivals
//   full[s]     copy engine, by byte count     -                   1 (producer announces the bytes)
//   empty[s]    -                              consumer warps      8
//
// Per stage and warp: 4 ldmatrix of A, 2 of metadata (one word serves both k-steps), 2 per 8 tokens of B, 4 mma.sp per 8
// tokens. The gated form streams two weights, gate and up, and writes silu(gate) * up.
//
// Programmatic dependent launch: weights are constants, so their copies start before the previous kernel of the stream
// has finished; x, residual and y are touched only after it has.
#pragma once
#include "../layout/tile64.cuh"
#include "../ptx/cluster.cuh"
#include "../ptx/mbarrier.cuh"
#include "../ptx/mma_sp.cuh"
#include "../ptx/tma.cuh"
#include "epilogue.cuh"

namespace sparsekern::decode {

constexpr int kConsumerWarps = 8;
constexpr int kConsumerThreads = kConsumerWarps * 32;
constexpr int kThreads = kConsumerThreads + 32;
constexpr int kConsumerBarrier = 1;
constexpr int kSmemCapacity = 227 * 1024;

// kTokenTiles: tokens in units of 8. kWeights: 1, or 2 for the gated form.
template <class T_, int kTokenTiles_, int kWeights_>
struct Config {
  using T = T_;
  static constexpr int kTokenTiles = kTokenTiles_;
  static constexpr int kWeights = kWeights_;
  static constexpr int kTokens = kTokenTiles * 8;
  static constexpr int kXBytes = kTokens * 128;
  static constexpr int kValueBytes = tile64::kPanelsPerSuperpanel * tile64::kValueBytes;
  static constexpr int kMetadataBytes = tile64::kPanelsPerSuperpanel * tile64::kMetadataBytes;
  static constexpr int kWeightBytes = kValueBytes + kMetadataBytes;
  static constexpr int kStageBytes = kXBytes + kWeights * kWeightBytes;
  static constexpr int kSumPitch = tile64::kSuperpanelRows + 4;  // words; +4 spreads the banks
  static constexpr int kSumBytes = kWeights * kTokens * kSumPitch * 4;
  static constexpr int kFit = (kSmemCapacity - 256 - kSumBytes) / kStageBytes;
  static constexpr int kStages = kFit < 12 ? kFit : 12;
  static constexpr int kSmemBytes = kStages * kStageBytes + kSumBytes + 2 * kStages * 8;
  static_assert(kStages >= 3 && kSmemBytes <= kSmemCapacity);
};

template <class T>
struct Params {
  const uint8_t* values[2];
  const uint8_t* metadata[2];
  OutputSegment<T> out;
  tile64::Extent extent;
  int tokens;
};

// Shared memory as byte addresses: stages first (1024-byte aligned for the swizzle), then sums, then barriers.
template <class Cfg>
struct Smem {
  uint32_t base;

  __device__ __forceinline__ explicit Smem(const void* raw) : base(ptx::smem_address(raw)) {
    if (base % 1024 != 0) __trap();  // the swizzled tiles need it; there is no static shared memory before us
  }
  __device__ __forceinline__ uint32_t x(int stage) const { return base + stage * Cfg::kStageBytes; }
  __device__ __forceinline__ uint32_t values(int stage, int weight) const {
    return x(stage) + Cfg::kXBytes + weight * Cfg::kWeightBytes;
  }
  __device__ __forceinline__ uint32_t metadata(int stage, int weight) const {
    return values(stage, weight) + Cfg::kValueBytes;
  }
  __device__ __forceinline__ uint32_t sums() const {
    return base + Cfg::kStages * Cfg::kStageBytes;
  }
  __device__ __forceinline__ uint32_t full(int stage) const {
    return sums() + Cfg::kSumBytes + stage * 8;
  }
  __device__ __forceinline__ uint32_t empty(int stage) const {
    return full(stage) + Cfg::kStages * 8;
  }
};

// Position in the ring of stages; the parity flips at each turn.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct KRange {
  int begin, end;
};

__device__ __forceinline__ KRange k_slice(int k_tiles, int rank, int ranks) {
  return {static_cast<int>(static_cast<int64_t>(k_tiles) * rank / ranks),
          static_cast<int>(static_cast<int64_t>(k_tiles) * (rank + 1) / ranks)};
}

template <class Cfg>
struct Producer {
  const CUtensorMap* x_map;
  const Params<typename Cfg::T>& p;
  const Smem<Cfg>& smem;
  RingPosition<Cfg::kStages> ring = {};

  __device__ __forceinline__ void copy_weights(int stage, int superpanel, int k_tile) const {
    const int panels = p.extent.panels_in(superpanel);
    const uint32_t value_bytes = panels * tile64::kValueBytes, metadata_bytes = panels * tile64::kMetadataBytes;
    const uint32_t full = smem.full(stage);
    ptx::mbarrier_arrive_expect_bytes(full, Cfg::kXBytes + Cfg::kWeights * (value_bytes + metadata_bytes));
    const size_t tile = p.extent.first_tile(superpanel, k_tile);
#pragma unroll
    for (int w = 0; w < Cfg::kWeights; ++w) {
      ptx::bulk_copy(smem.values(stage, w), p.values[w] + tile * tile64::kValueBytes, value_bytes, full,
                     ptx::L2Hint::kEvictFirst);
      ptx::bulk_copy(smem.metadata(stage, w), p.metadata[w] + tile * tile64::kMetadataBytes, metadata_bytes,
                     full, ptx::L2Hint::kEvictFirst);
    }
  }
  __device__ __forceinline__ void copy_x(int stage, int k_tile) const {
    ptx::tensor_copy(smem.x(stage), x_map, k_tile * tile64::kDenseK, 0, smem.full(stage), ptx::L2Hint::kEvictLast);
  }
  // The first turn of the ring: weights at once, x when the kernel that made it has finished. Returns the tiles issued.
  __device__ __forceinline__ int first_turn(int superpanel, KRange k) {
    const int count = k.end - k.begin < Cfg::kStages ? k.end - k.begin : Cfg::kStages;
    for (int i = 0; i < count; ++i) copy_weights(i, superpanel, k.begin + i);
    ptx::wait_for_predecessor();
    for (int i = 0; i < count; ++i) {
      copy_x(i, k.begin + i);
      ring.advance();
    }
    return count;
  }
  __device__ __forceinline__ void run(int superpanel, KRange k) {
    for (int k_tile = k.begin; k_tile < k.end; ++k_tile) {
      ptx::mbarrier_wait(smem.empty(ring.stage), ring.parity ^ 1);
      copy_weights(ring.stage, superpanel, k_tile);
      copy_x(ring.stage, k_tile);
      ring.advance();
    }
  }
};

template <class Cfg>
using Accumulators = float[Cfg::kWeights][2][Cfg::kTokenTiles][4];

// One stage for one warp: two m16 tiles of each weight times all tokens, two k-steps.
template <class Cfg>
__device__ __forceinline__ void multiply_stage(Accumulators<Cfg>& d, const Smem<Cfg>& smem,
                                               int stage, int warp_idx, int lane_idx) {
  const int panel = warp_idx / 2, half = warp_idx % 2;
  const int row_in_matrix = lane_idx % 8, matrix = lane_idx / 8;
  const uint32_t a_lane = panel * tile64::kValueBytes + (matrix / 2) * tile64::kChunkStride +
                          (half * 4 + matrix % 2) * tile64::kRowGroupStride + row_in_matrix * 16;
  const uint32_t metadata_lane = panel * tile64::kMetadataBytes + half * 256 + lane_idx * 4;
  const uint32_t b_lane = smem.x(stage) + row_in_matrix * 128;

  uint32_t metadata[Cfg::kWeights][2];
#pragma unroll
  for (int w = 0; w < Cfg::kWeights; ++w) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      metadata[w][i] = ptx::load_shared_u32(smem.metadata(stage, w) + metadata_lane + i * 128);
  }
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    uint32_t a[Cfg::kWeights][2][4];
#pragma unroll
    for (int w = 0; w < Cfg::kWeights; ++w) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        ptx::ldmatrix_x4(a[w][i], smem.values(stage, w) + a_lane + step * 2 * tile64::kChunkStride +
                                      i * 2 * tile64::kRowGroupStride);
    }
#pragma unroll
    for (int n = 0; n < Cfg::kTokenTiles; ++n) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, b_lane + n * 1024 + ((step * 4 + matrix) ^ row_in_matrix) * 16);
#pragma unroll
      for (int w = 0; w < Cfg::kWeights; ++w) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (step == 0) ptx::mma_sp<typename Cfg::T, 0>(d[w][i][n], a[w][i], b, metadata[w][i]);
          else ptx::mma_sp<typename Cfg::T, 1>(d[w][i][n], a[w][i], b, metadata[w][i]);
        }
      }
    }
  }
}

// Accumulators -> sums[weight][token][row] in this CTA's shared memory.
template <class Cfg>
__device__ __forceinline__ void write_sums(const Accumulators<Cfg>& d, const Smem<Cfg>& smem,
                                           int warp_idx, int lane_idx) {
  const int g = lane_idx / 4, t = lane_idx % 4;
#pragma unroll
  for (int w = 0; w < Cfg::kWeights; ++w) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int n = 0; n < Cfg::kTokenTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int token = n * 8 + 2 * t + e % 2;
          const int row = warp_idx * 32 + i * 16 + g + 8 * (e / 2);
          const uint32_t address =
              smem.sums() + ((w * Cfg::kTokens + token) * Cfg::kSumPitch + row) * 4;
          ptx::store_shared_f32(address, d[w][i][n][e]);
        }
      }
    }
  }
}

// Sum of 4 consecutive rows of one token over the CTAs of the cluster, starting with this one: a fixed order, since an
// output always belongs to the same CTA, and not the same neighbour for everybody at once. All loads first: a
// neighbour's shared memory is far away. Lanes read consecutive 16-byte pieces.
template <class Cfg, int kRanks>
__device__ __forceinline__ void reduce_segment(float (&v)[4], const Smem<Cfg>& smem, int weight, int token, int row,
                                               int rank) {
  const uint32_t local = smem.sums() + ((weight * Cfg::kTokens + token) * Cfg::kSumPitch + row) * 4;
  float4 part[kRanks];
#pragma unroll
  for (int i = 0; i < kRanks; ++i)
    part[i] = ptx::load_cluster_float4(ptx::map_to_cta(local, (rank + i) % kRanks));
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = 0.0f;
#pragma unroll
  for (int i = 0; i < kRanks; ++i) v[0] += part[i].x, v[1] += part[i].y, v[2] += part[i].z, v[3] += part[i].w;
}

// Each CTA of the cluster finishes its share of the (token, 4 rows) segments.
template <class Cfg, int kRanks>
__device__ __forceinline__ void store_outputs(const Params<typename Cfg::T>& p, const Smem<Cfg>& smem, int superpanel,
                                              int rank) {
  constexpr int kSegments = tile64::kSuperpanelRows / 4;
  const int total = p.tokens * kSegments;
  const int begin = total * rank / kRanks, end = total * (rank + 1) / kRanks;
#pragma unroll 1
  for (int item = begin + static_cast<int>(threadIdx.x); item < end; item += kConsumerThreads) {
    const int token = item / kSegments, row = item % kSegments * 4;
    float v[4];
    reduce_segment<Cfg, kRanks>(v, smem, 0, token, row, rank);
    if constexpr (Cfg::kWeights == 2) {
      float up[4];
      reduce_segment<Cfg, kRanks>(up, smem, 1, token, row, rank);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = activate(v[i], Activation::kSilu) * up[i];
    }
    p.out.template store<4>(v, token, superpanel * tile64::kSuperpanelRows + row);
  }
}

// kRanks: CTAs of a cluster. With more than one, a cluster has one superpanel (see the launcher).
template <class Cfg, int kRanks>
__global__ void __launch_bounds__(kThreads, 1)
    spmm_decode_sm90_kernel(const __grid_constant__ CUtensorMap x_map,
                            const __grid_constant__ Params<typename Cfg::T> p) {
  extern __shared__ __align__(1024) uint8_t raw_smem[];
  const Smem<Cfg> smem(raw_smem);
  const int warp_idx = threadIdx.x / 32, lane_idx = threadIdx.x % 32;
  const int rank = blockIdx.x % kRanks, first = blockIdx.x / kRanks, step = gridDim.x / kRanks;
  const KRange k = k_slice(p.extent.k_tiles, rank, kRanks);

  if (threadIdx.x == kConsumerThreads) {
    for (int s = 0; s < Cfg::kStages; ++s) {
      ptx::mbarrier_init(smem.full(s), 1);
      ptx::mbarrier_init(smem.empty(s), kConsumerWarps);
    }
    ptx::mbarrier_init_fence();
    ptx::prefetch_tensor_map(&x_map);
  }
  __syncthreads();
  ptx::let_successor_start();

  if (warp_idx == kConsumerWarps) {
    if (lane_idx == 0) {
      Producer<Cfg> producer{&x_map, p, smem};
      const int issued = producer.first_turn(first, k);
      producer.run(first, {k.begin + issued, k.end});
      for (int superpanel = first + step; superpanel < p.extent.superpanels; superpanel += step)
        producer.run(superpanel, k);
    }
    __syncwarp();
    if constexpr (kRanks > 1) {  // the two barriers of the consumers below
      ptx::cluster_sync();
      ptx::cluster_sync();
    }
    return;
  }
  const auto sync = [] {
    if constexpr (kRanks > 1) ptx::cluster_sync();
    else ptx::named_barrier_sync(kConsumerBarrier, kConsumerThreads);
  };
  RingPosition<Cfg::kStages> ring;
  for (int superpanel = first; superpanel < p.extent.superpanels; superpanel += step) {
    Accumulators<Cfg> d = {};
    const bool has_rows = warp_idx / 2 < p.extent.panels_in(superpanel);
    for (int k_tile = k.begin; k_tile < k.end; ++k_tile) {
      ptx::mbarrier_wait(smem.full(ring.stage), ring.parity);
      if (has_rows) multiply_stage<Cfg>(d, smem, ring.stage, warp_idx, lane_idx);
      __syncwarp();
      if (lane_idx == 0) ptx::mbarrier_arrive(smem.empty(ring.stage));
      ring.advance();
    }
    write_sums<Cfg>(d, smem, warp_idx, lane_idx);
    sync();  // all sums are there
    ptx::wait_for_predecessor();
    store_outputs<Cfg, kRanks>(p, smem, superpanel, rank);
    sync();  // all sums have been read: the next superpanel may overwrite them, a neighbour may leave
  }
}

}  // namespace sparsekern::decode

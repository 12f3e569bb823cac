// spmm_split_sm90.cuh: D[M,N] = A[M,K] · B[K,N], A 2:4-sparse, for problems with fewer tiles than the
// GPU has SMs: the CTAs of a cluster share the K of one tile. Hopper: copy engine + wgmma.sp, as the
// prefill kernel, whose stages, copies and main loop these are.
//
//   M = out_features   N = tokens   K = in_features (dense count)
//   Specification: sparsekern/reference.py, linear
//
// The prefill kernel also cuts tiles along K, but its CTAs meet in global memory: write, fence, count,
// poll, read, some 4 us. In a cluster they meet in shared memory: sums that others finish go to the
// ring of stages, which is empty then, a cluster barrier, and everybody adds up its own parts of 16
// tokens, its own sums first and then those of the ranks after it: a fixed order.
//
// Roles (384 threads)                                             registers
//   warpgroups 0, 1   consumers: half of the rows each            240
//   warps 8, 9        producers: one lane copies x, one weights    24    (10, 11 idle)
//
// One tile per cluster, and no cluster waits for another. Launches overlap (dependent_launch.cuh).
#pragma once
#include "spmm_prefill_sm90.cuh"

namespace sparsekern::split {

using prefill::Accumulators;
using prefill::kConsumers;
using prefill::kSumTokens;
using prefill::kThreads;

template <class T>
struct Params {
  const uint8_t* values;
  const uint8_t* metadata;
  OutputSegment<T> out;
  tile64::Extent extent;
  int tokens;
  int tile_rows;  // tiles along M; the clusters go through them first
  int splits;     // CTAs of a cluster
};

// The part of the work of one CTA.
struct Part {
  int m, n, k_begin, k_end;  // tile, column tiles

  template <class T>
  static __device__ __forceinline__ Part of(const Params<T>& p) {
    const int tile = ptx::cluster_idx(), rank = ptx::cluster_cta_rank(), k = p.extent.k_tiles;
    return {tile % p.tile_rows, tile / p.tile_rows, k * rank / p.splits, k * (rank + 1) / p.splits};
  }
};

template <class Cfg>
__device__ __forceinline__ void produce_x(const CUtensorMap* x_map, const Part& part,
                                          const prefill::Smem<Cfg>& smem) {
  prefill::RingPosition<Cfg::kStages> ring;
#pragma unroll 1
  for (int k_tile = part.k_begin; k_tile < part.k_end; ++k_tile) {
    const int stage = ring.stage();
    ptx::mbarrier_wait(smem.empty(stage), ring.parity() ^ 1);
    ptx::store_shared_int4(smem.tile(stage), {part.m, part.n, 0, part.k_end - part.k_begin});
    ptx::mbarrier_arrive_expect_bytes(smem.full(stage), Cfg::kXBytes);
    ptx::tensor_copy(smem.x(stage), x_map, k_tile * tile64::kDenseK, part.n * Cfg::kTokens,
                     smem.full(stage), ptx::L2Hint::kEvictNormal);
    ring.advance();
  }
}

// Panels that the weight does not have are filled with copies of its last, as in produce_weights of
// the prefill kernel.
template <class Cfg>
__device__ __forceinline__ void produce_weights(const Params<typename Cfg::T>& p, const Part& part,
                                                const prefill::Smem<Cfg>& smem) {
  prefill::RingPosition<Cfg::kStages> ring;
  const int wanted = part.m * Cfg::kTilePanels, last = p.extent.panels - 1;
  const int available =
      wanted + Cfg::kTilePanels - 1 <= last ? Cfg::kTilePanels : last - wanted + 1;
  const int superpanel = wanted / tile64::kPanelsPerSuperpanel,
            step = p.extent.panels_in(superpanel);
  uint32_t tile =
      p.extent.first_tile(superpanel, part.k_begin) + wanted % tile64::kPanelsPerSuperpanel;
#pragma unroll 1
  for (int k_tile = part.k_begin; k_tile < part.k_end; ++k_tile, tile += step) {
    const int stage = ring.stage();
    const uint32_t full = smem.full(stage);
    const uint8_t* values = p.values + static_cast<size_t>(tile) * tile64::kValueBytes;
    const uint8_t* metadata = p.metadata + static_cast<size_t>(tile) * tile64::kMetadataBytes;
    ptx::mbarrier_wait(smem.empty(stage), ring.parity() ^ 1);
    ptx::mbarrier_arrive_expect_bytes(full, Cfg::kValueBytes + Cfg::kMetadataBytes);
#pragma unroll 1
    for (int slot = 0, count = available; slot < Cfg::kTilePanels; slot += count, count = 1) {
      ptx::bulk_copy(smem.values(stage) + slot * tile64::kValueBytes, values,
                     count * tile64::kValueBytes, full, ptx::L2Hint::kEvictNormal);
      ptx::bulk_copy(smem.metadata(stage) + slot * tile64::kMetadataBytes, metadata,
                     count * tile64::kMetadataBytes, full, ptx::L2Hint::kEvictNormal);
    }
    ring.advance();
  }
}

// The sums of one consumer in shared memory: [part of 16 tokens][consumer][panel][half][thread], 16
// bytes each. A thread holds the same rows and tokens in every CTA of the cluster.
template <class Cfg>
struct SharedSums {
  uint32_t base;

  __device__ __forceinline__ SharedSums(const prefill::Smem<Cfg>& smem, int consumer)
      : base(smem.base + (consumer * Cfg::kPanels * 2 * 128 + threadIdx.x % 128) * 16) {}
  static constexpr int kPartBytes = kConsumers * Cfg::kPanels * 2 * 128 * 16;
  static_assert(Cfg::kTokens / kSumTokens * kPartBytes <= Cfg::kStages * Cfg::kStageBytes);

  __device__ __forceinline__ uint32_t at(int part, int m, int half) const {
    return base + part * kPartBytes + (m * 2 + half) * 128 * 16;
  }
};

// Leaves the sums that other ranks finish where they find them. `parts`: those that exist.
template <class Cfg>
__device__ __forceinline__ void give_sums(const Accumulators<Cfg>& d, const SharedSums<Cfg>& sums,
                                          int parts, int rank, int splits) {
  int owner = 0;
#pragma unroll
  for (int part = 0; part < Cfg::kTokens / kSumTokens; ++part) {
    if (part >= parts) break;
    if (owner != rank) {
#pragma unroll
      for (int m = 0; m < Cfg::kPanels; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* v = &d[m][part * 8 + half * 4];
          ptx::store_shared_int4(sums.at(part, m, half),
                                 {__float_as_int(v[0]), __float_as_int(v[1]), __float_as_int(v[2]),
                                  __float_as_int(v[3])});
        }
      }
    }
    owner = owner + 1 == splits ? 0 : owner + 1;
  }
}

template <class Cfg>
__device__ __forceinline__ void take_sums(Accumulators<Cfg>& d, const SharedSums<Cfg>& sums,
                                          int parts, int rank, int splits) {
#pragma unroll 1
  for (int i = 1; i < splits; ++i) {
    const int peer = rank + i < splits ? rank + i : rank + i - splits;
    const uint32_t there = ptx::map_to_cta(sums.base, peer) - sums.base;
    int owner = 0;
#pragma unroll
    for (int part = 0; part < Cfg::kTokens / kSumTokens; ++part) {
      if (part >= parts) break;
      if (owner == rank) {
#pragma unroll
        for (int m = 0; m < Cfg::kPanels; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float4 add = ptx::load_cluster_float4(sums.at(part, m, half) + there);
            float* v = &d[m][part * 8 + half * 4];
            v[0] += add.x, v[1] += add.y, v[2] += add.z, v[3] += add.w;
          }
        }
      }
      owner = owner + 1 == splits ? 0 : owner + 1;
    }
  }
}

template <class Cfg>
__global__ void __launch_bounds__(kThreads, 1)
    spmm_split_sm90_kernel(const __grid_constant__ CUtensorMap x_map,
                           const __grid_constant__ Params<typename Cfg::T> p) {
  extern __shared__ __align__(1024) uint8_t raw_smem[];
  const prefill::Smem<Cfg> smem(raw_smem);
  const int warpgroup_idx = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    for (int s = 0; s < Cfg::kStages; ++s) {
      ptx::mbarrier_init(smem.full(s), prefill::kProducers);
      ptx::mbarrier_init(smem.empty(s), kConsumers);
    }
    ptx::mbarrier_init_fence();
    ptx::prefetch_tensor_map(&x_map);
  }
  __syncthreads();
  ptx::let_successor_start();
  const Part part = Part::of(p);

  if (warpgroup_idx == kConsumers) {
    ptx::give_up_registers<prefill::kProducerRegisters>();
    if (threadIdx.x == kConsumers * 128) {
      ptx::wait_for_predecessor();  // it made x; it may read y
      produce_x<Cfg>(&x_map, part, smem);
    } else if (threadIdx.x == kConsumers * 128 + 32) {
      produce_weights<Cfg>(p, part, smem);
    }
    ptx::cluster_sync();
  } else {
    ptx::take_registers<prefill::kConsumerRegisters>();
    const int rank = ptx::cluster_cta_rank();
    const prefill::Release release{threadIdx.x % 128 == 0 ? ptx::map_to_cta(smem.empty(0), rank)
                                                          : 0};
    prefill::Consumer<Cfg> consumer{smem, release, warpgroup_idx};
    Accumulators<Cfg> d;
    consumer.multiply(d);
    ptx::named_barrier_sync(1 + kConsumers, kConsumers * 128);  // nobody reads the ring any more
    const SharedSums<Cfg> sums(smem, warpgroup_idx);
    const int token = part.n * Cfg::kTokens;
    const int parts = tile64::ceil_div(p.tokens - token, kSumTokens);
    give_sums<Cfg>(d, sums, parts, rank, p.splits);
    ptx::cluster_sync();  // all sums are there
    take_sums<Cfg>(d, sums, parts, rank, p.splits);
    prefill::store_activated<Cfg>(
        d, p.out, p.tokens, part.m * Cfg::kRows + warpgroup_idx * Cfg::kConsumerRows, token,
        smem.out(warpgroup_idx), warpgroup_idx, [&](int i) { return i % p.splits == rank; });
  }
  ptx::cluster_sync();  // nobody leaves while a peer may still read its sums
}

}  // namespace sparsekern::split

// prefill_sm90.cuh: D[M,N] = A[M,K] · B[K,N] for many tokens, A 2:4-sparse. Hopper: copy
// engine + wgmma.sp. Tiles, parameters and shared memory: tile_scheduler_sm90.cuh. What happens to
// the accumulators: prefill_epilogue_sm90.cuh. What the consumers do: mainloop_sm90.cuh.
//
//   M = out_features   N = tokens   K = in_features (dense count)
//   Specification: sparsekern/reference.py, linear
//
// Operands       memory                      moved by
//   values       tile64 (layout/tile64.cuh)  bulk copy; multicast over the cluster's token tiles
//   metadata     tile64                      bulk copy; one LDS.32 per thread, tile and 64 of K
//   x = Bᵀ       [N, K] row-major            tensor copy, swizzled; multicast over its rows
//   y = Dᵀ       [N, M] row-major            stmatrix.trans to smem, tensor copy; the consumers go
//                                            on with the next tile while it drains
//
// Tile: BLOCK_M x BLOCK_N x 64, BLOCK_M = 256 rows for two consumer warpgroups. BLOCK_M is
// as large as the accumulators allow, because B is the fat operand: it is not compressed and every
// 64 rows read it from smem once more.
//
// Roles (384 threads)                                                        registers
//   warpgroups 0, 1   consumers: half of the rows each                       240
//   warps 8, 9        producers: one lane copies x, one the weights           24
//   warps 10, 11      store warps: one per consumer, copies to y (epilogue)   24
//
// Barriers      filled by                      released by                     arrivals
//   full[s]     copy engines of the cluster    -                               2 (own producers)
//   empty[s]    -                              both consumers of every CTA     2 * (CM + CN - 1)
//                                              that this CTA's copies reach
//
// Launches overlap (dependent_launch.cuh): weights are copied while the kernel before this one in
// the stream ends, x when it has. The consumers need no wait of their own: x comes after one.
//
// Work: a persistent grid; the clusters are dealt the tiles in turn. The last, partly
// filled wave (few tokens: it is all there is) is shared out along K. Either its tiles are cut into
// equal parts, as many as there are clusters for; the CTAs that share a tile exchange float32 sums
// through global memory and each finishes the token blocks that it owns. Or, streamed, every
// cluster takes an equal piece of all of it, and the one with the end of a tile finishes that. Both
// add in a fixed order.
#pragma once
#include "linear/mainloop_sm90.cuh"
#include "linear/prefill_epilogue_sm90.cuh"
#include "linear/tile_scheduler_sm90.cuh"
#include "ptx/cluster.cuh"
#include "ptx/dependent_launch.cuh"
#include "ptx/elect.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/memory.cuh"
#include "ptx/registers.cuh"
#include "ptx/tma.cuh"

namespace sparsekern::prefill {

// --- producer ---

template <class Cfg>
__device__ __forceinline__ void produce_x(const CUtensorMap* x_map,
                                          const Params<typename Cfg::Output>& p,
                                          const Smem<Cfg>& smem, int index,
                                          RingPosition<Cfg::kStages>& ring) {
  const int rank = ptx::cluster_cta_rank(), cluster_m = rank % p.cluster.m;
  const uint16_t mask = ((1u << p.cluster.m) - 1)
                        << (rank - cluster_m);  // every CTA of my column of the cluster
  const int share = Cfg::kTokens / p.cluster.m;
  const WorkItem item = work_item<Cfg>(p, index);
  const TilePosition tile = tile_position(p, item.tile);
  const int row = tile.n * Cfg::kTokens + cluster_m * share;
#pragma unroll 1
  for (int k_tile = item.k_begin; k_tile < item.k_end; ++k_tile) {
    const uint32_t full = smem.full(ring.stage()),
                   slice = smem.x(ring.stage()) + cluster_m * share * 128;
    ptx::mbarrier_wait(smem.empty(ring.stage()), ring.parity() ^ 1);
    ptx::store_shared_int4(smem.tile(ring.stage()),
                           {tile.m, tile.n, index, item.k_end - item.k_begin});
    ptx::mbarrier_arrive_expect_bytes(full, Cfg::kXBytes);
    if (p.cluster.m == 1)
      ptx::tensor_copy(slice, x_map, k_tile * Cfg::Tile::kDenseK, row, full, p.x_hint);
    else
      ptx::tensor_copy_multicast(slice, x_map, k_tile * Cfg::Tile::kDenseK, row, full, mask,
                                 p.x_hint);
    ring.advance();
  }
}

// This CTA's share of the tile's panels. Panels that the weight does not have are filled with copies
// of its last in the first turn of the ring, and left as they are then: no stage ever holds
// uninitialised metadata, and nobody stores their sums. unfilled: stages that have held nothing yet.
template <class Cfg>
__device__ __forceinline__ void produce_weights(const Params<typename Cfg::Output>& p,
                                                const Smem<Cfg>& smem, int index,
                                                RingPosition<Cfg::kStages>& ring, int& unfilled) {
  const int rank = ptx::cluster_cta_rank(), cluster_n = rank / p.cluster.m;
  const int share = Cfg::kTilePanels / p.cluster.n, last = p.extent.panels - 1;
  const WorkItem item = work_item<Cfg>(p, index);
  const int first = tile_position(p, item.tile).m * Cfg::kTilePanels;
  const int wanted = first + cluster_n * share, panel = wanted < last ? wanted : last;
  const int of_tile = min(max(last + 1 - first, 0), Cfg::kTilePanels);  // that there are
  const int of_share = min(max(last + 1 - wanted, 0), share);
  const int group = panel / tile64::kPanelsPerGroup, step = p.extent.panels_in(group);
  uint32_t tile = p.extent.first_tile(group, item.k_begin) + panel % tile64::kPanelsPerGroup;
#pragma unroll 1
  for (int k_tile = item.k_begin; k_tile < item.k_end; ++k_tile, tile += step) {
    const uint32_t full = smem.full(ring.stage());
    const int slots = unfilled > 0 ? share : of_share;
    const int expected = unfilled > 0 ? Cfg::kTilePanels : of_tile;
    unfilled -= unfilled > 0;
    ptx::mbarrier_wait(smem.empty(ring.stage()), ring.parity() ^ 1);
    ptx::mbarrier_arrive_expect_bytes(full, expected * Cfg::kPanelBytes);
#pragma unroll 1
    for (int i = 0, count = max(of_share, 1); i < slots; i += count, count = 1) {
      const int slot = cluster_n * share + i;
      const uint32_t values = smem.values(ring.stage()) + slot * Cfg::Tile::kValueBytes;
      const uint32_t metadata = smem.metadata(ring.stage()) + slot * Cfg::Tile::kMetadataBytes;
      const uint8_t* from_values = p.values + static_cast<size_t>(tile) * Cfg::Tile::kValueBytes;
      const uint8_t* from_metadata =
          p.metadata + static_cast<size_t>(tile) * Cfg::Tile::kMetadataBytes;
      if (p.cluster.n == 1) {
        ptx::bulk_copy(values, from_values, count * Cfg::Tile::kValueBytes, full,
                       ptx::L2Hint::kEvictNormal);
        ptx::bulk_copy(metadata, from_metadata, count * Cfg::Tile::kMetadataBytes, full,
                       ptx::L2Hint::kEvictNormal);
      } else {
        // Every CTA of my row of the cluster.
        const uint16_t mask = p.row_mask << (rank - cluster_n * p.cluster.m);
        ptx::bulk_copy_multicast(values, from_values, count * Cfg::Tile::kValueBytes, full, mask,
                                 ptx::L2Hint::kEvictNormal);
        ptx::bulk_copy_multicast(metadata, from_metadata, count * Cfg::Tile::kMetadataBytes, full,
                                 mask, ptx::L2Hint::kEvictNormal);
      }
    }
    ring.advance();
  }
}

// --- kernel ---

template <class Cfg>
__global__ void __launch_bounds__(kThreads, 1)
    spmm_prefill_sm90_kernel(const __grid_constant__ CUtensorMap x_map,
                             const __grid_constant__ CUtensorMap y_map,
                             const __grid_constant__ Params<typename Cfg::Output> p) {
  extern __shared__ __align__(1024) uint8_t raw_smem[];
  const Smem<Cfg> smem(raw_smem);
  const int warpgroup_idx = ptx::uniform(threadIdx.x / 128);
  if (threadIdx.x == 0) {
    for (int s = 0; s < Cfg::kStages; ++s) {
      ptx::mbarrier_init(smem.full(s), kProducers);
      ptx::mbarrier_init(smem.empty(s), kConsumers * kReleases * (p.cluster.m + p.cluster.n - 1));
    }
    ptx::mbarrier_init_fence();
    ptx::prefetch_tensor_map(&x_map);
  }
  ptx::cluster_sync();
  ptx::let_successor_start();

  if (warpgroup_idx == kConsumers) {
    ptx::give_up_registers<kProducerRegisters>();
    RingPosition<Cfg::kStages> ring;
    const int warp_idx = ptx::uniform(threadIdx.x / 32) - kConsumers * 4;
    if (warp_idx == 0) {
      if (ptx::elect_one()) {
        ptx::wait_for_predecessor();  // it made x; it may read y, and use the workspace
#pragma unroll 1
        for (int index = ptx::cluster_idx(); index < work_items<Cfg>(p); index += p.clusters)
          produce_x<Cfg>(&x_map, p, smem, index, ring);
      }
    } else if (warp_idx == 1) {
      if (ptx::elect_one()) {
        int unfilled = Cfg::kStages;
#pragma unroll 1
        for (int index = ptx::cluster_idx(); index < work_items<Cfg>(p); index += p.clusters)
          produce_weights<Cfg>(p, smem, index, ring, unfilled);
      }
    } else if (p.whole_boxes) {
      store_boxes<Cfg>(&y_map, smem, warp_idx - kProducers);
    }
  } else {
    ptx::take_registers<kConsumerRegisters>();
    Consumer<Cfg> consumer{smem, p.cluster, warpgroup_idx};
    int4 progress;
    do {  // the grid has no more clusters than there are items
      Accumulators<Cfg> d;
      consumer.multiply(d, [&](int4 at) {
        if constexpr (Cfg::kScaled)
          fetch_scales<Cfg>(p.out, p.tokens, smem, warpgroup_idx,
                            at.x * Cfg::kRows + warpgroup_idx * Cfg::kConsumerRows,
                            at.y * Cfg::kTokens);
      });
      store_tile<Cfg>(d, p, smem, warpgroup_idx);
      progress = ptx::load_shared_int4(smem.progress(warpgroup_idx));
      consumer.ring.state = progress.w;
    } while (has_next<Cfg>(p, progress.z));
    if (p.whole_boxes) dismiss_store_warp<Cfg>(smem, warpgroup_idx);
  }
  // Nobody leaves while a peer may still write to it or arrive on its barriers.
  ptx::cluster_sync();
}

}  // namespace sparsekern::prefill

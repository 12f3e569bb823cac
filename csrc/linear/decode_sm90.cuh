// decode_sm90.cuh: D[M,N] = A[M,K] · B[K,N] for 1 to 64 tokens, A 2:4-sparse. Hopper: copy
// engine + mma.sp.
//
//   M = out_features   N = tokens   K = in_features (dense count)
//   Specification: sparsekern/reference.py, linear
//
// At these N the weights are the only traffic that counts: 9/16 of the dense bytes, each read once.
// So the kernel is a copy loop with a little arithmetic in its shadow:
//
//   one CTA      = one row block of 256 rows (a tile row group), 128 or 64, and one slice of K
//   one stage    = the 64 dense columns of a tile: [x tile | 16 KiB values | 2 KiB metadata]
//   one cluster  = the 1, 2, 4, 8 or 16 CTAs that share a row block; each takes 1/C of K, partial
//                  sums meet in shared memory
//
// Few row blocks (a 4096-row weight has 16) would leave most SMs idle, hence the split of K; the
// reduction adds in a fixed order, so the result does not depend on timing. Up to 190 KiB per SM
// are in flight.
//
// Roles (288 threads)
//   warps 0-7   consumers: warp w owns an eighth of the rows (two m16 tiles or one) and all tokens
//   warp 8      producer: one lane issues the copies
// With 64 rows (320 threads) a CTA has two such teams, warps 0-3 and 8, and 4-7 and 9, each with half
// of its slice of K and a ring of its own, because a stage of so few bytes takes as long as a turn of
// their loops. A warp owns a quarter of the rows, one m16 tile.
// Paired, up to 16 tokens and not gated (SK_DECODE_CONFIGS): two CTAs of an SM with half the
// ring each, so that one fetches while the other stores; or two teams of eight consumers and a producer
// in a CTA (576 threads), each with half of its slice of K and of its ring.
//
// Barriers      filled by                      released by         arrivals
//   full[s]     copy engine, by byte count     -                   1 (producer announces the bytes)
//   empty[s]    -                              consumer warps      8, with 64 rows 4
//
// Per stage and warp (256 rows): 4 ldmatrix of A, 2 words of metadata (each serves both k-steps), 2
// ldmatrix of B and 4 mma.sp per 8 tokens. The gated form streams two weights, gate and up, and
// writes silu(gate) * up.
//
// Weights of 8 bits: a tile has 128 dense columns, so x comes in two boxes of 64 and the metadata is
// 4 KiB. They are widened to the type of x in registers (decode_widen.cuh); the sums are scaled by
// the channel's scale. Per stage and warp: 4 ldmatrix and 4 8-byte words of metadata, 64 values per
// lane to widen, 16 words of B and 8 mma.sp per 8 tokens.
//
// Weights of 4 bits: a tile has 256 dense columns, x comes in four boxes. The values lie so that a
// word gives the instruction's pairs in their places, and the metadata is that of 16-bit values. With
// scales of groups of 64 or 128 columns, which follow the metadata of a tile, each group is summed
// alone, then scaled and added. Per stage and warp: 4 ldmatrix and 8 words of metadata, 128 values per
// lane to widen, 8 ldmatrix of B and 16 mma.sp per 8 tokens, and a multiplication per sum and group.
//
// Tiles, parameters and shared memory: decode_tile_sm90.cuh. What the consumers do with a stage:
// decode_stage_sm90.cuh.
//
// Programmatic dependent launch: weights are constants, so their copies start before the previous
// kernel of the stream has finished; x, residual and y are touched only after it has.
#pragma once
#include "ptx/cluster.cuh"
#include "ptx/dependent_launch.cuh"
#include "ptx/elect.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/memory.cuh"
#include "ptx/named_barrier.cuh"
#include "ptx/tma.cuh"
#include "linear/decode_stage_sm90.cuh"
#include "linear/decode_tile_sm90.cuh"
#include "linear/epilogue.cuh"

namespace sparsekern::decode {

template <class Cfg>
struct Producer {
  const CUtensorMap* x_map;
  const Params<Cfg>& p;
  const Smem<Cfg>& smem;
  RingPosition<Cfg::kStages> ring = {};

  __device__ __forceinline__ void copy_weights(int stage, int row_block, int k_tile) const {
    constexpr int kBlocksPerGroup = tile64::kPanelsPerGroup / Cfg::kPanels;
    const int panels = panels_in<Cfg>(p.extent, row_block);
    const uint32_t value_bytes = panels * Cfg::Tile::kValueBytes,
                   metadata_bytes = panels * Cfg::kTileMetadataBytes;
    const uint32_t full = smem.full(stage);
    ptx::mbarrier_arrive_expect_bytes(
        full, Cfg::kXBytes + Cfg::kWeights * (value_bytes + metadata_bytes));
    const size_t tile = p.extent.first_tile(row_block / kBlocksPerGroup, k_tile) +
                        row_block % kBlocksPerGroup * Cfg::kPanels;
#pragma unroll
    for (int w = 0; w < Cfg::kWeights; ++w) {
      ptx::bulk_copy(smem.values(stage, w), p.values[w] + tile * Cfg::Tile::kValueBytes,
                     value_bytes, full, ptx::L2Hint::kEvictFirst);
      ptx::bulk_copy(smem.metadata(stage, w), p.metadata[w] + tile * Cfg::kTileMetadataBytes,
                     metadata_bytes, full, ptx::L2Hint::kEvictFirst);
    }
  }
  __device__ __forceinline__ void copy_x(int stage, int k_tile) const {
#pragma unroll
    for (int box = 0; box < Cfg::kXBoxes; ++box)
      ptx::tensor_copy(smem.x(stage) + box * Cfg::kXBoxBytes, x_map,
                       k_tile * Cfg::Tile::kDenseK + box * Cfg::kXBoxColumns, 0, smem.full(stage),
                       ptx::L2Hint::kEvictLast);
  }
  // The first turn of the ring: weights at once, x when the kernel that made it has finished.
  // Returns the tiles issued.
  __device__ __forceinline__ int first_turn(int row_block, KTiles k) {
    const int count = k.count < Cfg::kStages ? k.count : Cfg::kStages;
    for (int i = 0; i < count; ++i) copy_weights(i, row_block, k.at(i));
    ptx::wait_for_predecessor();
    for (int i = 0; i < count; ++i) {
      copy_x(i, k.at(i));
      ring.advance();
    }
    return count;
  }
  __device__ __forceinline__ void run(int row_block, KTiles k, int begin) {
    for (int i = begin; i < k.count; ++i) {
      ptx::mbarrier_wait(smem.empty(ring.stage), ring.parity ^ 1);
      copy_weights(ring.stage, row_block, k.at(i));
      copy_x(ring.stage, k.at(i));
      ring.advance();
    }
  }
};

// Accumulators -> sums[weight][token][row] in this CTA's shared memory. kAdd: to the other team's.
template <class Cfg, bool kAdd>
__device__ __forceinline__ void write_sums(const Accumulators<Cfg>& d, const Smem<Cfg>& smem,
                                           int warp_idx, int lane_idx) {
  const int g = lane_idx / 4, t = lane_idx % 4;
#pragma unroll
  for (int w = 0; w < Cfg::kWeights; ++w) {
#pragma unroll
    for (int i = 0; i < Cfg::kWarpTiles; ++i) {
#pragma unroll
      for (int n = 0; n < Cfg::kTokenTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int token = n * 8 + 2 * t + e % 2;
          const int row = warp_idx * Cfg::kWarpRows + i * 16 + g + 8 * (e / 2);
          const uint32_t address =
              smem.sums() + ((w * Cfg::kTokens + token) * Cfg::kSumPitch + row) * 4;
          const float v = d[w][i][n][e];
          ptx::store_shared_f32(address, kAdd ? ptx::load_shared_f32(address) + v : v);
        }
      }
    }
  }
}

constexpr int kMostRanks = 8;

// Sum of 4 consecutive rows of one token over the CTAs of the cluster, starting with this one: a
// fixed order, since an output always belongs to the same CTA, and not the same neighbour for
// everybody at once. All loads first, or half of them where two CTAs share the registers: a
// neighbour's shared memory is far away. Lanes read consecutive 16-byte pieces.
template <class Cfg, int kRanks>
__device__ __forceinline__ void reduce_segment(float (&v)[4], const Smem<Cfg>& smem, int weight,
                                               int token, int row, int rank, int ranks) {
  constexpr int kMost = kRanks > 0 ? kRanks : kMostRanks;
  constexpr int kAtOnce = Cfg::kPaired != kAlone && kMost == 8 ? 4 : kMost;
  const uint32_t local = smem.sums() + ((weight * Cfg::kTokens + token) * Cfg::kSumPitch + row) * 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = 0.0f;
#pragma unroll(kAtOnce < kMost ? 1 : 2)
  for (int first = 0; first < kMost; first += kAtOnce) {
    float4 part[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i < ranks)
        part[i] =
            ptx::load_cluster_float4(ptx::map_to_cta(local, (rank + first + i) & (ranks - 1)));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i < ranks)
        v[0] += part[i].x, v[1] += part[i].y, v[2] += part[i].z, v[3] += part[i].w;
    }
  }
}

// Each CTA of the cluster finishes its share of the (token, 4 rows) segments.
template <class Cfg, int kRanks>
__device__ __forceinline__ void store_outputs(const Params<Cfg>& p, const Smem<Cfg>& smem,
                                              int row_block, int rank) {
  constexpr int kSegments = Cfg::kRows / 4;
  const int total = p.tokens * kSegments, ranks = kRanks > 0 ? kRanks : p.ranks;
  const int begin = total * rank / ranks, end = total * (rank + 1) / ranks;
#pragma unroll 1
  for (int item = begin + static_cast<int>(threadIdx.x); item < end;
       item += Cfg::kConsumerThreads) {
    const int token = item / kSegments, row = item % kSegments * 4;
    float v[4];
    reduce_segment<Cfg, kRanks>(v, smem, 0, token, row, rank, ranks);
    if constexpr (Cfg::kWeights == 2) {
      float up[4];
      reduce_segment<Cfg, kRanks>(up, smem, 1, token, row, rank, ranks);
      gate(v, up);
    }
    p.out.template store<4>(v, token, row_block * Cfg::kRows + row);
  }
}

// kRanks: CTAs of a cluster, or 0: p.ranks. With more than one, a cluster has one row block (see the
// launcher).
template <class Cfg, int kRanks>
__global__ void __launch_bounds__(Cfg::kThreads, Cfg::kPerSm)
    spmm_decode_sm90_kernel(const __grid_constant__ CUtensorMap x_map,
                            const __grid_constant__ Params<Cfg> p) {
  extern __shared__ __align__(1024) uint8_t raw_smem[];
  Smem<Cfg> smem(raw_smem);
  const int warp_idx = threadIdx.x / 32, lane_idx = threadIdx.x % 32;
  const int team = Cfg::kTeams == 1                 ? 0
                   : warp_idx < Cfg::kConsumerWarps ? warp_idx / Cfg::kTeamWarps
                                                    : warp_idx - Cfg::kConsumerWarps;
  const int row_warp = warp_idx - team * Cfg::kTeamWarps;  // of a consumer
  smem.first = team * Cfg::kStages;
  const int ranks = kRanks > 0 ? kRanks : p.ranks;
  const int rank = blockIdx.x & (ranks - 1);
  // Where all splits are possible no register should wait for the end of the loop: a step that is
  // too large with more ranks than one, and the rank asked for once more.
  const int first = kRanks > 0 ? blockIdx.x / ranks : ptx::cluster_idx();
  const int step = kRanks > 0 ? gridDim.x / ranks : gridDim.x;
  const KTiles k = KTiles::of(p.extent.k_tiles, rank + team * ranks, ranks * Cfg::kTeams);

  if (threadIdx.x == Cfg::kConsumerThreads) {
    for (int s = 0; s < Cfg::kAllStages; ++s) {
      ptx::mbarrier_init(smem.full(s), 1);
      ptx::mbarrier_init(smem.empty(s), Cfg::kTeamWarps * ptx::kArrivalsPerWarp);
    }
    ptx::mbarrier_init_fence();
    ptx::prefetch_tensor_map(&x_map);
  }
  __syncthreads();
  ptx::let_successor_start();

  if (warp_idx == Cfg::kConsumerWarps + team) {
    if (ptx::elect_one()) {
      Producer<Cfg> producer{&x_map, p, smem};
      const int issued = producer.first_turn(first, k);
      producer.run(first, k, issued);
      for (int row_block = first + step; row_block < p.row_blocks; row_block += step)
        producer.run(row_block, k, 0);
    }
    __syncwarp();
    if (ranks > 1) {  // the two barriers of the consumers below
      ptx::cluster_sync();
      ptx::cluster_sync();
    }
    return;
  }
  const auto sync = [&] {
    if (ranks > 1) ptx::cluster_sync();
    else ptx::named_barrier_sync(kConsumerBarrier, Cfg::kConsumerThreads);
  };
  RingPosition<Cfg::kStages> ring;
  for (int row_block = first; row_block < p.row_blocks; row_block += step) {
    Accumulators<Cfg> d = {};
    const bool has_rows =
        row_warp * Cfg::kWarpRows / tile64::kRows < panels_in<Cfg>(p.extent, row_block);
    for (int i = 0; i < k.count; ++i) {
      ptx::mbarrier_wait(smem.full(ring.stage), ring.parity);
      if (has_rows) {
        if constexpr (std::is_same_v<typename Cfg::W, Int4>)
          multiply_int4_stage<Cfg>(d, smem, ring.stage, row_warp, lane_idx);
        else if constexpr (Cfg::kWidens)
          multiply_widened_stage<Cfg>(d, smem, ring.stage, row_warp, lane_idx);
        else multiply_stage<Cfg>(d, smem, ring.stage, row_warp, lane_idx);
      }
      ptx::mbarrier_arrive_warp(smem.empty(ring.stage));
      ring.advance();
    }
    if (team == 0) write_sums<Cfg, false>(d, smem, row_warp, lane_idx);
    if constexpr (Cfg::kTeams == 2) {
      ptx::named_barrier_sync(kConsumerBarrier,
                              Cfg::kConsumerThreads);  // the first team's are there
      if (team == 1) write_sums<Cfg, true>(d, smem, row_warp, lane_idx);
    }
    sync();  // all sums are there
    ptx::wait_for_predecessor();
    store_outputs<Cfg, kRanks>(p, smem, row_block, kRanks > 0 ? rank : ptx::cluster_cta_rank());
    sync();  // all sums have been read: they may be overwritten, a neighbour may leave
  }
}

}  // namespace sparsekern::decode

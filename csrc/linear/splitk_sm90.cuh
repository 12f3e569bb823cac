// splitk_sm90.cuh: D[M,N] = A[M,K] · B[K,N], A 2:4-sparse, for problems that are over in a few
// microseconds. Hopper: copy engine + wgmma.sp; the stages and the main loop are the prefill
// kernel's.
//
//   M = out_features   N = tokens   K = in_features (dense count)
//   Specification: sparsekern/reference.py, linear
//
// Where there are fewer tiles than SMs the CTAs of a cluster share the K of a tile, and what
// follows the main loop takes as long as that. The prefill kernel cuts tiles, too, but its CTAs
// meet in global memory: write, fence, count, poll, read, some 4 us. Here each split finishes
// kOwnTokens tokens of the tile, the last fewer or none: a reduce-scatter. The others put their
// sums of these straight into its shared memory, in a place of their own; one cluster barrier; it
// adds its own sums first and then those of the splits after it: a fixed order.
//
// Across clusters: with so few tiles that one cluster of each leaves most SMs idle, several share
// the K of a tile. Each split then writes what it has added up to the workspace, and counts. The
// last one to do so adds up what all have written, in the order of the clusters, so that the bits
// do not depend on who that is, and stores it; the others end. Nobody waits.
//
// Columns of tiles are as wide as kTokens at most and equally wide: a box of x that has rows
// outside of x is slower to fetch than a whole one. What the main loop finds in the rest of a stage
// belongs to tokens that nobody stores.
//
// Roles (384 threads)                                             registers
//   warpgroups 0, 1   consumers: half of the rows each            240
//   warps 8, 9        producers: one lane copies x, one weights    24    (10, 11 idle)
//
// One tile, or one part of it, per cluster, and no cluster waits for another. Launches overlap
// (dependent_launch.cuh).
#pragma once
#include "linear/mainloop_sm90.cuh"
#include "linear/prefill_epilogue_sm90.cuh"
#include "ptx/cluster.cuh"
#include "ptx/dependent_launch.cuh"
#include "ptx/elect.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/memory.cuh"
#include "ptx/named_barrier.cuh"
#include "ptx/registers.cuh"
#include "ptx/tma.cuh"

namespace sparsekern::split {

using prefill::Accumulators;
using prefill::kConsumers;
using prefill::kSumTokens;
using prefill::kThreads;

// As the prefill kernel's, but what is on its way to y lies in the ring of stages, which is empty
// then, and the received sums take its place beside the ring.
// kAcross: clusters share tiles.
template <class T_, class Y_, int kPanels_, int kTokens_, int kSplits_, bool kAcross_>
struct Config : prefill::Config<T_, Y_, kPanels_, kTokens_, false> {
  using Base = prefill::Config<T_, Y_, kPanels_, kTokens_, false>;
  static constexpr int kSplits = kSplits_;
  static constexpr bool kAcross = kAcross_;
  static constexpr int kOwnTokens = tile64::ceil_div(kTokens_ / kSumTokens, kSplits) * kSumTokens;
  static constexpr int kOwnVectors = kOwnTokens / 8 * kPanels_;  // float4 of sums per thread
  static constexpr int kConsumerSumBytes = kOwnVectors * 128 * 16;
  static constexpr int kSumBytes = kConsumerSumBytes * kConsumers;  // from one other split
  static constexpr int kReceivedBytes = (kSplits - 1) * kSumBytes;
  static constexpr int kOutBytes = kReceivedBytes / kConsumers;  // where prefill::Smem puts them
  static constexpr int kBoxBytes = kOwnTokens * 128;             // a panel's rows of these tokens
  static constexpr int kStagingBytes = kPanels_ * kBoxBytes > kSumTokens* Base::kSumPitch
                                           ? kPanels_ * kBoxBytes
                                           : kSumTokens * Base::kSumPitch;
  static constexpr int kFit =
      (prefill::kSmemCapacity - 256 - kReceivedBytes - kConsumers * Base::kScaleBytes) /
      Base::kStageBytes;
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  static constexpr int kNotes = kStages + kConsumers;
  static constexpr int kSmemBytes = kStages * Base::kStageBytes + kReceivedBytes + 2 * kStages * 8 +
                                    kNotes * 16 + kConsumers * Base::kScaleBytes;
  static_assert(kTokens_ % kSumTokens == 0 && kStages >= 3 && kBoxBytes % 1024 == 0);
  static_assert(kConsumers * kStagingBytes <= kStages * Base::kStageBytes);
  static_assert(kSmemBytes <= prefill::kSmemCapacity);
};

template <class Output>
struct Params {
  const uint8_t* values;
  const uint8_t* metadata;
  Output out;
  tile64::Extent extent;
  int tokens;
  int column_tokens;  // of a column of tiles, up to kTokens; a multiple of 8
  int tile_rows;      // tiles along M; the clusters go through them first
  bool only_round;    // y is sums plus bias, rounded
  bool whole_pieces;  // of 16 bytes, each with a place in y
  ptx::L2Hint x_hint;
  // Across clusters:
  int clusters;        // of a tile
  float4* partials;    // [cluster][CTA][consumer][kOwnVectors][128]
  uint32_t* counters;  // [tile][CTA][consumer]: clusters that have written; zero between launches
};

// The part of the work of one CTA.
struct Part {
  int m, n;              // tile
  int token, token_end;  // those of the tile that exist
  int k_begin, k_end;    // column tiles

  template <class Cfg>
  static __device__ __forceinline__ Part of(const Params<typename Cfg::Output>& p) {
    const int cluster = ptx::cluster_idx(), rank = ptx::cluster_cta_rank(), k = p.extent.k_tiles;
    const int tile = Cfg::kAcross ? cluster / p.clusters : cluster;
    const int n = tile / p.tile_rows, token = n * p.column_tokens;
    Part part = {tile % p.tile_rows,
                 n,
                 token,
                 min(token + p.column_tokens, p.tokens),
                 k * rank / Cfg::kSplits,
                 k * (rank + 1) / Cfg::kSplits};
    if constexpr (Cfg::kAcross) {  // as equal, without products that may not fit
      const int parts = p.clusters * Cfg::kSplits, at = cluster % p.clusters * Cfg::kSplits + rank;
      const int fewest = k / parts, longer = k % parts;
      part.k_begin = at * fewest + min(at, longer);
      part.k_end = part.k_begin + fewest + (at < longer);
    }
    return part;
  }
};

template <class Cfg>
__device__ __forceinline__ void produce_x(const CUtensorMap* x_map,
                                          const Params<typename Cfg::Output>& p, const Part& part,
                                          const prefill::Smem<Cfg>& smem) {
  prefill::RingPosition<Cfg::kStages> ring;
#pragma unroll 1
  for (int k_tile = part.k_begin; k_tile < part.k_end; ++k_tile) {
    const int stage = ring.stage();
    ptx::mbarrier_wait(smem.empty(stage), ring.parity() ^ 1);
    ptx::store_shared_int4(smem.tile(stage), {part.m, part.n, 0, part.k_end - part.k_begin});
    ptx::mbarrier_arrive_expect_bytes(smem.full(stage), p.column_tokens * 128);
    ptx::tensor_copy(smem.x(stage), x_map, k_tile * Cfg::Tile::kDenseK, part.token,
                     smem.full(stage), p.x_hint);
    ring.advance();
  }
}

// Panels that the weight does not have are filled with copies of its last in the first turn of the
// ring, and left as they are then: no stage ever holds uninitialised metadata, and nobody stores
// their sums.
template <class Cfg>
__device__ __forceinline__ void produce_weights(const Params<typename Cfg::Output>& p,
                                                const Part& part, const prefill::Smem<Cfg>& smem) {
  prefill::RingPosition<Cfg::kStages> ring;
  const int wanted = part.m * Cfg::kTilePanels, last = p.extent.panels - 1;
  const int available =
      wanted + Cfg::kTilePanels - 1 <= last ? Cfg::kTilePanels : last - wanted + 1;
  const int group = wanted / tile64::kPanelsPerGroup, step = p.extent.panels_in(group);
  uint32_t tile = p.extent.first_tile(group, part.k_begin) + wanted % tile64::kPanelsPerGroup;
#pragma unroll 1
  for (int k_tile = part.k_begin; k_tile < part.k_end; ++k_tile, tile += step) {
    const int stage = ring.stage();
    const uint32_t full = smem.full(stage);
    const uint8_t* values = p.values + static_cast<size_t>(tile) * Cfg::Tile::kValueBytes;
    const uint8_t* metadata = p.metadata + static_cast<size_t>(tile) * Cfg::Tile::kMetadataBytes;
    const int slots = k_tile - part.k_begin < Cfg::kStages ? Cfg::kTilePanels : available;
    ptx::mbarrier_wait(smem.empty(stage), ring.parity() ^ 1);
    ptx::mbarrier_arrive_expect_bytes(full, slots * Cfg::kPanelBytes);
#pragma unroll 1
    for (int slot = 0, count = available; slot < slots; slot += count, count = 1) {
      ptx::bulk_copy(smem.values(stage) + slot * Cfg::Tile::kValueBytes, values,
                     count * Cfg::Tile::kValueBytes, full, ptx::L2Hint::kEvictNormal);
      ptx::bulk_copy(smem.metadata(stage) + slot * Cfg::Tile::kMetadataBytes, metadata,
                     count * Cfg::Tile::kMetadataBytes, full, ptx::L2Hint::kEvictNormal);
    }
    ring.advance();
  }
}

// --- after the main loop ---

// Received sums: [split after the owner][consumer][8 tokens][panel][thread], 16 bytes each. A
// thread has the same rows and tokens in every CTA of the cluster.
template <class Cfg>
__device__ __forceinline__ uint32_t received(const prefill::Smem<Cfg>& smem, int from_next) {
  return smem.base + Cfg::kStages * Cfg::kStageBytes + from_next * Cfg::kSumBytes +
         threadIdx.x / 128 * Cfg::kConsumerSumBytes + threadIdx.x % 128 * 16;
}

template <class Cfg>
__device__ __forceinline__ void scatter_sums(const Accumulators<Cfg>& d,
                                             const prefill::Smem<Cfg>& smem, int rank, int tokens) {
#pragma unroll
  for (int owner = 0; owner < Cfg::kSplits; ++owner) {
    if (owner == rank || owner * Cfg::kOwnTokens >= tokens) continue;
    const int after = rank > owner ? rank - owner : rank - owner + Cfg::kSplits;
    const uint32_t there = ptx::map_to_cta(received(smem, after - 1), owner);
#pragma unroll
    for (int v = 0; v < Cfg::kOwnVectors; ++v) {
      const int tokens8 = owner * Cfg::kOwnTokens / 8 + v / Cfg::kPanels;
      if (tokens8 >= Cfg::kTokens / 8) break;
      ptx::store_cluster_float4(there + v * 128 * 16,
                                prefill::bits_of(&d[v % Cfg::kPanels][tokens8 * 4]));
    }
  }
}

// kSplit: the rank of this CTA, as a constant, because accumulators cannot be indexed.
template <class Cfg, int kSplit>
__device__ __forceinline__ void reduce_sums(Accumulators<Cfg>& d, const prefill::Smem<Cfg>& smem) {
#pragma unroll
  for (int i = 0; i < Cfg::kSplits - 1; ++i) {
#pragma unroll
    for (int v = 0; v < Cfg::kOwnVectors; ++v) {
      const int tokens8 = kSplit * Cfg::kOwnTokens / 8 + v / Cfg::kPanels;
      if (tokens8 >= Cfg::kTokens / 8) break;
      prefill::add_bits(&d[v % Cfg::kPanels][tokens8 * 4],
                        ptx::load_shared_float4(received(smem, i) + v * 128 * 16));
    }
  }
}

// Across clusters: writes this CTA's sums of its own tokens. Returns false, but for the last
// cluster of the tile to do so, which then has the sums of all.
//
// The kernel before this one in the stream may use the same workspace. It has ended: the consumers
// come here with sums of x, which the producer has fetched after wait_for_predecessor.
template <class Cfg, int kSplit>
__device__ __forceinline__ bool gather_across(Accumulators<Cfg>& d,
                                              const Params<typename Cfg::Output>& p,
                                              const prefill::Smem<Cfg>& smem, int consumer) {
  constexpr int kFirst = kSplit * Cfg::kOwnTokens / 8;  // of eight tokens
  constexpr int kLeft = (Cfg::kTokens / 8 - kFirst) * Cfg::kPanels;
  constexpr int kVectors = kLeft < Cfg::kOwnVectors ? kLeft : Cfg::kOwnVectors;
  constexpr int kInFlight = 16;  // loads of a thread
  constexpr int kAtOnce = kVectors < kInFlight ? kVectors : kInFlight;
  constexpr int kClusters = kInFlight / kAtOnce;
  static_assert(kVectors % kAtOnce == 0);
  const int cluster = ptx::cluster_idx(), tile = cluster / p.clusters, thread = threadIdx.x % 128;
  const auto partial = [&](int of_cluster) {
    const int index = (of_cluster * Cfg::kSplits + kSplit) * kConsumers + consumer;
    return p.partials + index * Cfg::kOwnVectors * 128 + thread;
  };
  const auto sums = [&](int v) { return &d[v % Cfg::kPanels][(kFirst + v / Cfg::kPanels) * 4]; };
  float4* mine = partial(cluster);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) __stcg(mine + v * 128, prefill::bits_of(sums(v)));
  prefill::publish_sums(consumer);
  if (thread == 0) {
    uint32_t* counter = p.counters + (tile * Cfg::kSplits + kSplit) * kConsumers + consumer;
    const uint32_t before = ptx::atomic_add_acquire(counter, 1u);
    const bool last = before == static_cast<uint32_t>(p.clusters - 1);
    if (last) *counter = 0;  // nobody else counts on it; the next launch finds zero
    ptx::store_shared_int4(smem.progress(consumer), {last, 0, 0, 0});
  }
  ptx::named_barrier_sync(1 + consumer, 128);
  if (!ptx::load_shared_int4(smem.progress(consumer)).x) return false;
#pragma unroll
  for (int begin = 0; begin < kVectors; begin += kAtOnce) {
#pragma unroll
    for (int v = 0; v < kAtOnce; ++v) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums(begin + v)[i] = 0;
    }
#pragma unroll 1
    for (int first = 0; first < p.clusters; first += kClusters) {
      float4 add[kClusters][kAtOnce] = {};
#pragma unroll
      for (int i = 0; i < kClusters; ++i) {
        const float4* from = partial(tile * p.clusters + first + i);
        if (first + i < p.clusters) {
#pragma unroll
          for (int v = 0; v < kAtOnce; ++v) add[i][v] = __ldcg(from + (begin + v) * 128);
        }
      }
#pragma unroll
      for (int i = 0; i < kClusters; ++i) {
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) prefill::add_bits(sums(begin + v), add[i][v]);
      }
    }
  }
  return true;
}

// first_token: of the tile; the finished tokens begin kSplit * kOwnTokens later. Sums plus bias,
// rounded, through boxes in shared memory, then 16 bytes per thread, shifted where pieces of y begin
// elsewhere.
template <class Cfg, int kSplit>
__device__ __forceinline__ void store_rounded(Accumulators<Cfg>& d, const typename Cfg::Output& out,
                                              const prefill::Smem<Cfg>& smem, bool whole_pieces,
                                              int token_end, int first_row, int first_token,
                                              uint32_t boxes, int consumer) {
  const prefill::ScalingOf<Cfg> scaling =
      prefill::prepare_sums<Cfg>(d, out, smem, consumer, first_row);
#pragma unroll
  for (int m = 0; m < Cfg::kPanels; ++m) {
#pragma unroll
    for (int part = 0; part < Cfg::kOwnTokens / 16; ++part) {
      const int tokens16 = kSplit * Cfg::kOwnTokens / 16 + part;
      if (tokens16 >= Cfg::kTokens / 16) break;
      prefill::stage_sums<Cfg>(&d[m][tokens16 * 8], scaling, m, tokens16 * 16,
                               boxes + m * Cfg::kBoxBytes + part * 16 * 128);
    }
  }
  ptx::named_barrier_sync(1 + consumer, 128);
  if (!whole_pieces) {
    prefill::store_shifted<Cfg>(out, boxes, Cfg::kOwnTokens, first_row,
                                first_token + kSplit * Cfg::kOwnTokens, token_end);
    return;
  }
  const int thread = threadIdx.x % 128, piece = thread % 8;
#pragma unroll
  for (int m = 0; m < Cfg::kPanels; ++m) {
#pragma unroll
    for (int part = 0; part < Cfg::kOwnTokens / 16; ++part) {
      const int own = part * 16 + thread / 8;
      const int token = first_token + kSplit * Cfg::kOwnTokens + own;
      const int row = first_row + m * 64 + piece * 8;
      if (token >= token_end || row >= out.out_features) continue;
      const uint4 words =
          ptx::load_shared_u128(boxes + m * Cfg::kBoxBytes + own * 128 + (piece ^ own % 8) * 16);
      *reinterpret_cast<uint4*>(out.y + token * out.y_stride + row) = words;
    }
  }
}

template <class Cfg, int kSplit = 0>
__device__ __forceinline__ void finish(Accumulators<Cfg>& d, const Params<typename Cfg::Output>& p,
                                       const prefill::Smem<Cfg>& smem, const Part& part, int rank,
                                       int consumer) {
  if constexpr (kSplit * Cfg::kOwnTokens >= Cfg::kTokens) return;
  if constexpr (kSplit + 1 < Cfg::kSplits) {
    if (rank != kSplit) {
      finish<Cfg, kSplit + 1>(d, p, smem, part, rank, consumer);
      return;
    }
  }
  reduce_sums<Cfg, kSplit>(d, smem);
  if constexpr (Cfg::kAcross && kSplit * Cfg::kOwnTokens < Cfg::kTokens) {
    if (part.token + kSplit * Cfg::kOwnTokens >= part.token_end) return;
    if (!gather_across<Cfg, kSplit>(d, p, smem, consumer)) return;
  }
  const int row = part.m * Cfg::kRows + consumer * Cfg::kConsumerRows;
  const uint32_t staging = smem.base + consumer * Cfg::kStagingBytes;
  if (p.only_round)
    store_rounded<Cfg, kSplit>(d, p.out, smem, p.whole_pieces, part.token_end, row, part.token,
                               staging, consumer);
  else
    prefill::store_activated<Cfg>(
        d, p.out, part.token_end, staging, consumer, [&] { return make_int2(row, part.token); },
        [](int i) { return i / (Cfg::kOwnTokens / kSumTokens) == kSplit; });
}

template <class Cfg>
__global__ void __launch_bounds__(kThreads, 1)
    spmm_split_sm90_kernel(const __grid_constant__ CUtensorMap x_map,
                           const __grid_constant__ Params<typename Cfg::Output> p) {
  extern __shared__ __align__(1024) uint8_t raw_smem[];
  const prefill::Smem<Cfg> smem(raw_smem);
  const int warpgroup_idx = ptx::uniform(threadIdx.x / 128);
  if (threadIdx.x == 0) {
    for (int s = 0; s < Cfg::kStages; ++s) {
      ptx::mbarrier_init(smem.full(s), prefill::kProducers);
      ptx::mbarrier_init(smem.empty(s), kConsumers * prefill::kReleases);
    }
    ptx::mbarrier_init_fence();
    ptx::prefetch_tensor_map(&x_map);
  }
  ptx::cluster_arrive();  // whoever scatters sums waits for this: the receiver must have started
  __syncthreads();
  ptx::let_successor_start();
  const Part part = Part::of<Cfg>(p);

  if (warpgroup_idx == kConsumers) {
    ptx::give_up_registers<prefill::kProducerRegisters>();
    const int warp_idx = ptx::uniform(threadIdx.x / 32) - kConsumers * 4;
    if (warp_idx == 0) {
      if (ptx::elect_one()) {
        ptx::wait_for_predecessor();  // it made x; it may read y
        produce_x<Cfg>(&x_map, p, part, smem);
      }
    } else if (warp_idx == 1) {
      if (ptx::elect_one()) produce_weights<Cfg>(p, part, smem);
    }
    __syncwarp();
    ptx::cluster_wait();
    ptx::cluster_sync();
  } else {
    ptx::take_registers<prefill::kConsumerRegisters>();
    const int rank = ptx::cluster_cta_rank();
    prefill::Consumer<Cfg> consumer{smem, {1, 1}, warpgroup_idx};
    Accumulators<Cfg> d;
    consumer.multiply(d, [&](int4) {
      if constexpr (Cfg::kScaled)
        prefill::fetch_scales<Cfg>(p.out, p.tokens, smem, warpgroup_idx,
                                   part.m * Cfg::kRows + warpgroup_idx * Cfg::kConsumerRows,
                                   part.token);
    });
    // With few rows a consumer may have multiplied nothing but copies of panels.
    const bool has_rows =
        part.m * Cfg::kRows + warpgroup_idx * Cfg::kConsumerRows < p.out.out_features;
    ptx::cluster_wait();
    if (has_rows) scatter_sums<Cfg>(d, smem, rank, part.token_end - part.token);
    ptx::cluster_sync();  // all sums have arrived; nobody reads the ring any more
    if (has_rows) finish<Cfg>(d, p, smem, part, rank, warpgroup_idx);
  }
}

}  // namespace sparsekern::split

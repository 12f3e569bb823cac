// mainloop_sm90.cuh: what a consumer warpgroup of the prefill and of the split kernel does: stages
// of the ring in, sums in registers out. Hopper: wgmma.sp.
//
// Timeline of a consumer: issue the first panel of stage s - wait until stage s-1 is done, release
// it - wait full[s+1], load its metadata - issue the other panels. So the tensor cores have work
// while the consumer waits, and the metadata is there when the next stage may be issued. Two sets
// of metadata registers take turns: that of stage s-1 is free when that of s+1 is loaded.
//
// The tensor cores add up products of e4m3 with some 14 bits. Promoted: their sums of 256 dense
// columns (two stages, four instructions) are added to others in float32, while they work for the
// other consumer.
#pragma once
#include "linear/tile_scheduler_sm90.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/memory.cuh"
#include "ptx/named_barrier.cuh"
#include "ptx/registers.cuh"
#include "ptx/wgmma_sp.cuh"

namespace sparsekern::prefill {

// Arrivals that tell one CTA that one consumer has finished with a stage.
constexpr int kReleases = ptx::kArrivalsPerWarp == 1 ? 1 : 128;

// Who must learn that this consumer has finished with a stage: lane j tells peer j.
struct Release {
  uint32_t empty;       // this CTA's first empty barrier
  uint32_t peer_empty;  // shared::cluster address of peer j's; 0 for lanes without a peer
  ClusterShape cluster;

  template <class Cfg>
  static __device__ __forceinline__ Release of(const Smem<Cfg>& smem, ClusterShape cluster) {
    const int lane = ptx::thread_idx_again() % 128;
    const bool active = lane < cluster.m + cluster.n - 1;
    return {smem.empty(0), active ? ptx::map_to_cta(smem.empty(0), peer(cluster, lane)) : 0,
            cluster};
  }
  // My column of the cluster, then my row without myself.
  static __device__ __forceinline__ int peer(ClusterShape cluster, int j) {
    const int rank = ptx::cluster_cta_rank(), cluster_m = rank % cluster.m,
              cluster_n = rank / cluster.m;
    if (j < cluster.m) return cluster_n * cluster.m + j;
    const int n = j - cluster.m;
    return (n < cluster_n ? n : n + 1) * cluster.m + cluster_m;
  }
  __device__ __forceinline__ void operator()(int stage) const {
    if constexpr (kReleases == 1) {
      if (peer_empty != 0) ptx::mbarrier_arrive_cluster(peer_empty + stage * 8);
    } else {
      for (int j = 0; j < cluster.m + cluster.n - 1; ++j)
        ptx::mbarrier_arrive_cluster(ptx::map_to_cta(empty, peer(cluster, j)) + stage * 8);
    }
  }
};

template <class Cfg>
struct Consumer {
  using Words = uint32_t[Cfg::Tile::kWords];  // of a panel
  using Metadata = Words[Cfg::kPanels];
  // Two words a panel in two sets are too many for the largest tile.
  static constexpr bool kByPanel = Cfg::Tile::kWords == 2 && Cfg::kTokens > 192;

  const Smem<Cfg> smem;
  const ClusterShape cluster;
  const int consumer;                 // 0 or 1
  RingPosition<Cfg::kStages> ring{};  // the stage whose metadata is loaded next

  // Where this thread's words of a stage are.
  __device__ __forceinline__ uint32_t metadata_of(int stage) const {
    // The largest tile has no register to keep the thread's index in; read here, it is there in
    // time.
    const uint32_t thread = Cfg::kTokens > 192 ? ptx::thread_idx_again() : threadIdx.x;
    return smem.metadata(stage) + consumer * Cfg::kPanels * Cfg::Tile::kMetadataBytes +
           thread % 128 * 4;
  }
  static __device__ __forceinline__ void load(Words& words, uint32_t from) {
#pragma unroll
    for (int w = 0; w < Cfg::Tile::kWords; ++w)
      words[w] = ptx::load_shared_u32(from + w * tile64::kWordsBytes);
  }
  // The first kCount panels of the next stage.
  template <int kCount = Cfg::kPanels>
  __device__ __forceinline__ void load_next(Metadata& metadata) {
    const uint32_t words = metadata_of(ring.stage());
    ptx::mbarrier_wait(smem.full(ring.stage()), ring.parity());
#pragma unroll
    for (int m = 0; m < kCount; ++m) load(metadata[m], words + m * Cfg::Tile::kMetadataBytes);
    ring.advance();
  }

  // One panel of a stage.
  __device__ __forceinline__ void issue(Accumulators<Cfg>& d, const Metadata& metadata, int m,
                                        int stage, bool accumulate) const {
    using Wgmma = ptx::WgmmaSp<typename Cfg::T, Cfg::kTokens>;
    const uint64_t a = tile64::weight_descriptor(smem.values(stage) +
                                                 consumer * Cfg::kPanels * Cfg::Tile::kValueBytes) +
                       m * (Cfg::Tile::kValueBytes >> 4);
    const uint64_t b = tile64::x_descriptor(smem.x(stage));
    Wgmma::template run<0>(d[m], a, b, metadata[m][0], accumulate);
    Wgmma::template run<Cfg::Tile::selector(1)>(d[m], a + tile64::kWeightStep, b + tile64::kXStep,
                                                metadata[m][Cfg::Tile::word(1)], 1);
  }

  // Issues the loaded stage into d. Between its panels, while the tensor cores are busy with the
  // first, waits for and releases the stage before and loads the next one's metadata. (With one
  // panel, in the split kernel, the second group is empty.)
  __device__ __forceinline__ void step(Accumulators<Cfg>& d, const Metadata& metadata,
                                       Metadata& next, const Release& release, int k_tile,
                                       int k_tiles, bool accumulate) {
    const int stage = ring.previous_stage();
    ptx::wgmma_fence();
    issue(d, metadata, 0, stage, accumulate);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    if (k_tile > 0) release(stage == 0 ? Cfg::kStages - 1 : stage - 1);
    if (k_tile + 1 < k_tiles) load_next(next);
    ptx::wgmma_fence();
#pragma unroll
    for (int m = 1; m < Cfg::kPanels; ++m) issue(d, metadata, m, stage, accumulate);
    ptx::wgmma_commit();
  }

  // All stages of an item, but the wait for the last one.
  __device__ __forceinline__ void multiply_stages(Accumulators<Cfg>& d, const Release& release) {
    Metadata even, odd;
    load_next(even);
    const int k_tiles = ptx::load_shared_int4(smem.tile(ring.previous_stage())).w;
    int k_tile = 0;
    while (true) {
      step(d, even, odd, release, k_tile, k_tiles, k_tile > 0);
      if (++k_tile == k_tiles) break;
      step(d, odd, even, release, k_tile, k_tiles, k_tile > 0);
      if (++k_tile == k_tiles) break;
    }
  }

  // The same with one set of metadata: a panel's words are loaded while the tensor cores work on
  // the other panel.
  __device__ __forceinline__ void multiply_by_panel(Accumulators<Cfg>& d, const Release& release) {
    Metadata metadata;
    load_next<1>(metadata);
    const int k_tiles = ptx::load_shared_int4(smem.tile(ring.previous_stage())).w;
#pragma unroll 1
    for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
      const int stage = ring.previous_stage();
      ptx::wgmma_fence();
      issue(d, metadata, 0, stage, k_tile > 0);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      if (k_tile > 0) release(stage == 0 ? Cfg::kStages - 1 : stage - 1);
      load(metadata[1], metadata_of(stage) + Cfg::Tile::kMetadataBytes);
      ptx::wgmma_fence();
      issue(d, metadata, 1, stage, k_tile > 0);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      if (k_tile + 1 < k_tiles) load_next<1>(metadata);
    }
  }

  // The same, promoted: the sums of the last one or two stages are left in `part`.
  __device__ __forceinline__ void multiply_promoted(Accumulators<Cfg>& d, Accumulators<Cfg>& part,
                                                    const Release& release) {
    Metadata even, odd;
    load_next(even);
    const int k_tiles = ptx::load_shared_int4(smem.tile(ring.previous_stage())).w;
#pragma unroll
    for (int m = 0; m < Cfg::kPanels; ++m) {
#pragma unroll
      for (int i = 0; i < Cfg::kTokens / 2; ++i) d[m][i] = 0.0f;
    }
    int k_tile = 0;
    while (true) {
      step(part, even, odd, release, k_tile, k_tiles, false);
      if (++k_tile == k_tiles) break;
      step(part, odd, even, release, k_tile, k_tiles, true);
      if (++k_tile == k_tiles) break;
      promote(d, part);
    }
  }
  static __device__ __forceinline__ void promote(Accumulators<Cfg>& d, Accumulators<Cfg>& part) {
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int m = 0; m < Cfg::kPanels; ++m) {
#pragma unroll
      for (int i = 0; i < Cfg::kTokens / 2; ++i) d[m][i] += part[m][i];
    }
  }

  // One item of work. Where it is goes to smem.progress before the last stage is given back.
  // before_end({tile m, tile n, ...}) is called, where there are scales to fetch, while the tensor
  // cores are busy with that stage.
  template <class BeforeEnd>
  __device__ __forceinline__ void multiply(Accumulators<Cfg>& d, BeforeEnd before_end) {
    const Release release = Release::of<Cfg>(smem, cluster);
    const auto end = [&] {
      if constexpr (Cfg::kScaled)
        before_end(ptx::load_shared_int4(smem.tile(ring.previous_stage())));
    };
    if constexpr (Cfg::kPromoted) {
      Accumulators<Cfg> part;
      multiply_promoted(d, part, release);
      end();
      promote(d, part);
    } else {
      if constexpr (kByPanel) multiply_by_panel(d, release);
      else multiply_stages(d, release);
      end();
      ptx::wgmma_wait<0>();
    }
    const int last = ring.previous_stage();
    if (threadIdx.x % 128 == 0) {
      int4 at = ptx::load_shared_int4(smem.tile(last));
      at.w = static_cast<int>(ring.state);
      ptx::store_shared_int4(smem.progress(consumer), at);
    }
    ptx::named_barrier_sync(1 + consumer, 128);  // nobody releases what lane 0 still reads
    release(last);
  }
};

}  // namespace sparsekern::prefill

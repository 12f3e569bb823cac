// mainloop_sm90.cuh: what a consumer warpgroup of the prefill and of the split kernel does: stages
// of the ring in, sums in registers out. Hopper: wgmma.sp.
//
// Timeline of a consumer: issue the first panel of stage s - wait until stage s-1 is done, release
// it - wait full[s+1], load its metadata - issue the other panels. So the tensor cores have work
// while the consumer waits, and the metadata is there when the next stage may be issued. Two sets
// of metadata registers take turns: that of stage s-1 is free when that of s+1 is loaded.
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
  using Metadata = uint32_t[Cfg::kPanels];

  const Smem<Cfg> smem;
  const ClusterShape cluster;
  const int consumer;                 // 0 or 1
  RingPosition<Cfg::kStages> ring{};  // the stage whose metadata is loaded next

  __device__ __forceinline__ void load(Metadata& metadata) {
    // The largest tile has no register to keep the thread's index in; read here, it is there in
    // time.
    const uint32_t thread = Cfg::kTokens > 192 ? ptx::thread_idx_again() : threadIdx.x;
    const uint32_t word = smem.metadata(ring.stage()) +
                          consumer * Cfg::kPanels * Cfg::Tile::kMetadataBytes + thread % 128 * 4;
    ptx::mbarrier_wait(smem.full(ring.stage()), ring.parity());
#pragma unroll
    for (int m = 0; m < Cfg::kPanels; ++m)
      metadata[m] = ptx::load_shared_u32(word + m * Cfg::Tile::kMetadataBytes);
    ring.advance();
  }

  // Issues the loaded stage into d. Between its panels, while the tensor cores are busy with the
  // first, waits for and releases the stage before and loads the next one's metadata. (With one
  // panel, in the split kernel, the second group is empty.)
  __device__ __forceinline__ void step(Accumulators<Cfg>& d, const Metadata& metadata,
                                       Metadata& next, const Release& release, int k_tile,
                                       int k_tiles) {
    using Wgmma = ptx::WgmmaSp<typename Cfg::T, Cfg::kTokens>;
    const int stage = ring.previous_stage();
    const uint64_t a = tile64::weight_descriptor(smem.values(stage) +
                                                 consumer * Cfg::kPanels * Cfg::Tile::kValueBytes);
    const uint64_t b = tile64::x_descriptor(smem.x(stage));
    const auto issue = [&](int m) {
      const uint64_t a_panel = a + m * (Cfg::Tile::kValueBytes >> 4);
      Wgmma::template run<0>(d[m], a_panel, b, metadata[m], k_tile > 0);
      Wgmma::template run<1>(d[m], a_panel + tile64::kWeightStep, b + tile64::kXStep, metadata[m],
                             1);
    };
    ptx::wgmma_fence();
    issue(0);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    if (k_tile > 0) release(stage == 0 ? Cfg::kStages - 1 : stage - 1);
    if (k_tile + 1 < k_tiles) load(next);
    ptx::wgmma_fence();
#pragma unroll
    for (int m = 1; m < Cfg::kPanels; ++m) issue(m);
    ptx::wgmma_commit();
  }

  // One item of work. Where it is goes to smem.progress before the last stage is given back.
  __device__ __forceinline__ void multiply(Accumulators<Cfg>& d) {
    const Release release = Release::of<Cfg>(smem, cluster);
    Metadata even, odd;
    load(even);
    const int k_tiles = ptx::load_shared_int4(smem.tile(ring.previous_stage())).w;
    int k_tile = 0;
    while (true) {
      step(d, even, odd, release, k_tile, k_tiles);
      if (++k_tile == k_tiles) break;
      step(d, odd, even, release, k_tile, k_tiles);
      if (++k_tile == k_tiles) break;
    }
    ptx::wgmma_wait<0>();
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

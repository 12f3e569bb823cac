// spmm_prefill_sm90.cuh: D[M,N] = A[M,K] · B[K,N] for many tokens, A 2:4-sparse. Hopper: copy
// engine + wgmma.sp.
//
//   M = out_features   N = tokens   K = in_features (dense count)
//   Specification: sparsekern/reference.py, linear
//
// Operands       memory                      moved by
//   values       tile64 (layout/tile64.cuh)  bulk copy; multicast over the cluster's token tiles
//   metadata     tile64                      bulk copy; one LDS.32 per thread, tile and 64 of K
//   x = Bᵀ       [N, K] row-major            tensor copy, swizzled; multicast over its rows
//   y = Dᵀ       [N, M] row-major            stmatrix.trans to smem, then 16-byte stores
//
// Tile: BLOCK_M x BLOCK_N x 64, BLOCK_M = 256 or 128 rows for two consumer warpgroups. BLOCK_M is
// as large as the accumulators allow, because B is the fat operand: it is not compressed and every
// 64 rows read it from smem once more.
//
// Roles (384 threads)                                                        registers
//   warpgroups 0, 1   consumers: half of the rows each                       240
//   warps 8, 9        producers: one lane copies x, one the weights           24    (10, 11 idle)
//
// Barriers      filled by                      released by                     arrivals
//   full[s]     copy engines of the cluster    -                               2 (own producers)
//   empty[s]    -                              both consumers of every CTA     2 * (CM + CN - 1)
//                                              that this CTA's copies reach
//
// Work: a persistent grid walks the tiles; the last, partly filled wave is cut along K so that
// every CTA has a share of it (few tokens: that wave is all there is). The CTAs that share a tile
// exchange float32 sums through global memory and each finishes the token blocks that it owns,
// adding the others in a fixed order.
//
// Timeline of a consumer: issue stage s - commit - wait full[s+1], load its metadata - wait until
// stage s-1 is done - release it. One group is always in flight, and the metadata is there when the
// next one may be issued. Metadata registers rotate through three sets, since a register that an
// in-flight wgmma reads must not be written (ptxas would serialise: C7513).
#pragma once
#include "../layout/tile64.cuh"
#include "../ptx/cluster.cuh"
#include "../ptx/mbarrier.cuh"
#include "../ptx/mma_sp.cuh"
#include "../ptx/tma.cuh"
#include "../ptx/wgmma_sp.cuh"
#include "epilogue.cuh"

namespace sparsekern::prefill {

constexpr int kConsumers = 2;  // warpgroups
constexpr int kProducers = 2;  // warps
constexpr int kThreads = (kConsumers + 1) * 128;
constexpr int kSmemCapacity = 227 * 1024;
constexpr int kRoundedTokens =
    32;                         // tokens per step of the epilogue when it stages rounded values ...
constexpr int kSumTokens = 16;  // ... and when it stages float32 sums
constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;

// kPanels: m64 tiles per consumer. kTokens: BLOCK_N.
template <class T_, int kPanels_, int kTokens_>
struct Config {
  using T = T_;
  static constexpr int kPanels = kPanels_;
  static constexpr int kTilePanels = kPanels * kConsumers;
  static constexpr int kRows = kTilePanels * tile64::kRows;  // BLOCK_M
  static constexpr int kTokens = kTokens_;                   // BLOCK_N
  static constexpr int kXBytes = kTokens * 128;
  static constexpr int kValueBytes = kTilePanels * tile64::kValueBytes;
  static constexpr int kMetadataBytes = kTilePanels * tile64::kMetadataBytes;
  static constexpr int kStageBytes = kXBytes + kValueBytes + kMetadataBytes;
  static constexpr int kConsumerRows = kPanels * tile64::kRows;
  static constexpr int kRoundedPitch = kConsumerRows * 2;    // bytes between staged tokens
  static constexpr int kSumPitch = (kConsumerRows + 4) * 4;  // +4 words spread the banks
  static constexpr int kOutBytes = kSumTokens * kSumPitch;   // per consumer; covers both forms
  static constexpr int kFit = (kSmemCapacity - 128 - kConsumers * kOutBytes) / kStageBytes;
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  static constexpr int kSmemBytes = kStages * kStageBytes + kConsumers * kOutBytes +
                                    2 * kStages * 8 + (kStages + kConsumers) * 16;
  static_assert(kRoundedTokens * kRoundedPitch <= kOutBytes);
  static_assert(kStages >= 3 && kSmemBytes <= kSmemCapacity && kTokens % kRoundedTokens == 0);
};

// CTAs of a cluster form a CM x CN grid: same column = same tokens (share x), same row = same
// weights (share A).
struct ClusterShape {
  int m, n;
};

template <class T>
struct Params {
  const uint8_t* values;
  const uint8_t* metadata;
  OutputSegment<T> out;
  tile64::Extent extent;
  int tokens;
  ClusterShape cluster;
  int clusters;                 // in the grid
  int tile_rows, tile_columns;  // cluster tiles along M and N
  int whole_tiles;     // cluster tiles that one cluster does alone
  int splits;          // parts of K that each of the others is cut into
  float4* partials;    // [CTA tile of the rest][split][token block][consumer][kPanels * 4][128]
  uint32_t* counters;  // [CTA tile of the rest][consumer][2]: arrived, done; zero between launches
  uint16_t row_mask;   // CTAs of the cluster's first row; shifted by a CTA's place in its column
  int group_m;         // rows of cluster tiles that are walked together, for L2
};

template <class Cfg>
struct Smem {
  uint32_t base;

  __device__ __forceinline__ explicit Smem(const void* raw) : base(ptx::smem_address(raw)) {
    if (base % 1024 != 0) __trap();  // the swizzle needs it; no static shared memory comes before
  }
  __device__ __forceinline__ uint32_t x(int stage) const { return base + stage * Cfg::kStageBytes; }
  __device__ __forceinline__ uint32_t values(int stage) const { return x(stage) + Cfg::kXBytes; }
  __device__ __forceinline__ uint32_t metadata(int stage) const {
    return values(stage) + Cfg::kValueBytes;
  }
  __device__ __forceinline__ uint32_t out(int consumer) const {
    return base + Cfg::kStages * Cfg::kStageBytes + consumer * Cfg::kOutBytes;
  }
  __device__ __forceinline__ uint32_t full(int stage) const {
    return base + Cfg::kStages * Cfg::kStageBytes + kConsumers * Cfg::kOutBytes + stage * 8;
  }
  __device__ __forceinline__ uint32_t empty(int stage) const {
    return full(stage) + Cfg::kStages * 8;
  }
  // Where the work is: {tile m, tile n, item, column tiles} for each stage, written by the producer
  // of x; {tile m, tile n, item, ring state} for a consumer in its epilogue. The accumulators leave
  // no registers to keep these in.
  __device__ __forceinline__ uint32_t tile(int stage) const {
    return full(0) + 2 * Cfg::kStages * 8 + stage * 16;
  }
  __device__ __forceinline__ uint32_t progress(int consumer) const {
    return tile(Cfg::kStages + consumer);
  }
};

// One item of work: a cluster tile, or one part of its K.
struct WorkItem {
  int tile, split, k_begin, k_end;
};

template <class T>
__device__ __forceinline__ int work_items(const Params<T>& p) {
  return p.whole_tiles + (p.tile_rows * p.tile_columns - p.whole_tiles) * p.splits;
}

template <class T>
__device__ __forceinline__ WorkItem work_item(const Params<T>& p, int index) {
  const int rest = index - p.whole_tiles, k_tiles = p.extent.k_tiles;
  if (rest < 0) return {index, 0, 0, k_tiles};
  const int split = rest % p.splits;
  return {p.whole_tiles + rest / p.splits, split, k_tiles * split / p.splits,
          k_tiles * (split + 1) / p.splits};
}

struct TilePosition {
  int m, n;  // CTA tile
};

// Cluster tile `index` -> this CTA's tile. Groups of group_m cluster rows; inside a group rows
// fastest, then tokens.
template <class T>
__device__ __forceinline__ TilePosition tile_position(const Params<T>& p, int index) {
  const int rank = ptx::cluster_cta_rank();
  const int group = index / (p.group_m * p.tile_columns),
            within = index % (p.group_m * p.tile_columns);
  const int first = group * p.group_m;
  const int height = p.tile_rows - first < p.group_m ? p.tile_rows - first : p.group_m;
  return {(first + within % height) * p.cluster.m + rank % p.cluster.m,
          within / height * p.cluster.n + rank / p.cluster.m};
}

// Position in the ring of stages; the parity flips at each turn. Both in one register: the
// consumers have none to spare.
template <int kStages>
struct RingPosition {
  uint32_t state = 0;  // 2 * stage + parity
  __device__ __forceinline__ int stage() const { return state / 2; }
  __device__ __forceinline__ int previous_stage() const {
    return state < 2 ? kStages - 1 : state / 2 - 1;
  }
  __device__ __forceinline__ uint32_t parity() const { return state % 2; }
  __device__ __forceinline__ void advance() {
    state += 2;
    if (state >= 2 * kStages) state = (state - 2 * kStages) ^ 1;
  }
};

// --- producer ---

template <class Cfg>
__device__ __forceinline__ void produce_x(const CUtensorMap* x_map,
                                          const Params<typename Cfg::T>& p, const Smem<Cfg>& smem,
                                          int index, RingPosition<Cfg::kStages>& ring) {
  const int rank = ptx::cluster_cta_rank(), cluster_m = rank % p.cluster.m;
  const uint16_t mask = ((1u << p.cluster.m) - 1)
                        << (rank - cluster_m);  // every CTA of my column of the cluster
  const int share = Cfg::kTokens / p.cluster.m;
  const WorkItem item = work_item(p, index);
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
      ptx::tensor_copy(slice, x_map, k_tile * tile64::kDenseK, row, full,
                       ptx::L2Hint::kEvictNormal);
    else
      ptx::tensor_copy_multicast(slice, x_map, k_tile * tile64::kDenseK, row, full, mask,
                                 ptx::L2Hint::kEvictNormal);
    ring.advance();
  }
}

// This CTA's share of the tile's panels. Panels that the weight does not have are filled with
// copies of the first, so that no stage ever holds uninitialised metadata.
template <class Cfg>
__device__ __forceinline__ void produce_weights(const Params<typename Cfg::T>& p,
                                                const Smem<Cfg>& smem, int index,
                                                RingPosition<Cfg::kStages>& ring) {
  const int rank = ptx::cluster_cta_rank(), cluster_n = rank / p.cluster.m;
  const int share = Cfg::kTilePanels / p.cluster.n, last = p.extent.panels - 1;
  const WorkItem item = work_item(p, index);
  const int wanted = tile_position(p, item.tile).m * Cfg::kTilePanels + cluster_n * share;
  const int panel = wanted < last ? wanted : last;
  const int available = wanted + share - 1 <= last ? share : last - panel + 1;
  const int superpanel = panel / tile64::kPanelsPerSuperpanel,
            step = p.extent.panels_in(superpanel);
  uint32_t tile =
      p.extent.first_tile(superpanel, item.k_begin) + panel % tile64::kPanelsPerSuperpanel;
#pragma unroll 1
  for (int k_tile = item.k_begin; k_tile < item.k_end; ++k_tile, tile += step) {
    const uint32_t full = smem.full(ring.stage());
    ptx::mbarrier_wait(smem.empty(ring.stage()), ring.parity() ^ 1);
    ptx::mbarrier_arrive_expect_bytes(full, Cfg::kValueBytes + Cfg::kMetadataBytes);
#pragma unroll 1
    for (int i = 0, count = available; i < share; i += count, count = 1) {
      const int slot = cluster_n * share + i;
      const uint32_t values = smem.values(ring.stage()) + slot * tile64::kValueBytes;
      const uint32_t metadata = smem.metadata(ring.stage()) + slot * tile64::kMetadataBytes;
      const uint8_t* from_values = p.values + static_cast<size_t>(tile) * tile64::kValueBytes;
      const uint8_t* from_metadata =
          p.metadata + static_cast<size_t>(tile) * tile64::kMetadataBytes;
      if (p.cluster.n == 1) {
        ptx::bulk_copy(values, from_values, count * tile64::kValueBytes, full,
                       ptx::L2Hint::kEvictNormal);
        ptx::bulk_copy(metadata, from_metadata, count * tile64::kMetadataBytes, full,
                       ptx::L2Hint::kEvictNormal);
      } else {
        // Every CTA of my row of the cluster.
        const uint16_t mask = p.row_mask << (rank - cluster_n * p.cluster.m);
        ptx::bulk_copy_multicast(values, from_values, count * tile64::kValueBytes, full, mask,
                                 ptx::L2Hint::kEvictNormal);
        ptx::bulk_copy_multicast(metadata, from_metadata, count * tile64::kMetadataBytes, full,
                                 mask, ptx::L2Hint::kEvictNormal);
      }
    }
    ring.advance();
  }
}

// --- consumers ---

template <class Cfg>
using Accumulators = float[Cfg::kPanels][Cfg::kTokens / 2];

// Who must learn that this consumer has finished with a stage: lane j tells peer j.
struct Release {
  // shared::cluster address of the peer's first empty barrier; 0 for lanes without a peer
  uint32_t empty_base;

  template <class Cfg>
  static __device__ __forceinline__ Release of(const Smem<Cfg>& smem, ClusterShape cluster) {
    const int rank = ptx::cluster_cta_rank(), cluster_m = rank % cluster.m,
              cluster_n = rank / cluster.m;
    const int lane = threadIdx.x % 128;
    int peer = cluster_n * cluster.m + lane;  // my column of the cluster
    if (lane >= cluster.m) {                  // then my row, without myself
      const int n = lane - cluster.m;
      peer = (n < cluster_n ? n : n + 1) * cluster.m + cluster_m;
    }
    const bool active = lane < cluster.m + cluster.n - 1;
    return {active ? ptx::map_to_cta(smem.empty(0), peer) : 0};
  }
  __device__ __forceinline__ void operator()(int stage) const {
    if (empty_base != 0) ptx::mbarrier_arrive_cluster(empty_base + stage * 8);
  }
};

template <class Cfg>
struct Consumer {
  using Metadata = uint32_t[Cfg::kPanels];

  const Smem<Cfg> smem;
  const Release release;
  const int consumer;                 // 0 or 1
  RingPosition<Cfg::kStages> ring{};  // the stage whose metadata is loaded next

  __device__ __forceinline__ void load(Metadata& metadata) {
    ptx::mbarrier_wait(smem.full(ring.stage()), ring.parity());
    const uint32_t word = smem.metadata(ring.stage()) +
                          consumer * Cfg::kPanels * tile64::kMetadataBytes + threadIdx.x % 128 * 4;
#pragma unroll
    for (int m = 0; m < Cfg::kPanels; ++m)
      metadata[m] = ptx::load_shared_u32(word + m * tile64::kMetadataBytes);
    ring.advance();
  }

  // Issues the loaded stage into d, loads the next one's metadata while that runs, then waits for
  // and releases the stage before.
  __device__ __forceinline__ void step(Accumulators<Cfg>& d, const Metadata& metadata,
                                       Metadata& next, int k_tile, int k_tiles) {
    using Wgmma = ptx::WgmmaSp<typename Cfg::T, Cfg::kTokens>;
    const int stage = ring.previous_stage();
    const uint64_t a = tile64::weight_descriptor(smem.values(stage) +
                                                 consumer * Cfg::kPanels * tile64::kValueBytes);
    const uint64_t b = tile64::x_descriptor(smem.x(stage));
    ptx::wgmma_fence();
#pragma unroll
    for (int m = 0; m < Cfg::kPanels; ++m) {
      const uint64_t a_panel = a + m * (tile64::kValueBytes >> 4);
      Wgmma::template run<0>(d[m], a_panel, b, metadata[m], k_tile > 0);
      Wgmma::template run<1>(d[m], a_panel + tile64::kWeightStep, b + tile64::kXStep, metadata[m],
                             1);
    }
    ptx::wgmma_commit();
    if (k_tile + 1 < k_tiles) load(next);
    ptx::wgmma_wait<1>();
    if (k_tile > 0) release(stage == 0 ? Cfg::kStages - 1 : stage - 1);
  }

  // One item of work. Where it is goes to smem.progress before the last stage is given back.
  __device__ __forceinline__ void multiply(Accumulators<Cfg>& d) {
    Metadata first, second, third;
    load(first);
    const int k_tiles = ptx::load_shared_int4(smem.tile(ring.previous_stage())).w;
    int k_tile = 0;
    while (true) {
      step(d, first, second, k_tile, k_tiles);
      if (++k_tile == k_tiles) break;
      step(d, second, third, k_tile, k_tiles);
      if (++k_tile == k_tiles) break;
      step(d, third, first, k_tile, k_tiles);
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

// --- epilogue ---

// What a consumer has accumulated: rows and tokens of y, and which blocks of 32 tokens it finishes:
// all of them, or every `splits`-th of a tile whose K is shared.
struct Finished {
  int row, token, split, splits;

  template <class Cfg>
  static __device__ __forceinline__ Finished of(const Params<typename Cfg::T>& p,
                                                const Smem<Cfg>& smem, int consumer) {
    const int4 at = ptx::load_shared_int4(smem.progress(consumer));
    const int rest = at.z - p.whole_tiles;
    return {at.x * Cfg::kRows + consumer * Cfg::kConsumerRows, at.y * Cfg::kTokens,
            rest < 0 ? 0 : rest % p.splits, rest < 0 ? 1 : p.splits};
  }
  __device__ __forceinline__ bool owns(int block) const { return block % splits == split; }
};

// Adds up a tile whose K is shared: writes the blocks that others own, waits for theirs, adds those
// of its own blocks, starting with the next split: a fixed order.
template <class Cfg>
__device__ __forceinline__ void exchange_sums(Accumulators<Cfg>& d,
                                              const Params<typename Cfg::T>& p,
                                              const Smem<Cfg>& smem, int consumer) {
  constexpr int kBlocks = Cfg::kTokens / kRoundedTokens, kVectors = Cfg::kPanels * 4;
  const int rest = ptx::load_shared_int4(smem.progress(consumer)).z - p.whole_tiles;
  const int split = rest % p.splits, thread = threadIdx.x % 128;
  const int cta_tile = rest / p.splits * p.cluster.m * p.cluster.n + ptx::cluster_cta_rank();
  const auto partial = [&](int of_split, int block) {
    return p.partials +
           (((static_cast<size_t>(cta_tile) * p.splits + of_split) * kBlocks + block) * kConsumers +
            consumer) *
               kVectors * 128 +
           thread;
  };
  uint32_t* counter = p.counters + (cta_tile * kConsumers + consumer) * 2;
  int owner = 0;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block, owner = owner + 1 == p.splits ? 0 : owner + 1) {
    if (owner == split) continue;
    float4* to = partial(split, block);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const float* from = &d[v / 4][block * 16 + v % 4 * 4];
      __stcg(to + v * 128, make_float4(from[0], from[1], from[2], from[3]));
    }
  }
  __threadfence();
  ptx::named_barrier_sync(1 + consumer, 128);
  if (thread == 0) {
    atomicAdd(counter, 1u);
    while (ptx::load_acquire(counter) != static_cast<uint32_t>(p.splits)) {
    }
  }
  ptx::named_barrier_sync(1 + consumer, 128);
  owner = 0;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block, owner = owner + 1 == p.splits ? 0 : owner + 1) {
    if (owner != split) continue;
#pragma unroll 1
    for (int i = 1; i < p.splits; ++i) {
      const float4* from = partial((split + i) % p.splits, block);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const float4 add = __ldcg(from + v * 128);
        float* to = &d[v / 4][block * 16 + v % 4 * 4];
        to[0] += add.x, to[1] += add.y, to[2] += add.z, to[3] += add.w;
      }
    }
  }
  ptx::named_barrier_sync(1 + consumer, 128);
  if (thread == 0 && atomicAdd(counter + 1, 1u) == static_cast<uint32_t>(p.splits - 1)) {
    counter[0] = 0;  // the last to leave; the next launch finds zeros
    counter[1] = 0;
  }
}

// Two ways from the accumulators of one consumer to y. Bias alone and 16-byte aligned rows: add,
// round, transpose through smem with stmatrix, 32 tokens at a time. Everything else: stage float32
// sums, 16 tokens at a time, and finish rows of 8 from there, so that the long code for activations
// and odd edges exists once and not once per accumulator.

template <class Cfg>
__device__ __forceinline__ void store_rounded(const Accumulators<Cfg>& d,
                                              const Params<typename Cfg::T>& p,
                                              const Smem<Cfg>& shared, int consumer) {
  using T = typename Cfg::T;
  const uint32_t smem = shared.out(consumer);
  const Finished at = Finished::of<Cfg>(p, shared, consumer);
  constexpr int kPieces = Cfg::kConsumerRows / 8;  // 16-byte pieces of one token's rows
  const int thread = threadIdx.x % 128, warp_idx = thread / 32, lane_idx = thread % 32;
  const int matrix = lane_idx / 8, line = lane_idx % 8;
  float bias[Cfg::kPanels][2];
#pragma unroll
  for (int m = 0; m < Cfg::kPanels; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = at.row + m * 64 + warp_idx * 16 + h * 8 + lane_idx / 4;
      bias[m][h] = p.out.bias && row < p.out.out_features ? to_float(p.out.bias[row]) : 0.0f;
    }
  }
  // This thread's pieces: one 16-byte piece of every kStride-th token.
  constexpr int kStride = 128 / kPieces;
  const int piece = thread % kPieces, row = at.row + piece * 8;
  T* to = p.out.y + static_cast<int64_t>(at.token + thread / kPieces) * p.out.y_stride + row;
  const int left = row < p.out.out_features ? p.tokens - at.token - thread / kPieces : 0;
#pragma unroll
  for (int part = 0; part < Cfg::kTokens / kRoundedTokens; ++part) {
    if (at.token + part * kRoundedTokens >= p.tokens) break;
    if (!at.owns(part)) continue;
#pragma unroll
    for (int m = 0; m < Cfg::kPanels; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* v = &d[m][(part * 4 + half * 2) * 4];
        const int token = half * 16 + matrix / 2 * 8 + line,
                  column = m * 8 + warp_idx * 2 + matrix % 2;
        ptx::stmatrix_x4_transposed(smem + token * Cfg::kRoundedPitch + ((column ^ line) * 16),
                                    pack_pair<T>(v[0] + bias[m][0], v[1] + bias[m][0]),
                                    pack_pair<T>(v[2] + bias[m][1], v[3] + bias[m][1]),
                                    pack_pair<T>(v[4] + bias[m][0], v[5] + bias[m][0]),
                                    pack_pair<T>(v[6] + bias[m][1], v[7] + bias[m][1]));
      }
    }
    ptx::named_barrier_sync(1 + consumer, 128);
#pragma unroll
    for (int i = 0; i < kRoundedTokens / kStride; ++i) {
      const int token = i * kStride + thread / kPieces;
      const uint4 v =
          ptx::load_shared_u128(smem + token * Cfg::kRoundedPitch + ((piece ^ (token % 8)) * 16));
      const int distance = part * kRoundedTokens + i * kStride;
      if (distance < left) *reinterpret_cast<uint4*>(to + distance * p.out.y_stride) = v;
    }
    ptx::named_barrier_sync(1 + consumer, 128);
  }
}

template <class Cfg>
__device__ __forceinline__ void store_activated(const Accumulators<Cfg>& d,
                                                const Params<typename Cfg::T>& p,
                                                const Smem<Cfg>& shared, int consumer) {
  const uint32_t smem = shared.out(consumer);
  const Finished at = Finished::of<Cfg>(p, shared, consumer);
  constexpr int kPieces = Cfg::kConsumerRows / 8;
  const int thread = threadIdx.x % 128, warp_idx = thread / 32, lane_idx = thread % 32;
  const uint32_t lane_smem =
      smem + lane_idx % 4 * 2 * Cfg::kSumPitch + (warp_idx * 16 + lane_idx / 4) * 4;
#pragma unroll 1
  for (int part = 0; part < Cfg::kTokens / kSumTokens; ++part) {
    if (at.token + part * kSumTokens >= p.tokens) break;
    if (!at.owns(part * kSumTokens / kRoundedTokens)) continue;
#pragma unroll
    for (int q = 0; q < Cfg::kTokens / kSumTokens; ++q) {
      if (q != part) continue;
#pragma unroll
      for (int m = 0; m < Cfg::kPanels; ++m) {
#pragma unroll
        for (int i = 0; i < 8; ++i)
          ptx::store_shared_f32(
              lane_smem + (i / 4 * 8 + i % 2) * Cfg::kSumPitch + (m * 64 + i / 2 % 2 * 8) * 4,
              d[m][q * 8 + i]);
      }
    }
    ptx::named_barrier_sync(1 + consumer, 128);
#pragma unroll 1
    for (int i = thread; i < kSumTokens * kPieces; i += 128) {
      const int token = i / kPieces, row = i % kPieces * 8,
                global_token = at.token + part * kSumTokens + token;
      if (global_token < p.tokens) {
        float v[8];
        ptx::load_shared_f32x8(v, smem + token * Cfg::kSumPitch + row * 4);
        p.out.template store<8>(v, global_token, at.row + row);
      }
    }
    ptx::named_barrier_sync(1 + consumer, 128);
  }
}

template <class Cfg>
__device__ __forceinline__ void store_tile(Accumulators<Cfg>& d, const Params<typename Cfg::T>& p,
                                           const Smem<Cfg>& smem, int consumer) {
  if (p.splits > 1 && ptx::load_shared_int4(smem.progress(consumer)).z >= p.whole_tiles)
    exchange_sums<Cfg>(d, p, smem, consumer);
  if (p.out.activation == Activation::kNone && !p.out.residual && p.out.aligned &&
      p.out.out_features % 8 == 0)
    store_rounded<Cfg>(d, p, smem, consumer);
  else store_activated<Cfg>(d, p, smem, consumer);
}

// --- kernel ---

template <class Cfg>
__global__ void __launch_bounds__(kThreads, 1)
    spmm_prefill_sm90_kernel(const __grid_constant__ CUtensorMap x_map,
                             const __grid_constant__ Params<typename Cfg::T> p) {
  extern __shared__ __align__(1024) uint8_t raw_smem[];
  const Smem<Cfg> smem(raw_smem);
  const int warpgroup_idx = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    for (int s = 0; s < Cfg::kStages; ++s) {
      ptx::mbarrier_init(smem.full(s), kProducers);
      ptx::mbarrier_init(smem.empty(s), kConsumers * (p.cluster.m + p.cluster.n - 1));
    }
    ptx::mbarrier_init_fence();
    ptx::prefetch_tensor_map(&x_map);
  }
  ptx::cluster_sync();

  if (warpgroup_idx == kConsumers) {
    ptx::give_up_registers<kProducerRegisters>();
    RingPosition<Cfg::kStages> ring;
    if (threadIdx.x == kConsumers * 128) {
#pragma unroll 1
      for (int index = ptx::cluster_idx(); index < work_items(p); index += p.clusters)
        produce_x<Cfg>(&x_map, p, smem, index, ring);
    } else if (threadIdx.x == kConsumers * 128 + 32) {
#pragma unroll 1
      for (int index = ptx::cluster_idx(); index < work_items(p); index += p.clusters)
        produce_weights<Cfg>(p, smem, index, ring);
    }
  } else {
    ptx::take_registers<kConsumerRegisters>();
    const Release release = Release::of<Cfg>(smem, p.cluster);
    Consumer<Cfg> consumer{smem, release, warpgroup_idx};
    int4 progress;
    do {  // the grid has no more clusters than there are items
      Accumulators<Cfg> d;
      consumer.multiply(d);
      store_tile<Cfg>(d, p, smem, warpgroup_idx);
      progress = ptx::load_shared_int4(smem.progress(warpgroup_idx));
      consumer.ring.state = progress.w;
    } while (progress.z + p.clusters < work_items(p));
  }
  ptx::
      cluster_sync();  // nobody leaves while a peer may still write to it or arrive on its barriers
}

}  // namespace sparsekern::prefill

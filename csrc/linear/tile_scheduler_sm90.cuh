// tile_scheduler_sm90.cuh: what the prefill kernel's roles agree on: the tile and its stages, the
// parameters, the map of shared memory, which work a cluster does, the ring of stages.
#pragma once
#include "layout/tile64.cuh"
#include "ptx/cluster.cuh"
#include "ptx/memory.cuh"
#include "ptx/tma.cuh"
#include "linear/epilogue.cuh"

namespace sparsekern::prefill {

constexpr int kConsumers = 2;  // warpgroups
constexpr int kProducers = 2;  // warps
constexpr int kThreads = (kConsumers + 1) * 128;
constexpr int kSmemCapacity = 227 * 1024;
constexpr int kBlockTokens =
    32;                         // tokens per step of the epilogue when it stages rounded values ...
constexpr int kMostSlots = 3;   // ... and steps whose copies to y may be under way
constexpr int kSumTokens = 16;  // tokens per step when it stages float32 sums
constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;

constexpr int stages_that_fit(int consumer_bytes, int stage_bytes) {
  const int fit = (kSmemCapacity - 512 - kConsumers * consumer_bytes) / stage_bytes;
  return fit < 8 ? fit : 8;
}

// T: type of x and of the weight's values. Y: of y. kPanels: m64 tiles per consumer. kTokens:
// BLOCK_N. kStreamed: the last wave is streamed (below). kPromoted: what the tensor cores have added
// up goes to float32 sums at short intervals (mainloop_sm90.cuh).
template <class T_, class Y_, int kPanels_, int kTokens_, bool kStreamed_, bool kPromoted_ = false>
struct Config {
  using T = T_;
  using Y = Y_;
  using Accumulator = typename Element<T>::Accumulator;
  using Tile = tile64::Tile<Element<T>::kStorageBits>;
  static constexpr bool kScaled = Element<T>::kStorageBits < 16;  // by channel and by token
  using Output = Epilogue<Y, kScaled>;
  static constexpr bool kStreamed = kStreamed_;
  static constexpr bool kPromoted = kPromoted_;
  static constexpr int kPanels = kPanels_;
  static constexpr int kTilePanels = kPanels * kConsumers;
  static constexpr int kRows = kTilePanels * tile64::kRows;  // BLOCK_M
  static constexpr int kTokens = kTokens_;                   // BLOCK_N
  static constexpr int kXBytes = kTokens * 128;
  static constexpr int kPanelBytes = Tile::kValueBytes + Tile::kMetadataBytes;
  static constexpr int kValueBytes = kTilePanels * Tile::kValueBytes;
  static constexpr int kMetadataBytes = kTilePanels * Tile::kMetadataBytes;
  static constexpr int kStageBytes = kXBytes + kValueBytes + kMetadataBytes;
  static constexpr int kConsumerRows = kPanels * tile64::kRows;
  // Where K is shared, blocks are owned. What is left of the tokens belongs to the last block; the
  // epilogue goes through it in a step of its own.
  static constexpr int kBlocks = kTokens / kBlockTokens;
  static constexpr int kSteps = (kTokens + kBlockTokens - 1) / kBlockTokens;
  static constexpr int kBoxBytes = kBlockTokens * tile64::kRows * kBytes<Y>;  // 32 tokens x 64 rows
  static constexpr int kSumPitch = (kConsumerRows + 4) * 4;  // +4 words spread the banks
  static constexpr int kScaleBytes = kScaled ? (kTokens + kConsumerRows) * 4 : 0;  // per consumer
  // 8-bit stages are larger by their metadata: where that costs a stage, a slot makes room for it.
  static constexpr int kFit =
      stages_that_fit(kMostSlots * kPanels * kBoxBytes + kScaleBytes, kStageBytes);
  static constexpr int kFitWithout =
      stages_that_fit((kMostSlots - 1) * kPanels * kBoxBytes + kScaleBytes, kStageBytes);
  static constexpr bool kGivesSlot = kScaled && kFitWithout > kFit;
  static constexpr int kSlots = kGivesSlot ? kMostSlots - 1 : kMostSlots;
  static constexpr int kOutBytes = kSlots * kPanels * kBoxBytes;  // per consumer; covers both forms
  static constexpr int kStages = kGivesSlot ? kFitWithout : kFit;
  static constexpr int kNotes = kStages + kConsumers * (2 + kSlots);  // int4; see Smem::tile
  static constexpr int kSmemBytes = kStages * kStageBytes + kConsumers * kOutBytes +
                                    2 * kStages * 8 + kNotes * 16 + kConsumers * kScaleBytes;
  static_assert(kSumTokens * kSumPitch <= kOutBytes);
  static_assert(kStageBytes % 1024 == 0 && kBoxBytes % 1024 == 0);  // swizzled boxes
  static_assert(kStages >= 3 && kSmemBytes <= kSmemCapacity);
};

// CTAs of a cluster form a CM x CN grid: same column = same tokens (share x), same row = same
// weights (share A).
struct ClusterShape {
  int m, n;
};

// How L2 should keep x: where one row of tiles reads it, nobody will again. tile_rows: of clusters.
inline ptx::L2Hint x_hint(int tile_rows) {
  return tile_rows == 1 ? ptx::L2Hint::kEvictFirst : ptx::L2Hint::kEvictNormal;
}

template <class Output>
struct Params {
  const uint8_t* values;
  const uint8_t* metadata;
  Output out;
  tile64::Extent extent;
  int tokens;
  ClusterShape cluster;
  int clusters;                 // in the grid
  int tile_rows, tile_columns;  // cluster tiles along M and N
  int whole_tiles;              // cluster tiles that one cluster does alone
  int splits;                   // parts of K that each of the others is cut into
  int stream_units;             // column tiles of all of the others, when they are streamed
  bool only_round;              // y is sums plus bias, rounded ...
  bool whole_boxes;             // ... in boxes that the copy engine takes there
  float4* partials;    // [CTA tile of the rest][split][token block][consumer][kPanels * 4][128]
  uint32_t* counters;  // [CTA tile of the rest][consumer][2]: arrived, done; zero between launches
  uint16_t row_mask;   // CTAs of the cluster's first row; shifted by a CTA's place in its column
  int group_m;         // rows of cluster tiles that are walked together, for L2
  ptx::L2Hint x_hint;
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
  // What a consumer has left in a slot for its store warp: {row, token, whether it ends a tile}.
  __device__ __forceinline__ uint32_t order(int consumer, int slot) const {
    return tile(Cfg::kStages + kConsumers * (1 + slot) + consumer);
  }
  // Thread 0's memory while it exchanges sums: {index of the tile's counters}.
  __device__ __forceinline__ uint32_t exchange(int consumer) const {
    return tile(Cfg::kStages + kConsumers * (1 + Cfg::kSlots) + consumer);
  }
  // float32 scales of a consumer's tile: of its tokens, then of its rows.
  __device__ __forceinline__ uint32_t scales(int consumer) const {
    return tile(Cfg::kNotes) + consumer * Cfg::kScaleBytes;
  }
  __device__ __forceinline__ uint32_t boxes(int consumer, int slot) const {
    return out(consumer) + slot * Cfg::kPanels * Cfg::kBoxBytes;
  }
};

// One item of work: a cluster tile, or one part of its K.
struct WorkItem {
  int tile, k_begin, k_end;
};

template <class Cfg>
__host__ __device__ __forceinline__ int work_items(const Params<typename Cfg::Output>& p) {
  if constexpr (Cfg::kStreamed) return p.whole_tiles + 2 * p.clusters;
  return p.whole_tiles + (p.tile_rows * p.tile_columns - p.whole_tiles) * p.splits;
}

// A streamed rest (stream-K): its tiles' column tiles lie end to end, and cluster c takes those
// from first_unit(c) to first_unit(c + 1). A piece is at most one tile long, so it meets one tile
// or two.
//
//   tile      |       t        |      t + 1     |
//   cluster   |   c - 1   |     c     |   c + 1 |
//   of c                  | 2nd | 1st |
//
// The cluster with the end of a tile finishes it; the others give it their sums. Each cluster first
// does what others finish, so nobody waits for somebody who waits.
template <class Output>
__host__ __device__ __forceinline__ int first_unit(const Params<Output>& p, int cluster) {
  return cluster * p.stream_units / p.clusters;
}
template <class Output>
__host__ __device__ __forceinline__ int cluster_of_unit(const Params<Output>& p, int unit) {
  return ((unit + 1) * p.clusters - 1) / p.stream_units;
}

// Its first (0) or second (1) item; the second is empty when the piece lies in one tile.
template <class Output>
__host__ __device__ __forceinline__ WorkItem streamed_item(const Params<Output>& p, int cluster,
                                                           int which) {
  const int k_tiles = p.extent.k_tiles;
  const int begin = first_unit(p, cluster), end = first_unit(p, cluster + 1);
  const int tile = begin / k_tiles, start = tile * k_tiles;
  if (end <= start + k_tiles)
    return {p.whole_tiles + tile, begin - start, which ? begin - start : end - start};
  if (which) return {p.whole_tiles + tile, begin - start, k_tiles};
  return {p.whole_tiles + tile + 1, 0, end - start - k_tiles};
}

template <class Cfg>
__host__ __device__ __forceinline__ WorkItem work_item(const Params<typename Cfg::Output>& p,
                                                       int index) {
  const int rest = index - p.whole_tiles, k_tiles = p.extent.k_tiles;
  if (rest < 0) return {index, 0, k_tiles};
  if constexpr (Cfg::kStreamed) return streamed_item(p, rest % p.clusters, rest / p.clusters);
  const int split = rest % p.splits;
  return {p.whole_tiles + rest / p.splits, k_tiles * split / p.splits,
          k_tiles * (split + 1) / p.splits};
}

// Whether a cluster has another item after this one.
template <class Cfg>
__host__ __device__ __forceinline__ bool has_next(const Params<typename Cfg::Output>& p,
                                                  int index) {
  const int next = index + p.clusters;
  if (next >= work_items<Cfg>(p)) return false;
  if (!Cfg::kStreamed || next < p.whole_tiles + p.clusters) return true;
  const WorkItem item = work_item<Cfg>(p, next);
  return item.k_begin < item.k_end;
}

struct TilePosition {
  int m, n;  // CTA tile
};

// Cluster tile `index` -> this CTA's tile. Groups of group_m cluster rows; inside a group rows
// fastest, then tokens.
template <class Output>
__device__ __forceinline__ TilePosition tile_position(const Params<Output>& p, int index) {
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

template <class Cfg>
using Accumulators = typename Cfg::Accumulator[Cfg::kPanels][Cfg::kTokens / 2];

}  // namespace sparsekern::prefill

// decode_tile_sm90.cuh: what the decode kernel's roles agree on: the row block and its stages, the
// parameters, the map of shared memory, the ring of stages, which column tiles a team has.
#pragma once
#include "layout/tile64.cuh"
#include "ptx/memory.cuh"
#include "linear/epilogue.cuh"

namespace sparsekern::decode {

constexpr int kConsumerBarrier = 1;
// Of a CTA, of `per_sm` on an SM: the system takes 1 KiB of 228 for each.
constexpr int smem_capacity(int per_sm) { return 228 * 1024 / per_sm - 1024; }
constexpr int kPairedTokens = 16;  // the most of a pair

enum Pair { kAlone, kTwoOfSm, kTwoTeams };  // the last column of SK_DECODE_CONFIGS

// W, X, Y: types of the weight's values, of x and of y. kTokenTiles: tokens in units of 8. kWeights:
// 1, or 2 for the gated form. kPanels: row panels of a row block, 4, 2 or 1. kScaleGroup: columns
// that share a scale of the metadata (int4), or 0. kPaired: Pair.
template <class W_, class X_, class Y_, int kTokenTiles_, int kWeights_, int kPanels_,
          int kScaleGroup_ = 0, int kPaired_ = kAlone>
struct Config {
  using W = W_;
  using X = X_;
  using Tile = tile64::Tile<Element<W>::kStorageBits>;
  using Y = Y_;
  static constexpr bool kWidens = Element<W>::kStorageBits < Element<X>::kStorageBits;
  static constexpr bool kScaled = kWidens;
  static constexpr int kScaleGroup = kScaleGroup_;
  static constexpr int kPanels = kPanels_;
  static constexpr int kRows = kPanels * tile64::kRows;
  static constexpr int kPaired = kPaired_;
  static constexpr int kTeams = kPanels == 1 || kPaired == kTwoTeams ? 2 : 1;
  static constexpr int kTeamWarps = kPanels == 1 ? 4 : 8;  // without the producer
  static constexpr int kConsumerWarps = kTeams * kTeamWarps;
  static constexpr int kConsumerThreads = kConsumerWarps * 32;
  static constexpr int kThreads = kConsumerThreads + 32 * kTeams;
  static constexpr int kWarpRows = kRows / kTeamWarps;  // 32 or 16
  static constexpr int kWarpTiles = kWarpRows / 16;
  static constexpr int kTokenTiles = kTokenTiles_;
  static constexpr int kWeights = kWeights_;
  static constexpr int kTokens = kTokenTiles * 8;
  static constexpr int kXBoxColumns = 64;
  static constexpr int kXBoxBytes = kTokens * 128;
  static constexpr int kXBoxes = Tile::kDenseK / kXBoxColumns;
  static constexpr int kXBytes = kXBoxes * kXBoxBytes;
  static constexpr int kValueBytes = kPanels * Tile::kValueBytes;
  static constexpr int kTileMetadataBytes = Tile::kMetadataBytes + tile64::scale_bytes(kScaleGroup);
  static constexpr int kMetadataBytes = kPanels * kTileMetadataBytes;
  static constexpr int kWeightBytes = kValueBytes + kMetadataBytes;
  static constexpr int kStageBytes =  // a multiple of 1024, for the swizzle of x
      tile64::ceil_div(kXBytes + kWeights * kWeightBytes, 1024) * 1024;
  static constexpr int kSumPitch = kRows + 4;  // words; +4 spreads the banks
  static constexpr int kSumBytes = kWeights * kTokens * kSumPitch * 4;
  static constexpr int kPerSm = kPaired == kTwoOfSm ? 2 : 1;
  static constexpr int kCapacity = smem_capacity(kPerSm);
  static constexpr int kFit = (kCapacity - 256 - kSumBytes) / kStageBytes / kTeams;
  static constexpr int kStages = kFit < 12 ? kFit : 12;  // of a team
  static constexpr int kAllStages = kTeams * kStages;
  static constexpr int kSmemBytes = kAllStages * kStageBytes + kSumBytes + 2 * kAllStages * 8;
  static_assert(kStages >= (Element<W>::kStorageBits < 8 ? 2 : 3) && kSmemBytes <= kCapacity);
  static_assert(Element<X>::kStorageBits == 16 && (kWidens || std::is_same_v<W, X>));
  static_assert(kWeights == 1 || !kWidens, "the epilogue has the scales of one weight");
};

// The split of K is an argument of the launch, so that one kernel has all of them; where two CTAs share
// an SM, and for weights of int8 and int4, but for int8 with 64 tokens, which would spill. The others
// have a kernel for each.
template <class Cfg>
constexpr bool kLaunchedSplit =
    Cfg::kPaired != kAlone ||
    (std::is_integral_v<typename Element<typename Cfg::W>::Accumulator> &&
     (Element<typename Cfg::W>::kStorageBits < 8 || Cfg::kTokenTiles < 8));

template <class Cfg>
struct Params {
  const uint8_t* values[2];
  const uint8_t* metadata[2];
  Epilogue<typename Cfg::Y, Cfg::kScaled> out;
  tile64::Extent extent;
  int row_blocks;
  int tokens;
  int ranks;  // CTAs of a cluster, a power of two; for kernels that have all splits
};

template <class Cfg>
Params<Cfg> make_params(const LinearProblem& p) {
  Params<Cfg> params = {};
  params.values[0] = static_cast<const uint8_t*>(p.weight.values);
  params.values[1] = static_cast<const uint8_t*>(p.up.values);
  params.metadata[0] = static_cast<const uint8_t*>(p.weight.metadata);
  params.metadata[1] = static_cast<const uint8_t*>(p.up.metadata);
  params.out = make_epilogue<typename Cfg::Y, Cfg::kScaled>(p);
  params.extent = tile64::Extent::of<typename Cfg::Tile>(p.out_features, p.in_features);
  params.row_blocks = tile64::ceil_div(params.extent.panels, Cfg::kPanels);
  params.tokens = p.tokens;
  return params;
}

template <class Cfg>
__device__ __forceinline__ int panels_in(const tile64::Extent& extent, int row_block) {
  const int left = extent.panels - row_block * Cfg::kPanels;
  return left < Cfg::kPanels ? left : Cfg::kPanels;
}

// Shared memory as byte addresses: stages first (1024-byte aligned for the swizzle), then sums,
// then barriers. Stages are counted from the first of a team.
template <class Cfg>
struct Smem {
  uint32_t base;
  int first = 0;

  __device__ __forceinline__ explicit Smem(const void* raw) : base(ptx::smem_address(raw)) {
    if (base % 1024 != 0) __trap();  // the swizzle needs it; no static shared memory comes before
  }
  __device__ __forceinline__ uint32_t x(int stage) const {
    return base + (first + stage) * Cfg::kStageBytes;
  }
  __device__ __forceinline__ uint32_t values(int stage, int weight) const {
    return x(stage) + Cfg::kXBytes + weight * Cfg::kWeightBytes;
  }
  __device__ __forceinline__ uint32_t metadata(int stage, int weight) const {
    return values(stage, weight) + Cfg::kValueBytes;
  }
  __device__ __forceinline__ uint32_t sums() const {
    return base + Cfg::kAllStages * Cfg::kStageBytes;
  }
  __device__ __forceinline__ uint32_t full(int stage) const {
    return sums() + Cfg::kSumBytes + (first + stage) * 8;
  }
  __device__ __forceinline__ uint32_t empty(int stage) const {
    return full(stage) + Cfg::kAllStages * 8;
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

// The column tiles of one team: first, first + step, ... The teams of a cluster interleave, so that
// together they read memory in order.
struct KTiles {
  int first, step, count;

  static __device__ __forceinline__ KTiles of(int k_tiles, int rank, int ranks) {
    return {rank, ranks, (k_tiles - rank + ranks - 1) / ranks};
  }
  __device__ __forceinline__ int at(int i) const { return first + i * step; }
};

template <class Cfg>
using Accumulators = float[Cfg::kWeights][Cfg::kWarpTiles][Cfg::kTokenTiles][4];

}  // namespace sparsekern::decode

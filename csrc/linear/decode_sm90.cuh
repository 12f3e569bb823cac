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
// Programmatic dependent launch: weights are constants, so their copies start before the previous
// kernel of the stream has finished; x, residual and y are touched only after it has.
#pragma once
#include "layout/tile64.cuh"
#include "ptx/cluster.cuh"
#include "ptx/dependent_launch.cuh"
#include "ptx/elect.cuh"
#include "ptx/matrix.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/memory.cuh"
#include "ptx/mma_sp.cuh"
#include "ptx/named_barrier.cuh"
#include "ptx/registers.cuh"
#include "ptx/tma.cuh"
#include "linear/decode_widen.cuh"
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

template <class Cfg>
using Accumulators = float[Cfg::kWeights][Cfg::kWarpTiles][Cfg::kTokenTiles][4];

// Where a warp's rows are in the values and the metadata of a stage: offsets of lane i, which names
// row i % 8 of matrix i / 8 of the first ldmatrix and has word i of the first m16 tile's metadata
// and the scale of its row i / 4.
template <class Cfg>
struct WarpRows {
  uint32_t values, metadata, scales;

  __device__ __forceinline__ WarpRows(int warp_idx, int lane_idx) {
    const int panel = warp_idx * Cfg::kWarpRows / tile64::kRows;
    const int first_m16 = warp_idx * Cfg::kWarpRows % tile64::kRows / 16;
    const int row_in_matrix = lane_idx % 8, matrix = lane_idx / 8;
    values = panel * Cfg::Tile::kValueBytes + (matrix / 2) * tile64::kChunkStride +
             (first_m16 * 2 + matrix % 2) * tile64::kRowGroupStride + row_in_matrix * 16;
    metadata = panel * Cfg::kTileMetadataBytes + first_m16 * 128 + lane_idx * 4;
    scales = panel * Cfg::kTileMetadataBytes + Cfg::Tile::kMetadataBytes +
             (first_m16 * 16 + lane_idx / 4) * 4;
  }
};

// One stage for one warp: its m16 tiles of each weight times all tokens, two k-steps.
template <class Cfg>
__device__ __forceinline__ void multiply_stage(Accumulators<Cfg>& d, const Smem<Cfg>& smem,
                                               int stage, int warp_idx, int lane_idx) {
  const WarpRows<Cfg> rows(warp_idx, lane_idx);
  const int row_in_matrix = lane_idx % 8, matrix = lane_idx / 8;
  const uint32_t b_lane = smem.x(stage) + row_in_matrix * 128;

  uint32_t metadata[Cfg::kWeights][Cfg::kWarpTiles];
#pragma unroll
  for (int w = 0; w < Cfg::kWeights; ++w) {
#pragma unroll
    for (int i = 0; i < Cfg::kWarpTiles; ++i)
      metadata[w][i] = ptx::load_shared_u32(smem.metadata(stage, w) + rows.metadata + i * 128);
  }
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    uint32_t a[Cfg::kWeights][Cfg::kWarpTiles][4];
#pragma unroll
    for (int w = 0; w < Cfg::kWeights; ++w) {
#pragma unroll
      for (int i = 0; i < Cfg::kWarpTiles; ++i)
        ptx::ldmatrix_x4(a[w][i], smem.values(stage, w) + rows.values +
                                      step * 2 * tile64::kChunkStride +
                                      i * 2 * tile64::kRowGroupStride);
    }
#pragma unroll
    for (int n = 0; n < Cfg::kTokenTiles; ++n) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, b_lane + n * 1024 + ((step * 4 + matrix) ^ row_in_matrix) * 16);
#pragma unroll
      for (int w = 0; w < Cfg::kWeights; ++w) {
#pragma unroll
        for (int i = 0; i < Cfg::kWarpTiles; ++i) {
          if (step == 0) ptx::mma_sp<typename Cfg::X, 0>(d[w][i][n], a[w][i], b, metadata[w][i]);
          else ptx::mma_sp<typename Cfg::X, 1>(d[w][i][n], a[w][i], b, metadata[w][i]);
        }
      }
    }
  }
}

// Pairs with 16 tokens have no register to keep what follows from a thread's place between stages: it
// is asked for again.
template <class Cfg>
constexpr bool kFewRegisters = Cfg::kPaired != kAlone && Cfg::kTokenTiles == 2;

template <class Cfg>
__device__ __forceinline__ void place_again(int& warp_idx, int& lane_idx) {
  if constexpr (kFewRegisters<Cfg>) {
    const int thread = static_cast<int>(ptx::thread_idx_again());
    warp_idx = thread / 32 % Cfg::kTeamWarps, lane_idx = thread % 32;
  }
}

// The same with weights of 8 bits: two units of two k-steps. See decode_widen.cuh.
template <class Cfg>
__device__ __forceinline__ void multiply_widened_stage(Accumulators<Cfg>& d, const Smem<Cfg>& smem,
                                                       int stage, int warp_idx, int lane_idx) {
  constexpr int kUnits = Cfg::Tile::kDenseK / 64, kUnitMetadataBytes = 512;
  place_again<Cfg>(warp_idx, lane_idx);
  const WarpRows<Cfg> rows(warp_idx, lane_idx);
  const Widen<typename Cfg::W, typename Cfg::X> widen(lane_idx);
  const uint32_t metadata_pair = rows.metadata & ~7u;  // rows g and g + 8 of the lane's k-step
  const uint32_t b_lane = smem.x(stage) + widened_b_offset(lane_idx);
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    uint32_t narrow[Cfg::kWeights][Cfg::kWarpTiles][4], metadata[Cfg::kWeights][Cfg::kWarpTiles];
#pragma unroll
    for (int w = 0; w < Cfg::kWeights; ++w) {
#pragma unroll
      for (int i = 0; i < Cfg::kWarpTiles; ++i) {
        ptx::ldmatrix_x4(narrow[w][i], smem.values(stage, w) + rows.values +
                                           unit * 2 * tile64::kChunkStride +
                                           i * 2 * tile64::kRowGroupStride);
        metadata[w][i] =
            widened_metadata(ptx::load_shared_u64(smem.metadata(stage, w) + metadata_pair +
                                                  unit * kUnitMetadataBytes + i * 128),
                             lane_idx);
      }
    }
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t a[Cfg::kWeights][Cfg::kWarpTiles][4];
#pragma unroll
      for (int w = 0; w < Cfg::kWeights; ++w) {
#pragma unroll
        for (int i = 0; i < Cfg::kWarpTiles; ++i) {
          widen(a[w][i][0], a[w][i][2], narrow[w][i][2 * step]);
          widen(a[w][i][1], a[w][i][3], narrow[w][i][2 * step + 1]);
        }
      }
#pragma unroll
      for (int n = 0; n < Cfg::kTokenTiles; ++n) {
        uint32_t b[4];
#pragma unroll
        for (int r = 0; r < 4; ++r)
          b[r] = ptx::load_shared_u32((b_lane ^ widened_b_flip(step, r)) + unit * Cfg::kXBoxBytes +
                                      n * 1024);
#pragma unroll
        for (int w = 0; w < Cfg::kWeights; ++w) {
#pragma unroll
          for (int i = 0; i < Cfg::kWarpTiles; ++i) {
            if (step == 0) ptx::mma_sp<typename Cfg::X, 0>(d[w][i][n], a[w][i], b, metadata[w][i]);
            else ptx::mma_sp<typename Cfg::X, 1>(d[w][i][n], a[w][i], b, metadata[w][i]);
          }
        }
      }
    }
  }
}

// The same with weights of 4 bits, in parts of one or two boxes of columns (two or four k-steps), whose
// sums are scaled. With many tokens a part is one box even where two have the same scale, and parts are
// not interleaved, for the registers. Where two CTAs share the registers of an SM, the boxes of a part
// are widened in turn, and the sums of all tokens wait for the last.
template <class Cfg>
__device__ __forceinline__ void multiply_int4_stage(Accumulators<Cfg>& d, const Smem<Cfg>& smem,
                                                    int stage, int warp_idx, int lane_idx) {
  constexpr bool kManyTokens = Cfg::kTokenTiles >= 8;
  constexpr int kBoxes = kManyTokens || Cfg::kScaleGroup == 64 ? 1 : 2;  // of a part
  constexpr int kParts = Cfg::kXBoxes / kBoxes;
  constexpr int kTurns = kFewRegisters<Cfg> ? kBoxes : 1,
                kWide = kBoxes / kTurns;                    // boxes of a turn
  constexpr int kHeld = kTurns > 1 ? Cfg::kTokenTiles : 1;  // sums that wait
  place_again<Cfg>(warp_idx, lane_idx);
  const WarpRows<Cfg> rows(warp_idx, lane_idx);
  const int row_in_matrix = lane_idx % 8, matrix = lane_idx / 8;
  // ldmatrix takes both chunks of a part for one m16 tile, or one chunk for the warp's one or two.
  constexpr int kLoads = kBoxes == 2 ? Cfg::kWarpTiles : 1;
  const int upper = matrix / 2;
  const uint32_t values =
      smem.values(stage, 0) + rows.values +
      (kBoxes == 2 ? 0
                   : upper * (Cfg::kWarpTiles - 1) * 2 * tile64::kRowGroupStride -
                         upper * tile64::kChunkStride);
  const uint32_t metadata_lane = smem.metadata(stage, 0) + rows.metadata;
  const uint32_t scales_lane = smem.metadata(stage, 0) + rows.scales;
  const uint32_t b_lane = smem.x(stage) + row_in_matrix * 128;
#pragma unroll(kManyTokens || kFewRegisters<Cfg> ? 1 : 2)
  for (int part = 0; part < kParts; ++part) {
    uint32_t narrow[kLoads][4];
#pragma unroll
    for (int load = 0; load < kLoads; ++load)
      ptx::ldmatrix_x4(narrow[load], values + part * kBoxes * tile64::kChunkStride +
                                         load * 2 * tile64::kRowGroupStride);
    float scale[Cfg::kWarpTiles][2];  // of rows g and g + 8
    float sums[kHeld][Cfg::kWarpTiles][4];
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      uint32_t a[2 * kWide][Cfg::kWarpTiles][4], metadata[kWide][Cfg::kWarpTiles];
#pragma unroll
      for (int i = 0; i < Cfg::kWarpTiles; ++i) {
#pragma unroll
        for (int box = 0; box < kWide; ++box) {
          const int of_part = turn * kWide + box;
          const uint32_t* words =
              kBoxes == 2 ? &narrow[i % kLoads][2 * of_part] : &narrow[0][2 * i];
#pragma unroll
          for (int step = 0; step < 2; ++step) {
#pragma unroll
            for (int r = 0; r < 4; ++r)
              a[2 * box + step][i][r] =
                  widened_int4<typename Cfg::X>(words[r % 2], step * 2 + r / 2);
          }
          metadata[box][i] = ptx::load_shared_u32(
              metadata_lane + (part * kBoxes + of_part) * tile64::kWordsBytes + i * 128);
        }
        if constexpr (Cfg::kScaleGroup != 0) {
          if (turn + 1 < kTurns) continue;
          const int group = part * kBoxes * Cfg::kXBoxColumns / Cfg::kScaleGroup;
#pragma unroll
          for (int half = 0; half < 2; ++half)
            scale[i][half] = __uint_as_float(ptx::load_shared_u32(
                scales_lane + (group * tile64::kRows + i * 16 + half * 8) * 4));
        }
      }
#pragma unroll
      for (int n = 0; n < Cfg::kTokenTiles; ++n) {
        float (&group_sums)[Cfg::kWarpTiles][4] = sums[n % kHeld];
#pragma unroll
        for (int step = 0; step < 2 * kWide; ++step) {
          uint32_t b[4];
          ptx::ldmatrix_x4(b, b_lane + (part * kBoxes + turn * kWide + step / 2) * Cfg::kXBoxBytes +
                                  n * 1024 + ((step % 2 * 4 + matrix) ^ row_in_matrix) * 16);
#pragma unroll
          for (int i = 0; i < Cfg::kWarpTiles; ++i) {
            float (&to)[4] = Cfg::kScaleGroup != 0 ? group_sums[i] : d[0][i][n];
            if (Cfg::kScaleGroup != 0 && turn == 0 && step == 0)
              to[0] = to[1] = to[2] = to[3] = 0.0f;
            if (step % 2 == 0)
              ptx::mma_sp<typename Cfg::X, 0>(to, a[step][i], b, metadata[step / 2][i]);
            else ptx::mma_sp<typename Cfg::X, 1>(to, a[step][i], b, metadata[step / 2][i]);
          }
        }
        if constexpr (Cfg::kScaleGroup != 0) {
          if (turn + 1 < kTurns) continue;
#pragma unroll
          for (int i = 0; i < Cfg::kWarpTiles; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e)
              d[0][i][n][e] = fmaf(group_sums[i][e], scale[i][e / 2], d[0][i][n][e]);
          }
        }
      }
    }
  }
}

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

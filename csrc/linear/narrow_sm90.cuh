// narrow_sm90.cuh: D[M,N] = A[M,K] · B[K,N], A 2:4-sparse of int4, B of 16 bits, for some 17 to
// 1024 tokens. Hopper: copy engine + wgmma.sp with A in registers.
//
//   M = out_features   N = tokens   K = in_features (dense count)
//   Specification: sparsekern/reference.py, linear
//
// The decode kernel (mma.sp) reads x from shared memory once for every 32 rows; wgmma.sp reads it
// once for 64, and reads no weights there. So a warpgroup has a panel of 64 rows and all tokens of
// the tile, takes its int4 by ldmatrix, which gives A's fragment as it is (layout/tile64.cuh), widens
// it in registers and multiplies from there. Each weight is read and widened once for every kTokens
// tokens.
//
// Scales of groups are multiplied into the widened numbers, in 16 bits: level * scale, rounded once
// (Scale below), which is the weight that `weight.to(dtype)` has. One scale a row is for the epilogue.
//
//   one CTA     = a tile of 256 rows x kTokens tokens, and one part of K
//   one cluster = rows x parts: CTAs whose tiles lie one below the other share their boxes of x, each
//                 fetches a slice for all of them; those of the same tile share its K, their sums meet
//                 in shared memory as in the decode kernel
//
// Roles (640 threads)                                              registers
//   warpgroups 0-3   consumers: 64 rows each, all tokens           112
//   warps 16, 17     producers: one lane copies weights, one x      32    (18, 19 idle)
//
// Barriers              filled by                      released by
//   full_weights[s]     copy engine: 256 columns       -
//   empty_weights[s]    -                              the 16 consumer warps: it is in registers
//   full_x[s]           copy engine: 128 columns       -
//   empty_x[s]          -                              a lane of each consumer of all CTAs that share x
//
// Timeline of a consumer, of 64 columns (a chunk, two wgmma.sp) at a time: widen one into a set of
// registers while the tensor cores multiply from the other set. What the set was multiplied by last
// is waited for before it changes.
//
// Columns of tiles are as wide as kTokens at most and equally wide, as in splitk_sm90.cuh. Weights are
// read before the predecessor has finished, x after.
#pragma once
#include "linear/decode_tile_sm90.cuh"
#include "linear/decode_widen.cuh"
#include "ptx/cluster.cuh"
#include "ptx/dependent_launch.cuh"
#include "ptx/elect.cuh"
#include "ptx/matrix.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/named_barrier.cuh"
#include "ptx/registers.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma_sp.cuh"

namespace sparsekern::narrow {

constexpr int kConsumers = 4;
constexpr int kConsumerThreads = kConsumers * 128;
constexpr int kThreads = kConsumerThreads + 128;
constexpr int kPanels = kConsumers, kRows = kPanels * tile64::kRows;
constexpr int kConsumerBarrier = 1;
constexpr int kHalves = 2;                   // of a tile's columns: what a stage of x has
constexpr int kBoxes = 2, kBoxColumns = 64;  // of a stage of x; a chunk of the weight each
constexpr int kMostParts = 8;
// Arrivals by which a consumer releases a stage of x.
constexpr int kReleases = ptx::kArrivalsPerWarp == 1 ? 1 : 128;

// kScaleGroup: columns that share a scale of the metadata, or 0.
template <class X_, int kTokens_, int kScaleGroup_>
struct Config {
  using X = X_;
  using Tile = tile64::Tile<4>;
  static constexpr int kTokens = kTokens_;
  static constexpr int kScaleGroup = kScaleGroup_;
  static constexpr int kValueBytes = kPanels * Tile::kValueBytes;
  static constexpr int kTileMetadataBytes = Tile::kMetadataBytes + tile64::scale_bytes(kScaleGroup);
  static constexpr int kMetadataBytes = kPanels * kTileMetadataBytes;
  static constexpr int kWeightBytes = kValueBytes + kMetadataBytes;
  static constexpr int kBoxBytes = kTokens * 128;
  static constexpr int kXBytes = kBoxes * kBoxBytes;
  static constexpr int kWeightStages = kTokens <= 32 ? 6 : kTokens <= 64 ? 4 : 3;
  static constexpr int kFit =
      (decode::smem_capacity(1) - 256 - kWeightStages * kWeightBytes) / kXBytes;
  static constexpr int kXStages = kFit < 8 ? kFit : 8;
  static constexpr int kRingBytes = kWeightStages * kWeightBytes + kXStages * kXBytes;
  static constexpr int kConsumerRegisters = kTokens > 96 ? 112 : 104;
  static constexpr int kProducerRegisters = kTokens > 96 ? 32 : 56;
  static constexpr int kSumPitch = kRows + 4;  // words; +4 spreads the banks
  static constexpr int kSmemBytes = kRingBytes + 2 * (kWeightStages + kXStages) * 8;
  static_assert(kXStages >= 3 && kSmemBytes <= decode::smem_capacity(1));
  static_assert(kTokens * kSumPitch * 4 <= kRingBytes, "sums lie where the ring was");
  static_assert(kWeightBytes % 1024 == 0 && kBoxBytes % 1024 == 0);
};

template <class X>
struct Params {
  const uint8_t* values;
  const uint8_t* metadata;
  Epilogue<X, true> out;
  tile64::Extent extent;
  int tokens;
  int columns;        // of tiles
  int column_tokens;  // of one of them, up to kTokens; a multiple of 8
  int slice_tokens;   // of a box of x that one CTA fetches; a multiple of 8
  int cluster_rows;   // CTAs of a cluster one below the other
  int parts;          // CTAs of a cluster that share the K of a tile
};

// The work of one CTA.
struct Part {
  int row, part;  // place in the cluster
  int m;          // tile; beyond the weight in the last cluster
  int token, token_end;
  decode::KTiles k;

  template <class X>
  static __device__ __forceinline__ Part of(const Params<X>& p) {
    const int cluster = ptx::cluster_idx(), rank = ptx::cluster_cta_rank();
    const int row = rank % p.cluster_rows, part = rank / p.cluster_rows;
    const int token = cluster % p.columns * p.column_tokens;
    return {row,
            part,
            cluster / p.columns * p.cluster_rows + row,
            token,
            min(token + p.column_tokens, p.tokens),
            decode::KTiles::of(p.extent.k_tiles, part, p.parts)};
  }
};

// Shared memory as byte addresses: stages of x first (1024-byte aligned for the swizzle), stages of
// the weight, barriers. Sums take the place of the stages in the end.
template <class Cfg>
struct Smem {
  uint32_t base;

  __device__ __forceinline__ explicit Smem(const void* raw) : base(ptx::smem_address(raw)) {
    if (base % 1024 != 0) __trap();  // the swizzle needs it; no static shared memory comes before
  }
  __device__ __forceinline__ uint32_t x(int stage) const { return base + stage * Cfg::kXBytes; }
  __device__ __forceinline__ uint32_t weights(int stage) const {
    return base + Cfg::kXStages * Cfg::kXBytes + stage * Cfg::kWeightBytes;
  }
  __device__ __forceinline__ uint32_t full_x(int stage) const {
    return base + Cfg::kRingBytes + stage * 8;
  }
  __device__ __forceinline__ uint32_t empty_x(int stage) const {
    return full_x(stage) + Cfg::kXStages * 8;
  }
  __device__ __forceinline__ uint32_t full_weights(int stage) const {
    return base + Cfg::kRingBytes + 2 * Cfg::kXStages * 8 + stage * 8;
  }
  __device__ __forceinline__ uint32_t empty_weights(int stage) const {
    return full_weights(stage) + Cfg::kWeightStages * 8;
  }
};

// --- producers ---

// Panels that the weight does not have are filled with copies of one that it has in the first turn of
// the ring, and left as they are then.
template <class Cfg>
__device__ __forceinline__ void produce_weights(const Params<typename Cfg::X>& p, const Part& part,
                                                const Smem<Cfg>& smem) {
  decode::RingPosition<Cfg::kWeightStages> ring;
  const int group = min(part.m, p.extent.groups - 1), panels = p.extent.panels_in(group);
  uint32_t tile = p.extent.first_tile(group, part.k.first);
  const auto hint = p.columns == 1 ? ptx::L2Hint::kEvictFirst : ptx::L2Hint::kEvictNormal;
#pragma unroll 1
  for (int i = 0; i < part.k.count; ++i, tile += panels * part.k.step) {
    const uint32_t full = smem.full_weights(ring.stage), to = smem.weights(ring.stage);
    const uint8_t* values = p.values + static_cast<size_t>(tile) * Cfg::Tile::kValueBytes;
    const uint8_t* metadata = p.metadata + static_cast<size_t>(tile) * Cfg::kTileMetadataBytes;
    const int slots = i < Cfg::kWeightStages ? kPanels : panels;
    ptx::mbarrier_wait(smem.empty_weights(ring.stage), ring.parity ^ 1);
    ptx::mbarrier_arrive_expect_bytes(full, slots * (Cfg::kWeightBytes / kPanels));
#pragma unroll 1
    for (int slot = 0, count = panels; slot < slots; slot += count, count = 1) {
      ptx::bulk_copy(to + slot * Cfg::Tile::kValueBytes, values, count * Cfg::Tile::kValueBytes,
                     full, hint);
      ptx::bulk_copy(to + Cfg::kValueBytes + slot * Cfg::kTileMetadataBytes, metadata,
                     count * Cfg::kTileMetadataBytes, full, hint);
    }
    ring.advance();
  }
}

template <class Cfg>
__device__ __forceinline__ void produce_x(const CUtensorMap* x_map,
                                          const Params<typename Cfg::X>& p, const Part& part,
                                          const Smem<Cfg>& smem) {
  decode::RingPosition<Cfg::kXStages> ring;
  const int slice = part.row * p.slice_tokens, token = part.token + slice;
  const auto mask =
      static_cast<uint16_t>(((1 << p.cluster_rows) - 1) << (part.part * p.cluster_rows));
#pragma unroll 1
  for (int i = 0; i < kHalves * part.k.count; ++i) {
    const int column = part.k.at(i / kHalves) * Cfg::Tile::kDenseK + i % kHalves * 128;
    const uint32_t full = smem.full_x(ring.stage), to = smem.x(ring.stage) + slice * 128;
    ptx::mbarrier_wait(smem.empty_x(ring.stage), ring.parity ^ 1);
    ptx::mbarrier_arrive_expect_bytes(full, kBoxes * p.cluster_rows * p.slice_tokens * 128);
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {
      if (p.cluster_rows > 1)
        ptx::tensor_copy_multicast(to + box * Cfg::kBoxBytes, x_map, column + box * kBoxColumns,
                                   token, full, mask, ptx::L2Hint::kEvictLast);
      else
        ptx::tensor_copy(to + box * Cfg::kBoxBytes, x_map, column + box * kBoxColumns, token, full,
                         ptx::L2Hint::kEvictLast);
    }
    ring.advance();
  }
}

// --- consumers ---

template <class Cfg>
using Accumulators = float[Cfg::kTokens / 2];

// A factor of two numbers of a row, as the sum of two numbers of 16 bits: level * scale needs no more
// bits than that for one rounding, within 2^-17 of the product.
template <class X>
struct Scale {
  uint32_t high = 0, low = 0;

  __device__ __forceinline__ void load(uint32_t smem) {
    const float scale = ptx::load_shared_f32(smem);
    high = pack_pair<X>(scale, scale);
    const float rest = scale - unpack_pair<X>(high).x;
    low = pack_pair<X>(rest, rest);
  }
  __device__ __forceinline__ uint32_t operator()(uint32_t levels) const {
    return multiply_add_pairs<X>(levels, high, multiply_pairs<X>(levels, low));
  }
};

// What wgmma.sp takes of a chunk in registers: A of two k-steps, and the metadata of both.
struct Operand {
  uint32_t a[2][4];
  uint32_t metadata;
};

// Word `of` of the chunk: of row g for even registers, g + 8 for odd ones.
template <class Cfg>
__device__ __forceinline__ void widen(Operand& operand, const uint32_t (&of)[2],
                                      const Scale<typename Cfg::X> (&scale)[2]) {
#pragma unroll
  for (int step = 0; step < 2; ++step) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const uint32_t levels = decode::widened_int4<typename Cfg::X>(of[r % 2], step * 2 + r / 2);
      operand.a[step][r] = Cfg::kScaleGroup != 0 ? scale[r % 2](levels) : levels;
    }
  }
}

template <class Cfg>
__device__ __forceinline__ void issue(Accumulators<Cfg>& d, const Operand& operand, uint32_t box) {
  using Wgmma = ptx::WgmmaSpRegisters<typename Cfg::X, Cfg::kTokens>;
  const uint64_t b = tile64::x_descriptor(box);
  ptx::wgmma_fence();
  Wgmma::template run<0>(d, operand.a[0], b, operand.metadata, 1);
  Wgmma::template run<1>(d, operand.a[1], b + tile64::kXStep, operand.metadata, 1);
  ptx::wgmma_commit();
}

// Who must learn that this consumer has finished with a stage of x: the CTAs that share it, by one
// thread each.
struct Release {
  uint32_t empty;  // a thread's: shared::cluster address of a CTA's first barrier, or 0
  int first_rank, cluster_rows;

  template <class Cfg>
  static __device__ __forceinline__ Release of(const Smem<Cfg>& smem, const Part& part,
                                               int cluster_rows) {
    const int thread = threadIdx.x % 128, first_rank = part.part * cluster_rows;
    if constexpr (kReleases > 1) return {smem.empty_x(0), first_rank, cluster_rows};
    return {thread < cluster_rows ? ptx::map_to_cta(smem.empty_x(0), first_rank + thread) : 0,
            first_rank, cluster_rows};
  }
  __device__ __forceinline__ void operator()(int stage) const {
    if constexpr (kReleases == 1) {
      if (empty != 0) ptx::mbarrier_arrive_cluster(empty + stage * 8);
    } else {
      for (int row = 0; row < cluster_rows; ++row)
        ptx::mbarrier_arrive_cluster(ptx::map_to_cta(empty, first_rank + row) + stage * 8);
    }
  }
};

// Stages of the ring in, sums in registers out.
template <class Cfg>
__device__ __forceinline__ void multiply(Accumulators<Cfg>& d, const Smem<Cfg>& smem,
                                         const Release& release, int k_tiles, int panel) {
  constexpr int kOfHalf = 2;  // chunks
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  // Lane i names row i % 8 of matrix i / 8: rows 0-7 and 8-15 of the warp's, in two chunks.
  const uint32_t values = panel * Cfg::Tile::kValueBytes + lane / 16 * tile64::kChunkStride +
                          (warp * 2 + lane / 8 % 2) * tile64::kRowGroupStride + lane % 8 * 16;
  const uint32_t metadata = Cfg::kValueBytes + panel * Cfg::kTileMetadataBytes + thread * 4;
  const uint32_t scales = Cfg::kValueBytes + panel * Cfg::kTileMetadataBytes +
                          Cfg::Tile::kMetadataBytes + (warp * 16 + lane / 4) * 4;
#pragma unroll
  for (int i = 0; i < Cfg::kTokens / 2; ++i) d[i] = 0.0f;
  decode::RingPosition<Cfg::kWeightStages> weights;
  decode::RingPosition<Cfg::kXStages> x;
  Operand even, odd;
#pragma unroll 1
  for (int i = 0; i < k_tiles; ++i) {
    const uint32_t stage = smem.weights(weights.stage);
    ptx::mbarrier_wait(smem.full_weights(weights.stage), weights.parity);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      uint32_t narrow[4];
      ptx::ldmatrix_x4(narrow, stage + values + half * kOfHalf * tile64::kChunkStride);
      Scale<typename Cfg::X> scale[2];
      const auto load_scales = [&](int chunk) {
        if constexpr (Cfg::kScaleGroup != 0) {
          const int group = (half * kOfHalf + chunk) * kBoxColumns / Cfg::kScaleGroup;
          scale[0].load(stage + scales + group * tile64::kRows * 4);
          scale[1].load(stage + scales + (group * tile64::kRows + 8) * 4);
        }
      };
      const auto words = stage + metadata + half * kOfHalf * tile64::kWordsBytes;
      load_scales(0);
      ptx::wgmma_wait<1>();  // `even` of the half before
      even.metadata = ptx::load_shared_u32(words);
      widen<Cfg>(even, {narrow[0], narrow[1]}, scale);
      ptx::mbarrier_wait(smem.full_x(x.stage), x.parity);
      issue<Cfg>(d, even, smem.x(x.stage));
      ptx::wgmma_wait<1>();  // `odd` of the half before
      if (i > 0 || half > 0) release(x.stage == 0 ? Cfg::kXStages - 1 : x.stage - 1);
      if (Cfg::kScaleGroup == kBoxColumns) load_scales(1);
      odd.metadata = ptx::load_shared_u32(words + tile64::kWordsBytes);
      widen<Cfg>(odd, {narrow[2], narrow[3]}, scale);
      if (half == kHalves - 1) ptx::mbarrier_arrive_warp(smem.empty_weights(weights.stage));
      issue<Cfg>(d, odd, smem.x(x.stage) + Cfg::kBoxBytes);
      x.advance();
    }
    weights.advance();
  }
  ptx::wgmma_wait<0>();
}

// Sums -> [token][row] of this CTA's shared memory.
template <class Cfg>
__device__ __forceinline__ void write_sums(const Accumulators<Cfg>& d, const Smem<Cfg>& smem) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32_t to = smem.base + (2 * t * Cfg::kSumPitch + threadIdx.x / 32 * 16 + g) * 4;
#pragma unroll
  for (int i = 0; i < Cfg::kTokens / 2; ++i)
    ptx::store_shared_f32(to + ((i / 4 * 8 + i % 2) * Cfg::kSumPitch + i / 2 % 2 * 8) * 4, d[i]);
}

// Each CTA finishes its share of the tile's (token, 4 rows): the sum over the parts, beginning with
// its own, in a fixed order, because an output always belongs to the same CTA.
template <class Cfg>
__device__ __forceinline__ void store_outputs(const Params<typename Cfg::X>& p, const Part& part,
                                              const Smem<Cfg>& smem) {
  constexpr int kSegments = kRows / 4;
  const int total = (part.token_end - part.token) * kSegments;
  const int begin = total * part.part / p.parts, end = total * (part.part + 1) / p.parts;
#pragma unroll 1
  for (int item = begin + static_cast<int>(threadIdx.x); item < end; item += kConsumerThreads) {
    const int token = item / kSegments, row = item % kSegments * 4;
    const uint32_t local = smem.base + (token * Cfg::kSumPitch + row) * 4;
    float4 sums[kMostParts] = {ptx::load_shared_float4(local)};
#pragma unroll
    for (int i = 1; i < kMostParts; ++i) {
      const int other = part.part + i < p.parts ? part.part + i : part.part + i - p.parts;
      if (i < p.parts)
        sums[i] =
            ptx::load_cluster_float4(ptx::map_to_cta(local, part.row + other * p.cluster_rows));
    }
    float v[4] = {sums[0].x, sums[0].y, sums[0].z, sums[0].w};
#pragma unroll
    for (int i = 1; i < kMostParts; ++i) {
      if (i < p.parts) v[0] += sums[i].x, v[1] += sums[i].y, v[2] += sums[i].z, v[3] += sums[i].w;
    }
    p.out.template store<4>(v, part.token + token, part.m * kRows + row);
  }
}

template <class Cfg>
__global__ void __launch_bounds__(kThreads, 1)
    spmm_narrow_sm90_kernel(const __grid_constant__ CUtensorMap x_map,
                            const __grid_constant__ Params<typename Cfg::X> p) {
  extern __shared__ __align__(1024) uint8_t raw_smem[];
  const Smem<Cfg> smem(raw_smem);
  const int warpgroup_idx = ptx::uniform(threadIdx.x / 128);
  if (threadIdx.x == 0) {
    for (int s = 0; s < Cfg::kXStages; ++s) {
      ptx::mbarrier_init(smem.full_x(s), 1);
      ptx::mbarrier_init(smem.empty_x(s), kConsumers * kReleases * p.cluster_rows);
    }
    for (int s = 0; s < Cfg::kWeightStages; ++s) {
      ptx::mbarrier_init(smem.full_weights(s), 1);
      ptx::mbarrier_init(smem.empty_weights(s), kConsumerThreads / 32 * ptx::kArrivalsPerWarp);
    }
    ptx::mbarrier_init_fence();
    ptx::prefetch_tensor_map(&x_map);
  }
  ptx::cluster_arrive();  // whoever copies or arrives elsewhere waits for this
  __syncthreads();
  ptx::let_successor_start();
  const Part part = Part::of(p);

  if (warpgroup_idx == kConsumers) {
    ptx::give_up_registers<Cfg::kProducerRegisters>();
    const int warp_idx = ptx::uniform((threadIdx.x - kConsumerThreads) / 32);
    if (warp_idx == 0) {
      if (ptx::elect_one()) produce_weights<Cfg>(p, part, smem);
    }
    __syncwarp();
    ptx::cluster_wait();
    if (warp_idx == 1) {
      if (ptx::elect_one()) {
        ptx::wait_for_predecessor();  // it made x; it may read y
        produce_x<Cfg>(&x_map, p, part, smem);
      }
    }
    __syncwarp();
    ptx::cluster_sync();
    ptx::cluster_sync();
    return;
  }
  ptx::take_registers<Cfg::kConsumerRegisters>();
  ptx::cluster_wait();
  {
    Accumulators<Cfg> d;
    multiply<Cfg>(d, smem, Release::of<Cfg>(smem, part, p.cluster_rows), part.k.count,
                  warpgroup_idx);
    ptx::named_barrier_sync(kConsumerBarrier,
                            kConsumerThreads);  // nobody reads the stages any more
    write_sums<Cfg>(d, smem);
  }
  ptx::cluster_sync();  // all sums are there
  ptx::wait_for_predecessor();
  store_outputs<Cfg>(p, part, smem);
  ptx::cluster_sync();  // all sums have been read: a neighbour may leave
}

}  // namespace sparsekern::narrow

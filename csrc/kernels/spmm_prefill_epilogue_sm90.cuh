// spmm_prefill_epilogue_sm90.cuh: from the accumulators of one consumer warpgroup to y; first, where
// the K of a tile is shared, the exchange of sums with the other clusters.
#pragma once
#include "../ptx/mma_sp.cuh"
#include "../ptx/tma.cuh"
#include "spmm_prefill_plan_sm90.cuh"

namespace sparsekern::prefill {

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

// A thread's sums of a block of 32 tokens, to and from memory: 128 threads side by side.
template <class Cfg>
__device__ __forceinline__ void write_block(const Accumulators<Cfg>& d, int block, float4* to) {
#pragma unroll
  for (int v = 0; v < Cfg::kPanels * 4; ++v) {
    const float* from = &d[v / 4][block * 16 + v % 4 * 4];
    __stcg(to + v * 128, make_float4(from[0], from[1], from[2], from[3]));
  }
}

template <class Cfg>
__device__ __forceinline__ void add_block(Accumulators<Cfg>& d, int block, const float4* from) {
#pragma unroll
  for (int v = 0; v < Cfg::kPanels * 4; ++v) {
    const float4 add = __ldcg(from + v * 128);
    float* to = &d[v / 4][block * 16 + v % 4 * 4];
    to[0] += add.x, to[1] += add.y, to[2] += add.z, to[3] += add.w;
  }
}

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
    write_block<Cfg>(d, block, partial(split, block));
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
      add_block<Cfg>(d, block, partial((split + i) % p.splits, block));
    }
  }
  ptx::named_barrier_sync(1 + consumer, 128);
  if (thread == 0 && atomicAdd(counter + 1, 1u) == static_cast<uint32_t>(p.splits - 1)) {
    counter[0] = 0;  // the last to leave; the next launch finds zeros
    counter[1] = 0;
  }
}

// The same for a tile of a streamed rest. Returns false when another cluster finishes the tile; this
// one has then given away its sums.
template <class Cfg>
__device__ __forceinline__ bool gather_streamed(Accumulators<Cfg>& d,
                                                const Params<typename Cfg::T>& p,
                                                const Smem<Cfg>& smem, int consumer) {
  constexpr int kBlocks = Cfg::kTokens / kRoundedTokens, kVectors = Cfg::kPanels * 4;
  const int index = ptx::load_shared_int4(smem.progress(consumer)).z, thread = threadIdx.x % 128;
  const int cluster = (index - p.whole_tiles) % p.clusters;
  const int ctas = p.cluster.m * p.cluster.n, rank = ptx::cluster_cta_rank();
  const WorkItem item = work_item<Cfg>(p, index);
  const int tile = item.tile - p.whole_tiles;
  const auto partial = [&](int of_cluster, int block) {
    return p.partials +
           ((static_cast<size_t>(of_cluster * ctas + rank) * kBlocks + block) * kConsumers +
            consumer) *
               kVectors * 128 +
           thread;
  };
  uint32_t* counter = p.counters + ((tile * ctas + rank) * kConsumers + consumer) * 2;
  if (item.k_end < p.extent.k_tiles) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      write_block<Cfg>(d, block, partial(cluster, block));
    }
    __threadfence();
    ptx::named_barrier_sync(1 + consumer, 128);
    if (thread == 0) atomicAdd(counter, 1u);
    return false;
  }
  const int first = cluster_of_unit(p, tile * p.extent.k_tiles);
  if (first == cluster) return true;
  if (thread == 0) {
    while (ptx::load_acquire(counter) != static_cast<uint32_t>(cluster - first)) {
    }
    counter[0] = 0;  // nobody else counts on it; the next launch finds zero
  }
  ptx::named_barrier_sync(1 + consumer, 128);
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll 1
    for (int other = first; other < cluster; ++other) {
      add_block<Cfg>(d, block, partial(other, block));
    }
  }
  return true;
}

// Two ways from the accumulators of one consumer to y. Bias alone and 16-byte aligned rows: add,
// round, transpose through smem with stmatrix, 32 tokens at a time, and leave the rest to the copy
// engine, which clips at the ends of y. Everything else: stage float32 sums, 16 tokens at a time, and
// finish rows of 8 from there, so that the long code for activations and odd edges exists once and
// not once per accumulator.

// Rounds a warp's 16 rows of 16 tokens and leaves them in a box, [token][64 rows of a panel]; a
// token's 8 pieces of 16 bytes are in the order of a 128-byte swizzle. v: 8 sums of a thread; low,
// high: the bias of its rows.
template <class T>
__device__ __forceinline__ void stage_rounded(const float* v, float low, float high, uint32_t box) {
  const int warp_idx = threadIdx.x % 128 / 32, lane_idx = threadIdx.x % 32;
  const int matrix = lane_idx / 8, line = lane_idx % 8;
  const int token = matrix / 2 * 8 + line, piece = warp_idx * 2 + matrix % 2;
  ptx::stmatrix_x4_transposed(
      box + token * 128 + ((piece ^ line) * 16), pack_pair<T>(v[0] + low, v[1] + low),
      pack_pair<T>(v[2] + high, v[3] + high), pack_pair<T>(v[4] + low, v[5] + low),
      pack_pair<T>(v[6] + high, v[7] + high));
}

// The bias of a thread's rows: those of the upper and the lower half of its warp's 16.
template <class Cfg>
using RowBias = float[Cfg::kPanels][2];
template <class Cfg>
__device__ __forceinline__ void load_bias(RowBias<Cfg>& bias,
                                          const OutputSegment<typename Cfg::T>& out,
                                          int first_row) {
  const int warp_idx = threadIdx.x % 128 / 32, lane_idx = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < Cfg::kPanels; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + m * 64 + warp_idx * 16 + h * 8 + lane_idx / 4;
      bias[m][h] = out.bias && row < out.out_features ? to_float(out.bias[row]) : 0.0f;
    }
  }
}

template <class Cfg>
__device__ __forceinline__ void store_rounded(const Accumulators<Cfg>& d, const CUtensorMap* y_map,
                                              const Params<typename Cfg::T>& p,
                                              const Smem<Cfg>& shared, int consumer) {
  using T = typename Cfg::T;
  const Finished at = Finished::of<Cfg>(p, shared, consumer);
  const int thread = threadIdx.x % 128;
  RowBias<Cfg> bias;
  load_bias<Cfg>(bias, p.out, at.row);
  if (thread == 0) ptx::tensor_store_wait_read<0>();  // the tile before; long done
  uint32_t slot = 0;
#pragma unroll
  for (int part = 0; part < Cfg::kTokens / kRoundedTokens; ++part) {
    if (at.token + part * kRoundedTokens >= p.tokens) break;
    if (!at.owns(part)) continue;
    if (thread == 0) ptx::tensor_store_wait_read<kSlots - 1>();
    ptx::named_barrier_sync(1 + consumer, 128);  // the slot has been read
    const uint32_t boxes = shared.out(consumer) + slot * Cfg::kPanels * Cfg::kBoxBytes;
    slot = slot + 1 == kSlots ? 0 : slot + 1;
    // Box m: 64 rows of 32 tokens.
#pragma unroll
    for (int m = 0; m < Cfg::kPanels; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        stage_rounded<T>(&d[m][(part * 4 + half * 2) * 4], bias[m][0], bias[m][1],
                         boxes + m * Cfg::kBoxBytes + half * 16 * 128);
      }
    }
    ptx::fence_before_tensor_store();
    ptx::named_barrier_sync(1 + consumer, 128);  // the slot has been written
    if (thread == 0) {
#pragma unroll
      for (int m = 0; m < Cfg::kPanels; ++m)
        ptx::tensor_store(y_map, at.row + m * 64, at.token + part * kRoundedTokens,
                          boxes + m * Cfg::kBoxBytes, ptx::L2Hint::kEvictFirst);
      ptx::tensor_store_commit();
    }
  }
}

// owns(part): whether this CTA stores that part of 16 tokens.
template <class Cfg, class Owns>
__device__ __forceinline__ void store_activated(const Accumulators<Cfg>& d,
                                                const OutputSegment<typename Cfg::T>& out,
                                                int tokens, int first_row, int first_token,
                                                uint32_t smem, int consumer, Owns owns) {
  constexpr int kPieces = Cfg::kConsumerRows / 8;
  const int thread = threadIdx.x % 128, warp_idx = thread / 32, lane_idx = thread % 32;
  const uint32_t lane_smem =
      smem + lane_idx % 4 * 2 * Cfg::kSumPitch + (warp_idx * 16 + lane_idx / 4) * 4;
#pragma unroll 1
  for (int part = 0; part < Cfg::kTokens / kSumTokens; ++part) {
    if (first_token + part * kSumTokens >= tokens) break;
    if (!owns(part)) continue;
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
                global_token = first_token + part * kSumTokens + token;
      if (global_token < tokens) {
        float v[8];
        ptx::load_shared_f32x8(v, smem + token * Cfg::kSumPitch + row * 4);
        out.template store<8>(v, global_token, first_row + row);
      }
    }
    ptx::named_barrier_sync(1 + consumer, 128);
  }
}

template <class Cfg>
__device__ __forceinline__ void store_tile(Accumulators<Cfg>& d, const CUtensorMap* y_map,
                                           const Params<typename Cfg::T>& p, const Smem<Cfg>& smem,
                                           int consumer) {
  const bool rest = ptx::load_shared_int4(smem.progress(consumer)).z >= p.whole_tiles;
  if constexpr (Cfg::kStreamed) {
    if (rest && !gather_streamed<Cfg>(d, p, smem, consumer)) return;
  } else {
    if (p.splits > 1 && rest) exchange_sums<Cfg>(d, p, smem, consumer);
  }
  if (p.whole_boxes) {
    store_rounded<Cfg>(d, y_map, p, smem, consumer);
  } else {
    const Finished at = Finished::of<Cfg>(p, smem, consumer);
    store_activated<Cfg>(d, p.out, p.tokens, at.row, at.token, smem.out(consumer), consumer,
                         [&](int part) { return at.owns(part * kSumTokens / kRoundedTokens); });
  }
}

}  // namespace sparsekern::prefill

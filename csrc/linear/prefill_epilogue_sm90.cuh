// prefill_epilogue_sm90.cuh: from the accumulators of one consumer warpgroup to y; first, where
// the K of a tile is shared, the exchange of sums with the other clusters.
#pragma once
#include <type_traits>

#include "ptx/matrix.cuh"
#include "ptx/memory.cuh"
#include "ptx/named_barrier.cuh"
#include "ptx/registers.cuh"
#include "ptx/tma.cuh"
#include "linear/tile_scheduler_sm90.cuh"

namespace sparsekern::prefill {

// What a consumer has accumulated: rows and tokens of y, and which blocks of 32 tokens it finishes:
// all of them, or every `splits`-th of a tile whose K is shared.
struct Finished {
  int row, token, split, splits;

  template <class Cfg>
  static __device__ __forceinline__ Finished of(const Params<typename Cfg::Output>& p,
                                                const Smem<Cfg>& smem, int consumer) {
    const int4 at = ptx::load_shared_int4(smem.progress(consumer));
    const int rest = at.z - p.whole_tiles;
    return {at.x * Cfg::kRows + consumer * Cfg::kConsumerRows, at.y * Cfg::kTokens,
            rest < 0 ? 0 : rest % p.splits, rest < 0 ? 1 : p.splits};
  }
  __device__ __forceinline__ bool owns(int block) const { return block % splits == split; }
};

// The block that a step of 32 tokens belongs to.
template <class Cfg>
constexpr __host__ __device__ int block_of(int step) {
  return step < Cfg::kBlocks ? step : Cfg::kBlocks - 1;
}

// Four sums on their way from one thread block to another: float32, or int32 as its bits.
__device__ __forceinline__ float4 bits_of(const float* sums) {
  return make_float4(sums[0], sums[1], sums[2], sums[3]);
}
__device__ __forceinline__ float4 bits_of(const int32_t* sums) {
  return make_float4(__int_as_float(sums[0]), __int_as_float(sums[1]), __int_as_float(sums[2]),
                     __int_as_float(sums[3]));
}
__device__ __forceinline__ void add_bits(float* sums, float4 add) {
  sums[0] += add.x, sums[1] += add.y, sums[2] += add.z, sums[3] += add.w;
}
__device__ __forceinline__ void add_bits(int32_t* sums, float4 add) {
  sums[0] += __float_as_int(add.x), sums[1] += __float_as_int(add.y);
  sums[2] += __float_as_int(add.z), sums[3] += __float_as_int(add.w);
}

// A thread's sums of a step of 32 tokens (the last one may be shorter), to and from memory: 128
// threads side by side.
template <class Cfg>
__device__ __forceinline__ void write_block(const Accumulators<Cfg>& d, int step, float4* to) {
#pragma unroll
  for (int v = 0; v < Cfg::kPanels * 4; ++v) {
    if (step * 4 + v % 4 >= Cfg::kTokens / 8) continue;
    const auto* from = &d[v / 4][step * 16 + v % 4 * 4];
    __stcg(to + v * 128, bits_of(from));
  }
}

template <class Cfg>
__device__ __forceinline__ void add_block(Accumulators<Cfg>& d, int step, const float4* from) {
#pragma unroll
  for (int v = 0; v < Cfg::kPanels * 4; ++v) {
    if (step * 4 + v % 4 >= Cfg::kTokens / 8) continue;
    add_bits(&d[v / 4][step * 16 + v % 4 * 4], __ldcg(from + v * 128));
  }
}

// Where a consumer's sums of a tile lie: `index` counts CTA tiles, or their parts of K. Block 0;
// kBlockStride further the next one.
template <class Cfg>
constexpr int kBlockStride = kConsumers * Cfg::kPanels * 4 * 128;
template <class Cfg>
__device__ __forceinline__ float4* partial_sums(const Params<typename Cfg::Output>& p, int index,
                                                int consumer) {
  return p.partials + static_cast<size_t>(index) * Cfg::kSteps * kBlockStride<Cfg> +
         consumer * Cfg::kPanels * 4 * 128 + ptx::thread_idx_again() % 128;
}

// After a consumer's threads have written sums and before one of them counts it: whoever finds the
// count finds the sums.
__device__ __forceinline__ void publish_sums(int consumer) {
  __threadfence();
  ptx::named_barrier_sync(1 + consumer, 128);
}

// Adds up a tile whose K is shared: writes the blocks that others own, waits for theirs, adds those
// of its own blocks, starting with the next split: a fixed order.
template <class Cfg>
__device__ __forceinline__ void exchange_sums(Accumulators<Cfg>& d,
                                              const Params<typename Cfg::Output>& p,
                                              const Smem<Cfg>& smem, int consumer) {
  const int rest = ptx::load_shared_int4(smem.progress(consumer)).z - p.whole_tiles;
  const int split = rest % p.splits, thread = threadIdx.x % 128;
  const int cta_tile = rest / p.splits * p.cluster.m * p.cluster.n + ptx::cluster_cta_rank();
  if (thread == 0)  // for the end, since the accumulators leave no registers
    ptx::store_shared_int4(smem.exchange(consumer),
                           {(cta_tile * kConsumers + consumer) * 2, 0, 0, 0});
  const auto counter = [&] {
    return p.counters + ptx::load_shared_int4(smem.exchange(consumer)).x;
  };
  float4* mine = partial_sums<Cfg>(p, cta_tile * p.splits + split, consumer);
  int own = split;
#pragma unroll
  for (int step = 0; step < Cfg::kSteps; ++step) {
    if (block_of<Cfg>(step) != own) write_block<Cfg>(d, step, mine + step * kBlockStride<Cfg>);
    else if (step < Cfg::kBlocks - 1) own += p.splits;
  }
  publish_sums(consumer);
  if (thread == 0) {
    uint32_t* arrived = counter();
    atomicAdd(arrived, 1u);
    while (ptx::load_acquire(arrived) != static_cast<uint32_t>(p.splits)) {
    }
  }
  ptx::named_barrier_sync(1 + consumer, 128);
  own = split;
#pragma unroll
  for (int step = 0; step < Cfg::kSteps; ++step) {
    if (block_of<Cfg>(step) != own) continue;
    if (step < Cfg::kBlocks - 1) own += p.splits;
#pragma unroll 1
    for (int i = 1, of = split; i < p.splits; ++i) {
      of = of + 1 == p.splits ? 0 : of + 1;
      add_block<Cfg>(
          d, step,
          partial_sums<Cfg>(p, cta_tile * p.splits + of, consumer) + step * kBlockStride<Cfg>);
    }
  }
  ptx::named_barrier_sync(1 + consumer, 128);
  if (thread == 0) {
    uint32_t* arrived = counter();
    if (atomicAdd(arrived + 1, 1u) == static_cast<uint32_t>(p.splits - 1)) {
      arrived[0] = 0;  // the last to leave; the next launch finds zeros
      arrived[1] = 0;
    }
  }
}

// The same for a tile of a streamed rest. Returns false when another cluster finishes the tile;
// this one has then given away its sums.
template <class Cfg>
__device__ __forceinline__ bool gather_streamed(Accumulators<Cfg>& d,
                                                const Params<typename Cfg::Output>& p,
                                                const Smem<Cfg>& smem, int consumer) {
  const int index = ptx::load_shared_int4(smem.progress(consumer)).z, thread = threadIdx.x % 128;
  const int cluster = (index - p.whole_tiles) % p.clusters;
  const int ctas = p.cluster.m * p.cluster.n, rank = ptx::cluster_cta_rank();
  const WorkItem item = work_item<Cfg>(p, index);
  const int tile = item.tile - p.whole_tiles;
  const auto partial = [&](int of_cluster, int step) {
    return partial_sums<Cfg>(p, of_cluster * ctas + rank, consumer) + step * kBlockStride<Cfg>;
  };
  uint32_t* counter = p.counters + ((tile * ctas + rank) * kConsumers + consumer) * 2;
  if (item.k_end < p.extent.k_tiles) {
#pragma unroll
    for (int step = 0; step < Cfg::kSteps; ++step) {
      write_block<Cfg>(d, step, partial(cluster, step));
    }
    publish_sums(consumer);
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
  for (int step = 0; step < Cfg::kSteps; ++step) {
#pragma unroll 1
    for (int other = first; other < cluster; ++other) {
      add_block<Cfg>(d, step, partial(other, step));
    }
  }
  return true;
}

// Three ways from the accumulators of one consumer to y. Bias alone and 16-byte aligned rows: add,
// round, transpose through smem with stmatrix, 32 tokens at a time, and leave the rest to the copy
// engine, which clips at the ends of y. Bias alone and other rows: the same, but the consumer itself
// shifts what is staged to where 16-byte pieces of y begin (store_shifted). Everything else: stage
// float32 sums, 16 tokens at a time, and finish rows of 8 from there, so that the long code for
// activations exists once and not once per accumulator.
//
// Copies to y are issued by one warp per consumer, its store warp, so that the consumer fills the
// next slot meanwhile. Two named barriers per slot:
//
//   consumer   wait free[slot] - stage - fence - arrive filled[slot] - next slot
//   store warp wait filled[slot] - copy - wait until the copy before has been read - arrive
//              free[slot before]; after a tile's last copy, free that slot, too
//
// Both begin each tile with slot 0.
constexpr int kSlotThreads = 128 + 32;
__device__ __forceinline__ int filled_barrier(int consumer, int slot) {
  return 1 + kConsumers + consumer * kMostSlots + slot;
}
__device__ __forceinline__ int free_barrier(int consumer, int slot) {
  return filled_barrier(consumer + kConsumers, slot);
}
static_assert(1 + kConsumers + 2 * kConsumers * kMostSlots <= 16);  // named barriers of a CTA
constexpr int kNoMore = -1;  // row of the order that ends the work of a store warp

// Rounds a warp's 16 rows of 16 tokens and leaves them in a box, [token][64 rows of a panel]; a
// token's 8 pieces of 16 bytes are in the order of a 128-byte swizzle. v: 8 sums of a thread.
template <class T>
__device__ __forceinline__ void stage_rounded(const float* v, uint32_t box) {
  const int warp_idx = threadIdx.x % 128 / 32, lane_idx = threadIdx.x % 32;
  const int matrix = lane_idx / 8, line = lane_idx % 8;
  const int token = matrix / 2 * 8 + line, piece = warp_idx * 2 + matrix % 2;
  ptx::stmatrix_x4_transposed(box + token * 128 + ((piece ^ line) * 16), pack_pair<T>(v[0], v[1]),
                              pack_pair<T>(v[2], v[3]), pack_pair<T>(v[4], v[5]),
                              pack_pair<T>(v[6], v[7]));
}

// Adds the bias of a thread's rows: those of the upper and the lower half of its warp's 16.
template <class Cfg>
__device__ __forceinline__ void add_bias(Accumulators<Cfg>& d, const typename Cfg::Output& out,
                                         int first_row) {
  const int warp_idx = threadIdx.x % 128 / 32, lane_idx = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < Cfg::kPanels; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + m * 64 + warp_idx * 16 + half * 8 + lane_idx / 4;
      const float bias = out.row_bias(row);
#pragma unroll
      for (int i = 0; i < Cfg::kTokens / 2; i += 4) {
        d[m][i + half * 2] += bias;
        d[m][i + half * 2 + 1] += bias;
      }
    }
  }
}

// The scales of a consumer's tile, to its shared memory: while the last products are under way,
// because memory is far. Of tokens and rows that do not exist: 1.
template <class Cfg>
__device__ __forceinline__ void fetch_scales(const typename Cfg::Output& out, int tokens,
                                             const Smem<Cfg>& smem, int consumer, int first_row,
                                             int first_token) {
  const int thread = ptx::thread_idx_again() % 128;
  const auto fetch = [&](const float* scales, int at, int end, int place) {
    const float scale = scales != nullptr && at < end ? __ldg(scales + at) : 1.0f;
    ptx::store_shared_f32(smem.scales(consumer) + place * 4, scale);
  };
#pragma unroll
  for (int i = 0; i < Cfg::kTokens; i += 128) {
    if (i + 128 <= Cfg::kTokens || thread < Cfg::kTokens - i)
      fetch(out.token_scale, first_token + i + thread, tokens, i + thread);
  }
  if (thread < Cfg::kConsumerRows)
    fetch(out.channel_scale, first_row + thread, out.out_features, Cfg::kTokens + thread);
}

// What a thread's sums are multiplied with, and what is added: by rows g and g + 8 of its warp's 16
// in each panel.
template <class Cfg>
struct Scaling {
  float channel[Cfg::kPanels][2], bias[Cfg::kPanels][2];
  uint32_t tokens;  // shared memory: scales of this thread's first two tokens

  __device__ __forceinline__ Scaling(const typename Cfg::Output& out, const Smem<Cfg>& smem,
                                     int consumer, int first_row) {
    const int thread = ptx::thread_idx_again() % 128;
    tokens = smem.scales(consumer) + thread % 4 * 8;
#pragma unroll
    for (int m = 0; m < Cfg::kPanels; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = m * 64 + thread / 32 * 16 + half * 8 + thread % 32 / 4;
        channel[m][half] = ptx::load_shared_f32(smem.scales(consumer) + (Cfg::kTokens + row) * 4);
        bias[m][half] = out.bias ? out.row_bias(first_row + row) : 0.0f;
      }
    }
  }
  // d: the sums of 16 tokens from first_token of the tile on, of panel m.
  template <class Accumulator>
  __device__ __forceinline__ void apply(float (&v)[8], const Accumulator* d, int m,
                                        int first_token) const {
#pragma unroll
    for (int tokens8 = 0; tokens8 < 2; ++tokens8) {
      const float2 of_tokens = ptx::load_shared_float2(tokens + (first_token + tokens8 * 8) * 4);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = tokens8 * 4 + half * 2;
        const float low = ptx::as_float_here(d[i]) * channel[m][half];
        const float high = ptx::as_float_here(d[i + 1]) * channel[m][half];
        v[i] = low * of_tokens.x + bias[m][half];
        v[i + 1] = high * of_tokens.y + bias[m][half];
      }
    }
  }
};
// Of sums that need none.
struct NoScaling {};
template <class Cfg>
using ScalingOf = std::conditional_t<Cfg::kScaled, Scaling<Cfg>, NoScaling>;

// Rounds 16 tokens of panel m and leaves them in a box.
template <class Cfg>
__device__ __forceinline__ void stage_sums(const typename Cfg::Accumulator* d,
                                           const ScalingOf<Cfg>& scaling, int m, int first_token,
                                           uint32_t box) {
  if constexpr (Cfg::kScaled) {
    float v[8];
    scaling.apply(v, d, m, first_token);
    stage_rounded<typename Cfg::Y>(v, box);
  } else {
    stage_rounded<typename Cfg::Y>(d, box);
  }
}

// Before stage_sums: adds the bias, or finds the scales and the bias.
template <class Cfg>
__device__ __forceinline__ ScalingOf<Cfg> prepare_sums(Accumulators<Cfg>& d,
                                                       const typename Cfg::Output& out,
                                                       const Smem<Cfg>& smem, int consumer,
                                                       int first_row) {
  if constexpr (Cfg::kScaled) {
    return Scaling<Cfg>(out, smem, consumer, first_row);
  } else {
    if (out.bias) add_bias<Cfg>(d, out, first_row);
    return {};
  }
}

// From boxes of rounded values to y, whose rows begin anywhere: a thread puts a 16-byte piece of y
// together from the two pieces in shared memory that it lies across. What is left at the two ends of
// a token's rows, up to seven elements each, goes one by one, a thread each. All 128 threads; the
// boxes are there. tokens: of a box.
template <class Cfg>
__device__ __forceinline__ void store_shifted(const typename Cfg::Output& out, uint32_t boxes,
                                              int tokens, int first_row, int first_token,
                                              int token_end) {
  using Y = typename Cfg::Y;
  constexpr int kPieces = Cfg::kConsumerRows / 8, kEnds = 16;
  const int thread = ptx::thread_idx_again() % 128;
  const int left = out.out_features - first_row;
  const int rows = left < Cfg::kConsumerRows ? left : Cfg::kConsumerRows;
  if (tokens > token_end - first_token) tokens = token_end - first_token;
  const auto staged = [&](int token, int row) {
    return boxes + row / 64 * Cfg::kBoxBytes + token * 128 + ((row / 8 % 8) ^ (token % 8)) * 16;
  };
  const auto place = [&](int token, int row) {
    return out.y + (first_token + token) * out.y_stride + first_row + row;
  };
#pragma unroll 1
  for (int i = thread; i < tokens * kPieces; i += 128) {
    const int token = i / kPieces, piece = i % kPieces;
    const int beyond = out.beyond(first_token + token, first_row), row = piece * 8 - beyond;
    if (row < 0 || row + 8 > rows) continue;
    // The piece before, and this one; of them words 3 - beyond / 2 to 7 - beyond / 2, and of these
    // the last four, or four that begin half a word before.
    alignas(16) uint32_t words[8], v[4];
    uint32_t two[6], one[5];
    *reinterpret_cast<uint4*>(words) =
        ptx::load_shared_u128(staged(token, piece == 0 ? 0 : piece * 8 - 8));
    *reinterpret_cast<uint4*>(words + 4) = ptx::load_shared_u128(staged(token, piece * 8));
#pragma unroll
    for (int w = 0; w < 6; ++w) two[w] = beyond & 4 ? words[w] : words[w + 2];
#pragma unroll
    for (int w = 0; w < 5; ++w) one[w] = beyond & 2 ? two[w] : two[w + 1];
#pragma unroll
    for (int w = 0; w < 4; ++w) v[w] = beyond & 1 ? one[w] >> 16 | one[w + 1] << 16 : one[w + 1];
    *reinterpret_cast<uint4*>(place(token, row)) = *reinterpret_cast<const uint4*>(v);
  }
#pragma unroll 1
  for (int i = thread; i < tokens * kEnds; i += 128) {
    const int token = i / kEnds, end = i % kEnds / 8;
    const int beyond = out.beyond(first_token + token, first_row);
    const int head = (8 - beyond) % 8, tail = (rows + beyond) / 8 * 8 - beyond;
    const int row = (end ? (tail < head ? head : tail) : 0) + i % 8;
    if (row >= (end || rows < head ? rows : head)) continue;
    const auto four = ptx::load_shared_u64(staged(token, row) + row % 8 / 4 * 8);
    const uint32_t pair = row & 2 ? four.y : four.x;
    *reinterpret_cast<uint16_t*>(place(token, row)) =
        static_cast<uint16_t>(row & 1 ? pair >> 16 : pair);
  }
  static_assert(sizeof(Y) == 2);
}

// kBoxes: through the store warp.
template <class Cfg, bool kBoxes>
__device__ __forceinline__ void store_rounded(Accumulators<Cfg>& d,
                                              const Params<typename Cfg::Output>& p,
                                              const Smem<Cfg>& smem, int consumer) {
  const Finished at = Finished::of<Cfg>(p, smem, consumer);
  const ScalingOf<Cfg> scaling = prepare_sums<Cfg>(d, p.out, smem, consumer, at.row);
  int slot = 0, own = at.split;
#pragma unroll
  for (int step = 0; step < Cfg::kSteps; ++step) {
    constexpr int kPieces = kBlockTokens / 16;
    const int block = block_of<Cfg>(step);
    if (at.token + step * kBlockTokens >= p.tokens) break;
    if (block != own) continue;
    if (step < Cfg::kBlocks - 1) own += at.splits;
    // A last, short step stores as many tokens as the others: once more some of those before it.
    const int first = step < Cfg::kBlocks ? step * kBlockTokens : Cfg::kTokens - kBlockTokens;
    if constexpr (kBoxes) ptx::named_barrier_sync(free_barrier(consumer, slot), kSlotThreads);
    const uint32_t boxes = smem.boxes(consumer, slot);
#pragma unroll
    for (int m = 0; m < Cfg::kPanels; ++m) {
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece)
        stage_sums<Cfg>(&d[m][first / 2 + piece * 8], scaling, m, first + piece * 16,
                        boxes + m * Cfg::kBoxBytes + piece * 16 * 128);
    }
    if constexpr (kBoxes) {
      if (threadIdx.x % 128 == 0) {
        const bool in_blocks = step < Cfg::kBlocks - 1;
        const int next = in_blocks ? own : step + 1;
        const bool last = next >= (in_blocks ? Cfg::kBlocks : Cfg::kSteps) ||
                          at.token + next * kBlockTokens >= p.tokens;
        ptx::store_shared_int4(smem.order(consumer, slot), {at.row, at.token + first, last, 0});
      }
      ptx::fence_before_tensor_store();
      ptx::named_barrier_arrive(filled_barrier(consumer, slot), kSlotThreads);
    } else {
      // Who fills this slot again has met everybody at the barrier of the step between.
      ptx::named_barrier_sync(1 + consumer, 128);
      store_shifted<Cfg>(p.out, boxes, kBlockTokens, at.row, at.token + first, p.tokens);
    }
    slot = slot + 1 == Cfg::kSlots ? 0 : slot + 1;
  }
  if constexpr (!kBoxes) ptx::named_barrier_sync(1 + consumer, 128);  // the next tile begins anew
}

// Ends the work of this consumer's store warp.
template <class Cfg>
__device__ __forceinline__ void dismiss_store_warp(const Smem<Cfg>& smem, int consumer) {
  ptx::named_barrier_sync(free_barrier(consumer, 0), kSlotThreads);
  if (threadIdx.x % 128 == 0) ptx::store_shared_int4(smem.order(consumer, 0), {kNoMore, 0, 0, 0});
  ptx::named_barrier_arrive(filled_barrier(consumer, 0), kSlotThreads);
}

// One warp: copies to y what its consumer leaves in the slots.
template <class Cfg>
__device__ __forceinline__ void store_boxes(const CUtensorMap* y_map, const Smem<Cfg>& smem,
                                            int consumer) {
  const bool issues = threadIdx.x % 32 == 0;
  for (int slot = 0; slot < Cfg::kSlots; ++slot)
    ptx::named_barrier_arrive(free_barrier(consumer, slot), kSlotThreads);
  int slot = 0, before = -1;
  while (true) {
    ptx::named_barrier_sync(filled_barrier(consumer, slot), kSlotThreads);
    const int4 order = ptx::load_shared_int4(smem.order(consumer, slot));
    if (order.x == kNoMore) break;
    if (issues) {
#pragma unroll
      for (int m = 0; m < Cfg::kPanels; ++m) {
        ptx::tensor_store(y_map, order.x + m * 64, order.y,
                          smem.boxes(consumer, slot) + m * Cfg::kBoxBytes,
                          ptx::L2Hint::kEvictFirst);
      }
      ptx::tensor_store_commit();
      if (order.z) ptx::tensor_store_wait_read<0>();
      else ptx::tensor_store_wait_read<1>();
    }
    __syncwarp();
    if (before >= 0) ptx::named_barrier_arrive(free_barrier(consumer, before), kSlotThreads);
    if (order.z) {
      ptx::named_barrier_arrive(free_barrier(consumer, slot), kSlotThreads);
      slot = 0, before = -1;
    } else {
      before = slot;
      slot = slot + 1 == Cfg::kSlots ? 0 : slot + 1;
    }
  }
  if (issues) ptx::tensor_store_wait<0>();
}

// origin(): {row, token} of the tile; owns(part): whether this CTA stores that part of 16 tokens.
// Both are asked in each part, and the thread's index, too: the accumulators leave no registers.
template <class Cfg, class Origin, class Owns>
__device__ __forceinline__ void store_activated(const Accumulators<Cfg>& d,
                                                const typename Cfg::Output& out, int tokens,
                                                uint32_t smem, int consumer, Origin origin,
                                                Owns owns) {
  constexpr int kVector = Cfg::kTokens > 192 ? 4 : 8, kPieces = Cfg::kConsumerRows / kVector;
#pragma unroll 1
  for (int part = 0; part < Cfg::kTokens / kSumTokens; ++part) {
    if (origin().y + part * kSumTokens >= tokens) break;
    if (!owns(part)) continue;
    const int thread = ptx::thread_idx_again() % 128, warp_idx = thread / 32,
              lane_idx = thread % 32;
    const uint32_t lane_smem =
        smem + lane_idx % 4 * 2 * Cfg::kSumPitch + (warp_idx * 16 + lane_idx / 4) * 4;
#pragma unroll
    for (int q = 0; q < Cfg::kTokens / kSumTokens; ++q) {
      if (q != part) continue;
#pragma unroll
      for (int m = 0; m < Cfg::kPanels; ++m) {
#pragma unroll
        for (int i = 0; i < 8; ++i)
          ptx::store_shared_f32(
              lane_smem + (i / 4 * 8 + i % 2) * Cfg::kSumPitch + (m * 64 + i / 2 % 2 * 8) * 4,
              ptx::as_float_here(d[m][q * 8 + i]));
      }
    }
    ptx::named_barrier_sync(1 + consumer, 128);
#pragma unroll 1
    for (uint32_t i = ptx::thread_idx_again() % 128; i < kSumTokens * kPieces; i += 128) {
      const int2 first = origin();
      const int token = i / kPieces, row = i % kPieces * kVector,
                global_token = first.y + part * kSumTokens + token;
      if (global_token < tokens) {
        float v[kVector];
        ptx::load_shared(v, smem + token * Cfg::kSumPitch + row * 4);
        out.template store<kVector>(v, global_token, first.x + row);
      }
    }
    ptx::named_barrier_sync(1 + consumer, 128);
  }
}

template <class Cfg>
__device__ __forceinline__ void store_tile(Accumulators<Cfg>& d,
                                           const Params<typename Cfg::Output>& p,
                                           const Smem<Cfg>& smem, int consumer) {
  const bool rest = ptx::load_shared_int4(smem.progress(consumer)).z >= p.whole_tiles;
  if constexpr (Cfg::kStreamed) {
    if (rest && !gather_streamed<Cfg>(d, p, smem, consumer)) return;
  } else {
    if (p.splits > 1 && rest) exchange_sums<Cfg>(d, p, smem, consumer);
  }
  // The widest tile leaves no registers to shift with.
  constexpr bool kShifts = Cfg::kPanels * Cfg::kTokens <= 384;
  if (p.whole_boxes) {
    store_rounded<Cfg, true>(d, p, smem, consumer);
  } else if (kShifts && p.only_round) {
    store_rounded<Cfg, false>(d, p, smem, consumer);
  } else {
    const auto at = [&] { return Finished::of<Cfg>(p, smem, consumer); };
    store_activated<Cfg>(
        d, p.out, p.tokens, smem.out(consumer), consumer,
        [&] { return make_int2(at().row, at().token); },
        [&](int part) { return at().owns(block_of<Cfg>(part * kSumTokens / kBlockTokens)); });
  }
}

}  // namespace sparsekern::prefill

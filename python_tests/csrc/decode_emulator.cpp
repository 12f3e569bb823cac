// decode_emulator.cpp: runs the source of csrc/linear/decode_sm90.cuh on the CPU, cluster by cluster,
// for test_decode_emulated.py: emulator.h with the copy engine, its barriers and clusters.
// Not all instantiations, for the compiler's time: splits other than 4, tiles of 8, 16 and 64 tokens,
// and the types of the table below. EMULATE_FEW: e4m3 with bfloat16, 16 tokens, two configs.
#include "emulator.h"

#include <cuda.h>

namespace sparsekern::ptx {

enum class L2Hint { kEvictNormal, kEvictFirst, kEvictLast };
constexpr int kArrivalsPerWarp = 1;

// What a CUtensorMap of the emulator holds.
struct Tensor {
  const uint8_t* data;
  int64_t row_bytes;
  int rows, columns, box_rows;
};

struct Mbarrier {
  int arrivals, left;
  int64_t bytes;  // announced and not there
  uint32_t phase;

  void settle() {
    if (left != 0 || bytes != 0) return;
    left = arrivals;
    phase ^= 1;
  }
};
std::map<std::pair<int, uint32_t>, Mbarrier> mbarriers;  // by thread block and address

Mbarrier& mbarrier(uint32_t address) {
  const auto found = mbarriers.find({emulator::cta(), address});
  if (found != mbarriers.end()) return found->second;
  emulator::require(false, "a barrier that was initialised");
  static Mbarrier none;
  return none = {1 << 30, 1 << 30, 0, 0};
}
void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  emulator::shared(barrier, 8);
  mbarriers[{emulator::cta(), barrier}] = {int(arrivals), int(arrivals), 0, 0};
}
void mbarrier_init_fence() {}
void mbarrier_arrive(uint32_t barrier) {
  Mbarrier& b = mbarrier(barrier);
  emulator::require(b.left > 0, "no more arrivals than a barrier expects");
  --b.left;
  b.settle();
}
void mbarrier_arrive_warp(uint32_t barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
}
void mbarrier_arrive_expect_bytes(uint32_t barrier, uint32_t bytes) {
  mbarrier(barrier).bytes += bytes;
  mbarrier_arrive(barrier);
}
void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  Mbarrier& b = mbarrier(barrier);
  emulator::wait_until([&b, parity] { return b.phase != parity; });
}

void complete(Mbarrier& barrier, uint32_t bytes) {
  barrier.bytes -= bytes;
  barrier.settle();
}

void bulk_copy(uint32_t smem, const void* gmem, uint32_t bytes, uint32_t barrier, L2Hint) {
  emulator::require(reinterpret_cast<uintptr_t>(gmem) % 16 == 0 && smem % 16 == 0 && bytes % 16 == 0,
                    "a bulk copy in units of 16 bytes");
  emulator::require_readable(gmem, bytes);
  auto* to = emulator::shared(smem, 1);
  emulator::shared(smem + bytes - 1, 1);
  Mbarrier& b = mbarrier(barrier);
  emulator::fly([=, &b] {
    memcpy(to, gmem, bytes);
    complete(b, bytes);
  });
}

// A box of 64 16-bit columns, chunks of 16 bytes XORed with the row.
void tensor_copy(uint32_t smem, const CUtensorMap* map, int x, int y, uint32_t barrier, L2Hint) {
  Tensor t;
  memcpy(&t, map, sizeof(t));
  emulator::require(emulator::fibers[emulator::current].waited,
                    "x to be read after the kernel that made it");
  emulator::require(smem % 1024 == 0, "a swizzled box on 1024 bytes");
  auto* to = static_cast<uint8_t*>(emulator::shared(smem, 1));
  emulator::shared(smem + t.box_rows * 128 - 1, 1);
  Mbarrier& b = mbarrier(barrier);
  emulator::fly([=, &b] {
    for (int row = 0; row < t.box_rows; ++row) {
      for (int column = 0; column < 64; ++column) {
        uint16_t v = 0;
        if (y + row < t.rows && x + column < t.columns)
          memcpy(&v, t.data + (y + row) * t.row_bytes + (x + column) * 2, 2);
        memcpy(to + row * 128 + (column / 8 ^ row % 8) * 16 + column % 8 * 2, &v, 2);
      }
    }
    complete(b, t.box_rows * 128);
  });
}
void prefetch_tensor_map(const CUtensorMap*) {}

void named_barrier_sync(int id, int threads) { emulator::meet(emulator::of_block(id), threads); }
void cluster_sync() { emulator::meet(emulator::kOfCluster, emulator::fibers.size()); }
int cluster_cta_rank() { return emulator::cta(); }
int cluster_idx() { return blockIdx.x * emulator::threads / emulator::fibers.size(); }
uint32_t map_to_cta(uint32_t smem, uint32_t rank) {
  return smem | (rank + 1) << emulator::kCtaShift;
}
// The last thing before a store to y.
float4 load_cluster_float4(uint32_t address) {
  emulator::require(emulator::fibers[emulator::current].waited, "y to be written after that, too");
  return *static_cast<float4*>(emulator::shared(address, 16));
}

uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t v = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = selector >> 4 * i & 15, byte = bytes >> digit % 8 * 8 & 0xFF;
    v |= (digit < 8 ? byte : byte & 0x80 ? 0xFFu : 0u) << 8 * i;
  }
  return v;
}
uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) { return (a & mask) | bits; }
uint32_t f16_of_e4m3(uint8_t bits) {
  __nv_fp8_e4m3 v;
  v.__x = bits;
  const __half h(static_cast<float>(v));
  return reinterpret_cast<const uint16_t&>(h);
}
void e4m3x4_to_f16x2(uint32_t& low, uint32_t& high, uint32_t word) {
  low = f16_of_e4m3(word) | f16_of_e4m3(word >> 8) << 16;
  high = f16_of_e4m3(word >> 16) | f16_of_e4m3(word >> 24) << 16;
}

}  // namespace sparsekern::ptx

// ---- the kernel: its own includes of csrc/ptx find empty files ----------------------------------

#include "linear/configs.h"
#include "linear/decode_sm90.cuh"

namespace sparsekern::decode {

uint8_t raw_smem[1];  // the kernel's extern array; only its address is asked for

template <class Cfg, int kRanks>
void run_clusters(const LinearProblem& p, int clusters, int ranks) {
  Params<Cfg> params = make_params<Cfg>(p);
  params.ranks = ranks;
  const ptx::Tensor tensor = {static_cast<const uint8_t*>(p.x.data), p.x.stride * 2, p.tokens,
                              p.in_features, Cfg::kTokens};
  CUtensorMap map;
  memcpy(&map, &tensor, sizeof(tensor));
  if (ranks > 1 || clusters == 0) clusters = params.row_blocks;
  emulator::blocks = clusters * ranks;
  for (int cluster = 0; cluster < clusters && emulator::error.empty(); ++cluster) {
    emulator::first_block = cluster * ranks;
    ptx::mbarriers.clear();
    const bool ended = emulator::run_cluster(ranks, kThreads, Cfg::kSmemBytes, [&] {
      spmm_decode_sm90_kernel<Cfg, kRanks>(map, params);
    });
    emulator::require(ended, "barriers that all threads reach");
  }
}

template <class W, class X, int kTokenTiles, int kScaleGroup>
void run(const LinearProblem& p, int config, int clusters) {
#ifdef EMULATE_FEW
#define SK_CONFIGS(X) X(0, 4, 1) X(4, 2, 2)
#else
#define SK_CONFIGS(X) SK_DECODE_CONFIGS(X)
#endif
  switch (config) {
#define SK_CASE(index, panels, split) \
  case index:                         \
    if constexpr (split != 4)         \
      return run_clusters<Config<W, X, X, kTokenTiles, 1, panels, kScaleGroup>, \
                          kLaunchedSplit<W, kTokenTiles> ? 0 : split>(p, clusters, split); \
    else return;
    SK_CONFIGS(SK_CASE)
#undef SK_CASE
  }
}

template <class W, class X, int kScaleGroup = 0>
void run(const LinearProblem& p, int config, int clusters) {
#ifndef EMULATE_FEW
  if (p.tokens <= 8) return run<W, X, 1, kScaleGroup>(p, config, clusters);
  if (p.tokens > 16) return run<W, X, 8, kScaleGroup>(p, config, clusters);
#endif
  return run<W, X, 2, kScaleGroup>(p, config, clusters);
}

}  // namespace sparsekern::decode

// A problem as in csrc/core/problem.h, then the freedoms; clusters: 0 for one per row block. Returns
// "" or the rule that was broken.
struct Emulated {
  const void *x, *values, *metadata, *bias, *residual, *channel_scale;
  void* y;
  int64_t x_stride, y_stride, residual_stride, values_bytes, metadata_bytes;
  int tokens, out_features, in_features, weight, bf16, activation, config, clusters, late, falling;
};

extern "C" const char* emulate(const Emulated* e) {
  using namespace sparsekern;
  emulator::error.clear();
  emulator::copies_land_late = e->late;
  emulator::falling_order = e->falling;
  LinearProblem p = {};
  p.tokens = e->tokens, p.out_features = e->out_features, p.in_features = e->in_features;
  const DType x = e->bf16 ? DType::kBFloat16 : DType::kFloat16;
  p.x = {const_cast<void*>(e->x), e->x_stride, x};
  p.weight = {e->values, e->metadata};
  p.epilogue.channel_scale = static_cast<const float*>(e->channel_scale);
  p.epilogue.bias = e->bias;
  p.epilogue.activation = static_cast<Activation>(e->activation);
  p.epilogue.residual = e->residual;
  p.epilogue.residual_stride = e->residual_stride;
  p.y = {e->y, e->y_stride, x};
  const auto range = [](const void* begin, int64_t bytes) {
    const auto* first = static_cast<const uint8_t*>(begin);
    return std::make_pair(first, first + bytes);
  };
  emulator::readable = {range(e->values, e->values_bytes), range(e->metadata, e->metadata_bytes)};
  using Run = void (*)(const LinearProblem&, int, int);
#ifdef EMULATE_FEW
  constexpr Run run = decode::run<__nv_fp8_e4m3, __nv_bfloat16>;
#else
  constexpr Run runs[6][2] = {
      {nullptr, decode::run<__nv_bfloat16, __nv_bfloat16>},
      {decode::run<__nv_fp8_e4m3, __half>, decode::run<__nv_fp8_e4m3, __nv_bfloat16>},
      {decode::run<int8_t, __half>, decode::run<int8_t, __nv_bfloat16>},
      {decode::run<Int4, __half>, nullptr},
      {nullptr, decode::run<Int4, __nv_bfloat16, 64>},
      {decode::run<Int4, __half, 128>, decode::run<Int4, __nv_bfloat16, 128>},
  };
  const Run run = runs[e->weight][e->bf16];
#endif
  run(p, e->config, e->clusters);
  return emulator::error.c_str();
}

// emulator_sm90.h: emulator.h with what Hopper has: the copy engine, its barriers, clusters and
// wgmma.sp, for decode_emulator.cpp and narrow_emulator.cpp.
#pragma once
#include "emulator.h"
#include "emulator_bytes.h"

#include <cuda.h>

#include "core/problem.h"

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

// Of the thread block that the address names, or of this one.
Mbarrier& mbarrier(uint32_t address) {
  const int named = address >> emulator::kCtaShift;
  const auto found = mbarriers.find({named ? named - 1 : emulator::cta(),
                                     address & ((1u << emulator::kCtaShift) - 1)});
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

// The shared::cluster address of the same place in another thread block.
uint32_t map_to_cta(uint32_t smem, uint32_t rank) {
  return (smem & ((1u << emulator::kCtaShift) - 1)) | (rank + 1) << emulator::kCtaShift;
}

// A box of 64 16-bit columns, chunks of 16 bytes XORed with the row.
void tensor_copy(uint32_t smem, const CUtensorMap* map, int x, int y, uint32_t barrier, L2Hint) {
  Tensor t;
  memcpy(&t, map, sizeof(t));
  emulator::require(emulator::fibers[emulator::current].waited,
                    "x to be read after the kernel that made it");
  emulator::require(smem % 1024 == 0, "a swizzled box on 1024 bytes");  // and so in its block
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
void tensor_copy_multicast(uint32_t smem, const CUtensorMap* map, int x, int y, uint32_t barrier,
                           uint16_t cta_mask, L2Hint hint) {
  for (int rank = 0; rank < 16; ++rank)
    if (cta_mask >> rank & 1)
      tensor_copy(map_to_cta(smem, rank), map, x, y, map_to_cta(barrier, rank), hint);
}
void mbarrier_arrive_cluster(uint32_t barrier) { mbarrier_arrive(barrier); }
void prefetch_tensor_map(const CUtensorMap*) {}

void named_barrier_sync(int id, int threads) { emulator::meet(emulator::of_block(id), threads); }
void cluster_sync() { emulator::meet(emulator::kOfCluster, emulator::fibers.size()); }
int cluster_cta_rank() { return emulator::cta(); }
int cluster_idx() { return blockIdx.x * emulator::threads / emulator::fibers.size(); }
// Arrive and wait: the two halves of a barrier of the cluster.
int arrived, cluster_phase;
std::map<int, int> phase_of;  // fiber: when it arrived
void cluster_arrive() {
  phase_of[emulator::current] = cluster_phase;
  if (++arrived == static_cast<int>(emulator::fibers.size())) arrived = 0, ++cluster_phase;
}
void cluster_wait() {
  const int phase = phase_of[emulator::current];
  emulator::wait_until([phase] { return cluster_phase != phase; });
}
// The last thing before a store to y.
float4 load_cluster_float4(uint32_t address) {
  emulator::require(emulator::fibers[emulator::current].waited, "y to be written after that, too");
  return *static_cast<float4*>(emulator::shared(address, 16));
}

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

int uniform(int value) { return value; }
template <int kRegisters>
void give_up_registers() {}
template <int kRegisters>
void take_registers() {}
float4 load_shared_float4(uint32_t smem) { return load_cluster_float4(smem); }
float load_shared_f32(uint32_t smem) { return __uint_as_float(load_shared_u32(smem)); }

// ---- wgmma.sp with A in registers: what a thread has issued, and when it is done ------------------

// The registers themselves, because they are read until the group is complete, and what they held
// when it was issued.
struct Wgmma {
  float* d;
  const uint32_t *a, *metadata;
  uint32_t a_then[4], metadata_then;
  uint64_t b;
  int selector, tokens;
  bool bf16;
};
std::map<int, std::vector<Wgmma>> open;                 // by thread: not committed
std::map<int, std::vector<std::vector<Wgmma>>> groups;  // and committed, oldest first
std::map<int, bool> fenced;

void wgmma_fence() { fenced[emulator::current] = true; }

template <class T, int N>
struct WgmmaSpRegisters {
  template <int kSelector>
  static void run(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, const uint32_t& metadata,
                  int accumulate) {
    emulator::require(fenced[emulator::current], "a fence between registers and wgmma");
    emulator::require(accumulate == 1, "sums that are added to");
    Wgmma op = {d, a, &metadata, {}, metadata, b, kSelector, N, std::is_same_v<T, __nv_bfloat16>};
    std::copy(a, a + 4, op.a_then);
    open[emulator::current].push_back(op);
  }
};

void wgmma_commit() {
  fenced[emulator::current] = false;
  groups[emulator::current].push_back(std::move(open[emulator::current]));
  open[emulator::current].clear();
  emulator::meet(emulator::of_block(8 + emulator::current % emulator::threads / 128), 128);
}

// PTX ISA, "Register fragments for wgmma.mma_async.sp.m64nNk32", "Sparse matrix storage", "Strides"
// and "Swizzling modes". ops: the same instruction in the 128 threads, in thread block `cta`.
void execute(const std::vector<Wgmma>& ops) {
  const Wgmma& first = ops[0];
  const auto value = [&](uint32_t word, int index) {
    return first.bf16 ? element<__nv_bfloat16>(word, index) : element<__half>(word, index);
  };
  emulator::require(first.b >> 62 == 1 && (first.b >> 32 & 0x3FFF) == 1024 >> 4,
                    "B in rows of 128 bytes, swizzled");
  std::vector<std::vector<float>> b(32, std::vector<float>(first.tokens));
  for (int k = 0; k < 32; ++k) {
    for (int n = 0; n < first.tokens; ++n) {
      const uint32_t linear = (first.b & 0x3FFF) * 16 + n / 8 * 1024 + n % 8 * 128 + k * 2;
      const uint32_t at = linear ^ (linear >> 7 & 7) << 4;
      b[k][n] = value(*static_cast<uint16_t*>(emulator::shared(at, 2)), 0);
    }
  }
  for (const Wgmma& op : ops) {
    emulator::require(op.b == first.b, "one descriptor in a warpgroup");
    emulator::require(std::equal(op.a, op.a + 4, op.a_then) && *op.metadata == op.metadata_then,
                      "registers that do not change while wgmma reads them");
  }
  for (int row = 0; row < 64; ++row) {
    const int lanes = row / 16 * 32 + row % 8 * 4, upper = row / 8 % 2;
    for (int kept = 0; kept < 16; ++kept) {
      const int group = kept / 2;
      const float a = value(ops[lanes + kept % 8 / 2].a[upper + kept / 8 * 2], kept % 2);
      const uint32_t word = *ops[lanes + 2 * first.selector + group / 4].metadata;
      const uint32_t nibble = word >> (16 * upper + 4 * (group % 4)) & 15;
      emulator::require(nibble % 4 < nibble / 4, "metadata with two rising columns");
      const std::vector<float>& of_k = b[4 * group + (kept % 2 ? nibble / 4 : nibble % 4)];
      for (int n = 0; n < first.tokens; ++n)
        ops[lanes + n % 8 / 2].d[n / 8 * 4 + 2 * upper + n % 2] += a * of_k[n];
    }
  }
}

// The latest that the hardware may be: when the first thread of the warpgroup waits for it.
template <int kPending>
void wgmma_wait() {
  while (static_cast<int>(groups[emulator::current].size()) > kPending) {
    const int thread = emulator::current / 128 * 128;
    const size_t count = groups[thread][0].size();
    for (size_t i = 0; i < count; ++i) {
      std::vector<Wgmma> ops;
      for (int t = thread; t < thread + 128; ++t) ops.push_back(groups[t][0][i]);
      execute(ops);
    }
    for (int t = thread; t < thread + 128; ++t) groups[t].erase(groups[t].begin());
  }
}

}  // namespace sparsekern::ptx

// Both numbers of a pair, rounded once.
template <class Pair>
Pair fma_pairs(const Pair& a, const Pair& b, const Pair& c) {
  const auto fma_one = [](auto x, auto y, auto z) {
    using T = decltype(x);
    return T(std::fma(double(float(x)), double(float(y)), double(float(z))));
  };
  return {fma_one(a.x, b.x, c.x), fma_one(a.y, b.y, c.y)};
}
__nv_bfloat162 __hfma2(const __nv_bfloat162& a, const __nv_bfloat162& b, const __nv_bfloat162& c) {
  return fma_pairs(a, b, c);
}
__half2 __hfma2(const __half2& a, const __half2& b, const __half2& c) { return fma_pairs(a, b, c); }

// A problem as in csrc/core/problem.h, then the freedoms; clusters: 0 for one per row block.
struct Emulated {
  const void *x, *values, *metadata, *bias, *residual, *channel_scale;
  void* y;
  int64_t x_stride, y_stride, residual_stride, values_bytes, metadata_bytes;
  int tokens, out_features, in_features, weight, bf16, activation, config, clusters, late, falling;
};

sparsekern::LinearProblem emulated_problem(const Emulated* e) {
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
  return p;
}

// emulator_sm90.h: emulator.h with what Hopper has: the copy engine, its barriers, clusters and
// wgmma.sp.
#pragma once
#include "emulator.h"
#include "emulator_bytes.h"

#include <cuda.h>

#include "core/problem.h"

namespace sparsekern::ptx {

uint32_t thread_idx_again() { return threadIdx.x; }

enum class L2Hint { kEvictNormal, kEvictFirst, kEvictLast };
constexpr int kArrivalsPerWarp = 1;

// What a CUtensorMap of the emulator holds.
struct Tensor {
  uint8_t* data;
  int64_t row_bytes;
  int rows, columns, box_rows, element_bytes = 2;
};

struct Mbarrier {
  int arrivals, left;
  int64_t bytes;  // announced and not there
  uint32_t phase;
  bool told;

  void settle() {
    if (left != 0 || bytes != 0) return;
    left = arrivals;
    phase ^= 1;
  }
};
std::map<std::pair<int, uint32_t>, Mbarrier> mbarriers;  // by thread block and address

// Of the thread block that the address names, or of this one.
Mbarrier& mbarrier(uint32_t address) {
  emulator::named_cta(address);
  const int cta = (emulator::named(address) >> emulator::kCtaShift) - 1;
  const auto found = mbarriers.find({cta, address & ((1u << emulator::kCtaShift) - 1)});
  if (found != mbarriers.end()) return found->second;
  emulator::require(false, "a barrier that was initialised");
  static Mbarrier none;
  return none = {1 << 30, 1 << 30, 0, 0, false};
}
void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  emulator::shared(barrier, 8, emulator::Access::kWrites);
  mbarriers[{emulator::cta(), barrier}] = {int(arrivals), int(arrivals), 0, 0, false};
}
void mbarrier_init_fence() {}
void mbarrier_arrive(uint32_t barrier) {
  Mbarrier& b = mbarrier(barrier);
  emulator::require(b.left > 0, "no more arrivals than a barrier expects");
  --b.left;
  b.told |= emulator::self().told;
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
  emulator::self().told |= b.told;
}

void complete(uint32_t barrier, uint32_t bytes) {
  Mbarrier& b = mbarrier(barrier);
  b.bytes -= bytes;
  b.settle();
}

void bulk_copy(uint32_t smem, const void* gmem, uint32_t bytes, uint32_t barrier, L2Hint) {
  emulator::require(reinterpret_cast<uintptr_t>(gmem) % 16 == 0 && bytes % 16 == 0,
                    "a bulk copy in units of 16 bytes");
  emulator::require_readable(gmem, bytes);
  emulator::fly([=, to = emulator::named(smem), signal = emulator::named(barrier)] {
    memcpy(emulator::shared(to, bytes, emulator::Access::kWrites, 16), gmem, bytes);
    complete(signal, bytes);
  });
}

// The shared::cluster address of the same place in another thread block of the cluster.
uint32_t map_to_cta(uint32_t smem, uint32_t rank) {
  emulator::require(rank < uint32_t(emulator::cluster_ctas), "a thread block of the cluster");
  rank %= emulator::cluster_ctas;
  const int cta = emulator::cluster() * emulator::cluster_ctas + rank;
  return (smem & ((1u << emulator::kCtaShift) - 1)) | (cta + 1) << emulator::kCtaShift;
}
// copy(address, barrier) for each thread block of a mask.
template <class Copy>
void multicast(uint32_t smem, uint32_t barrier, uint16_t cta_mask, Copy copy) {
  emulator::require(cta_mask >> emulator::cluster_ctas == 0, "a mask of the cluster");
  for (int rank = 0; rank < emulator::cluster_ctas; ++rank)
    if (cta_mask >> rank & 1) copy(map_to_cta(smem, rank), map_to_cta(barrier, rank));
}
void bulk_copy_multicast(uint32_t smem, const void* gmem, uint32_t bytes, uint32_t barrier,
                         uint16_t cta_mask, L2Hint hint) {
  multicast(smem, barrier, cta_mask,
            [&](uint32_t to, uint32_t signal) { bulk_copy(to, gmem, bytes, signal, hint); });
}

// A box's rows are 128 bytes, chunks of 16 bytes XORed with the row. move(chunk in shared memory,
// chunk in the tensor, how many of its bytes are inside) for each.
template <class Move>
void for_each_chunk(const Tensor& t, uint32_t smem, int x, int y, Move move) {
  emulator::require(smem % 1024 == 0, "a swizzled box on 1024 bytes");  // and so in its block
  emulator::require(int64_t{x} * t.element_bytes % 16 == 0, "a box whose rows begin at 16 bytes");
  for (int row = 0; row < t.box_rows; ++row) {
    for (int chunk = 0; chunk < 8; ++chunk) {
      const int64_t first = int64_t{x} * t.element_bytes + chunk * 16;
      const int64_t left = y + row < t.rows ? t.columns * int64_t{t.element_bytes} - first : 0;
      move(smem + row * 128 + (chunk ^ row % 8) * 16, t.data + (y + row) * t.row_bytes + first,
           static_cast<int>(std::clamp<int64_t>(left, 0, 16)));
    }
  }
}
void tensor_copy(uint32_t smem, const CUtensorMap* map, int x, int y, uint32_t barrier, L2Hint) {
  Tensor t;
  memcpy(&t, map, sizeof(t));
  emulator::require(emulator::self().waited, "x to be read after the kernel that made it");
  emulator::fly([=, to = emulator::named(smem), signal = emulator::named(barrier)] {
    for_each_chunk(t, to, x, y, [](uint32_t chunk, const uint8_t* from, int bytes) {
      auto* there = emulator::shared(chunk, 16, emulator::Access::kWrites);
      memset(there, 0, 16);
      memcpy(there, from, bytes);
    });
    complete(signal, t.box_rows * 128);
  });
}
void tensor_copy_multicast(uint32_t smem, const CUtensorMap* map, int x, int y, uint32_t barrier,
                           uint16_t cta_mask, L2Hint hint) {
  multicast(smem, barrier, cta_mask,
            [&](uint32_t to, uint32_t signal) { tensor_copy(to, map, x, y, signal, hint); });
}
void mbarrier_arrive_cluster(uint32_t barrier) { mbarrier_arrive(barrier); }
void prefetch_tensor_map(const CUtensorMap*) {}

void named_barrier_sync(int id, int threads) {
  emulator::require(id > 0 && id < 16 && threads % 32 == 0, "a barrier from 1 to 15, of warps");
  emulator::meet(emulator::of_block(id), threads);
}
bool elect_one() { return threadIdx.x % 32 == 0; }
int cluster_cta_rank() { return emulator::cta() % emulator::cluster_ctas; }
int cluster_idx() { return blockIdx.x / emulator::cluster_ctas; }
void cluster_arrive() {
  auto& barrier = emulator::cluster_barriers[emulator::cluster()];
  emulator::require(emulator::self().cluster_phase < 0, "a wait after each arrival");
  emulator::self().cluster_phase = barrier.phase;
  barrier.told |= emulator::self().told;
  if (++barrier.arrived == emulator::cluster_ctas * emulator::threads)
    barrier.arrived = 0, ++barrier.phase;
}
void cluster_wait() {
  auto& barrier = emulator::cluster_barriers[emulator::cluster()];
  const int phase = emulator::self().cluster_phase;
  emulator::require(phase >= 0, "an arrival before each wait");
  emulator::wait_until([&barrier, phase] { return barrier.phase != phase; });
  emulator::self().cluster_phase = -1;
  emulator::self().told |= barrier.told;
}
void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
// The last thing before a store to y.
float4 load_cluster_float4(uint32_t address) {
  require_waited();
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
// Sums, also those that nobody has sent, of tokens that nobody stores.
float4 load_shared_float4(uint32_t smem) {
  require_waited();
  return *static_cast<float4*>(emulator::shared(smem, 16, emulator::Access::kPeeks));
}
float load_shared_f32(uint32_t smem) { return __uint_as_float(load_shared_u32(smem)); }

// ---- wgmma.sp: what a thread has issued, and when it is done ------------------------------------

// The registers themselves, because they are read until the group is complete, and what they held
// when it was issued. A is in registers or has a descriptor.
struct Wgmma {
  void (*execute)(const std::vector<Wgmma>&);
  void* d;
  const uint32_t *a, *metadata;
  uint32_t a_then[4], metadata_then;
  uint64_t a_memory, b;
  int selector, tokens, accumulate;
};
std::map<int, std::vector<Wgmma>> open;                 // by thread: not committed
std::map<int, std::vector<std::vector<Wgmma>>> groups;  // and committed, oldest first
std::map<int, bool> fenced;

void wgmma_fence() { fenced[emulator::current] = true; }

// PTX ISA, "Register fragments for wgmma.mma_async.sp.m64nNk32" and "m64nNk64", "Sparse matrix
// storage", "Strides" and "Swizzling modes". ops: the same instruction in the 128 threads.
template <class T>
void execute(const std::vector<Wgmma>& ops) {
  using Sum = std::conditional_t<std::is_integral_v<T>, int32_t, float>;
  constexpr int n = 16 / sizeof(T), kK = 4 * n;  // elements of a chunk of 16 bytes
  const Wgmma& first = ops[0];
  const auto chunk = [](uint32_t at, emulator::Access access, Sum* to, int step) {
    T values[n];
    memcpy(values, emulator::shared(at, 16, access), 16);
    for (int i = 0; i < n; ++i) to[i * step] = static_cast<Sum>(values[i]);
  };
  const auto field = [](uint64_t descriptor, int bit) {
    return static_cast<uint32_t>(descriptor >> bit & 0x3FFF) * 16;
  };
  emulator::require(first.b >> 62 == 1 && field(first.b, 32) == 1024,
                    "B in rows of 128 bytes, swizzled");
  emulator::require(first.a || first.a_memory >> 62 == 0, "A as it is");
  std::vector<Sum> b(kK * first.tokens);
  for (int token = 0; token < first.tokens; ++token) {
    for (int c = 0; c < 4; ++c) {
      const uint32_t linear = field(first.b, 0) + token / 8 * 1024 + token % 8 * 128 + c * 16;
      chunk(linear ^ (linear >> 7 & 7) << 4, emulator::Access::kPeeks,
            &b[c * n * first.tokens + token], first.tokens);
    }
  }
  for (const Wgmma& op : ops) {
    emulator::require(op.execute == first.execute && op.b == first.b &&
                          op.a_memory == first.a_memory && op.accumulate == first.accumulate,
                      "one instruction in a warpgroup");
    emulator::require(
        (!op.a || std::equal(op.a, op.a + 4, op.a_then)) && *op.metadata == op.metadata_then,
        "registers that do not change while wgmma reads them");
  }
  std::vector<Sum> sums(first.tokens);
  for (int row = 0; row < 64; ++row) {
    const int lanes = row / 16 * 32 + row % 8 * 4, upper = row / 8 % 2;
    Sum a[kK / 2];
    for (int c = 0; c < 2 && !first.a; ++c)
      chunk(field(first.a_memory, 0) + c * field(first.a_memory, 16) +
                row / 8 * field(first.a_memory, 32) + row % 8 * 16,
            emulator::Access::kReads, a + c * n, 1);
    for (int kept = 0; kept < kK / 2 && first.a; ++kept)
      a[kept] = element<T>(ops[lanes + kept % 8 / 2].a[upper + kept / 8 * 2], kept % 2);
    std::fill(sums.begin(), sums.end(), Sum(0));
    for (int kept = 0; kept < kK / 2; ++kept) {
      const int group = kept / 2;
      // As of mma_sp.
      const int lane = sizeof(T) == 2 ? 2 * first.selector + group / 4 : upper + 2 * (group / 8);
      const int bit = sizeof(T) == 2 ? 16 * upper + 4 * (group % 4) : 4 * (group % 8);
      const uint32_t nibble = *ops[lanes + lane].metadata >> bit & 15;
      emulator::require(nibble % 4 < nibble / 4, "metadata with two rising columns");
      const Sum* of_k = &b[(4 * group + (kept % 2 ? nibble / 4 : nibble % 4)) * first.tokens];
      for (int token = 0; token < first.tokens; ++token) sums[token] += a[kept] * of_k[token];
    }
    for (int token = 0; token < first.tokens; ++token) {
      Sum& d =
          static_cast<Sum*>(ops[lanes + token % 8 / 2].d)[token / 8 * 4 + 2 * upper + token % 2];
      d = first.accumulate ? d + sums[token] : sums[token];
    }
  }
}

void issue(const Wgmma& op) {
  emulator::require(fenced[emulator::current], "a fence between registers and wgmma");
  open[emulator::current].push_back(op);
}
template <class T, int N>
struct WgmmaSpRegisters {
  template <int kSelector>
  static void run(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, const uint32_t& metadata,
                  int accumulate) {
    Wgmma op = {execute<T>, d, a, &metadata, {}, metadata, 0, b, kSelector, N, accumulate};
    std::copy(a, a + 4, op.a_then);
    issue(op);
  }
};
template <class T, int N>
struct WgmmaSp {
  template <int kSelector, class Accumulator>
  static void run(Accumulator (&d)[N / 2], uint64_t a, uint64_t b, const uint32_t& metadata,
                  int accumulate) {
    static_assert(std::is_same_v<Accumulator, int32_t> == std::is_integral_v<T>);
    static_assert(kSelector == 0 || sizeof(T) == 2);
    issue({execute<T>, d, nullptr, &metadata, {}, metadata, a, b, kSelector, N, accumulate});
  }
};

void wgmma_commit() {
  fenced[emulator::current] = false;
  groups[emulator::current].push_back(std::move(open[emulator::current]));
  open[emulator::current].clear();
  emulator::meet(emulator::of_block(16 + emulator::current % emulator::threads / 128), 128);
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
      ops[0].execute(ops);
    }
    for (int t = thread; t < thread + 128; ++t) groups[t].erase(groups[t].begin());
  }
}

// As run_clusters, with all barriers and groups fresh: each thread must have reached what it waits
// for, and each copy its end.
void run_clusters(int clusters, int ctas, int threads, int smem_bytes,
                  std::function<void()> kernel) {
  mbarriers.clear(), open.clear(), groups.clear(), fenced.clear();
  const bool ended = emulator::run_clusters(clusters, ctas, threads, smem_bytes, kernel);
  emulator::require(ended, "barriers that all threads reach");
  bool complete = emulator::in_flight.empty();
  for (const auto& [at, barrier] : mbarriers) complete &= barrier.bytes == 0;
  emulator::require(complete, "copies that are complete before the kernel ends");
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

// A problem as in csrc/core/problem.h, then the freedoms; clusters: 0 for one per row block, of the
// prefill and the split kernel those that a GPU holds at once. beside: clusters that run side by
// side where none waits for another, 0: one; again: how often the launch is repeated,
// with the counters that the last one has left.
struct Emulated {
  const void *x, *values, *metadata, *bias, *residual, *channel_scale;
  void* y;
  int64_t x_stride, y_stride, residual_stride, values_bytes, metadata_bytes;
  int tokens, out_features, in_features, weight, bf16, activation, config, clusters, late, falling;
  const void* token_scale;
  int lag_first, lag_count, beside, again;
};

sparsekern::LinearProblem emulated_problem(const Emulated* e) {
  using namespace sparsekern;
  emulator::error.clear();
  emulator::copies_land_late = e->late;
  emulator::falling_order = e->falling;
  emulator::lag_first = e->lag_first, emulator::lag_count = e->lag_count;
  LinearProblem p = {};
  p.tokens = e->tokens, p.out_features = e->out_features, p.in_features = e->in_features;
  const DType x = e->bf16 ? DType::kBFloat16 : DType::kFloat16;
  p.x = {const_cast<void*>(e->x), e->x_stride, x};
  p.weight = {e->values, e->metadata};
  p.epilogue.channel_scale = static_cast<const float*>(e->channel_scale);
  p.epilogue.token_scale = static_cast<const float*>(e->token_scale);
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

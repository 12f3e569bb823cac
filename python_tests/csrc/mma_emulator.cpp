// mma_emulator.cpp: runs the source of csrc/linear/mma_sm80.cuh on the CPU, block by block,
// for test_mma_emulated.py. The kernel is compiled as it is; what a GPU would bring is defined
// here: threads, barriers, shared memory and the instructions of csrc/ptx, by the words of the PTX
// ISA.
//
// Each CUDA thread is a ucontext fiber that runs until a barrier or a warp instruction that not all
// have reached. Two freedoms of the hardware are settings, so that a missing wait shows: a cp.async
// lands at once or when a wait forces it, and threads run in rising or falling order. Shared memory
// starts as 0xFF, which is NaN. The first violation of a rule is reported and the rest goes on.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#undef __global__
#undef __launch_bounds__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

namespace emulator {

constexpr uint32_t kSmemBase = 1024;  // shared memory does not begin at address 0
constexpr size_t kFiberStack = 1 << 16;

struct Copy {
  uint32_t smem;
  const void* gmem;
  int bytes;
};
enum class State { kReady, kAtBarrier, kAtWarp, kDone };
struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kFiberStack);
  State state;
  bool waited;                            // for the kernel before this one
  std::vector<Copy> open;                 // copies of the group that is not closed
  std::vector<std::vector<Copy>> groups;  // closed groups under way, oldest first
};

std::vector<Fiber> fibers;
std::vector<uint8_t> smem;
std::vector<int> at_warp;  // lanes that have reached the warp instruction
int at_barrier, current;
ucontext_t scheduler;
bool copies_land_late, falling_order;
std::vector<std::pair<const uint8_t*, const uint8_t*>> readable;  // global memory, x first
std::string error;

void require(bool condition, const char* rule) {
  if (!condition && error.empty()) error = rule;
}

void* shared(uint32_t address, uint32_t bytes) {
  static uint8_t nowhere[16];
  const bool good =
      address >= kSmemBase && address % bytes == 0 && address + bytes <= kSmemBase + smem.size();
  require(good, "an access inside shared memory, aligned to its size");
  return good ? &smem[address - kSmemBase] : nowhere;
}

void yield(State state) {
  fibers[current].state = state;
  swapcontext(&fibers[current].context, &scheduler);
}

// One warp instruction: the last lane to arrive executes it for all.
struct Lane {
  const uint32_t *a, *b;
  uint32_t word;  // an address, or metadata
  void* result;
};
std::vector<Lane> lanes;

template <class Execute>
void warp_instruction(const Lane& lane, Execute execute) {
  const int warp = current / 32;
  lanes[current] = lane;
  if (++at_warp[warp] < 32) return yield(State::kAtWarp);
  at_warp[warp] = 0;
  execute(&lanes[warp * 32]);
  for (int i = warp * 32; i < warp * 32 + 32; ++i)
    if (i != current) fibers[i].state = State::kReady;
}

void land(const Copy& copy) {
  auto* to = static_cast<uint8_t*>(shared(copy.smem, 16));
  memset(to, 0, 16);
  memcpy(to, copy.gmem, copy.bytes);
}

// Runs one block; false when its threads wait for each other for ever.
bool run_block(int threads, int smem_bytes, std::function<void()> kernel) {
  static std::function<void()> entry;
  entry = std::move(kernel);
  fibers.resize(threads);
  lanes.resize(threads);
  at_warp.assign(threads / 32, 0);
  at_barrier = 0;
  smem.assign(smem_bytes, 0xFF);
  for (Fiber& fiber : fibers) {
    fiber.state = State::kReady;
    fiber.waited = false;
    fiber.open.clear();
    fiber.groups.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, +[] { entry(), yield(State::kDone); }, 0);
  }
  for (bool progress = true; progress;) {
    progress = false;
    for (int i = 0; i < threads; ++i) {
      current = falling_order ? threads - 1 - i : i;
      if (fibers[current].state != State::kReady) continue;
      progress = true;
      swapcontext(&scheduler, &fibers[current].context);
    }
  }
  return std::all_of(fibers.begin(), fibers.end(),
                     [](const Fiber& fiber) { return fiber.state == State::kDone; });
}

}  // namespace emulator

// ---- what the kernel's source uses of CUDA ------------------------------------------------------

struct ThreadIdx {
  struct {
    operator unsigned() const { return emulator::current; }
  } x;
} threadIdx;
struct {
  unsigned x;
} blockIdx;

void __syncthreads() {
  if (++emulator::at_barrier < static_cast<int>(emulator::fibers.size()))
    return emulator::yield(emulator::State::kAtBarrier);
  emulator::at_barrier = 0;
  for (emulator::Fiber& fiber : emulator::fibers) fiber.state = emulator::State::kReady;
}
float __int_as_float(int bits) {
  float v;
  memcpy(&v, &bits, 4);
  return v;
}
#define __expf expf
using std::max;
using std::min;

// ---- csrc/ptx -----------------------------------------------------------------------------------

namespace sparsekern::ptx {

using emulator::Copy;
using emulator::Lane;

uint32_t smem_address(const void*) { return emulator::kSmemBase; }

void cp_async_16(uint32_t smem, const void* gmem, int bytes = 16) {
  emulator::require(reinterpret_cast<uintptr_t>(gmem) % 16 == 0, "cp.async from 16-byte alignment");
  const auto* from = static_cast<const uint8_t*>(gmem);
  bool inside = bytes == 0;
  for (const auto& [begin, end] : emulator::readable)
    inside |= from >= begin && from + bytes <= end;
  emulator::require(inside, "cp.async from inside x, the values or the metadata");
  const auto& [x_begin, x_end] = emulator::readable[0];
  emulator::require(from < x_begin || from >= x_end || emulator::fibers[emulator::current].waited,
                    "x to be read after the kernel that made it");
  const Copy copy = {smem, gmem, bytes};
  if (!emulator::copies_land_late) emulator::land(copy);
  emulator::fibers[emulator::current].open.push_back(copy);
}
void wait_for_predecessor() { emulator::fibers[emulator::current].waited = true; }
void let_successor_start() {}

void cp_async_commit() {
  auto& fiber = emulator::fibers[emulator::current];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int kPending>
void cp_async_wait() {
  auto& groups = emulator::fibers[emulator::current].groups;
  for (; groups.size() > kPending; groups.erase(groups.begin()))
    if (emulator::copies_land_late)
      std::for_each(groups[0].begin(), groups[0].end(), emulator::land);
}

// Matrix m is the eight rows that lanes 8m .. 8m+7 name; lane i gets elements 2 (i % 4), + 1 of row
// i / 4. Eight rows in eight groups of banks are read at once.
void ldmatrix_x4(uint32_t (&r)[4], uint32_t smem) {
  emulator::warp_instruction({nullptr, nullptr, smem, r}, [](Lane* lanes) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      unsigned groups = 0;
      for (int row = 0; row < 8; ++row) groups |= 1u << lanes[matrix * 8 + row].word / 16 % 8;
      emulator::require(groups == 0xFF, "ldmatrix without bank conflicts");
      for (int i = 0; i < 32; ++i) {
        const auto* row = emulator::shared(lanes[matrix * 8 + i / 4].word, 16);
        static_cast<uint32_t*>(lanes[i].result)[matrix] = static_cast<const uint32_t*>(row)[i % 4];
      }
    }
  });
}

template <class T>
float element(uint32_t word, int half) {
  const uint16_t bits = word >> (16 * half);
  T v;
  memcpy(&v, &bits, 2);
  return static_cast<float>(v);
}

// PTX ISA, "Matrix fragments for sparse mma.m16n8k32" and "Sparse matrix storage".
template <class T, int kSelector>
void mma_sp(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
  emulator::warp_instruction({a, b, metadata, d}, [](Lane* lanes) {
    const auto b_at = [lanes](int k, int n) {
      return element<T>(lanes[4 * n + k % 8 / 2].b[k / 8], k % 2);
    };
    for (int row = 0; row < 16; ++row) {
      const int g = row % 8, upper = row / 8;
      for (int n = 0; n < 8; ++n) {
        float& sum = static_cast<float*>(lanes[4 * g + n / 2].result)[2 * upper + n % 2];
        for (int kept = 0; kept < 16; ++kept) {
          const int group = kept / 2;
          const uint32_t word = lanes[4 * g + 2 * kSelector + group / 4].word;
          const uint32_t nibble = word >> (16 * upper + 4 * (group % 4)) & 15;
          const int first = nibble % 4, second = nibble / 4;
          emulator::require(first < second, "metadata with two rising columns");
          const uint32_t pair = lanes[4 * g + kept % 8 / 2].a[upper + kept / 8 * 2];
          sum += element<T>(pair, kept % 2) * b_at(4 * group + (kept % 2 ? second : first), n);
        }
      }
    }
  });
}

uint32_t load_shared_u32(uint32_t smem) {
  return *static_cast<uint32_t*>(emulator::shared(smem, 4));
}
// The last thing before a store to y, which the kernel before this one may still be reading.
int4 load_shared_int4(uint32_t smem) {
  emulator::require(emulator::fibers[emulator::current].waited, "y to be written after that, too");
  return *static_cast<int4*>(emulator::shared(smem, 16));
}
void store_shared_f32(uint32_t smem, float v) {
  *static_cast<float*>(emulator::shared(smem, 4)) = v;
}

}  // namespace sparsekern::ptx

// ---- the kernel: its own includes of csrc/ptx find empty files ----------------------------------

#include "linear/configs.h"
#include "linear/mma_sm80.cuh"

namespace sparsekern::mma {

uint8_t raw_smem[1];  // the kernel's extern array; only its address is asked for

template <class Cfg>
void run_blocks(const LinearProblem& p) {
  const auto params = make_params<Cfg>(p);
  const int blocks = params.row_blocks * params.token_blocks;
  for (int block = 0; block < blocks && emulator::error.empty(); ++block) {
    blockIdx.x = block;
    const bool ended = emulator::run_block(Cfg::kThreads, Cfg::kSmemBytes,
                                           [&] { spmm_mma_sm80_kernel<Cfg>(params); });
    emulator::require(ended, "barriers that all threads reach");
  }
}

template <class T, bool kScaled>
void run(const LinearProblem& p, int config) {
  switch (config) {
#define SK_CASE(index, ...) \
  case index:               \
    return run_blocks<Config<T, __VA_ARGS__, kScaled>>(p);
    SK_MMA_CONFIGS(SK_CASE)
#undef SK_CASE
  }
}

}  // namespace sparsekern::mma

// A problem as in csrc/core/problem.h, then the freedoms. Returns "" or the rule that was broken.
struct Emulated {
  const void *x, *values, *metadata, *bias, *residual, *channel_scale, *token_scale;
  void* y;
  int64_t x_stride, y_stride, residual_stride;
  int tokens, out_features, in_features, dtype, activation, config, late, falling;
};

extern "C" const char* emulate(const Emulated* e) {
  using namespace sparsekern;
  emulator::error.clear();
  emulator::copies_land_late = e->late;
  emulator::falling_order = e->falling;
  LinearProblem p = {};
  p.tokens = e->tokens, p.out_features = e->out_features, p.in_features = e->in_features;
  const auto dtype = static_cast<DType>(e->dtype);
  p.x = {const_cast<void*>(e->x), e->x_stride, dtype};
  p.weight = {e->values, e->metadata};
  p.weight_dtype = dtype;
  p.epilogue.channel_scale = static_cast<const float*>(e->channel_scale);
  p.epilogue.token_scale = static_cast<const float*>(e->token_scale);
  p.epilogue.bias = e->bias;
  p.epilogue.activation = static_cast<Activation>(e->activation);
  p.epilogue.residual = e->residual;
  p.epilogue.residual_stride = e->residual_stride;
  p.y = {e->y, e->y_stride, dtype};
  const auto range = [](const void* begin, int64_t bytes) {
    const auto* first = static_cast<const uint8_t*>(begin);
    return std::make_pair(first, first + bytes);
  };
  using Tile = tile64::Tile<16>;
  const int64_t tiles = tile64::Extent::of<Tile>(p.out_features, p.in_features).tiles();
  emulator::readable = {range(e->x, ((p.tokens - 1) * e->x_stride + p.in_features) * 2),
                        range(e->values, tiles * Tile::kValueBytes),
                        range(e->metadata, tiles * Tile::kMetadataBytes)};
  const bool scaled = e->channel_scale != nullptr || e->token_scale != nullptr;
  const bool bf16 = dtype == DType::kBFloat16;
  const auto run = bf16 ? (scaled ? mma::run<__nv_bfloat16, true> : mma::run<__nv_bfloat16, false>)
                        : (scaled ? mma::run<__half, true> : mma::run<__half, false>);
  run(p, e->config);
  return emulator::error.c_str();
}

// emulator.h: thread blocks, shared memory and warp instructions of a GPU on the CPU, by the words
// of the PTX ISA, for *_emulator.cpp, which compile a kernel's source as it is.
//
// Each CUDA thread is a ucontext fiber that runs until a barrier or a warp instruction that not all
// have reached. Three freedoms of the hardware are settings, so that a missing wait shows: a copy
// lands at once or when a wait forces it, threads run in rising or falling order, and some may lag:
// they run when nothing else can. Shared memory starts as 0xFF, which is NaN; what is written of it
// is known. The first violation of a rule ends the run.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#undef __global__
#undef __launch_bounds__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

namespace emulator {

constexpr uint32_t kSmemBase = 1024;  // shared memory does not begin at address 0
constexpr int kCtaShift = 20;         // of an address in a cluster: thread block + 1
constexpr size_t kFiberStack = 1 << 16;
constexpr int kMostTurns = 50000;  // of all threads; more is a loop without end

struct Copy {
  uint32_t smem;
  const void* gmem;
  int bytes, size;  // what is copied, and with what is cleared
};
enum class State { kReady, kWaits, kPolls, kDone };
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kFiberStack]};
  State state;
  std::function<bool()> passes;  // what a fiber that polls waits for
  bool waited;                   // for the kernel before this one
  bool told;                     // that it is over: by itself or through a barrier
  int cluster_phase;             // in which it arrived at the cluster's barrier, or -1
  std::vector<std::pair<uint8_t*, uint32_t>> left;  // what it has written and not fenced
  std::vector<Copy> open;                           // copies of the group that is not closed
  std::vector<std::vector<Copy>> groups;            // closed groups under way, oldest first
};

// A byte of shared memory: never written; seen by all; written by a thread, and not yet to be seen
// by the copy engine.
enum Written : uint8_t { kNever, kSeen, kUnfenced };
struct Cta {
  std::vector<uint8_t> smem, written;
  bool started;
  int running;  // threads that have not ended
};
// Threads at a barrier: all that have arrived, and those of them that wait.
struct Meeting {
  int threads = 0;
  std::vector<int> arrived, waiting;
  bool told = false;
};
struct ClusterBarrier {
  int arrived, phase;
  bool told;
};

std::vector<Fiber> fibers;
int threads;       // of a thread block
int cluster_ctas;  // thread blocks of a cluster
std::vector<Cta> ctas;
std::vector<int> at_warp;  // lanes that have reached the warp instruction
std::map<int, Meeting> meetings;
std::vector<ClusterBarrier> cluster_barriers;
std::vector<std::function<void()>> in_flight;  // copies of the copy engine
int current, first_block, blocks;
ucontext_t scheduler;
bool copies_land_late, falling_order;
int lag_first, lag_count;  // threads of the grid
// Whether a thread that has met one that waited for the kernel before this one need not wait.
bool barriers_tell;
std::vector<std::pair<const uint8_t*, const uint8_t*>> readable;  // global memory, x first
std::string error;

void require(bool condition, const char* rule) {
  if (!condition && error.empty()) error = rule;
}

int cta() { return current / threads; }
int cluster() { return cta() / cluster_ctas; }
Fiber& self() { return fibers[current]; }

// An address with its thread block: of another one while that runs.
uint32_t named(uint32_t address) {
  return address >> kCtaShift ? address : address | (cta() + 1) << kCtaShift;
}
Cta& named_cta(uint32_t address) {
  Cta& c = ctas[(named(address) >> kCtaShift) - 1];
  require(c.started && c.running > 0, "a thread block that has begun and not ended");
  return c;
}

// Peeks: at what may never have been written, and then is not used. Leaves: writes, and the copy
// engine reads (copies) after a fence of this thread.
enum class Access { kPeeks, kReads, kCopies, kWrites, kLeaves };
void* shared(uint32_t address, uint32_t bytes, Access access, uint32_t alignment) {
  static uint8_t nowhere[1 << kCtaShift];
  Cta& c = named_cta(address);
  const uint32_t offset = (address & ((1u << kCtaShift) - 1)) - kSmemBase;
  const bool good =
      offset % alignment == 0 && offset < c.smem.size() && bytes <= c.smem.size() - offset;
  require(good, "an access inside shared memory, aligned to its size");
  if (!good) return nowhere;
  const auto written = c.written.begin() + offset;
  if (access == Access::kReads)
    require(std::find(written, written + bytes, kNever) == written + bytes,
            "shared memory to be written before it is read");
  if (access == Access::kCopies)
    require(std::count(written, written + bytes, kSeen) == bytes,
            "a fence between shared memory and the copy engine");
  if (access == Access::kWrites) std::fill(written, written + bytes, kSeen);
  if (access == Access::kLeaves) {
    std::fill(written, written + bytes, kUnfenced);
    self().left.push_back({&*written, bytes});
  }
  return &c.smem[offset];
}
void* shared(uint32_t address, uint32_t bytes, Access access = Access::kReads) {
  return shared(address, bytes, access, bytes);
}

void require_readable(const void* from, int bytes) {
  const auto* first = static_cast<const uint8_t*>(from);
  bool inside = bytes == 0;
  for (const auto& [begin, end] : readable) inside |= first >= begin && first + bytes <= end;
  require(inside, "a copy from inside x, the values or the metadata");
}

void yield(State state) {
  fibers[current].state = state;
  swapcontext(&fibers[current].context, &scheduler);
}

void wait_until(std::function<bool()> passes) {
  if (passes()) return;
  fibers[current].passes = std::move(passes);
  yield(State::kPolls);
}

// A barrier of `count` threads, of which some may not wait.
void meet(int key, int count, bool waits = true) {
  Meeting& m = meetings[key];
  require(m.arrived.empty() || m.threads == count, "a barrier of one number of threads");
  require(std::find(m.arrived.begin(), m.arrived.end(), current) == m.arrived.end(),
          "a thread once in a turn of a barrier");
  m.threads = count;
  m.arrived.push_back(current);
  m.told |= self().told;
  if (waits) m.waiting.push_back(current);
  if (static_cast<int>(m.arrived.size()) < count) {
    if (waits) yield(State::kWaits);
    return;
  }
  for (int fiber : m.waiting) fibers[fiber].state = State::kReady, fibers[fiber].told |= m.told;
  m = {};
}
int of_block(int id) { return cta() * 32 + id; }

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
  if (++at_warp[warp] < 32) return yield(State::kWaits);
  at_warp[warp] = 0;
  execute(&lanes[warp * 32]);
  for (int i = warp * 32; i < warp * 32 + 32; ++i)
    if (i != current) fibers[i].state = State::kReady;
}

// A copy of the copy engine.
void fly(std::function<void()> land) {
  if (copies_land_late) in_flight.push_back(std::move(land));
  else land();
}

bool land_one() {
  if (in_flight.empty()) return false;
  const auto land = std::move(in_flight.front());
  in_flight.erase(in_flight.begin());
  land();
  return true;
}

// Runs clusters of thread blocks side by side; false when a rule was broken or their threads wait
// for each other for ever.
bool run_clusters(int clusters, int ctas_each, int threads_each, int smem_bytes,
                  std::function<void()> kernel) {
  static std::function<void()> entry;
  entry = std::move(kernel);
  threads = threads_each, cluster_ctas = ctas_each;
  const int blocks_here = clusters * ctas_each, count = blocks_here * threads;
  fibers.resize(count);
  lanes.resize(count);
  at_warp.assign(count / 32, 0);
  meetings.clear();
  in_flight.clear();
  cluster_barriers.assign(clusters, {});
  ctas.assign(blocks_here, {std::vector<uint8_t>(smem_bytes, 0xFF),
                            std::vector<uint8_t>(smem_bytes, kNever), false, threads});
  for (Fiber& fiber : fibers) {
    fiber.state = State::kReady;
    fiber.waited = fiber.told = false;
    fiber.cluster_phase = -1;
    fiber.left.clear();
    fiber.open.clear();
    fiber.groups.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kFiberStack;
    makecontext(
        &fiber.context,
        +[] {
          entry();
          --ctas[cta()].running;
          yield(State::kDone);
        },
        0);
  }
  const auto turn = [&](bool of_lagging) {
    bool progress = false;
    for (int i = 0; i < count && error.empty(); ++i) {
      current = falling_order ? count - 1 - i : i;
      const int thread = first_block * threads + current;
      if ((thread >= lag_first && thread < lag_first + lag_count) != of_lagging) continue;
      Fiber& fiber = self();
      if (fiber.state == State::kPolls && fiber.passes()) fiber.state = State::kReady;
      if (fiber.state != State::kReady) continue;
      progress = ctas[cta()].started = true;
      swapcontext(&scheduler, &fiber.context);
    }
    return progress;
  };
  for (int turns = 0; error.empty() && (turn(false) || land_one() || turn(true)); ++turns)
    require(turns < kMostTurns, "loops that end");
  return error.empty() && std::all_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) {
           return fiber.state == State::kDone;
         });
}

}  // namespace emulator

// ---- what the kernels' sources use of CUDA ------------------------------------------------------

struct ThreadIdx {
  struct {
    operator unsigned() const { return emulator::current % emulator::threads; }
  } x;
} threadIdx;
struct BlockIdx {
  struct {
    operator unsigned() const { return emulator::first_block + emulator::cta(); }
  } x;
} blockIdx;
struct GridDim {
  struct {
    operator unsigned() const { return emulator::blocks; }
  } x;
} gridDim;

void __syncthreads() { emulator::meet(emulator::of_block(0), emulator::threads); }
void __syncwarp() {
  emulator::warp_instruction({}, [](emulator::Lane*) {});
}
void __trap() { emulator::require(false, "no trap"); }
float __int_as_float(int bits) {
  float v;
  memcpy(&v, &bits, 4);
  return v;
}
float __uint_as_float(unsigned bits) { return __int_as_float(static_cast<int>(bits)); }
#define __expf expf
using std::max;
using std::min;

// ---- csrc/ptx -----------------------------------------------------------------------------------

namespace sparsekern::ptx {

using emulator::Lane;

uint32_t smem_address(const void*) { return emulator::kSmemBase; }
void wait_for_predecessor() { emulator::self().waited = emulator::self().told = true; }
void let_successor_start() {}

// Matrix m is the eight rows that lanes 8m .. 8m+7 name; lane i gets elements 2 (i % 4), + 1 of row
// i / 4. Eight rows in eight groups of banks are read at once; of tokens that nobody stores they may
// be unwritten.
void ldmatrix_x4(uint32_t (&r)[4], uint32_t smem) {
  emulator::warp_instruction({nullptr, nullptr, smem, r}, [](Lane* lanes) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      unsigned groups = 0;
      for (int row = 0; row < 8; ++row) groups |= 1u << lanes[matrix * 8 + row].word / 16 % 8;
      emulator::require(groups == 0xFF, "ldmatrix without bank conflicts");
      for (int i = 0; i < 32; ++i) {
        const auto* row =
            emulator::shared(lanes[matrix * 8 + i / 4].word, 16, emulator::Access::kPeeks);
        static_cast<uint32_t*>(lanes[i].result)[matrix] = static_cast<const uint32_t*>(row)[i % 4];
      }
    }
  });
}

// An element of a register.
template <class T>
auto element(uint32_t word, int index) {
  T v;
  memcpy(&v, reinterpret_cast<const char*>(&word) + index * sizeof(T), sizeof(T));
  if constexpr (std::is_integral_v<T>) return static_cast<int32_t>(v);
  else return static_cast<float>(v);
}

// PTX ISA, "Matrix fragments for sparse mma.m16n8k32" and "m16n8k64", "Sparse matrix storage".
template <class T, int kSelector, class Accumulator>
void mma_sp(Accumulator (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
            uint32_t metadata) {
  emulator::warp_instruction({a, b, metadata, d}, [](Lane* lanes) {
    constexpr int n = 4 / sizeof(T), kK = 16 * n;  // elements of a register
    Accumulator a[16][kK / 2], b[kK][8];
    for (int row = 0; row < 16; ++row)
      for (int kept = 0; kept < kK / 2; ++kept)
        a[row][kept] = element<T>(
            lanes[row % 8 * 4 + kept % (4 * n) / n].a[row / 8 + kept / (4 * n) * 2], kept % n);
    for (int k = 0; k < kK; ++k)
      for (int column = 0; column < 8; ++column)
        b[k][column] = element<T>(lanes[4 * column + k % (4 * n) / n].b[k / (4 * n)], k % n);
    for (int row = 0; row < 16; ++row) {
      const int g = row % 8, upper = row / 8;
      for (int kept = 0; kept < kK / 2; ++kept) {
        const int group = kept / 2;
        // 16 bits: half a word is four groups of a row. 8 bits: a word is eight.
        const int lane = sizeof(T) == 2 ? 2 * kSelector + group / 4 : upper + 2 * (group / 8);
        const int bit = sizeof(T) == 2 ? 16 * upper + 4 * (group % 4) : 4 * (group % 8);
        const uint32_t nibble = lanes[4 * g + lane].word >> bit & 15;
        const int first = nibble % 4, second = nibble / 4;
        emulator::require(first < second, "metadata with two rising columns");
        const Accumulator* of_k = b[4 * group + (kept % 2 ? second : first)];
        for (int column = 0; column < 8; ++column)
          static_cast<Accumulator*>(lanes[4 * g + column / 2].result)[2 * upper + column % 2] +=
              a[row][kept] * of_k[column];
      }
    }
  });
}

// One word per lane; a bank has one address. Unwritten, it is neither metadata nor a number.
uint32_t load_shared_u32(uint32_t smem) {
  uint32_t v;
  emulator::warp_instruction({nullptr, nullptr, smem, &v}, [](Lane* lanes) {
    uint32_t of_bank[32] = {};
    for (int i = 0; i < 32; ++i) {
      uint32_t& word = of_bank[lanes[i].word / 4 % 32];
      emulator::require(word == 0 || word == lanes[i].word, "a load without bank conflicts");
      word = lanes[i].word;
      *static_cast<uint32_t*>(lanes[i].result) =
          *static_cast<uint32_t*>(emulator::shared(word, 4, emulator::Access::kPeeks));
    }
  });
  return v;
}
uint2 load_shared_u64(uint32_t smem) { return *static_cast<uint2*>(emulator::shared(smem, 8)); }
// Before a store to y, which the kernel before this one may still be reading.
void require_waited() {
  emulator::require(emulator::barriers_tell || emulator::self().waited,
                    "y to be written after that, too");
}
int4 load_shared_int4(uint32_t smem) {
  require_waited();
  return *static_cast<int4*>(emulator::shared(smem, 16));
}
void store_shared_f32(uint32_t smem, float v) {
  *static_cast<float*>(emulator::shared(smem, 4, emulator::Access::kWrites)) = v;
}

}  // namespace sparsekern::ptx

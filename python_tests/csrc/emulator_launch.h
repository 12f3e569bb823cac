// emulator_launch.h: emulator_sm90.h with what the split and the prefill kernel use besides:
// launches as of core/device.h and core/tensor_map.h, which find empty files, copies to y, sums that
// thread blocks exchange through global memory. Stores of 8 and 16 bytes are seen one by one.
#pragma once
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <list>

#include "emulator_sm90.h"
#include "linear/workspace.h"

namespace emulator {

// y, a store to which must lie in one of its rows.
struct Output {
  uint8_t* data;
  int64_t row_bytes, width;
  int rows;
} output;
std::vector<std::pair<const uint8_t*, const uint8_t*>> operands;  // bias, residual and scales
int64_t stores[17];                                               // to y: how many, by their bytes
int resident;  // clusters that the GPU holds at once
int together;  // and those that the last launch ran side by side
int beside;    // as many if none of them waits for another, or fewer
int launched;  // clusters of the last launch

// A copy of what the epilogue reads, aligned as that, between pages that nobody may touch: next to
// the one before it or, but for the alignment, the one after it.
class Guarded {
 public:
  Guarded(const void* from, int64_t bytes, bool at_begin) {
    const int64_t page = getpagesize(), inside = (bytes + 16 + page - 1) / page * page;
    size_ = inside + 2 * page;
    memory_ =
        static_cast<uint8_t*>(mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(memory_ + page, inside, PROT_READ | PROT_WRITE);
    memset(memory_ + page, 0xFF, inside);
    const int64_t offset = reinterpret_cast<uintptr_t>(from) % 16, last = inside - bytes;
    data = memory_ + page + (at_begin ? offset : last - (last - offset) % 16);
    memcpy(data, from, bytes);
    operands.push_back({data, data + bytes});
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(memory_, size_); }

  uint8_t* data;

 private:
  uint8_t* memory_;
  int64_t size_;
};
// A thread that touches such a page ends the run.
void on_fault(int) {
  require(false, "accesses inside the tensors of the problem");
  setcontext(&scheduler);
}

bool lies_in(const std::vector<std::pair<const uint8_t*, const uint8_t*>>& ranges, const void* from,
             int bytes) {
  const auto* first = static_cast<const uint8_t*>(from);
  return std::any_of(ranges.begin(), ranges.end(), [&](const auto& range) {
    return first >= range.first && first + bytes <= range.second;
  });
}
bool on_stack(const void* v) {
  const auto* stack = reinterpret_cast<const uint8_t*>(self().stack.get());
  return lies_in({{stack, stack + kFiberStack}}, v, 1);
}
void require_store(const void* to, int bytes) {
  const int64_t offset = static_cast<const uint8_t*>(to) - output.data;
  require(offset >= 0 && offset / output.row_bytes < output.rows &&
              offset % output.row_bytes + bytes <= output.width,
          "stores to y alone");
  require(self().told, "y to be written after the kernel before this one");
}

// 8 or 16 bytes that are read or written by one instruction.
template <int kWords>
struct Vector {
  uint32_t words[kWords];

  Vector() = default;
  Vector(const Vector& from) { move(&from); }
  Vector& operator=(const Vector& from) {
    move(&from);
    return *this;
  }

 private:
  void move(const Vector* from) {
    if (!on_stack(from)) {
      require(lies_in(operands, from, sizeof(*this)), "loads from the bias or the residual");
      require(reinterpret_cast<uintptr_t>(from) % sizeof(*this) == 0, "loads that are aligned");
    }
    if (!on_stack(this)) {
      require_store(this, sizeof(*this));
      require(reinterpret_cast<uintptr_t>(this) % sizeof(*this) == 0, "stores that are aligned");
      ++stores[sizeof(*this)];
    }
    if (error.empty()) memcpy(this, from, sizeof(*this));
  }
};

// ---- global memory that thread blocks share -----------------------------------------------------

std::vector<uint8_t> workspace;
std::map<int, std::vector<std::pair<float4*, float4>>> unseen;  // by thread: before a fence
std::map<int, std::pair<const uint32_t*, uint32_t>> polled;     // by thread: what it found last

void require_shared(const void* at, int bytes, size_t begin, size_t end) {
  require(lies_in({{&workspace[begin], &workspace[begin] + (end - begin)}}, at, bytes),
          "sums and counters inside the workspace");
  require(self().told, "the workspace to be used after the kernel before this one");
}
void require_sum(const float4* at) {
  require_shared(at, 16, sparsekern::kPrefillCounterBytes, workspace.size());
}
void require_counter(const uint32_t* at) {
  require_shared(at, 4, 0, sparsekern::kPrefillCounterBytes);
}

}  // namespace emulator

void __stcg(float4* to, float4 v) {
  emulator::require_sum(to);
  if (emulator::copies_land_late) emulator::unseen[emulator::current].push_back({to, v});
  else *to = v;
}
float4 __ldcg(const float4* from) {
  emulator::require_sum(from);
  return *from;
}
void __threadfence() {
  auto& stores = emulator::unseen[emulator::current];
  for (const auto& [to, v] : stores) *to = v;
  stores.clear();
}
uint32_t atomicAdd(uint32_t* at, uint32_t v) {
  emulator::require_counter(at);
  emulator::polled.erase(emulator::current);
  const uint32_t before = *at;
  *at += v;
  return before;
}
float __ldg(const float* from) {
  emulator::require(emulator::lies_in(emulator::operands, from, 4), "scales inside their arrays");
  return *from;
}
int __float_as_int(float v) { return static_cast<int>(reinterpret_cast<const uint32_t&>(v)); }

#define uint2 emulator::Vector<2>
#define uint4 emulator::Vector<4>

// ---- csrc/ptx -----------------------------------------------------------------------------------

namespace sparsekern::ptx {

// Who reads the same counter again waits for it to change.
uint32_t load_acquire(const uint32_t* at) {
  emulator::require_counter(at);
  const auto last = emulator::polled.find(emulator::current);
  if (last != emulator::polled.end() && last->second.first == at)
    emulator::wait_until([at, v = last->second.second] { return *at != v; });
  emulator::polled[emulator::current] = {at, *at};
  return *at;
}

uint32_t atomic_add_acquire(uint32_t* at, uint32_t v) { return atomicAdd(at, v); }

template <class Sum>
float as_float_here(Sum sum) {
  return static_cast<float>(sum);
}

void named_barrier_arrive(int id, int threads) {
  emulator::require(id > 0 && id < 16 && threads % 32 == 0, "a barrier from 1 to 15, of warps");
  emulator::meet(emulator::of_block(id), threads, false);
}

uint4 load_shared_u128(uint32_t smem) {
  uint4 v;
  memcpy(&v, emulator::shared(smem, 16), 16);
  return v;
}
float2 load_shared_float2(uint32_t smem) {
  return *static_cast<float2*>(emulator::shared(smem, 8));
}
// Of a row's first and last piece what does not belong to it may be unwritten.
template <int kCount>
void load_shared(float (&v)[kCount], uint32_t smem) {
  for (int i = 0; i < kCount; i += 4)
    memcpy(&v[i], emulator::shared(smem + i * 4, 16, emulator::Access::kPeeks), 16);
}
void store_shared_int4(uint32_t smem, int4 v) {
  *static_cast<int4*>(emulator::shared(smem, 16, emulator::Access::kWrites)) = v;
}
void store_cluster_float4(uint32_t address, float4 v) {
  *static_cast<float4*>(emulator::shared(address, 16, emulator::Access::kWrites)) = v;
}

// Matrix m goes to the eight rows that lanes 8m .. 8m+7 name, transposed: lane i has elements
// 2 (i % 4), + 1 of column i / 4. Eight rows in eight groups of banks are written at once.
void stmatrix_x4_transposed(uint32_t smem, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  const uint32_t r[4] = {r0, r1, r2, r3};
  auto* mine = static_cast<uint8_t*>(emulator::shared(smem, 16, emulator::Access::kLeaves));
  emulator::warp_instruction({r, nullptr, smem, mine}, [](Lane* lanes) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      unsigned groups = 0;
      for (int row = 0; row < 8; ++row) {
        const Lane& to = lanes[matrix * 8 + row];
        groups |= 1u << to.word / 16 % 8;
        for (int column = 0; column < 8; ++column) {
          const uint16_t v = lanes[column * 4 + row / 2].a[matrix] >> row % 2 * 16;
          memcpy(static_cast<uint8_t*>(to.result) + column * 2, &v, 2);
        }
      }
      emulator::require(groups == 0xFF, "stmatrix without bank conflicts");
    }
  });
}
void fence_before_tensor_store() {
  for (const auto& [written, bytes] : emulator::self().left)
    std::replace(written, written + bytes, uint8_t{emulator::kUnfenced}, uint8_t{emulator::kSeen});
  emulator::self().left.clear();
}

// Boxes on their way to y, by thread: each is read at once or when a wait forces it.
struct Boxes {
  std::vector<std::function<void()>> open;
  std::vector<std::vector<std::function<void()>>> groups;
  bool unfinished;  // read, and perhaps not yet in y
};
std::map<int, Boxes> boxes;

void tensor_store(const CUtensorMap* map, int x, int y, uint32_t smem, L2Hint) {
  Tensor t;
  memcpy(&t, map, sizeof(t));
  const auto store = [=] {
    for_each_chunk(t, smem, x, y, [](uint32_t chunk, uint8_t* to, int bytes) {
      if (bytes == 0) return;
      emulator::require_store(to, bytes);
      memcpy(to, emulator::shared(chunk, 16, emulator::Access::kCopies), bytes);
    });
  };
  if (!emulator::copies_land_late) store();
  boxes[emulator::current].open.push_back(store);
}
void tensor_store_commit() {
  Boxes& of = boxes[emulator::current];
  of.groups.push_back(std::move(of.open));
  of.open.clear();
}
template <int kPending>
void tensor_store_wait_read() {
  Boxes& of = boxes[emulator::current];
  for (; of.groups.size() > kPending; of.groups.erase(of.groups.begin())) {
    if (emulator::copies_land_late)
      for (const auto& store : of.groups[0]) store();
    of.unfinished = true;
  }
}
template <int kPending>
void tensor_store_wait() {
  tensor_store_wait_read<kPending>();
  if (kPending == 0) boxes[emulator::current].unfinished = false;
}

}  // namespace sparsekern::ptx

// ---- csrc/core/device.h and csrc/core/tensor_map.h ----------------------------------------------

namespace sparsekern {

constexpr int kPortableCluster = 8;
struct LaunchShape {
  int threads, smem_bytes, cluster;
  bool dependent = true, cooperative = false;
};
struct KernelStates {};

template <class... Params>
class DeviceKernel {
 public:
  DeviceKernel(const char*, const char*, void (*function)(Params...), KernelStates&)
      : function_(function) {}
  Status prepare(int, bool& waits) const {
    waits = true;
    return {};
  }
  Status resident_clusters(const LaunchShape&, int& count) const {
    count = emulator::resident;
    return {};
  }
  Status clusters_that_fit(const LaunchShape&, int& count) const {
    count = emulator::resident;
    return {};
  }
  // All clusters side by side where one may wait for another; else as many as the problem says, in
  // rising or falling order.
  Status launch(const LaunchShape& shape, int64_t blocks, cudaStream_t,
                const Params&... arguments) const {
    const int clusters = emulator::launched = static_cast<int>(blocks / shape.cluster);
    const int together = emulator::together =
        shape.cooperative ? clusters : std::min(emulator::beside, clusters);
    emulator::require(shape.smem_bytes <= 227 * 1024, "shared memory that an SM has");
    emulator::require(together <= emulator::resident, "clusters that are resident at once");
    emulator::blocks = static_cast<int>(blocks);
    for (int begin = 0; begin < clusters && emulator::error.empty(); begin += together) {
      const int here = std::min(together, clusters - begin);
      const int first = emulator::falling_order ? clusters - begin - here : begin;
      emulator::first_block = first * shape.cluster;
      emulator::unseen.clear(), emulator::polled.clear(), ptx::boxes.clear();
      ptx::run_clusters(here, shape.cluster, shape.threads, shape.smem_bytes,
                        [&] { function_(arguments...); });
      for (const auto& [thread, of] : ptx::boxes)
        emulator::require(of.open.empty() && of.groups.empty() && !of.unfinished,
                          "copies to y that somebody waits for");
    }
    return {};
  }

 private:
  void (*function_)(Params...);
};

inline Status make_map(CUtensorMap& map, const Rows& tensor, int rows, int columns, int box_rows) {
  const int bytes = info(tensor.dtype).storage_bits / 8;
  emulator::require(reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 &&
                        tensor.stride * bytes % 16 == 0 && box_rows <= 256,
                    "rows of 16 bytes, boxes of up to 256");
  const ptx::Tensor t = {
      static_cast<uint8_t*>(tensor.data), tensor.stride * bytes, rows, columns, box_rows, bytes};
  memcpy(&map, &t, sizeof(t));
  return {};
}
inline Status make_activation_map(const char*, CUtensorMap& map, const LinearProblem& p,
                                  int box_rows) {
  return make_map(map, p.x, p.tokens, p.in_features, box_rows);
}
inline Status make_output_map(const char*, CUtensorMap& map, const LinearProblem& p, int box_rows) {
  return make_map(map, p.y, p.tokens, p.out_features, box_rows);
}

}  // namespace sparsekern

// Not all configs are compiled, for the compiler's time: those of the list whose numbers are given.
template <int... kConfigs>
constexpr bool is_one_of(int config) {
  return ((config == kConfigs) || ...);
}
sparsekern::Status not_compiled() {
  emulator::require(false, "a config that is compiled");
  return {};
}

// The kernel of a problem: linear(problem). Returns the rule that was broken, or nothing.
template <class Linear>
const char* emulate_launch(const Emulated* e, Linear linear) {
  using namespace sparsekern;
  LinearProblem p = emulated_problem(e);
  constexpr DType kStored[] = {DType::kFloat16, DType::kFloat8E4M3, DType::kInt8};
  p.weight_dtype = e->weight ? kStored[e->weight] : p.y.dtype;
  p.x.dtype = p.weight_dtype;
  emulator::barriers_tell = true;
  emulator::output = {static_cast<uint8_t*>(p.y.data), p.y.stride * 2, p.out_features * int64_t{2},
                      p.tokens};
  std::fill(std::begin(emulator::stores), std::end(emulator::stores), 0);
  emulator::resident = e->clusters, emulator::beside = std::max(e->beside, 1);
  emulator::operands.clear();
  std::list<emulator::Guarded> copies;
  const auto guard = [&](auto& pointer, int64_t bytes) {
    if (!pointer) return;
    copies.emplace_back(pointer, bytes, e->falling);
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(copies.back().data);
  };
  guard(p.epilogue.bias, p.out_features * 2);
  guard(p.epilogue.residual, ((p.tokens - 1) * e->residual_stride + p.out_features) * 2);
  guard(p.epilogue.channel_scale, p.out_features * 4);
  guard(p.epilogue.token_scale, p.tokens * 4);
  // Sums are what a launch before has left there.
  auto& memory = emulator::workspace;
  memory.assign(kPrefillCounterBytes + e->clusters * 8 * kPrefillTileBytes, 0xFF);
  std::fill_n(memory.begin(), kPrefillCounterBytes, 0);
  p.workspace = memory.data();
  struct sigaction fault = {}, before;
  fault.sa_handler = emulator::on_fault;
  sigaction(SIGSEGV, &fault, &before);
  const auto forget = [](uint8_t* begin, int64_t bytes) { memset(begin, 0xFF, bytes); };
  Status status = linear(p);
  for (int i = 0; i < e->again && status.ok() && emulator::error.empty(); ++i) {
    for (int token = 0; token < p.tokens; ++token)
      forget(emulator::output.data + token * emulator::output.row_bytes, emulator::output.width);
    forget(memory.data() + kPrefillCounterBytes, memory.size() - kPrefillCounterBytes);
    std::fill(std::begin(emulator::stores), std::end(emulator::stores), 0);
    status = linear(p);
  }
  sigaction(SIGSEGV, &before, nullptr);
  if (!status.ok() && emulator::error.empty()) emulator::error = status.message;
  emulator::require(std::count(memory.begin(), memory.begin() + kPrefillCounterBytes, 0) ==
                        static_cast<ptrdiff_t>(kPrefillCounterBytes),
                    "counters that are zero again");
  return emulator::error.c_str();
}

// How many stores of so many bytes to y the last problem took.
extern "C" int64_t stores_of(int bytes) { return emulator::stores[bytes]; }
// How many clusters it had, and how many of them ran side by side.
extern "C" int clusters_launched() { return emulator::launched; }
extern "C" int clusters_together() { return emulator::together; }
// Of those that tests put into the kernel's source.
extern "C" {
int mistake = -1;
}

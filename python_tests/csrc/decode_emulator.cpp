// decode_emulator.cpp: runs the source of csrc/linear/decode_sm90.cuh on the CPU, cluster by cluster,
// for test_decode_emulated.py, as its launcher says. Not all instantiations, for the compiler's time:
// splits other than 4, tiles of 8, 16 and 64 tokens, and the types of the table below. EMULATE_FEW:
// bfloat16 x, 16 tokens, e4m3 in two configs, bfloat16 in four.
#include "emulator_sm90.h"

// ---- csrc/core/device.h and csrc/core/tensor_map.h, which find empty files ----------------------

namespace emulator {

int resident;  // clusters that the GPU holds at once
}
extern "C" {
int largest_cluster = 16;  // thread blocks, that the GPU has room for
int launched_cluster;      // of the last launch
}

namespace sparsekern {

constexpr int kPortableCluster = 8;
struct LaunchShape {
  int threads, smem_bytes, cluster;
  bool dependent;
};
struct KernelStates {};

template <class... Params>
class DeviceKernel {
 public:
  DeviceKernel(const char*, const char*, void (*function)(Params...), KernelStates&)
      : function_(function) {}
  Status resident_clusters(const LaunchShape& shape, int& count) const {
    SK_RETURN_IF_ERROR(clusters_that_fit(shape, count));
    emulator::require(count > 0, "a cluster that fits");
    return {};
  }
  Status clusters_that_fit(const LaunchShape& shape, int& count) const {
    count = shape.cluster <= largest_cluster ? emulator::resident : 0;
    return {};
  }
  Status launch(const LaunchShape& shape, int64_t blocks, cudaStream_t,
                const Params&... arguments) const {
    launched_cluster = shape.cluster;
    emulator::require(shape.smem_bytes <= 227 * 1024, "shared memory that an SM has");
    emulator::blocks = static_cast<int>(blocks);
    for (int first = 0; first < blocks && emulator::error.empty(); first += shape.cluster) {
      emulator::first_block = first;
      ptx::run_clusters(1, shape.cluster, shape.threads, shape.smem_bytes,
                        [&] { function_(arguments...); });
    }
    return {};
  }

 private:
  void (*function_)(Params...);
};

inline Status make_activation_map(const char*, CUtensorMap& map, const LinearProblem& p,
                                  int box_rows) {
  emulator::require(reinterpret_cast<uintptr_t>(p.x.data) % 16 == 0 && p.x.stride % 8 == 0,
                    "rows of 16 bytes");
  const ptx::Tensor t = {static_cast<uint8_t*>(p.x.data), p.x.stride * 2, p.tokens, p.in_features,
                         box_rows};
  memcpy(&map, &t, sizeof(t));
  return {};
}

}  // namespace sparsekern

// ---- the kernel: its own includes of csrc/ptx find empty files ----------------------------------

#include "linear/decode_launch_sm90.cuh"

namespace sparsekern::decode {

uint8_t raw_smem[1];  // the kernel's extern array; only its address is asked for

template <class W, class X, int kTokenTiles, int kScaleGroup>
Status run(const LinearProblem& p, int config) {
#ifdef EMULATE_FEW
#define SK_CONFIGS(X) \
  X(0, 4, 1, 0)       \
  X(4, 2, 2, 0) X(9, 4, 2, 1) X(14, 4, 2, 2) X(17, 2, 16, 0) X(18, 1, 8, 0) X(19, 1, 16, 0)
#else
#define SK_CONFIGS(X) SK_DECODE_CONFIGS(X)
#endif
  switch (config) {
#define SK_CASE(index, panels, split, paired)                                         \
  case index:                                                                         \
    if constexpr (split != 4 && index < configs_of(Element<W>::kStorageBits))         \
      return launch_split<Config<W, X, X, kTokenTiles, 1, panels, kScaleGroup,        \
                                 kTokenTiles * 8 <= kPairedTokens ? paired : kAlone>, \
                          split>(p, nullptr);                                         \
    break;
    SK_CONFIGS(SK_CASE)
#undef SK_CASE
  }
  emulator::require(false, "a config that is compiled");
  return {};
}

template <class W, class X, int kScaleGroup = 0>
Status run(const LinearProblem& p, int config) {
#ifndef EMULATE_FEW
  if (p.tokens <= 8) return run<W, X, 1, kScaleGroup>(p, config);
  if (p.tokens > 16) return run<W, X, 8, kScaleGroup>(p, config);
#endif
  return run<W, X, 2, kScaleGroup>(p, config);
}

}  // namespace sparsekern::decode

extern "C" const char* emulate(const Emulated* e) {
  using namespace sparsekern;
  const LinearProblem p = emulated_problem(e);
  using Run = Status (*)(const LinearProblem&, int);
#ifdef EMULATE_FEW
  constexpr Run runs[2][2] = {{nullptr, decode::run<__nv_bfloat16, __nv_bfloat16>},
                              {nullptr, decode::run<__nv_fp8_e4m3, __nv_bfloat16>}};
#else
  constexpr Run runs[6][2] = {
      {nullptr, decode::run<__nv_bfloat16, __nv_bfloat16>},
      {decode::run<__nv_fp8_e4m3, __half>, decode::run<__nv_fp8_e4m3, __nv_bfloat16>},
      {decode::run<int8_t, __half>, decode::run<int8_t, __nv_bfloat16>},
      {decode::run<Int4, __half>, nullptr},
      {nullptr, decode::run<Int4, __nv_bfloat16, 64>},
      {decode::run<Int4, __half, 128>, decode::run<Int4, __nv_bfloat16, 128>},
  };
#endif
  emulator::resident = e->clusters > 0 ? e->clusters : p.out_features;
  const Status status = runs[e->weight][e->bf16](p, e->config);
  if (!status.ok() && emulator::error.empty()) emulator::error = status.message;
  return emulator::error.c_str();
}

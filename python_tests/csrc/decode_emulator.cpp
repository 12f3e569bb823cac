// decode_emulator.cpp: runs the source of csrc/linear/decode_sm90.cuh on the CPU, cluster by cluster,
// for test_decode_emulated.py. Not all instantiations, for the compiler's time: splits other than 4, tiles of 8, 16 and 64 tokens,
// and the types of the table below. EMULATE_FEW: e4m3 with bfloat16, 16 tokens, two configs.
#include "emulator_sm90.h"

// ---- the kernel: its own includes of csrc/ptx find empty files ----------------------------------

#include "linear/configs.h"
#include "linear/decode_sm90.cuh"

namespace sparsekern::decode {

uint8_t raw_smem[1];  // the kernel's extern array; only its address is asked for

template <class Cfg, int kRanks>
void run_clusters(const LinearProblem& p, int clusters, int ranks) {
  Params<Cfg> params = make_params<Cfg>(p);
  params.ranks = ranks;
  const ptx::Tensor tensor = {static_cast<uint8_t*>(p.x.data), p.x.stride * 2, p.tokens,
                              p.in_features, Cfg::kTokens};
  CUtensorMap map;
  memcpy(&map, &tensor, sizeof(tensor));
  if (ranks > 1 || clusters == 0) clusters = params.row_blocks;
  emulator::blocks = clusters * ranks;
  for (int cluster = 0; cluster < clusters && emulator::error.empty(); ++cluster) {
    emulator::first_block = cluster * ranks;
    ptx::run_clusters(1, ranks, Cfg::kThreads, Cfg::kSmemBytes, [&] {
      spmm_decode_sm90_kernel<Cfg, kRanks>(map, params);
    });
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

extern "C" const char* emulate(const Emulated* e) {
  using namespace sparsekern;
  const LinearProblem p = emulated_problem(e);
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

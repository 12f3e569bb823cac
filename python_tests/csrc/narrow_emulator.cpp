// narrow_emulator.cpp: runs the source of csrc/linear/narrow_sm90.cuh on the CPU, cluster by cluster,
// for test_narrow_emulated.py. Not all types, and of tiles of 64 and 96 tokens one, for the compiler's
// time.
// EMULATE_FEW: bfloat16, groups of 128, tiles of 32 tokens.
#include "emulator_sm90.h"

// ---- the kernel: its own includes of csrc/ptx find empty files ----------------------------------

#include "linear/narrow_launch_sm90.cuh"

namespace sparsekern::narrow {

uint8_t raw_smem[1];  // the kernel's extern array; only its address is asked for

template <class X, int kTokens, int kScaleGroup>
void run_tiles(const LinearProblem& p, int cluster_rows, int parts) {
  using Cfg = Config<X, kTokens, kScaleGroup>;
  int64_t clusters = 0;
  const Params<X> params = make_params<Cfg>(p, cluster_rows, parts, clusters);
  const ptx::Tensor tensor = {static_cast<uint8_t*>(p.x.data), p.x.stride * 2, p.tokens,
                              p.in_features, params.slice_tokens};
  CUtensorMap map;
  memcpy(&map, &tensor, sizeof(tensor));
  const int ctas = cluster_rows * parts;
  emulator::blocks = static_cast<int>(clusters) * ctas;
  for (int cluster = 0; cluster < clusters && emulator::error.empty(); ++cluster) {
    emulator::first_block = cluster * ctas;
    ptx::run_clusters(1, ctas, kThreads, Cfg::kSmemBytes, [&] {
      spmm_narrow_sm90_kernel<Cfg>(map, params);
    });
  }
}

template <class X, int kScaleGroup = 0>
void run(const LinearProblem& p, int config) {
  switch (config) {
#ifdef EMULATE_FEW
#define SK_TILE(tokens, cluster_rows, parts) \
  if constexpr (tokens == 32) run_tiles<X, tokens, kScaleGroup>(p, cluster_rows, parts)
#else
#define SK_TILE(tokens, cluster_rows, parts)                                                 \
  if constexpr (tokens == 32 || tokens == 128 || (kIsBFloat16<X> && kScaleGroup == 128))      \
  run_tiles<X, tokens, kScaleGroup>(p, cluster_rows, parts)
#endif
#define SK_CASE(index, tokens, cluster_rows, parts) \
  case index:                                       \
    SK_TILE(tokens, cluster_rows, parts);           \
    return;
    SK_NARROW_CONFIGS(SK_CASE)
#undef SK_CASE
  }
}

}  // namespace sparsekern::narrow

// Returns "" or the rule that was broken.
extern "C" const char* emulate(const Emulated* e) {
  using namespace sparsekern;
  const LinearProblem p = emulated_problem(e);
  using Run = void (*)(const LinearProblem&, int);
#ifdef EMULATE_FEW
  constexpr Run run = narrow::run<__nv_bfloat16, 128>;
#else
  // By what python_tests/csrc/emulated_linear.py calls the weight: int4 is 3, plus columns of a group
  // by 64; then float16 or bfloat16.
  constexpr Run runs[3][2] = {
      {narrow::run<__half>, nullptr},
      {nullptr, narrow::run<__nv_bfloat16, 64>},
      {nullptr, narrow::run<__nv_bfloat16, 128>},
  };
  const Run run = runs[e->weight - 3][e->bf16];
#endif
  run(p, e->config);
  return emulator::error.c_str();
}

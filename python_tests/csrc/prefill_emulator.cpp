// prefill_emulator.cpp: runs the source of csrc/linear/prefill_sm90.cuh on the CPU, for
// test_prefill_emulated.py: all clusters side by side where they share a tile. EMULATE_FEW:
// bfloat16, tiles of 64 and 128 tokens.
#include "emulator_launch.h"

// ---- the kernel: its own includes of csrc/ptx find empty files ----------------------------------

#include "linear/prefill_launch_sm90.cuh"

namespace sparsekern::prefill {

uint8_t raw_smem[1];  // the kernel's extern array; only its address is asked for

template <class T, class Y, int... kConfigs>
Status run(const LinearProblem& p, int config) {
  switch (config) {
#define SK_CASE(index, panels, tokens, cluster_m, cluster_n, streamed, promoted)                   \
  case index:                                                                                      \
    if constexpr (is_one_of<kConfigs...>(index))                                                   \
      return launch<T, Y, panels, tokens, streamed, promoted>(p, {cluster_m, cluster_n}, nullptr); \
    break;
    SK_PREFILL_CONFIGS(SK_CASE)
#undef SK_CASE
  }
  return not_compiled();
}

}  // namespace sparsekern::prefill

extern "C" const char* emulate(const Emulated* e) {
  using namespace sparsekern;
  using Run = Status (*)(const LinearProblem&, int);
#ifdef EMULATE_FEW
  constexpr Run run = prefill::run<__nv_bfloat16, __nv_bfloat16, 14, 16, 17>;
#else
  constexpr Run runs[3][2] = {
      {prefill::run<__half, __half, 15, 16, 17>,
       prefill::run<__nv_bfloat16, __nv_bfloat16, 9, 10, 11, 12, 14, 16, 17, 18, 19>},
      {prefill::run<__nv_fp8_e4m3, __half, 22, 23>, nullptr},
      {nullptr, prefill::run<int8_t, __nv_bfloat16, 18>},
  };
  const Run run = runs[e->weight][e->bf16];
#endif
  return emulate_launch(e, [&](const LinearProblem& p) { return run(p, e->config); });
}

// split_emulator.cpp: runs the source of csrc/linear/splitk_sm90.cuh on the CPU, cluster by cluster
// or some side by side, for test_split_emulated.py. EMULATE_FEW: bfloat16, four configs.
#include "emulator_launch.h"

// ---- the kernel: its own includes of csrc/ptx find empty files ----------------------------------

#include "linear/splitk_launch_sm90.cuh"

namespace sparsekern::split {

uint8_t raw_smem[1];  // the kernel's extern array; only its address is asked for

template <class T, class Y, int... kConfigs>
Status run(const LinearProblem& p, int config) {
  switch (config) {
#define SK_CASE(index, panels, tokens, splits, across)                 \
  case index:                                                          \
    if constexpr (is_one_of<kConfigs...>(index))                       \
      return launch<T, Y, panels, tokens, splits, across>(p, nullptr); \
    break;
    SK_SPLIT_CONFIGS(SK_CASE)
#undef SK_CASE
  }
  return not_compiled();
}

}  // namespace sparsekern::split

extern "C" const char* emulate(const Emulated* e) {
  using namespace sparsekern;
  using Run = Status (*)(const LinearProblem&, int);
#ifdef EMULATE_FEW
  constexpr Run run = split::run<__nv_bfloat16, __nv_bfloat16, 2, 14, 23, 29>;
#else
  constexpr Run runs[3][2] = {
      {split::run<__half, __half, 1, 15, 26>,
       split::run<__nv_bfloat16, __nv_bfloat16, 0, 2, 4, 6, 10, 12, 14, 16,  //
                  23, 24, 25, 27, 28, 29>},
      {nullptr, split::run<__nv_fp8_e4m3, __nv_bfloat16, 2>},
      {split::run<int8_t, __half, 14>, nullptr},
  };
  const Run run = runs[e->weight][e->bf16];
#endif
  return emulate_launch(e, [&](const LinearProblem& p) { return run(p, e->config); });
}

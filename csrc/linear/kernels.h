// kernels.h: the table of the kernels of y = linear(x, W). What is not in a row no caller knows: a
// new kernel is its two files (kernel, instantiations), a row here and its list in configs.h.
#pragma once
#include <type_traits>

#include "core/dtype.h"
#include "core/problem.h"
#include "linear/configs.h"

namespace sparsekern {

// One instantiation per element type: linear/instantiate/*.cu.
#define SK_LINEAR(name) \
  template <class T>    \
  Status name(const LinearProblem& problem, int config, cudaStream_t stream);
namespace decode {
SK_LINEAR(linear)
SK_LINEAR(gated)
}  // namespace decode
namespace prefill {
SK_LINEAR(linear)
}
namespace split {
SK_LINEAR(linear)
}
namespace mma {
SK_LINEAR(linear)
}
namespace naive {
SK_LINEAR(linear)
}
#undef SK_LINEAR

struct LaunchOfDType {
  LinearLaunch of[kDTypeCount];
};

// What else a kernel takes or needs.
enum Takes : unsigned {
  kTakesEpilogue = 1,   // bias, activation, residual
  kTakesScales = 2,     // channel_scale, token_scale
  kTakesUp = 4,         // a second weight: gated
  kTakesWorkspace = 8,  // linear/workspace.h
};

struct Kernel {
  const char* name;
  LaunchOfDType launch;
  ConfigTable configs;
  int max_tokens;  // 0: any number
  unsigned takes;
};

namespace detail {
template <class Of>
constexpr LaunchOfDType launches(Of of) {
#define SK_LAUNCH(enumerator, name, type, ...) of(static_cast<type*>(nullptr)),
  return {{SK_DTYPES(SK_LAUNCH)}};
#undef SK_LAUNCH
}
}  // namespace detail

#define SK_LAUNCHES(function) \
  detail::launches(           \
      [](auto* type) -> LinearLaunch { return &function<std::remove_pointer_t<decltype(type)>>; })

// decode, prefill, split, mma: the weights are read before the predecessor in the stream has
// finished (programmatic dependent launch), so they must not come from it.
inline constexpr Kernel kKernels[] = {
    {"decode", SK_LAUNCHES(decode::linear), kDecodeConfigs, 64, kTakesEpilogue},
    {"decode_gated", SK_LAUNCHES(decode::gated), kDecodeConfigs, 32, kTakesUp},
    {"prefill", SK_LAUNCHES(prefill::linear), kPrefillConfigs, 0, kTakesEpilogue | kTakesWorkspace},
    {"split", SK_LAUNCHES(split::linear), kSplitConfigs, 0, kTakesEpilogue},
    {"mma", SK_LAUNCHES(mma::linear), kMmaConfigs, 0, kTakesEpilogue},
    {"naive", SK_LAUNCHES(naive::linear), kNaiveConfigs, 0, kTakesEpilogue | kTakesScales},
};
#undef SK_LAUNCHES

}  // namespace sparsekern

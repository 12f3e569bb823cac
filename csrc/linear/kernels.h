// kernels.h: the table of the kernels of y = linear(x, W). What is not in a row no caller knows: a
// new kernel is its two files (kernel, instantiations), a row here and its list in configs.h; more
// types of one are a line in its launches.
#pragma once
#include "core/dtype.h"
#include "core/problem.h"
#include "linear/configs.h"

namespace sparsekern {

// Compiled in linear/instantiate/*.cu, for the types of the weight's values W, of x X and of y Y.
#define SK_LINEAR(name)                \
  template <class W, class X, class Y> \
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
namespace narrow {
SK_LINEAR(linear)
}
namespace mma {
SK_LINEAR(linear)
}
namespace naive {
SK_LINEAR(linear)
}
#undef SK_LINEAR

// One instantiation. It takes the first `configs` rows of its kernel's.
struct Launch {
  DType weight, x, y;
  LinearLaunch launch;
  int configs;
};
#define SK_LAUNCH(W, X, Y, function, configs) \
  {kDTypeOf<W>, kDTypeOf<X>, kDTypeOf<Y>, &function<W, X, Y>, configs},

inline constexpr Launch kDecode[] = {SK_PLAIN(SK_LAUNCH, decode::linear, kDecodeConfigs.rows)  //
                                     SK_W8A16(SK_LAUNCH, decode::linear, SK_DECODE_NARROW)
                                         SK_W4A16(SK_LAUNCH, decode::linear, SK_DECODE_NARROW)};
inline constexpr Launch kDecodeGated[] = {SK_PLAIN(SK_LAUNCH, decode::gated, SK_DECODE_GATED)};
inline constexpr Launch kPrefill[] = {
    SK_PLAIN(SK_LAUNCH, prefill::linear, SK_PREFILL_UNPROMOTED)  //
    SK_E4M3_A8(SK_LAUNCH, prefill::linear, kPrefillConfigs.rows)
        SK_INT8_A8(SK_LAUNCH, prefill::linear, SK_PREFILL_UNPROMOTED)};
inline constexpr Launch kSplit[] = {SK_PLAIN(SK_LAUNCH, split::linear, kSplitConfigs.rows)  //
                                    SK_W8A8(SK_LAUNCH, split::linear, SK_SPLIT_BOTH)};
inline constexpr Launch kNarrow[] = {SK_W4A16(SK_LAUNCH, narrow::linear, kNarrowConfigs.rows)};
inline constexpr Launch kMma[] = {SK_PLAIN(SK_LAUNCH, mma::linear, kMmaConfigs.rows)  //
                                  SK_W8A8(SK_LAUNCH, mma::linear, SK_MMA_BOTH)};
inline constexpr Launch kNaive[] = {SK_PLAIN(SK_LAUNCH, naive::linear, kNaiveConfigs.rows)  //
                                    SK_W8A8(SK_LAUNCH, naive::linear, kNaiveConfigs.rows)};
#undef SK_LAUNCH

struct Launches {
  const Launch* of;
  int count;

  template <int kCount>
  constexpr Launches(const Launch (&launches)[kCount]) : of(launches), count(kCount) {}
  constexpr const Launch* begin() const { return of; }
  constexpr const Launch* end() const { return of + count; }
};

// What else a kernel takes or needs.
enum Takes : unsigned {
  kTakesEpilogue = 1,      // bias, activation, residual
  kTakesChannelScale = 2,  // whatever the types; see takes()
  kTakesTokenScale = 4,    // the same
  kTakesUp = 8,            // a second weight: gated
  kTakesWorkspace = 16,    // linear/workspace.h; see Kernel::sharing
};

struct Kernel {
  const char* name;
  Launches launches;
  ConfigTable configs;
  int max_tokens;  // 0: any number
  unsigned takes;
  int sharing = 0;  // the first config whose thread blocks share tiles through the workspace

  constexpr bool needs_workspace(int config) const {
    return (takes & kTakesWorkspace) != 0 && config >= sharing;
  }
};

// decode, prefill, split, narrow, mma: the weights are read before the predecessor in the stream has
// finished (programmatic dependent launch), so they must not come from it, unless
// LinearProblem::weight_is_new says so.
inline constexpr Kernel kKernels[] = {
    {"decode", kDecode, kDecodeConfigs, 64, kTakesEpilogue},
    {"decode_gated", kDecodeGated, kDecodeConfigs, 32, kTakesUp},
    {"prefill", kPrefill, kPrefillConfigs, 0, kTakesEpilogue | kTakesWorkspace},
    {"split", kSplit, kSplitConfigs, 0, kTakesEpilogue | kTakesWorkspace, SK_SPLIT_ACROSS},
    {"narrow", kNarrow, kNarrowConfigs, 0, kTakesEpilogue},
    {"mma", kMma, kMmaConfigs, 0, kTakesEpilogue},
    {"naive", kNaive, kNaiveConfigs, 0, kTakesEpilogue | kTakesChannelScale | kTakesTokenScale},
};

// Of one launch: numbers of fewer than 16 bits have scales.
constexpr unsigned takes(const Kernel& kernel, const Launch& launch) {
  return kernel.takes | (info(launch.weight).storage_bits < 16 ? kTakesChannelScale : 0u) |
         (info(launch.x).storage_bits < 16 ? kTakesTokenScale : 0u);
}

}  // namespace sparsekern

// widen.cu: the launch of widen.cuh.
#include "weights/widen.cuh"

namespace sparsekern {
namespace {

using namespace widen;

constexpr const char* kOp = "sparsekern.linear (widen)";
constexpr int kMostOfGrid = 65536;  // along y and z

template <class W, class X, int kScaleGroup>
Status launch(const WidenProblem& problem, cudaStream_t stream) {
  const Params params = make_params<W>(problem);
  SK_CHECK_REL(kOp, params.narrow.k_tiles, <, kMostOfGrid, "Split in_features.");
  SK_CHECK_REL(kOp, params.narrow.groups, <, kMostOfGrid, "Split out_features.");
  if (params.narrow.tiles() == 0) return {};
  const dim3 grid = grid_of(params);
  widen_kernel<W, X, kScaleGroup><<<grid, kThreads, 0, stream>>>(params);
  return launch_status(kOp, "widen_kernel", grid, dim3(kThreads), 0);
}

template <class W, class X>
Status launch_grouped(const WidenProblem& problem, cudaStream_t stream) {
  if constexpr (std::is_same_v<W, Int4>) {
    if (problem.scale_group == 64) return launch<W, X, 64>(problem, stream);
    if (problem.scale_group == 128) return launch<W, X, 128>(problem, stream);
  }
  return launch<W, X, 0>(problem, stream);
}

}  // namespace

Status launch_widen(const WidenProblem& problem, cudaStream_t stream) {
#define SK_WIDEN(W, X, Y, ...)                                  \
  if (problem.from == kDTypeOf<W> && problem.to == kDTypeOf<X>) \
    return launch_grouped<W, X>(problem, stream);
  SK_W8A16(SK_WIDEN, )
  SK_W4A16(SK_WIDEN, )
#undef SK_WIDEN
  return make_status(StatusKind::value, kOp, ": expected values of 8 or 4 bits to be widened to ",
                     "16, got ", info(problem.from).name, " and ", info(problem.to).name,
                     ". Convert the weight.");
}

}  // namespace sparsekern

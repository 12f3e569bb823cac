// mma_sm80.cu: entry point of the mma.sp kernel, and the kernel for bfloat16; float16 has a
// file of its own.
#include "linear/mma_launch_sm80.cuh"

namespace sparsekern {
namespace mma {

extern template Status launch_config<__half>(const LinearProblem&, int, cudaStream_t);

}  // namespace mma

Status launch_mma(const LinearProblem& p, int config, cudaStream_t stream) {
  if (p.tokens == 0 || p.out_features == 0) return {};
  return p.dtype == DType::kBFloat16 ? mma::launch_config<__nv_bfloat16>(p, config, stream)
                                     : mma::launch_config<__half>(p, config, stream);
}

}  // namespace sparsekern

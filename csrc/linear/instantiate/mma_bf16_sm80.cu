// mma_bf16_sm80.cu: the mma.sp kernel, for bfloat16.
#include "linear/mma_launch_sm80.cuh"

namespace sparsekern {
SK_INSTANTIATE_LINEAR(__nv_bfloat16, __nv_bfloat16, __nv_bfloat16, mma::linear)
}

// mma_int8_bf16_sm80.cu: the mma.sp kernel, for int8 with y in bfloat16.
#include "linear/mma_launch_sm80.cuh"

namespace sparsekern {
SK_INSTANTIATE_LINEAR(int8_t, int8_t, __nv_bfloat16, mma::linear)
}

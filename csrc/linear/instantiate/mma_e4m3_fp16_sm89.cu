// mma_e4m3_fp16_sm89.cu: the mma.sp kernel, for e4m3 with y in float16.
#include "linear/mma_launch_sm80.cuh"

namespace sparsekern {
SK_INSTANTIATE_LINEAR(__nv_fp8_e4m3, __nv_fp8_e4m3, __half, mma::linear)
}

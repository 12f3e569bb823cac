// mma_e4m3_sm89.cu: the mma.sp kernel, for e4m3, y in float16 and bfloat16.
#include "linear/mma_launch_sm80.cuh"

namespace sparsekern {
SK_E4M3_A8(SK_INSTANTIATE_LINEAR, mma::linear)
}

// mma_int8_sm80.cu: the mma.sp kernel, for int8, y in float16 and bfloat16.
#include "linear/mma_launch_sm80.cuh"

namespace sparsekern {
SK_INT8_A8(SK_INSTANTIATE_LINEAR, mma::linear)
}

// mma_fp16_sm80.cu: the mma.sp kernel, for float16.
#include "linear/mma_launch_sm80.cuh"

namespace sparsekern {
SK_INSTANTIATE_LINEAR(__half, __half, __half, mma::linear)
}

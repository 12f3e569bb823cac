// mma_sm80.cu: the mma.sp kernel, for float16 and bfloat16.
#include "linear/mma_launch_sm80.cuh"

namespace sparsekern {
SK_PLAIN(SK_INSTANTIATE_LINEAR, mma::linear)
}

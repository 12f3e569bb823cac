// splitk_fp16_sm90.cu: the split kernel, for float16.
#include "linear/splitk_launch_sm90.cuh"

namespace sparsekern {
SK_INSTANTIATE_LINEAR(__half, __half, __half, split::linear)
}

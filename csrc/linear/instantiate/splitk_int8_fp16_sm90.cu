// splitk_int8_fp16_sm90.cu: the split kernel, for int8 with y in float16.
#include "linear/splitk_launch_sm90.cuh"

namespace sparsekern {
SK_INSTANTIATE_LINEAR(int8_t, int8_t, __half, split::linear)
}

// splitk_int8_sm90.cu: the split kernel, for int8, y in float16 and bfloat16.
#include "linear/splitk_launch_sm90.cuh"

namespace sparsekern {
SK_INT8_A8(SK_INSTANTIATE_LINEAR, split::linear)
}

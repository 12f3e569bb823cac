// splitk_bf16_sm90.cu: the split kernel, for bfloat16.
#include "linear/splitk_launch_sm90.cuh"

namespace sparsekern {
SK_INSTANTIATE_LINEAR(__nv_bfloat16, __nv_bfloat16, __nv_bfloat16, split::linear)
}

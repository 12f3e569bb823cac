// splitk_e4m3_bf16_sm90.cu: the split kernel, for e4m3 with y in bfloat16.
#include "linear/splitk_launch_sm90.cuh"

namespace sparsekern {
SK_INSTANTIATE_LINEAR(__nv_fp8_e4m3, __nv_fp8_e4m3, __nv_bfloat16, split::linear)
}

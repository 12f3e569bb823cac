// narrow_int4_sm90.cu: the narrow kernel, int4 weights, for float16 and bfloat16.
#include "linear/narrow_launch_sm90.cuh"

namespace sparsekern {
SK_INSTANTIATE_LINEAR(Int4, __half, __half, narrow::linear)
SK_INSTANTIATE_LINEAR(Int4, __nv_bfloat16, __nv_bfloat16, narrow::linear)
}  // namespace sparsekern

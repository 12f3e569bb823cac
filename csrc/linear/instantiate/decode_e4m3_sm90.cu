// decode_e4m3_sm90.cu: the decode kernel, e4m3 weights, for float16 and bfloat16.
#include "linear/decode_launch_sm90.cuh"

namespace sparsekern {
SK_INSTANTIATE_LINEAR(__nv_fp8_e4m3, __half, __half, decode::linear)
SK_INSTANTIATE_LINEAR(__nv_fp8_e4m3, __nv_bfloat16, __nv_bfloat16, decode::linear)
}  // namespace sparsekern

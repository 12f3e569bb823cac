// decode_bf16_sm90.cu: the decode kernel, for bfloat16.
#include "linear/decode_launch_sm90.cuh"

namespace sparsekern {
SK_INSTANTIATE_LINEAR(__nv_bfloat16, __nv_bfloat16, __nv_bfloat16, decode::linear)
}

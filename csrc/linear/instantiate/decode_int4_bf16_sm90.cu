// decode_int4_bf16_sm90.cu: the decode kernel, int4 weights and bfloat16.
#include "linear/decode_launch_sm90.cuh"

namespace sparsekern {
SK_INSTANTIATE_LINEAR(Int4, __nv_bfloat16, __nv_bfloat16, decode::linear)
}

// decode_int8_bf16_sm90.cu: the decode kernel, int8 weights and bfloat16.
#include "linear/decode_launch_sm90.cuh"

namespace sparsekern {
SK_INSTANTIATE_LINEAR(int8_t, __nv_bfloat16, __nv_bfloat16, decode::linear)
}

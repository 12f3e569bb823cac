// decode_bf16_sm90.cu: the decode kernel, for bfloat16.
#include "linear/decode_launch_sm90.cuh"

namespace sparsekern {
SK_INSTANTIATE_LINEAR(decode::linear, __nv_bfloat16)
}

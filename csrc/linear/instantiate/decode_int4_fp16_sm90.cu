// decode_int4_fp16_sm90.cu: the decode kernel, int4 weights and float16.
#include "linear/decode_launch_sm90.cuh"

namespace sparsekern {
SK_INSTANTIATE_LINEAR(Int4, __half, __half, decode::linear)
}

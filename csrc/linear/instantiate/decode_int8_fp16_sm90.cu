// decode_int8_fp16_sm90.cu: the decode kernel, int8 weights and float16.
#include "linear/decode_launch_sm90.cuh"

namespace sparsekern {
SK_INSTANTIATE_LINEAR(int8_t, __half, __half, decode::linear)
}

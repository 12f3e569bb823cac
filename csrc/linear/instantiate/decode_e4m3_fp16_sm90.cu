// decode_e4m3_fp16_sm90.cu: the decode kernel, e4m3 weights and float16.
#include "linear/decode_launch_sm90.cuh"

namespace sparsekern {
SK_INSTANTIATE_LINEAR(__nv_fp8_e4m3, __half, __half, decode::linear)
}

// decode_fp16_sm90.cu: the decode kernel, for float16.
#include "linear/decode_launch_sm90.cuh"

namespace sparsekern {
SK_INSTANTIATE_LINEAR(__half, __half, __half, decode::linear)
}

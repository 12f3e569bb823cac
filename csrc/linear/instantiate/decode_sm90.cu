// decode_sm90.cu: the decode kernel, for float16 and bfloat16.
#include "linear/decode_launch_sm90.cuh"

namespace sparsekern {
SK_PLAIN(SK_INSTANTIATE_LINEAR, decode::linear)
}

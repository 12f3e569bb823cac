// prefill_int8_sm90.cu: the prefill kernel, for int8, y in float16 and bfloat16.
#include "linear/prefill_launch_sm90.cuh"

namespace sparsekern {
SK_INT8_A8(SK_INSTANTIATE_LINEAR, prefill::linear)
}

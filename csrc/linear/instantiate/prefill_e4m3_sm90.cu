// prefill_e4m3_sm90.cu: the prefill kernel, for e4m3, y in float16 and bfloat16.
#include "linear/prefill_launch_sm90.cuh"

namespace sparsekern {
SK_E4M3_A8(SK_INSTANTIATE_LINEAR, prefill::linear)
}

// prefill_int8_bf16_sm90.cu: the prefill kernel, for int8 with y in bfloat16.
#include "linear/prefill_launch_sm90.cuh"

namespace sparsekern {
SK_INSTANTIATE_LINEAR(int8_t, int8_t, __nv_bfloat16, prefill::linear)
}

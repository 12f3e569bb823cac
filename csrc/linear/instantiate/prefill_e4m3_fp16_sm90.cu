// prefill_e4m3_fp16_sm90.cu: the prefill kernel, for e4m3 with y in float16.
#include "linear/prefill_launch_sm90.cuh"

namespace sparsekern {
SK_INSTANTIATE_LINEAR(__nv_fp8_e4m3, __nv_fp8_e4m3, __half, prefill::linear)
}

// prefill_fp16_sm90.cu: the prefill kernel, for float16.
#include "linear/prefill_launch_sm90.cuh"

namespace sparsekern {
SK_INSTANTIATE_LINEAR(__half, __half, __half, prefill::linear)
}

// prefill_sm90.cu: the prefill kernel, for float16 and bfloat16.
#include "linear/prefill_launch_sm90.cuh"

namespace sparsekern {
SK_PLAIN(SK_INSTANTIATE_LINEAR, prefill::linear)
}

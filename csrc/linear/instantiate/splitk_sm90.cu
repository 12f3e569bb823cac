// splitk_sm90.cu: the split kernel, for float16 and bfloat16.
#include "linear/splitk_launch_sm90.cuh"

namespace sparsekern {
SK_PLAIN(SK_INSTANTIATE_LINEAR, split::linear)
}

// decode_fp16_sm90.cu: the decode kernel for float16, one weight.
#include "linear/decode_launch_sm90.cuh"

template sparsekern::Status sparsekern::decode::launch_for_tokens<__half, 1>(const LinearProblem&,
                                                                             const void*,
                                                                             const void*, int,
                                                                             cudaStream_t);

// decode_gated_bf16_sm90.cu: the decode kernel for bfloat16, gate and up.
#include "linear/decode_launch_sm90.cuh"

template sparsekern::Status sparsekern::decode::launch_for_tokens<__nv_bfloat16, 2>(
    const LinearProblem&, const void*, const void*, int, cudaStream_t);

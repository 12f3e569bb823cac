// prefill_fp16_sm90.cu: the prefill kernel for float16.
#include "linear/prefill_launch_sm90.cuh"

template sparsekern::Status sparsekern::prefill::launch_config<__half>(const LinearProblem&, int,
                                                                       void*, cudaStream_t);

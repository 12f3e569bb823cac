// mma_fp16_sm80.cu: the mma.sp kernel for float16.
#include "linear/mma_launch_sm80.cuh"

template sparsekern::Status sparsekern::mma::launch_config<__half>(const LinearProblem&, int,
                                                                   cudaStream_t);

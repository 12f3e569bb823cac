// prefill_sm90.cu: entry points of the prefill kernel, and the kernel for bfloat16; float16
// has a file of its own.
#include "linear/prefill_launch_sm90.cuh"

namespace sparsekern {
namespace prefill {

extern template Status launch_config<__half>(const LinearProblem&, int, void*, cudaStream_t);

}  // namespace prefill

Status launch_prefill(const LinearProblem& p, int config, void* workspace, cudaStream_t stream) {
  if (p.tokens == 0) return {};
  return p.dtype == DType::kBFloat16
             ? prefill::launch_config<__nv_bfloat16>(p, config, workspace, stream)
             : prefill::launch_config<__half>(p, config, workspace, stream);
}

Status prefill_workspace_bytes(size_t& bytes) {
  int device = 0, sms = 0;
  SK_CUDA(prefill::kOp, cudaGetDevice(&device));
  SK_CUDA(prefill::kOp, cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  SK_CHECK_REL(prefill::kOp, sms * prefill::kConsumers * 2 * sizeof(uint32_t), <=,
               kPrefillCounterBytes, "Raise kPrefillCounterBytes.");
  bytes = kPrefillCounterBytes + sms * prefill::kTileBytes;
  return {};
}

}  // namespace sparsekern

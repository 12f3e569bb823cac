// widen_emulator.cpp: runs the source of csrc/weights/widen.cuh on the CPU, for
// test_widen_emulated.py. Its threads do not meet, so they run one after the other.
#include <cstdint>
#include <cstring>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include "emulator_bytes.h"

#undef __global__
#undef __launch_bounds__
#define __global__
#define __launch_bounds__(...)

dim3 threadIdx(0, 0, 0), blockIdx(0, 0, 0);

namespace sparsekern::ptx {

void e4m3x4_to_f16x2(uint32_t&, uint32_t&, uint32_t);  // not of this kernel

}  // namespace sparsekern::ptx

// ---- the kernel: its own includes of csrc/ptx find empty files ----------------------------------

#include "weights/widen.cuh"

namespace sparsekern::widen {

template <class W, class X, int kScaleGroup = 0>
void run(const WidenProblem& problem) {
  const Params params = make_params<W>(problem);
  const dim3 grid = grid_of(params);
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < kThreads; ++threadIdx.x)
          widen_kernel<W, X, kScaleGroup>(params);
}

template <class X>
void run_any(const WidenProblem& p) {
  if (p.from == DType::kFloat8E4M3) run<__nv_fp8_e4m3, X>(p);
  else if (p.from == DType::kInt8) run<int8_t, X>(p);
  else if (p.scale_group == 64) run<Int4, X, 64>(p);
  else if (p.scale_group == 128) run<Int4, X, 128>(p);
  else run<Int4, X>(p);
}

}  // namespace sparsekern::widen

// from, bf16: types of the stored values (DType) and of the numbers.
extern "C" void emulate(int out_features, int in_features, int from, int bf16, int scale_group,
                        const void* values, const void* metadata, const float* channel_scale,
                        void* widened) {
  using namespace sparsekern;
  const DType to = bf16 ? DType::kBFloat16 : DType::kFloat16;
  const WidenProblem p = {out_features, in_features,          static_cast<DType>(from),
                          to,           scale_group,          {values, metadata},
                          channel_scale, widened};
  if (bf16) widen::run_any<__nv_bfloat16>(p);
  else widen::run_any<__half>(p);
}

extern "C" int64_t widened_bytes_of(int out_features, int in_features) {
  return sparsekern::widened_bytes(out_features, in_features);
}

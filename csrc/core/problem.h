// core/problem.h: what the host side may call. Torch-free: plain pointers, sizes, strides in elements, a
// stream.
//
// GEMM letters: D[M,N] = A[M,K] · B[K,N] with A the 2:4-sparse weight, because the hardware
// sparsifies only A. For a linear layer y[tokens, out] = x[tokens, in] · W[out, in]^T that means M
// = out_features, N = tokens, K = in_features (always the dense count). No launcher allocates or
// synchronises; each returns a Status.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/status.h"

namespace sparsekern {

enum class DType : int { kFloat16 = 0, kBFloat16 = 1 };
enum class Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kSilu = 3 };

// y = activation(x · Wᵀ + bias) + residual, accumulated in float32 and rounded once.
struct LinearProblem {
  const void* x;         // [tokens, in_features], row stride x_stride
  const void* values;    // packed "tile64" (layout/tile64.cuh)
  const void* metadata;  // packed "tile64"
  const void* bias;      // [out_features] or null
  const void* residual;  // [tokens, out_features], row stride residual_stride, or null
  void* y;               // [tokens, out_features], row stride y_stride
  int tokens, out_features, in_features;
  int64_t x_stride, y_stride, residual_stride;  // in elements
  DType dtype;
  Activation activation;
};

// silu(x · Gᵀ) * (x · Uᵀ): both halves of a gated MLP in one launch. G and U have the same shape.
struct GatedProblem {
  LinearProblem gate;  // bias, residual and activation unused; y is the output
  const void* up_values;
  const void* up_metadata;
};

Status launch_pack(const void* values, const void* metadata, void* packed_values,
                   void* packed_metadata, int out_features, int in_features, cudaStream_t stream);

// Row-major values [out, in/2] and metadata [out, in/8] of a contiguous 16-bit w, pruned by
// magnitude. `bad_chunks` counts what holds NaN or Inf; the caller zeroes it.
Status launch_prune_compress(const void* w, void* values, void* metadata, int* bad_chunks,
                             int64_t elements, DType dtype, cudaStream_t stream);

// The readable kernel of naive_sm90.cu; any number of tokens.
Status launch_naive(const LinearProblem& problem, cudaStream_t stream);

// For 1 to 64 tokens (gated: 32). config: index into SK_DECODE_CONFIGS (configs.h), 0 chooses. The
// weights are read before the kernel's predecessor in the stream has finished (programmatic
// dependent launch): they must not come from it.
Status launch_decode(const LinearProblem& problem, int config, cudaStream_t stream);
int decode_config(int out_features, int in_features);  // what 0 would choose
Status launch_decode_gated(const GatedProblem& problem, int config, cudaStream_t stream);
// config: index into SK_PREFILL_CONFIGS (configs.h). workspace: prefill_workspace_bytes, of which the
// first kPrefillCounterBytes are zero before the first launch (each leaves them so), not shared by
// launches that may overlap; null: tiles are never cut along K, which is slower when there are few.
constexpr size_t kPrefillCounterBytes = 16384;
Status launch_prefill(const LinearProblem& problem, int config, void* workspace,
                      cudaStream_t stream);
Status prefill_workspace_bytes(size_t& bytes);

// For problems with few tiles. config: index into SK_SPLIT_CONFIGS (configs.h). It overlaps with its
// predecessor as launch_decode does, and launch_prefill and launch_mma do, too.
Status launch_split(const LinearProblem& problem, int config, cudaStream_t stream);

// Compute capability 8.0 and later, any number of tokens. config: index into SK_MMA_CONFIGS
// (configs.h).
Status launch_mma(const LinearProblem& problem, int config, cudaStream_t stream);

}  // namespace sparsekern

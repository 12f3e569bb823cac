// problem.h: what a launcher is asked to compute. Torch-free: plain pointers, sizes, strides in
// elements, a stream.
//
// GEMM letters: D[M,N] = A[M,K] · B[K,N] with A the 2:4-sparse weight, because the hardware
// sparsifies only A. For a linear layer y[tokens, out] = x[tokens, in] · W[out, in]^T that means M
// = out_features, N = tokens, K = in_features (always the dense count). No launcher allocates or
// synchronises; each returns a Status.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "core/status.h"

namespace sparsekern {

// X(enumerator, name in Python); without one: kNone.
#define SK_ACTIVATIONS(X) X(kRelu, "relu") X(kGelu, "gelu") X(kSilu, "silu")
#define SK_ENUMERATOR(name, text) , name
enum class Activation : int { kNone SK_ACTIVATIONS(SK_ENUMERATOR) };
#undef SK_ENUMERATOR

// A dense matrix [tokens, features], x or y.
struct Rows {
  void* data;
  int64_t stride;  // of a token, in elements
  DType dtype;
};

// A 2:4 weight in layout "tile64" (layout/tile64.cuh).
struct Operand {
  const void* values;
  const void* metadata;
};

// What happens to the sums before they are rounded to y (linear/epilogue.cuh). Null: left out.
struct EpilogueArguments {
  const float* channel_scale;  // [out_features]
  const float* token_scale;    // [tokens]
  const void* bias;            // [out_features], dtype of y
  Activation activation;
  const void* residual;     // [tokens, out_features], dtype of y
  int64_t residual_stride;  // of a token, in elements
};

// y = activation(x · Wᵀ * channel_scale * token_scale + bias) + residual, accumulated in float32
// (int32 for int8) and rounded once; a gated kernel: y = silu(x · Wᵀ) * (x · Upᵀ).
struct LinearProblem {
  int tokens, out_features, in_features;
  Rows x;
  DType weight_dtype;  // storage type of the values
  int scale_group;     // of int4: columns that share a scale of the metadata (tile64.cuh); 0: none
  Operand weight;
  Operand up;          // of a gated kernel, same shape; else null
  bool weight_is_new;  // the work just before in the stream makes it: nothing of it is read early
  EpilogueArguments epilogue;
  Rows y;
  void* workspace;  // see linear/workspace.h
};

// A kernel of linear/kernels.h with one of its rows of linear/configs.h.
using LinearLaunch = Status (*)(const LinearProblem& problem, int config, cudaStream_t stream);

// Row-major values of 16 or 8 bits and metadata -> layout "tile64".
Status launch_pack(const void* values, const void* metadata, void* packed_values,
                   void* packed_metadata, int out_features, int in_features, int storage_bits,
                   cudaStream_t stream);

// Row-major values [out, in/2] and metadata [out, in/8] of a contiguous 16-bit w, pruned by
// magnitude. `bad_chunks` counts what holds NaN or Inf; the caller zeroes it.
Status launch_prune_compress(const void* w, void* values, void* metadata, int* bad_chunks,
                             int64_t elements, DType dtype, cudaStream_t stream);

}  // namespace sparsekern

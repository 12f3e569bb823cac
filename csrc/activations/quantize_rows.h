// quantize_rows.h: activations to 8 bits, one scale per token, alone or behind what a decoder
// layer does just before a linear layer. Kernels: quantize_rows.cuh.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/dtype.h"
#include "core/problem.h"
#include "core/status.h"

namespace sparsekern {

// What is quantised, y [tokens, features].
enum class RowSource : int {
  kPlain,  // x
  kNorm,   // RMSNorm(x + residual) * norm_weight
  kGated,  // silu(x) * up
};

// Row-major matrices of `tokens` rows; strides of a token, in elements. Null: left out.
struct QuantizeRowsProblem {
  RowSource source;
  int64_t tokens;
  int features;
  Rows x;
  const void* up;  // kGated: dtype of x
  int64_t up_stride;
  const void* norm_weight;  // kNorm: [features], dtype of x
  float eps;
  void* residual;  // kNorm: dtype of x; becomes x + residual
  int64_t residual_stride;
  void* y;  // kNorm and kGated: what is quantised, dtype of x
  int64_t y_stride;
  DType storage;  // of q
  void* q;
  int64_t q_stride;
  float* scale;  // [tokens]
};

Status launch_quantize_rows(const QuantizeRowsProblem& problem, cudaStream_t stream);

}  // namespace sparsekern

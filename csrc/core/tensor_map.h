// tensor_map.h: describes activations [rows, columns] of 16-bit elements to the copy engine, which
// then moves boxes of 64 columns (128 bytes) x box_rows rows to or from 128-byte-swizzled shared
// memory. Outside the tensor it reads zero and writes nothing.
#pragma once
#include <cuda.h>
#include <cudaTypedefs.h>

#include "core/driver.h"
#include "core/problem.h"

namespace sparsekern {

constexpr int kBoxColumns = 64;

inline Status make_tensor_map(const char* op, CUtensorMap& map, const void* address, DType dtype,
                              int rows, int columns, int64_t stride, int box_rows) {
  static PFN_cuTensorMapEncodeTiled_v12000 encode = nullptr;
  SK_RETURN_IF_ERROR(driver_entry(op, "cuTensorMapEncodeTiled", 12000, encode));
  const cuuint64_t extent[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t row_bytes[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[2] = {kBoxColumns, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t element_strides[2] = {1, 1};
  const CUresult result =
      encode(&map,
             dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                       : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             2, const_cast<void*>(address), extent, row_bytes, box, element_strides,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    return make_status(StatusKind::runtime, op, ": cuTensorMapEncodeTiled failed with ",
                       int(result), " for [", rows, ", ", columns, "], row stride ", stride,
                       ", box ", box_rows, " x ", kBoxColumns, ".");
  return {};
}

inline Status make_activation_map(const char* op, CUtensorMap& map, const LinearProblem& p,
                                  int box_rows) {
  SK_CHECK_MULTIPLE(op, reinterpret_cast<uintptr_t>(p.x), uintptr_t{16},
                    "Copy x to aligned memory.");
  SK_CHECK_MULTIPLE(op, p.x_stride, int64_t{8}, "Make x contiguous, or pad in_features to 8.");
  return make_tensor_map(op, map, p.x, p.dtype, p.tokens, p.in_features, p.x_stride, box_rows);
}

// y must be 16-byte aligned, with y_stride a multiple of 8.
inline Status make_output_map(const char* op, CUtensorMap& map, const LinearProblem& p,
                              int box_rows) {
  return make_tensor_map(op, map, p.y, p.dtype, p.tokens, p.out_features, p.y_stride, box_rows);
}

}  // namespace sparsekern

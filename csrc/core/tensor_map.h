// tensor_map.h: describes activations [rows, columns] to the copy engine, which then moves boxes of
// 128 bytes (64 columns at 16 bits) x box_rows rows to or from 128-byte-swizzled shared memory.
// Outside the tensor it reads zero and writes nothing.
#pragma once
#include <cuda.h>
#include <cudaTypedefs.h>

#include "core/driver.h"
#include "core/problem.h"

namespace sparsekern {

constexpr int kBoxRowBytes = 128;

inline CUtensorMapDataType tensor_map_type(DType dtype) {
#define SK_TYPE(enumerator, name, type, bits, operand, accumulator, tensor_map, ...) tensor_map,
  constexpr CUtensorMapDataType kTypes[] = {SK_DTYPES(SK_TYPE)};
#undef SK_TYPE
  return kTypes[static_cast<int>(dtype)];
}

inline Status make_tensor_map(const char* op, CUtensorMap& map, const Rows& tensor, int rows,
                              int columns, int box_rows) {
  static PFN_cuTensorMapEncodeTiled_v12000 encode = nullptr;
  SK_RETURN_IF_ERROR(driver_entry(op, "cuTensorMapEncodeTiled", 12000, encode));
  const cuuint64_t extent[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const int bits = info(tensor.dtype).storage_bits, box_columns = kBoxRowBytes * 8 / bits;
  const cuuint64_t row_bytes[1] = {static_cast<cuuint64_t>(tensor.stride) * bits / 8};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns),
                             static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t element_strides[2] = {1, 1};
  const CUresult result =
      encode(&map, tensor_map_type(tensor.dtype), 2, tensor.data, extent, row_bytes, box,
             element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    return make_status(StatusKind::runtime, op, ": cuTensorMapEncodeTiled failed with ",
                       int(result), " for [", rows, ", ", columns, "], row stride ", tensor.stride,
                       ", box ", box_rows, " x ", box_columns, ".");
  return {};
}

// Rows of x that `bytes` divide, on such addresses.
inline Status check_x(const char* op, const LinearProblem& p, int bytes = 16) {
  const auto x = reinterpret_cast<uintptr_t>(p.x.data);
  const int64_t x_stride = p.x.stride, elements = bytes * 8 / info(p.x.dtype).storage_bits;
  SK_CHECK_MULTIPLE(op, x, static_cast<uintptr_t>(bytes), "Copy x to aligned memory.");
  SK_CHECK_MULTIPLE(op, x_stride, elements, "Make x contiguous, or pad its rows to 16 bytes.");
  return {};
}

inline Status make_activation_map(const char* op, CUtensorMap& map, const LinearProblem& p,
                                  int box_rows) {
  SK_RETURN_IF_ERROR(check_x(op, p));
  return make_tensor_map(op, map, p.x, p.tokens, p.in_features, box_rows);
}

// y must be 16-byte aligned, with y_stride a multiple of 8.
inline Status make_output_map(const char* op, CUtensorMap& map, const LinearProblem& p,
                              int box_rows) {
  return make_tensor_map(op, map, p.y, p.tokens, p.out_features, box_rows);
}

}  // namespace sparsekern

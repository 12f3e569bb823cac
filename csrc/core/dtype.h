// dtype.h: the table of element types. Whatever depends on the type of an element, on the host, in
// the kernels (dtype.cuh) or in generated code (tools/gen_wgmma_sp.py), is read from here.
//
// X(enumerator, name in Python, C++ type, bits in memory, operand of mma.sp and wgmma.sp in PTX,
//   accumulator, type of a tensor map, type for NVIDIA's libraries, bits of infinity or 0)
#pragma once
#include <cstdint>

struct __half;
struct __nv_bfloat16;
struct __nv_fp8_e4m3;

namespace sparsekern {

struct Int4;  // two of them are a byte; a name for templates

#define SK_DTYPES(X)                                                                              \
  X(kFloat16, "float16", __half, 16, "f16", float, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CUDA_R_16F,   \
    0x7C00)                                                                                       \
  X(kBFloat16, "bfloat16", __nv_bfloat16, 16, "bf16", float, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,    \
    CUDA_R_16BF, 0x7F80)                                                                          \
  X(kFloat8E4M3, "float8_e4m3fn", __nv_fp8_e4m3, 8, "e4m3", float, CU_TENSOR_MAP_DATA_TYPE_UINT8, \
    CUDA_R_8F_E4M3, 0)                                                                            \
  X(kInt8, "int8", int8_t, 8, "s8", int32_t, CU_TENSOR_MAP_DATA_TYPE_UINT8, CUDA_R_8I, 0)         \
  X(kInt4, "int4", Int4, 4, "s4", int32_t, CU_TENSOR_MAP_DATA_TYPE_UINT8, CUDA_R_4I, 0)

// What linear kernels are compiled for: X(C++ types of the weight's values, of x and of y, ...).
// Plain: all the same. W8A8 and W8A16: weights of 8 bits with scales, x of as many or of 16 bits.
#define SK_PLAIN(X, ...)                 \
  X(__half, __half, __half, __VA_ARGS__) \
  X(__nv_bfloat16, __nv_bfloat16, __nv_bfloat16, __VA_ARGS__)
#define SK_E4M3_A8(X, ...)                             \
  X(__nv_fp8_e4m3, __nv_fp8_e4m3, __half, __VA_ARGS__) \
  X(__nv_fp8_e4m3, __nv_fp8_e4m3, __nv_bfloat16, __VA_ARGS__)
#define SK_INT8_A8(X, ...)               \
  X(int8_t, int8_t, __half, __VA_ARGS__) \
  X(int8_t, int8_t, __nv_bfloat16, __VA_ARGS__)
#define SK_W8A8(X, ...) SK_E4M3_A8(X, __VA_ARGS__) SK_INT8_A8(X, __VA_ARGS__)
#define SK_W8A16(X, ...)                                      \
  X(__nv_fp8_e4m3, __half, __half, __VA_ARGS__)               \
  X(__nv_fp8_e4m3, __nv_bfloat16, __nv_bfloat16, __VA_ARGS__) \
  X(int8_t, __half, __half, __VA_ARGS__)                      \
  X(int8_t, __nv_bfloat16, __nv_bfloat16, __VA_ARGS__)
#define SK_W4A16(X, ...)               \
  X(Int4, __half, __half, __VA_ARGS__) \
  X(Int4, __nv_bfloat16, __nv_bfloat16, __VA_ARGS__)

#define SK_ENUMERATOR(name, ...) name,
enum class DType : int { SK_DTYPES(SK_ENUMERATOR) };
#undef SK_ENUMERATOR

struct DTypeInfo {
  const char* name;  // as in torch, without "torch."
  int storage_bits;
  unsigned infinity;
};

#define SK_INFO(enumerator, name, type, bits, operand, accumulator, map, library, infinity) \
  {name, bits, infinity},
constexpr DTypeInfo kDTypes[] = {SK_DTYPES(SK_INFO)};
#undef SK_INFO
constexpr int kDTypeCount = sizeof(kDTypes) / sizeof(kDTypes[0]);

// By the C++ type.
template <class T>
struct DTypeOf;
#define SK_DTYPE_OF(enumerator, name, type, ...)       \
  template <>                                          \
  struct DTypeOf<type> {                               \
    static constexpr DType kValue = DType::enumerator; \
  };
SK_DTYPES(SK_DTYPE_OF)
#undef SK_DTYPE_OF
template <class T>
constexpr DType kDTypeOf = DTypeOf<T>::kValue;

// Calls function(Type<T>{}) with the one of the C++ types T... that dtype is; false: it is none.
template <class T>
struct Type {
  using Of = T;
};
template <class... T, class Function>
bool with_type(DType dtype, Function&& function) {
  return ((kDTypeOf<T> == dtype && (function(Type<T>{}), true)) || ...);
}

constexpr const DTypeInfo& info(DType dtype) { return kDTypes[static_cast<int>(dtype)]; }

}  // namespace sparsekern

// dtype.h: the table of element types. Whatever depends on the type of an element, on the host, in
// the kernels (dtype.cuh) or in generated code (tools/gen_wgmma_sp.py), is read from here.
//
// X(enumerator, name in Python, C++ type, bits in memory, operand of mma.sp and wgmma.sp in PTX,
//   accumulator, type of a tensor map, type for NVIDIA's libraries, bits of infinity)
#pragma once

struct __half;
struct __nv_bfloat16;

namespace sparsekern {

#define SK_DTYPES(X)                                                                            \
  X(kFloat16, "float16", __half, 16, "f16", float, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CUDA_R_16F, \
    0x7C00)                                                                                     \
  X(kBFloat16, "bfloat16", __nv_bfloat16, 16, "bf16", float, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,  \
    CUDA_R_16BF, 0x7F80)

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

constexpr const DTypeInfo& info(DType dtype) { return kDTypes[static_cast<int>(dtype)]; }

}  // namespace sparsekern

// dtype.cuh: the table of element types (dtype.h) as traits of the C++ types, and conversions to
// and from float32, the type of all sums.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

#include "core/dtype.h"

namespace sparsekern {

template <class T>
struct Element;

#define SK_ELEMENT(enumerator, name, type, bits, operand, accumulator, ...)            \
  template <>                                                                          \
  struct Element<type> {                                                               \
    static constexpr int kStorageBits = bits;                                          \
    static constexpr int kPerByte = bits < 8 ? 8 / bits : 1;                           \
    using Accumulator = accumulator;                                                   \
    /* Sums of float32 that tensor cores keep with fewer bits. */                      \
    static constexpr bool kPromotes = bits == 8 && std::is_same_v<accumulator, float>; \
  };
SK_DTYPES(SK_ELEMENT)
#undef SK_ELEMENT

template <class T>
constexpr int kBytes = Element<T>::kStorageBits / 8;  // of a type of whole bytes

template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(v);
  } else {
    const __half2 v = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(v);
  }
}

template <class T>
__device__ __forceinline__ float2 unpack_pair(uint32_t bits) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(bits));
  } else {
    return __half22float2(reinterpret_cast<const __half2&>(bits));
  }
}

template <class T>
constexpr bool kIsBFloat16 = std::is_same_v<T, __nv_bfloat16>;

// Holds every value of 8 or 4 bits exactly, and becomes float32 by a shift.
using ExactOf8Bits = __nv_bfloat16;

// Two elements of a word, subtracted or multiplied.
template <class T>
__device__ __forceinline__ uint32_t subtract_pairs(uint32_t a, uint32_t b) {
  using Pair = std::conditional_t<kIsBFloat16<T>, __nv_bfloat162, __half2>;
  const Pair v = __hsub2(reinterpret_cast<const Pair&>(a), reinterpret_cast<const Pair&>(b));
  return reinterpret_cast<const uint32_t&>(v);
}
template <class T>
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  using Pair = std::conditional_t<kIsBFloat16<T>, __nv_bfloat162, __half2>;
  const Pair v = __hmul2(reinterpret_cast<const Pair&>(a), reinterpret_cast<const Pair&>(b));
  return reinterpret_cast<const uint32_t&>(v);
}
// a * b + c, rounded once.
template <class T>
__device__ __forceinline__ uint32_t multiply_add_pairs(uint32_t a, uint32_t b, uint32_t c) {
  using Pair = std::conditional_t<kIsBFloat16<T>, __nv_bfloat162, __half2>;
  const Pair v = __hfma2(reinterpret_cast<const Pair&>(a), reinterpret_cast<const Pair&>(b),
                         reinterpret_cast<const Pair&>(c));
  return reinterpret_cast<const uint32_t&>(v);
}

template <class T>
__device__ __forceinline__ float to_float(T v) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __bfloat162float(v);
  else return __half2float(v);
}

template <class T>
__device__ __forceinline__ T from_float(float v) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(v);
  else return __float2half_rn(v);
}

}  // namespace sparsekern

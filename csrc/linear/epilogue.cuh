// epilogue.cuh: what happens to an accumulator before it is rounded: bias, activation, residual.
// All in float32.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "core/problem.h"

namespace sparsekern {

__device__ __forceinline__ float activate(float v, Activation activation) {
  switch (activation) {
    case Activation::kRelu:
      return fmaxf(v, 0.0f);
    case Activation::kGelu:
      return 0.5f * v * (1.0f + erff(v * 0.70710678f));
    case Activation::kSilu:
      return v / (1.0f + __expf(-v));
    default:
      return v;
  }
}

// One uniform branch for the whole array, not one per element.
template <int kCount>
__device__ __forceinline__ void activate(float (&v)[kCount], Activation activation) {
  if (activation == Activation::kNone) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = activate(v[i], activation);
}

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
__device__ __forceinline__ float to_float(T v) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __bfloat162float(v);
  else return __half2float(v);
}

template <class T>
__device__ __forceinline__ T from_float(float v) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(v);
  else return __float2half_rn(v);
}

template <int kCount>
struct PackedWords;
template <>
struct PackedWords<4> {
  using Type = uint2;
};
template <>
struct PackedWords<8> {
  using Type = uint4;
};

// Where a finished row segment goes: 4 or 8 consecutive out_features of one token. `aligned` says
// that every pointer and stride allows 16-byte accesses; otherwise, and in the last columns,
// elements go one by one.
template <class T>
struct OutputSegment {
  T* y;
  const T* bias;
  const T* residual;
  int64_t y_stride, residual_stride;
  int out_features;
  Activation activation;
  bool aligned;

  template <int kCount>
  __device__ __forceinline__ void store(float (&v)[kCount], int token, int row) const {
    using Words = typename PackedWords<kCount>::Type;
    const int count = out_features - row < kCount ? out_features - row : kCount;
    if (count <= 0) return;
    T* out = y + token * y_stride + row;
    const T* add = residual ? residual + token * residual_stride + row : nullptr;
    if (aligned && count == kCount) {
      if (bias) accumulate(v, *reinterpret_cast<const Words*>(bias + row));
      activate(v, activation);
      if (add) accumulate(v, *reinterpret_cast<const Words*>(add));
      Words packed;
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i)
        reinterpret_cast<uint32_t*>(&packed)[i] = pack_pair<T>(v[2 * i], v[2 * i + 1]);
      *reinterpret_cast<Words*>(out) = packed;
      return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < count && bias) v[i] += to_float(bias[row + i]);
    }
    activate(v, activation);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < count) out[i] = from_float<T>(v[i] + (add ? to_float(add[i]) : 0.0f));
    }
  }

 private:
  template <int kCount>
  static __device__ __forceinline__ void accumulate(float (&v)[kCount],
                                                    typename PackedWords<kCount>::Type packed) {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const float2 pair = unpack_pair<T>(reinterpret_cast<const uint32_t*>(&packed)[i]);
      v[2 * i] += pair.x;
      v[2 * i + 1] += pair.y;
    }
  }
};

inline bool is_aligned16(const void* pointer, int64_t stride) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride % 8 == 0;
}

template <class T>
OutputSegment<T> output_segment(const LinearProblem& p) {
  const bool aligned = is_aligned16(p.y, p.y_stride) && is_aligned16(p.bias, 8) &&
                       is_aligned16(p.residual, p.residual_stride);
  return {static_cast<T*>(p.y),
          static_cast<const T*>(p.bias),
          static_cast<const T*>(p.residual),
          p.y_stride,
          p.residual_stride,
          p.out_features,
          p.activation,
          aligned};
}

}  // namespace sparsekern

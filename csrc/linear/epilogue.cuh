// epilogue.cuh: what happens to a sum before it is rounded to y. All in float32:
//
//   y = activation(sum * channel_scale * token_scale + bias) + residual
//
// and the gate of two sums. One for all kernels; what one leaves out at compile time costs nothing,
// a pointer that is null a uniform branch.
#pragma once
#include <cstdint>

#include "core/dtype.cuh"
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

// v = silu(v) * up
template <int kCount>
__device__ __forceinline__ void gate(float (&v)[kCount], const float (&up)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = activate(v[i], Activation::kSilu) * up[i];
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

// The scales of a kernel that has them; either may be null.
template <bool kScaled>
struct Scales {
  const float* channel_scale;
  const float* token_scale;

  // v: `count` consecutive rows of one token.
  template <int kCount>
  __device__ __forceinline__ void scale(float (&v)[kCount], int count, int token, int row) const {
    const float of_token = token_scale ? token_scale[token] : 1.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < count) v[i] = v[i] * (channel_scale ? channel_scale[row + i] : 1.0f) * of_token;
    }
  }
};
template <>
struct Scales<false> {
  template <int kCount>
  __device__ __forceinline__ void scale(float (&)[kCount], int, int, int) const {}
};

// T: dtype of y, bias and residual. A finished segment is one output, or 4 or 8 consecutive
// out_features of one token. `aligned` says that every pointer and stride allows 16-byte accesses;
// otherwise, and in the last columns, elements go one by one.
template <class T, bool kScaled = false>
struct Epilogue : Scales<kScaled> {
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
    this->scale(v, count, token, row);
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

  __device__ __forceinline__ void store_one(float sum, int token, int row) const {
    if (row >= out_features) return;
    float v[1] = {sum};
    this->scale(v, 1, token, row);
    if (bias) v[0] += to_float(bias[row]);
    activate(v, activation);
    if (residual) v[0] += to_float(residual[token * residual_stride + row]);
    y[token * y_stride + row] = from_float<T>(v[0]);
  }

  // By how many elements a row of a token lies beyond a multiple of 16 bytes in memory.
  __device__ __forceinline__ int beyond(int token, int row) const {
    const uint32_t first = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(y) / sizeof(T));
    return (first + token * static_cast<uint32_t>(y_stride) + row) % (16 / sizeof(T));
  }

  // For a thread that holds many tokens of a row, where `only_adds_bias`.
  __device__ __forceinline__ float row_bias(int row) const {
    return row < out_features ? to_float(bias[row]) : 0.0f;
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

template <class T, bool kScaled = false>
Epilogue<T, kScaled> make_epilogue(const LinearProblem& p) {
  const EpilogueArguments& arguments = p.epilogue;
  Epilogue<T, kScaled> epilogue = {};
  if constexpr (kScaled) {
    epilogue.channel_scale = arguments.channel_scale;
    epilogue.token_scale = arguments.token_scale;
  }
  epilogue.y = static_cast<T*>(p.y.data);
  epilogue.bias = static_cast<const T*>(arguments.bias);
  epilogue.residual = static_cast<const T*>(arguments.residual);
  epilogue.y_stride = p.y.stride;
  epilogue.residual_stride = arguments.residual_stride;
  epilogue.out_features = p.out_features;
  epilogue.activation = arguments.activation;
  epilogue.aligned = is_aligned16(p.y.data, p.y.stride) && is_aligned16(arguments.bias, 8) &&
                     is_aligned16(arguments.residual, arguments.residual_stride);
  return epilogue;
}

// y is sums, scaled and plus bias where they are, rounded.
template <class T, bool kScaled>
bool only_adds_bias(const Epilogue<T, kScaled>& epilogue) {
  return epilogue.activation == Activation::kNone && epilogue.residual == nullptr;
}

}  // namespace sparsekern

// quantize_rows.cuh: y [tokens, features] in 16 bits -> q in 8 bits and a float32 scale per token,
// in one pass over memory; y is x, RMSNorm(x + residual) * weight, or silu(x) * up.
//
//   Specification: sparsekern/ops/quantize_rows.py (torch, on the CPU; equal bits for kPlain).
//
//   absmax = max |y|;  scale = absmax / limit, but at least 2^-126, and 1 where absmax is 0
//   q = rounded to nearest even(y * (1 / scale)), saturated to +-limit
//   limit = 448 (e4m3fn) or 127 (int8). NaN or Inf in y: the scale is NaN and q is 0
//
// A row is kept in registers, kChunks pieces of 16 bytes a thread, by 1 to 16 warps; short rows
// share a thread block. How a row is cut depends on `features` alone, so the sums of a norm do too:
// a token gets the same bits in every batch.
//
//   load      x (and residual: h = x + residual, written back; or up: y = silu(x) * up)
//   reduce    kNorm: sum of h * h, and max |h * weight|; else: max |y|
//   finish    kNorm: y = h * weight * r, r = 1 / sqrt(mean(h * h) + eps); q, y and scale are stored
//
// One reduction serves a norm, because rounding and multiplying with r > 0 are monotonic: max |y| is
// max |h * weight| * r, rounded as y is. Magnitudes are compared as integers, where NaN is largest.
//
// kChunks = 0: rows of any address, stride and length, an element at a time and read twice.
//
// Bytes per element: 2 (kGated: 4) read, 1 written; residual: 2 and 2 more; y: 2 more.
#pragma once
#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

#include "activations/quantize_rows.h"
#include "core/dtype.cuh"
#include "ptx/dependent_launch.cuh"

namespace sparsekern::quantize_rows {

constexpr int kWarpThreads = 32;
constexpr int kChunkValues = 8;  // of 16 bits, in 16 bytes
constexpr int kMaxWarps = 16;
constexpr uint32_t kMagnitude = 0x7FFFFFFF, kInfinity = 0x7F800000;
constexpr float kSmallestScale = 0x1p-126f;  // whose inverse is finite

struct Params {
  const void* x;
  const void* up;
  const void* norm_weight;
  void* residual;
  void* y;
  uint8_t* q;
  float* scale;
  int64_t x_stride, up_stride, residual_stride, y_stride, q_stride;
  int64_t tokens;
  int features;
  int warps;  // of a row
  float eps;
};

// ---- formats of q -------------------------------------------------------------------------------

// |v| <= 448 (1 + 2^-22), what the instruction of 8.9 makes of it. From 2^-6 on the three highest
// bits of the mantissa stay; below, adding 2^14 leaves a multiple of 2^-9 in the lowest bits.
__host__ __device__ __forceinline__ uint32_t to_e4m3(float v) {
  union {
    float number;
    uint32_t bits;
  } magnitude, sum;
  magnitude.number = v;
  const uint32_t sign = magnitude.bits >> 31;
  magnitude.bits &= kMagnitude;
  sum.number = magnitude.number + 0x1p14f;
  const uint32_t nearest = magnitude.bits + 0x7FFFF + (magnitude.bits >> 20 & 1);
  const uint32_t normal = (nearest >> 20) - ((127 - 7) << 3);
  const uint32_t small = sum.bits & 0xF;
  const uint32_t found = magnitude.number < 0x1p-6f ? small : normal;
  return (found < 0x7E ? found : 0x7E) | sign << 7;
}

struct E4m3 {
  static constexpr float kLimit = 448.0f;

  static __device__ __forceinline__ uint32_t four(float a, float b, float c, float d) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
    return to_e4m3(a) | to_e4m3(b) << 8 | to_e4m3(c) << 16 | to_e4m3(d) << 24;
#else
    const uint32_t low = __nv_cvt_float2_to_fp8x2({a, b}, __NV_SATFINITE, __NV_E4M3);
    const uint32_t high = __nv_cvt_float2_to_fp8x2({c, d}, __NV_SATFINITE, __NV_E4M3);
    return low | high << 16;
#endif
  }
};

struct Int8 {
  static constexpr float kLimit = 127.0f;

  // In the lowest byte. |v| <= 127 (1 + 2^-22): adding 1.5 * 2^23 leaves the rounded integer there.
  static __device__ __forceinline__ uint32_t one(float v) {
    return __float_as_uint(__fadd_rn(v, 12582912.0f));
  }
  static __device__ __forceinline__ uint32_t four(float a, float b, float c, float d) {
    const uint32_t low = __byte_perm(one(a), one(b), 0x0040);
    const uint32_t high = __byte_perm(one(c), one(d), 0x0040);
    return __byte_perm(low, high, 0x5410);
  }
};

// By the type of an element of q.
template <class T>
struct LevelsOf;
template <>
struct LevelsOf<__nv_fp8_e4m3> {
  using Of = E4m3;
};
template <>
struct LevelsOf<int8_t> {
  using Of = Int8;
};

// What the largest magnitude of a row (the bits of a float) makes of it.
struct Scale {
  float scale, inverse;
  bool finite;

  static __device__ __forceinline__ Scale of(uint32_t top, float limit) {
    if (top >= kInfinity) return {__uint_as_float(0x7FC00000), 0.0f, false};
    if (top == 0) return {1.0f, 1.0f, true};
    const float scale = fmaxf(__fdiv_rn(__uint_as_float(top), limit), kSmallestScale);
    return {scale, __frcp_rn(scale), true};
  }
};

// ---- arithmetic ---------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t larger(uint32_t top, float v) {
  return max(top, __float_as_uint(v) & kMagnitude);
}

// The larger magnitudes of two pairs; NaN is larger than everything.
template <class T>
__device__ __forceinline__ uint32_t larger_pair(uint32_t top, uint32_t pair) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 v = __hmax2_nan(reinterpret_cast<const __nv_bfloat162&>(top),
                                         __habs2(reinterpret_cast<const __nv_bfloat162&>(pair)));
    return reinterpret_cast<const uint32_t&>(v);
  } else {
    const __half2 v = __hmax2_nan(reinterpret_cast<const __half2&>(top),
                                  __habs2(reinterpret_cast<const __half2&>(pair)));
    return reinterpret_cast<const uint32_t&>(v);
  }
}

__device__ __forceinline__ float silu_times(float gate, float up) {
  return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}

template <class T>
__device__ __forceinline__ float rounded(float v) {
  return to_float(from_float<T>(v));
}

struct Chunk {
  uint32_t word[4];
};

template <class T>
__device__ __forceinline__ Chunk load_chunk(const T* from) {
  const uint4 v = *reinterpret_cast<const uint4*>(from);
  return {v.x, v.y, v.z, v.w};
}

template <class T>
__device__ __forceinline__ void store_chunk(T* to, const Chunk& c) {
  *reinterpret_cast<uint4*>(to) = {c.word[0], c.word[1], c.word[2], c.word[3]};
}

template <class Q, class T>
__device__ __forceinline__ void store_quantized(uint8_t* to, const Chunk& y, const Scale& row) {
  uint2 q = {0, 0};
  if (row.finite) {
    float v[kChunkValues];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack_pair<T>(y.word[i]);
      v[2 * i] = __fmul_rn(pair.x, row.inverse);
      v[2 * i + 1] = __fmul_rn(pair.y, row.inverse);
    }
    q = {Q::four(v[0], v[1], v[2], v[3]), Q::four(v[4], v[5], v[6], v[7])};
  }
  *reinterpret_cast<uint2*>(to) = q;
}

// ---- reduction ----------------------------------------------------------------------------------

struct Shared {
  float sum[kMaxWarps];
  uint32_t top[kMaxWarps];
};

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2)
    v += __shfl_xor_sync(0xFFFFFFFF, v, distance);
  return v;
}

// Sum and maximum over the warps of this row, in all of their threads. Every thread of the block.
template <RowSource kSource>
__device__ __forceinline__ void reduce(Shared& shared, int warps, int row, float& sum,
                                       uint32_t& top) {
  constexpr bool kSums = kSource == RowSource::kNorm;
  top = __reduce_max_sync(0xFFFFFFFF, top);
  if constexpr (kSums) sum = warp_sum(sum);
  if (warps == 1) return;
  const int warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  if (lane == 0) {
    shared.top[warp] = top;
    if constexpr (kSums) shared.sum[warp] = sum;
  }
  __syncthreads();
  const bool mine = lane < warps;
  top = __reduce_max_sync(0xFFFFFFFF, mine ? shared.top[row * warps + lane] : 0);
  if constexpr (kSums) sum = warp_sum(mine ? shared.sum[row * warps + lane] : 0.0f);
}

// ---- kernels ------------------------------------------------------------------------------------

// Where the rows of one token are.
template <class T>
struct TokenRows {
  const T* x;
  const T* up;
  T* residual;
  T* y;
  uint8_t* q;

  __device__ __forceinline__ TokenRows(const Params& p, int64_t token)
      : x(static_cast<const T*>(p.x) + token * p.x_stride),
        up(static_cast<const T*>(p.up) + token * p.up_stride),
        residual(static_cast<T*>(p.residual) + token * p.residual_stride),
        y(static_cast<T*>(p.y) + token * p.y_stride),
        q(p.q + token * p.q_stride) {}
};

// 16-byte aligned rows of a multiple of 8 features, at most kChunks * 8 * the threads of a row.
template <class T, class Q, RowSource kSource, int kChunks>
__device__ __forceinline__ void quantize_aligned(const Params& p, Shared& shared) {
  const int row_threads = p.warps * kWarpThreads;
  const int row = threadIdx.x / row_threads, thread = threadIdx.x % row_threads;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (blockDim.x / row_threads) + row;
  const bool inside = token < p.tokens;
  const TokenRows<T> at(p, inside ? token : 0);
  const T* norm_weight = static_cast<const T*>(p.norm_weight);
  const auto place = [&](int i) { return (thread + i * row_threads) * kChunkValues; };
  const auto exists = [&](int i) { return inside && place(i) < p.features; };

  Chunk kept[kChunks];  // x, or h, or y
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    kept[i] = {};
    if (exists(i)) kept[i] = load_chunk(at.x + place(i));
  }
  float sum = 0.0f;
  uint32_t top = 0, top_pair = 0;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    if (!exists(i)) continue;
    Chunk& c = kept[i];
    if constexpr (kSource == RowSource::kNorm) {
      if (p.residual != nullptr) {
        const Chunk other = load_chunk(at.residual + place(i));
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const float2 a = unpack_pair<T>(c.word[w]), b = unpack_pair<T>(other.word[w]);
          c.word[w] = pack_pair<T>(a.x + b.x, a.y + b.y);
        }
        store_chunk(at.residual + place(i), c);
      }
      const Chunk weight = load_chunk(norm_weight + place(i));
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float2 h = unpack_pair<T>(c.word[w]), g = unpack_pair<T>(weight.word[w]);
        sum = fmaf(h.x, h.x, sum);
        sum = fmaf(h.y, h.y, sum);
        top = larger(larger(top, __fmul_rn(h.x, g.x)), __fmul_rn(h.y, g.y));
      }
    } else {
      if constexpr (kSource == RowSource::kGated) {
        const Chunk up = load_chunk(at.up + place(i));
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const float2 g = unpack_pair<T>(c.word[w]), u = unpack_pair<T>(up.word[w]);
          c.word[w] = pack_pair<T>(silu_times(g.x, u.x), silu_times(g.y, u.y));
        }
      }
#pragma unroll
      for (int w = 0; w < 4; ++w) top_pair = larger_pair<T>(top_pair, c.word[w]);
    }
  }
  if constexpr (kSource != RowSource::kNorm) {
    const float2 pair = unpack_pair<T>(top_pair);
    top = larger(larger(0, pair.x), pair.y);
  }
  reduce<kSource>(shared, p.warps, row, sum, top);
  if (!inside) return;

  float r = 1.0f;
  if constexpr (kSource == RowSource::kNorm) {
    r = __frcp_rn(__fsqrt_rn(__fdiv_rn(sum, static_cast<float>(p.features)) + p.eps));
    top = larger(0, rounded<T>(__fmul_rn(__uint_as_float(top), r)));
  }
  const Scale scale = Scale::of(top, Q::kLimit);
  if (thread == 0) p.scale[token] = scale.scale;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    if (!exists(i)) continue;
    Chunk& c = kept[i];
    if constexpr (kSource == RowSource::kNorm) {
      const Chunk weight = load_chunk(norm_weight + place(i));
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float2 h = unpack_pair<T>(c.word[w]), g = unpack_pair<T>(weight.word[w]);
        c.word[w] =
            pack_pair<T>(__fmul_rn(__fmul_rn(h.x, g.x), r), __fmul_rn(__fmul_rn(h.y, g.y), r));
      }
    }
    if constexpr (kSource != RowSource::kPlain) {
      if (p.y != nullptr) store_chunk(at.y + place(i), c);
    }
    store_quantized<Q, T>(at.q + place(i), c, scale);
  }
}

// Any rows: a thread block each, an element at a time. With a residual, the second pass reads what
// the same thread wrote in the first.
template <class T, class Q, RowSource kSource>
__device__ __forceinline__ void quantize_any(const Params& p, Shared& shared) {
  const int64_t token = blockIdx.x;
  const TokenRows<T> at(p, token);
  const T* norm_weight = static_cast<const T*>(p.norm_weight);
  float sum = 0.0f;
  uint32_t top = 0;
  for (int i = threadIdx.x; i < p.features; i += blockDim.x) {
    float v = to_float(at.x[i]);
    if constexpr (kSource == RowSource::kNorm) {
      if (p.residual != nullptr) {
        at.residual[i] = from_float<T>(v + to_float(at.residual[i]));
        v = to_float(at.residual[i]);
      }
      sum = fmaf(v, v, sum);
      v = __fmul_rn(v, to_float(norm_weight[i]));
    } else if constexpr (kSource == RowSource::kGated) {
      v = rounded<T>(silu_times(v, to_float(at.up[i])));
    }
    top = larger(top, v);
  }
  reduce<kSource>(shared, p.warps, 0, sum, top);
  float r = 1.0f;
  if constexpr (kSource == RowSource::kNorm) {
    r = __frcp_rn(__fsqrt_rn(__fdiv_rn(sum, static_cast<float>(p.features)) + p.eps));
    top = larger(0, rounded<T>(__fmul_rn(__uint_as_float(top), r)));
  }
  const Scale scale = Scale::of(top, Q::kLimit);
  if (threadIdx.x == 0) p.scale[token] = scale.scale;
  for (int i = threadIdx.x; i < p.features; i += blockDim.x) {
    float v = to_float(at.x[i]);
    if constexpr (kSource == RowSource::kNorm) {
      if (p.residual != nullptr) v = to_float(at.residual[i]);
      v = rounded<T>(__fmul_rn(__fmul_rn(v, to_float(norm_weight[i])), r));
    } else if constexpr (kSource == RowSource::kGated) {
      v = rounded<T>(silu_times(v, to_float(at.up[i])));
    }
    if constexpr (kSource != RowSource::kPlain) {
      if (p.y != nullptr) at.y[i] = from_float<T>(v);
    }
    const float scaled = scale.finite ? __fmul_rn(v, scale.inverse) : 0.0f;
    at.q[i] = static_cast<uint8_t>(Q::four(scaled, 0.0f, 0.0f, 0.0f));
  }
}

template <class T, class Q, RowSource kSource, int kChunks>
__global__ void __launch_bounds__(kMaxWarps* kWarpThreads) quantize_rows_kernel(const Params p) {
  __shared__ Shared shared;
  ptx::let_successor_start();
  ptx::wait_for_predecessor();
  if constexpr (kChunks == 0) quantize_any<T, Q, kSource>(p, shared);
  else quantize_aligned<T, Q, kSource, kChunks>(p, shared);
}

}  // namespace sparsekern::quantize_rows

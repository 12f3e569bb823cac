// decode_widen.cuh: 8-bit and 4-bit weights as the A of mma.sp m16n8k32, whose B is 16-bit x. int4 is
// at the end, and is simple, because its layout was made for this. 8 bits, whose layout is wgmma's:
//
// One ldmatrix.x4 of a tile of 8-bit values gives a warp 16 rows x 64 dense columns, two k-steps:
// word t of row g is the kept pairs of the groups (of 4 columns) 2t and 2t+1 of a k-step. The
// instruction wants the groups t and 4+t there. So it is told of the groups in another order, the
// same for A, metadata and B; a sum does not depend on it:
//
//   slot of the instruction     0  1  2  3    4  5  6  7
//   group of the weight         0  3  4  7    1  2  5  6
//
// Lane (g, t) fills slots t and 4+t: its two groups, in falling order where t is odd. Falling and
// rising, rather than rising everywhere, so that the lanes that load B (below) meet 32 banks.
//
// How the values become 16 bits, instructions of two values in brackets (half of the byte
// permutation where one serves four):
//   e4m3 -> float16    the conversion of sm_89 and later                                       (1.5)
//   e4m3 -> bfloat16   sign and exponent moved to their places, times 2^120, which is exact:
//                      subnormals of e4m3 are subnormals of bfloat16 until then                 (4)
//   int8 -> float16    as the mantissa of 1024 + (v + 128), minus 1152                        (2.5)
//   int8 -> bfloat16   128 + (v & 127), minus 128 or, below zero, 256                           (4)
// All are exact. The codes of e4m3 that are no number (0x7F, 0xFF) do not occur in weights.
#pragma once
#include "core/dtype.cuh"
#include "ptx/permute.cuh"

namespace sparsekern::decode {

template <class Pair>
__device__ __forceinline__ uint32_t minus(uint32_t a, uint32_t b) {
  const Pair v = __hsub2(reinterpret_cast<const Pair&>(a), reinterpret_cast<const Pair&>(b));
  return reinterpret_cast<const uint32_t&>(v);
}

// Two words of a lane's slots t and 4+t from one word of four 8-bit values.
template <class W, class X>
class Widen {
  static constexpr bool kE4M3 = std::is_same_v<W, __nv_fp8_e4m3>;
  static constexpr bool kBF16 = std::is_same_v<X, __nv_bfloat16>;
  static_assert(kE4M3 || std::is_same_v<W, int8_t>);
  // Byte permutations of the bytes 0, 1 of a word, and of 2, 3. The digits 8 to B stand for the
  // sign of a byte, 4 for a byte of the second operand.
  static constexpr uint32_t kLow = kE4M3 ? 0x9180 : 0x4140, kHigh = kE4M3 ? 0xB3A2 : 0x4342;
  uint32_t first_, second_;

 public:
  __device__ __forceinline__ explicit Widen(int lane_idx) {
    const bool falling = lane_idx % 2 != 0;
    if constexpr (kE4M3 && !kBF16) {
      first_ = second_ = falling ? 0x1032 : 0x3210;
    } else {
      first_ = falling ? kHigh : kLow;
      second_ = falling ? kLow : kHigh;
    }
  }
  __device__ __forceinline__ void operator()(uint32_t& a, uint32_t& a_upper, uint32_t word) const {
    if constexpr (kE4M3 && !kBF16) {
      ptx::e4m3x4_to_f16x2(a, a_upper, ptx::permute_bytes(word, 0, first_));
    } else if constexpr (kE4M3) {
      a = place_e4m3(ptx::permute_bytes(word, 0, first_));
      a_upper = place_e4m3(ptx::permute_bytes(word, 0, second_));
    } else if constexpr (!kBF16) {
      const uint32_t from_zero = word ^ 0x80808080;
      a = minus<__half2>(ptx::permute_bytes(from_zero, 0x64646464, first_), 0x64806480);
      a_upper = minus<__half2>(ptx::permute_bytes(from_zero, 0x64646464, second_), 0x64806480);
    } else {
      a = place_int8(ptx::permute_bytes(word, 0x43434343, first_));
      a_upper = place_int8(ptx::permute_bytes(word, 0x43434343, second_));
    }
  }

 private:
  // Halves ssss'ssss'seee'emmm -> seee'e'mmm at the low end of bfloat16's exponent.
  static __device__ __forceinline__ uint32_t place_e4m3(uint32_t extended) {
    const uint32_t placed = extended << 4 & 0x87F087F0, two_to_120 = 0x7B807B80;
    const __nv_bfloat162 v = __hmul2(reinterpret_cast<const __nv_bfloat162&>(placed),
                                     reinterpret_cast<const __nv_bfloat162&>(two_to_120));
    return reinterpret_cast<const uint32_t&>(v);
  }
  // Halves 0100'0011'svvv'vvvv; with s they are the bits of 128 or 256.
  static __device__ __forceinline__ uint32_t place_int8(uint32_t tagged) {
    return minus<__nv_bfloat162>(tagged & 0xFF7FFF7F, tagged & 0xFF80FF80);
  }
};

// The metadata of both k-steps for m16n8k32, one register of which lanes t / 2 serve k-step t / 2.
// rows: the 8-bit layout's words of row g and of row g + 8, columns of k-step t / 2, nibbles by
// group. Even lanes give slots 0 to 3, odd ones 4 to 7, of row g in the low half, g + 8 in the high.
__device__ __forceinline__ uint32_t widened_metadata(uint2 rows, int lane_idx) {
  const uint32_t even_bytes = ptx::permute_bytes(rows.x, rows.y, 0x6420);
  const uint32_t odd_bytes = ptx::permute_bytes(rows.x, rows.y, 0x7531);
  const int shift = lane_idx % 2 * 4;
  return (even_bytes >> shift & 0x0F0F0F0F) | (odd_bytes << shift & 0xF0F0F0F0);
}

// Where a lane finds its two columns of B's register r (rows 8r + 2t, 8r + 2t + 1: a half of slot 2r
// + t / 2), as a byte offset in a swizzled box of 64 columns, of the first 8 tokens. The lane's first
// offset differs from the others by an exclusive or. The 32 lanes of each meet 32 banks.
__device__ __forceinline__ uint32_t widened_b_offset(int lane_idx) {
  const int g = lane_idx / 4, t = lane_idx % 4;
  return g * 128 + ((t / 2) ^ g) * 16 + t * 4;
}
constexpr __host__ __device__ uint32_t widened_b_flip(int k_step, int r) {
  return k_step * 64 + r % 2 * 32 + r / 2 * 8;
}

// Pair `pair` of a word of eight int4, each stored as itself plus 8: the mantissa's low bits of 128
// (bfloat16) or 1024 (float16), minus that and 8. Two or three instructions for two values.
template <class X>
__device__ __forceinline__ uint32_t widened_int4(uint32_t word, int pair) {
  constexpr bool kBF16 = std::is_same_v<X, __nv_bfloat16>;
  constexpr uint32_t kTag = kBF16 ? 0x43004300 : 0x64006400;
  using Pair = std::conditional_t<kBF16, __nv_bfloat162, __half2>;
  return minus<Pair>(ptx::and_or(word >> 4 * pair, 0x000F000F, kTag), kTag + 0x00080008);
}

}  // namespace sparsekern::decode

// tile64.cuh: "tile64", the packed layout of a 2:4 weight on the GPU. One copy feeds the decode and
// the prefill kernel.
//
//   M = out_features, K = in_features (dense count).  Specification in Python: sparsekern/formats/tile64.py.
//
// The weight is cut into tiles of 64 rows x 64 dense columns. A tile holds 64 x 32 kept values
// (4096 bytes at 16 bits) and 64 x 64 / 4 nibbles of metadata (512 bytes). Rows are padded to 64
// and columns to 64 with zero values and the nibble 0x4. Tiles are ordered in superpanels of 4
// row-panels (256 rows; the last superpanel may be shorter):
//
//   for superpanel: for k_tile: for panel in superpanel: tile
//
// so that one (superpanel, k_tile) is one bulk copy:
//
//                     k_tile 0            k_tile 1
//   superpanel 0   [ p0 p1 p2 p3 ]     [ p0 p1 p2 p3 ]  ...    256 rows, 16 KiB + 2 KiB each
//   superpanel 1   [ p4 p5 ]           [ p4 p5 ]        ...    a last one of 128 rows
//
// Values inside a tile: 8-row x 16-byte core matrices of 128 contiguous bytes, row groups fastest:
//   byte(row, c) = (c / 8) * 1024 + (row / 8) * 128 + (row % 8) * 16 + (c % 8) * 2
//   c = kept column 0..31
// This is the unswizzled K-major operand of wgmma (SBO = 128 between row groups, LBO = 1024 between
// 16-byte columns), and any four core matrices are one conflict-free ldmatrix.x4, which gives
// exactly the A fragment of mma.sp.
//
// Metadata inside a tile: one 32-bit word per thread of a warpgroup, in the register order that
// mma.sp and wgmma.sp share:
//   word(w, lane) = nibbles of row 16w + g, dense k 16t..16t+15          in bits  0..15
//                 | nibbles of row 16w + g + 8, same k                   in bits 16..31
//   g = lane / 4, t = lane % 4
// Lanes t = 0, 1 serve the first k32 step of the tile (selector 0), lanes t = 2, 3 the second
// (selector 1).
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparsekern::tile64 {

constexpr int kRows = 64;                                // rows of a tile (one m64 wgmma)
constexpr int kDenseK = 64;                              // dense columns of a tile (two k32 steps)
constexpr int kKeptK = kDenseK / 2;                      // kept columns of a tile
constexpr int kValueBytes = kRows * kKeptK * 2;          // 4096
constexpr int kMetadataBytes = kRows * kDenseK / 4 / 2;  // 512
constexpr int kCoreMatrixBytes = 128;
constexpr int kRowGroupStride = kCoreMatrixBytes;           // SBO
constexpr int kChunkStride = kRows / 8 * kCoreMatrixBytes;  // LBO: 1024
constexpr int kPanelsPerSuperpanel = 4;
constexpr int kSuperpanelRows = kPanelsPerSuperpanel * kRows;  // 256

// Of non-negative numbers; no sum, so that it does not overflow near 2^31.
constexpr __host__ __device__ int ceil_div(int a, int b) { return a / b + (a % b != 0); }

// Extent of a packed weight, in tiles.
struct Extent {
  int panels;       // row panels of 64
  int k_tiles;      // column tiles of 64
  int superpanels;  // groups of 4 panels

  static constexpr __host__ __device__ Extent of(int out_features, int in_features) {
    const int panels = ceil_div(out_features, kRows);
    return {panels, ceil_div(in_features, kDenseK), ceil_div(panels, kPanelsPerSuperpanel)};
  }
  constexpr __host__ __device__ int panels_in(int superpanel) const {
    const int left = panels - superpanel * kPanelsPerSuperpanel;
    return left < kPanelsPerSuperpanel ? left : kPanelsPerSuperpanel;
  }
  // Index of the first tile of (superpanel, k_tile); multiply by kValueBytes or kMetadataBytes for
  // an address.
  constexpr __host__ __device__ size_t first_tile(int superpanel, int k_tile) const {
    return static_cast<size_t>(superpanel) * kPanelsPerSuperpanel * k_tiles +
           static_cast<size_t>(k_tile) * panels_in(superpanel);
  }
  constexpr __host__ __device__ size_t tiles() const {
    return static_cast<size_t>(panels) * k_tiles;
  }
};

// Byte offset of kept column c of a row, inside a tile's values.
constexpr __host__ __device__ int value_offset(int row, int c) {
  return (c / 8) * kChunkStride + (row / 8) * kRowGroupStride + (row % 8) * 16 + (c % 8) * 2;
}

// Matrix descriptors for wgmma (PTX ISA, "Matrix descriptor format"): address, LBO, SBO in units of
// 16 bytes, swizzle mode.
__device__ __forceinline__ uint64_t
weight_descriptor(uint32_t smem) {  // the compressed tile, no swizzle
  return static_cast<uint64_t>((smem & 0x3FFFF) >> 4) |
         (static_cast<uint64_t>(kChunkStride >> 4) << 16) |
         (static_cast<uint64_t>(kRowGroupStride >> 4) << 32);
}
__device__ __forceinline__ uint64_t
x_descriptor(uint32_t smem) {  // 64 columns of x: 128-byte swizzle, 8 rows = 1024 bytes
  return static_cast<uint64_t>((smem & 0x3FFFF) >> 4) | (1ull << 16) | ((1024ull >> 4) << 32) |
         (1ull << 62);
}
constexpr int kWeightStep =
    2 * kChunkStride >> 4;  // from one k32 step to the next, in descriptor units
constexpr int kXStep = 64 >> 4;

}  // namespace sparsekern::tile64

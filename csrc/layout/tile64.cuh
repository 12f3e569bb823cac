// tile64.cuh: "tile64", the packed layout of a 2:4 weight on the GPU. One copy feeds all kernels.
//
//   M = out_features, K = in_features (dense count).  Specification in Python:
//   sparsekern/formats/tile64.py.
//
// The weight is cut into tiles of 64 rows x 4 chunks of 16 bytes of kept values, so 4096 bytes of
// values whatever the element type. At 16 bits that is 64 x 32 kept of 64 x 64 dense values and 64
// x 64 / 4 nibbles of metadata (512 bytes); at 8 bits 64 x 128 dense and 1024 bytes. Rows are
// padded to 64 and columns to those of a tile with zero values and the nibble 0x4. Four row panels
// of 64 are a tile row group (256 rows; the last group may be shorter):
//
//   for group: for k_tile: for panel in group: tile
//
// so that one (group, k_tile) is one bulk copy; at 16 bits:
//
//              k_tile 0            k_tile 1
//   group 0  [ p0 p1 p2 p3 ]     [ p0 p1 p2 p3 ]  ...    256 rows, 16 KiB + 2 KiB each
//   group 1  [ p4 p5 ]           [ p4 p5 ]        ...    a last one of 128 rows
//
// Values inside a tile: 8-row x 16-byte core matrices of 128 contiguous bytes, row groups fastest:
//   byte(row, c) = (c / v) * 1024 + (row / 8) * 128 + (row % 8) * 16 + (c % v) * bits / 8
//   c = kept column, v = values of a chunk (8 at 16 bits)
// This is the unswizzled K-major operand of wgmma (SBO = 128 between row groups, LBO = 1024 between
// 16-byte columns), and any four core matrices are one conflict-free ldmatrix.x4, which gives
// exactly the A fragment of mma.sp.
//
// Metadata inside a tile of 16-bit values: one 32-bit word per thread of a warpgroup, in the
// register order that mma.sp and wgmma.sp share:
//   word(w, lane) = nibbles of row 16w + g, dense k 16t..16t+15          in bits  0..15
//                 | nibbles of row 16w + g + 8, same k                   in bits 16..31
//   g = lane / 4, t = lane % 4
// Lanes t = 0, 1 serve the first k32 step of the tile (selector 0), lanes t = 2, 3 the second
// (selector 1).
//
// Of 8-bit values: two words per thread, one after the other for the tile's two k64 steps s:
//   word(s, w, lane) at byte s * 512 + (32w + lane) * 4
//     = nibbles of row 16w + g + 8 (t % 2), dense k 64s + 32 (t / 2) .. + 31
// Every lane serves (selector 0).
//
// Of int4, 256 dense columns in four chunks of 64. Word t of a row's 16 bytes of a chunk has the kept
// pairs of the groups t, 4 + t, 8 + t and 12 + t (of 4 columns) of the chunk's columns: of pair j, the
// first value in bits 4j .. 4j+3 and the second in bits 16+4j .. 19+4j, each as value + 8 (padding:
// 8). The metadata is that of four tiles of 16-bit values side by side, 2048
// bytes; with scales of groups of 64 or 128 columns, those of the tile follow as float32
// [group][row], 0 outside the weight. One scale per row is not in the tile.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparsekern::tile64 {

constexpr int kRows = 64;   // rows of a tile (one m64 wgmma)
constexpr int kChunks = 4;  // 16-byte pieces of a row of kept values in a tile (two k steps)
constexpr int kCoreMatrixBytes = 128;
constexpr int kRowGroupStride = kCoreMatrixBytes;           // SBO
constexpr int kChunkStride = kRows / 8 * kCoreMatrixBytes;  // LBO: 1024
constexpr int kPanelsPerGroup = 4;
constexpr int kGroupRows = kPanelsPerGroup * kRows;  // 256

constexpr int kSteps = 2;             // k steps of a tile, whatever the type
constexpr int kWordsBytes = 4 * 128;  // one word of metadata per thread of a warpgroup

// What depends on the bits of a stored value.
template <int kStorageBits>
struct Tile {
  static constexpr int kChunkValues = 128 / kStorageBits;         // 8 at 16 bits
  static constexpr int kKeptK = kChunks * kChunkValues;           // kept columns: 32
  static constexpr int kDenseK = 2 * kKeptK;                      // dense columns: 64
  static constexpr int kValueBytes = kRows * kChunks * 16;        // 4096
  static constexpr int kMetadataBytes = kRows * kDenseK / 4 / 2;  // 512
  static constexpr int kWords = kMetadataBytes / kWordsBytes;     // per thread: 1, at 8 bits 2

  // Which of its words a k step takes, and with which selector.
  static constexpr __host__ __device__ int word(int step) { return kWords == 1 ? 0 : step; }
  static constexpr __host__ __device__ int selector(int step) { return kWords == 1 ? step : 0; }

  // Byte offset of kept column c of a row, inside a tile's values.
  static constexpr __host__ __device__ int value_offset(int row, int c) {
    return c / kChunkValues * kChunkStride + row / 8 * kRowGroupStride + row % 8 * 16 +
           c % kChunkValues * kStorageBits / 8;
  }
};

// Of the scales that follow the metadata of an int4 tile; group: columns, or 0.
constexpr __host__ __device__ int scale_bytes(int group) {
  return group == 0 ? 0 : Tile<4>::kDenseK / group * kRows * 4;
}

// Of non-negative numbers; no sum, so that it does not overflow near 2^31.
constexpr __host__ __device__ int ceil_div(int a, int b) { return a / b + (a % b != 0); }

// Extent of a packed weight, in tiles.
struct Extent {
  int panels;   // row panels of 64
  int k_tiles;  // column tiles
  int groups;   // tile row groups of 4 panels

  template <class Tile>
  static constexpr __host__ __device__ Extent of(int out_features, int in_features) {
    const int panels = ceil_div(out_features, kRows);
    return {panels, ceil_div(in_features, Tile::kDenseK), ceil_div(panels, kPanelsPerGroup)};
  }
  constexpr __host__ __device__ int panels_in(int group) const {
    const int left = panels - group * kPanelsPerGroup;
    return left < kPanelsPerGroup ? left : kPanelsPerGroup;
  }
  // Index of the first tile of (group, k_tile); multiply by kValueBytes or kMetadataBytes for an
  // address.
  constexpr __host__ __device__ size_t first_tile(int group, int k_tile) const {
    return static_cast<size_t>(group) * kPanelsPerGroup * k_tiles +
           static_cast<size_t>(k_tile) * panels_in(group);
  }
  constexpr __host__ __device__ size_t tiles() const {
    return static_cast<size_t>(panels) * k_tiles;
  }
};

// Matrix descriptors for wgmma (PTX ISA, "Matrix descriptor format"): address, LBO, SBO in units of
// 16 bytes, swizzle mode.
__device__ __forceinline__ uint64_t
weight_descriptor(uint32_t smem) {  // the compressed tile, no swizzle
  return static_cast<uint64_t>((smem & 0x3FFFF) >> 4) |
         (static_cast<uint64_t>(kChunkStride >> 4) << 16) |
         (static_cast<uint64_t>(kRowGroupStride >> 4) << 32);
}
__device__ __forceinline__ uint64_t
x_descriptor(uint32_t smem) {  // rows of 128 bytes of x: 128-byte swizzle, 8 rows = 1024 bytes
  return static_cast<uint64_t>((smem & 0x3FFFF) >> 4) | (1ull << 16) | ((1024ull >> 4) << 32) |
         (1ull << 62);
}
constexpr int kWeightStep =
    2 * kChunkStride >> 4;  // from one k step to the next, in descriptor units
constexpr int kXStep = 64 >> 4;

}  // namespace sparsekern::tile64

// pack.cu: row-major 2:4 weight -> "tile64" (layout/tile64.cuh). A permutation, done once at load,
// at memory speed.
//
// One block per tile. A warp moves 8 rows x 64 bytes of values: reads are 64-byte row pieces,
// writes four whole core matrices. Rows and columns that the weight lacks become zero values and
// the nibble 0x4.
#include <cstdint>

#include "core/problem.h"
#include "layout/tile64.cuh"

namespace sparsekern {
namespace {

using Tile = tile64::Tile<16>;
constexpr int kThreads = 256;
constexpr uint32_t kPaddingByte = 0x44;

struct PackParams {
  const uint16_t* values;   // [out_features, in_features / 2]
  const uint8_t* metadata;  // [out_features, ceil(in_features / 8)]
  uint8_t* packed_values;
  uint8_t* packed_metadata;
  tile64::Extent extent;
  int out_features, in_features;
};

// Eight kept values of one row, zero where the weight ends. Vector load when every row is 16-byte
// aligned.
__device__ __forceinline__ uint4 load_values(const PackParams& p, int row, int column) {
  const int kept = p.in_features / 2;
  if (row >= p.out_features || column >= kept) return {0, 0, 0, 0};
  const uint16_t* from = p.values + static_cast<int64_t>(row) * kept + column;
  if (kept % 8 == 0) return *reinterpret_cast<const uint4*>(from);
  uint32_t word[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (column + i < kept) word[i / 2] |= static_cast<uint32_t>(from[i]) << (i % 2 * 16);
  }
  return {word[0], word[1], word[2], word[3]};
}

// Sixteen dense columns of one row's metadata.
__device__ __forceinline__ uint32_t load_metadata(const PackParams& p, int row, int byte) {
  const int pitch = (p.in_features + 7) / 8;
  const uint8_t* from = p.metadata + static_cast<int64_t>(row) * pitch + byte;
  const bool inside = row < p.out_features;
  const uint32_t low = inside && byte < pitch ? from[0] : kPaddingByte;
  const uint32_t high = inside && byte + 1 < pitch ? from[1] : kPaddingByte;
  return low | high << 8;
}

__global__ void __launch_bounds__(kThreads) pack_kernel(const PackParams p) {
  const int panel = blockIdx.y, k_tile = blockIdx.x;
  const size_t tile = p.extent.first_tile(panel / tile64::kPanelsPerGroup, k_tile) +
                      panel % tile64::kPanelsPerGroup;
  const int row = threadIdx.x / 4, chunk = threadIdx.x % 4;
  *reinterpret_cast<uint4*>(p.packed_values + tile * Tile::kValueBytes +
                            Tile::value_offset(row, chunk * 8)) =
      load_values(p, panel * tile64::kRows + row, k_tile * Tile::kKeptK + chunk * 8);
  if (threadIdx.x < Tile::kMetadataBytes / 4) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int first_row = panel * tile64::kRows + warp * 16 + g,
              byte = k_tile * (Tile::kDenseK / 8) + t * 2;
    reinterpret_cast<uint32_t*>(p.packed_metadata + tile * Tile::kMetadataBytes)[threadIdx.x] =
        load_metadata(p, first_row, byte) | load_metadata(p, first_row + 8, byte) << 16;
  }
}

}  // namespace

Status launch_pack(const void* values, const void* metadata, void* packed_values,
                   void* packed_metadata, int out_features, int in_features, cudaStream_t stream) {
  constexpr const char* kOp = "sparsekern.pack";
  SK_CHECK_MULTIPLE(kOp, in_features, 4, "Pad in_features.");
  const PackParams p = {static_cast<const uint16_t*>(values),
                        static_cast<const uint8_t*>(metadata),
                        static_cast<uint8_t*>(packed_values),
                        static_cast<uint8_t*>(packed_metadata),
                        tile64::Extent::of<Tile>(out_features, in_features),
                        out_features,
                        in_features};
  if (p.extent.tiles() == 0) return {};
  SK_CHECK_REL(kOp, p.extent.panels, <, 65536, "Split out_features.");
  const dim3 grid(p.extent.k_tiles, p.extent.panels);
  pack_kernel<<<grid, kThreads, 0, stream>>>(p);
  return launch_status(kOp, "pack_kernel", grid, dim3(kThreads), 0);
}

}  // namespace sparsekern

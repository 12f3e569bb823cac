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

constexpr const char* kOp = "sparsekern.pack";
constexpr int kThreads = 256;
constexpr uint32_t kPaddingByte = 0x44;

struct PackParams {
  const uint8_t* values;    // [out_features, in_features / 2], of 16 or 8 bits
  const uint8_t* metadata;  // [out_features, ceil(in_features / 8)]
  uint8_t* packed_values;
  uint8_t* packed_metadata;
  tile64::Extent extent;
  int out_features, in_features;
};

template <int kBits>
struct Word;
template <>
struct Word<16> {
  using Type = uint16_t;
};
template <>
struct Word<8> {
  using Type = uint8_t;
};

// 16 bytes of kept values of one row, zero where the weight ends. Vector load when every row is
// 16-byte aligned.
template <int kBits>
__device__ __forceinline__ uint4 load_values(const PackParams& p, int row, int column) {
  constexpr int kCount = 128 / kBits, kPerWord = 32 / kBits;
  const int kept = p.in_features / 2;
  if (row >= p.out_features || column >= kept) return {0, 0, 0, 0};
  const auto* from = reinterpret_cast<const typename Word<kBits>::Type*>(p.values) +
                     static_cast<int64_t>(row) * kept + column;
  if (kept % kCount == 0) return *reinterpret_cast<const uint4*>(from);
  uint32_t word[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (column + i < kept)
      word[i / kPerWord] |= static_cast<uint32_t>(from[i]) << (i % kPerWord * kBits);
  }
  return {word[0], word[1], word[2], word[3]};
}

// 8 * kCount dense columns of one row's metadata.
template <int kCount>
__device__ __forceinline__ uint32_t load_metadata(const PackParams& p, int row, int byte) {
  const int pitch = (p.in_features + 7) / 8;
  const uint8_t* from = p.metadata + static_cast<int64_t>(row) * pitch + byte;
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    word |= (row < p.out_features && byte + i < pitch ? from[i] : kPaddingByte) << (i * 8);
  return word;
}

template <int kBits>
__global__ void __launch_bounds__(kThreads) pack_kernel(const PackParams p) {
  using Tile = tile64::Tile<kBits>;
  constexpr int kChunk = Tile::kChunkValues, kBytesK = Tile::kDenseK / 8;
  const int panel = blockIdx.y, k_tile = blockIdx.x;
  const size_t tile = p.extent.first_tile(panel / tile64::kPanelsPerGroup, k_tile) +
                      panel % tile64::kPanelsPerGroup;
  const int row = threadIdx.x / 4, chunk = threadIdx.x % 4;
  *reinterpret_cast<uint4*>(p.packed_values + tile * Tile::kValueBytes +
                            Tile::value_offset(row, chunk * kChunk)) =
      load_values<kBits>(p, panel * tile64::kRows + row, k_tile * Tile::kKeptK + chunk * kChunk);
  if (threadIdx.x < Tile::kMetadataBytes / 4) {
    const int step = threadIdx.x / 128, warp = threadIdx.x % 128 / 32;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int first_row = panel * tile64::kRows + warp * 16 + g;
    uint32_t word;
    if constexpr (Tile::kWords == 1) {
      const int byte = k_tile * kBytesK + t * 2;
      word = load_metadata<2>(p, first_row, byte) | load_metadata<2>(p, first_row + 8, byte) << 16;
    } else {
      const int byte = k_tile * kBytesK + step * 8 + t / 2 * 4;
      word = load_metadata<4>(p, first_row + t % 2 * 8, byte);
    }
    reinterpret_cast<uint32_t*>(p.packed_metadata + tile * Tile::kMetadataBytes)[threadIdx.x] =
        word;
  }
}

template <int kBits>
Status launch(const PackParams& p, cudaStream_t stream) {
  if (p.extent.tiles() == 0) return {};
  SK_CHECK_REL(kOp, p.extent.panels, <, 65536, "Split out_features.");
  const dim3 grid(p.extent.k_tiles, p.extent.panels);
  pack_kernel<kBits><<<grid, kThreads, 0, stream>>>(p);
  return launch_status(kOp, "pack_kernel", grid, dim3(kThreads), 0);
}

}  // namespace

Status launch_pack(const void* values, const void* metadata, void* packed_values,
                   void* packed_metadata, int out_features, int in_features, int storage_bits,
                   cudaStream_t stream) {
  SK_CHECK_MULTIPLE(kOp, in_features, 4, "Pad in_features.");
  PackParams p = {static_cast<const uint8_t*>(values),
                  static_cast<const uint8_t*>(metadata),
                  static_cast<uint8_t*>(packed_values),
                  static_cast<uint8_t*>(packed_metadata),
                  {},
                  out_features,
                  in_features};
  switch (storage_bits) {
    case 16:
      p.extent = tile64::Extent::of<tile64::Tile<16>>(out_features, in_features);
      return launch<16>(p, stream);
    case 8:
      p.extent = tile64::Extent::of<tile64::Tile<8>>(out_features, in_features);
      return launch<8>(p, stream);
    default:
      return make_status(StatusKind::value, kOp, ": expected storage_bits 16 or 8, got ",
                         storage_bits, ". Convert the weight.");
  }
}

}  // namespace sparsekern

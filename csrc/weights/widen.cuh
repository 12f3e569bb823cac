// widen.cuh: a weight of 8 or 4 bits in layout "tile64" (layout/tile64.cuh) -> the same weight with
// values of 16 bits, in the same layout, for the kernels that multiply those.
//
//   number = level * scale, in float32, rounded once to X; +0 for what becomes -0
//
// This is what `pack` makes of the dequantised weight, bit for bit. A tile of 8-bit values is two
// tiles of 16 bits, one of int4 is four. One block per narrow tile, in the order of memory; a thread
// widens the 16 bytes of a row of one chunk:
//
//   int4     chunk c is tile c; word t holds the pairs of the groups t, 4 + t, 8 + t, 12 + t of its
//            64 columns, and these are word t of that row in the chunks 0, 1, 2, 3 of 16 bits
//   8 bits   chunk c is the chunks 2 (c % 2) and the next of tile c / 2, in order
//
// so all lanes of a warp read 512 bytes in a row and write 512 in a row for every chunk. The metadata
// of int4 is that of four tiles already. Of 8 bits a word has the 32 columns of a row, of 16 bits it
// has 16 columns of the rows g and g + 8, and lanes 2i, 2i + 1 have the two words of both rows.
#pragma once
#include "layout/tile64.cuh"
#include "linear/decode_widen.cuh"
#include "weights/widen.h"

namespace sparsekern::widen {

constexpr int kThreads = tile64::kRows * tile64::kChunks;  // of a block: 256

struct Params {
  const uint8_t *values, *metadata;
  const float* channel_scale;  // [out_features], or null
  uint8_t *wide_values, *wide_metadata;
  tile64::Extent narrow, wide;
  int out_features;
};

inline dim3 grid_of(const Params& p) {
  return dim3(tile64::kPanelsPerGroup, p.narrow.k_tiles, p.narrow.groups);
}

// Two levels, as bfloat16 that has them exactly -> two numbers.
template <class X>
__device__ __forceinline__ uint32_t scaled_pair(uint32_t levels, float scale) {
  const float2 pair = unpack_pair<__nv_bfloat16>(levels);
  // minus -0 is plus 0
  return subtract_pairs<X>(pack_pair<X>(pair.x * scale, pair.y * scale), 0x80008000);
}

// The chunks of 16 bits that one chunk of a row becomes: four of int4, two of 8 bits.
template <class W, class X, int kCount>
__device__ __forceinline__ void widened_chunks(uint4 (&wide)[kCount], uint4 narrow, float scale) {
  const uint32_t words[4] = {narrow.x, narrow.y, narrow.z, narrow.w};
  uint32_t to[kCount][4];
  if constexpr (Element<W>::kStorageBits == 4) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
#pragma unroll
      for (int t = 0; t < 4; ++t)
        to[j][t] = scaled_pair<X>(decode::widened_int4<__nv_bfloat16>(words[t], j), scale);
    }
  } else {
    const decode::Widen<W, __nv_bfloat16> levels(0);  // of an even lane: in order
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t low, high;
      levels(low, high, words[i]);
      to[i / 2][i % 2 * 2] = scaled_pair<X>(low, scale);
      to[i / 2][i % 2 * 2 + 1] = scaled_pair<X>(high, scale);
    }
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j) wide[j] = {to[j][0], to[j][1], to[j][2], to[j][3]};
}

// kScaleGroup: columns that share a scale of the metadata (int4), or 0: channel_scale.
template <class W, class X, int kScaleGroup>
__global__ void __launch_bounds__(kThreads) widen_kernel(const Params p) {
  using Narrow = tile64::Tile<Element<W>::kStorageBits>;
  using Wide = tile64::Tile<16>;
  constexpr int kTiles = Narrow::kDenseK / Wide::kDenseK;    // that a narrow one becomes: 4 or 2
  constexpr int kOfTile = tile64::kChunks / kTiles;          // chunks of one of them: 1 or 2
  constexpr int kWideChunks = tile64::kChunks / kOfTile;     // that a chunk becomes: 4 or 2
  constexpr int kMetadataBytes = Narrow::kMetadataBytes + tile64::scale_bytes(kScaleGroup);
  const int panel = blockIdx.x, k_tile = blockIdx.y, group = blockIdx.z;
  if (panel >= p.narrow.panels_in(group)) return;
  const int thread = threadIdx.x, chunk = thread / tile64::kRows, row = thread % tile64::kRows;
  const size_t tile = p.narrow.first_tile(group, k_tile) + panel;
  const uint8_t* metadata = p.metadata + tile * kMetadataBytes;

  float scale = 1.0f;
  if constexpr (kScaleGroup != 0) {
    const auto* scales = reinterpret_cast<const float*>(metadata + Narrow::kMetadataBytes);
    scale = scales[chunk * Wide::kDenseK / kScaleGroup * tile64::kRows + row];
  } else {
    const int channel = (group * tile64::kPanelsPerGroup + panel) * tile64::kRows + row;
    if (p.channel_scale != nullptr && channel < p.out_features) scale = p.channel_scale[channel];
  }
  const uint4 narrow =
      reinterpret_cast<const uint4*>(p.values + tile * Narrow::kValueBytes)[thread];

  // The wide tile i of this narrow one; the last of them may lie outside the weight.
  const auto exists = [&](int i) { return k_tile * kTiles + i < p.wide.k_tiles; };
  const auto wide_tile = [&](int i) {
    return p.wide.first_tile(group, k_tile * kTiles + i) + panel;
  };
  if (const int i = chunk / kOfTile; exists(i)) {
    uint4 wide[kWideChunks];
    widened_chunks<W, X>(wide, narrow, scale);
    auto* to = reinterpret_cast<uint4*>(p.wide_values + wide_tile(i) * Wide::kValueBytes) +
               chunk % kOfTile * kWideChunks * tile64::kRows + row;
#pragma unroll
    for (int j = 0; j < kWideChunks; ++j) to[j * tile64::kRows] = wide[j];
  }
  if constexpr (Element<W>::kStorageBits == 4) {
    constexpr int kPieces = Wide::kMetadataBytes / 16;  // of a wide tile
    const int i = thread / kPieces;
    if (i < kTiles && exists(i))
      reinterpret_cast<uint4*>(p.wide_metadata +
                               wide_tile(i) * Wide::kMetadataBytes)[thread % kPieces] =
          reinterpret_cast<const uint4*>(metadata)[thread];
  } else {
    constexpr int kWords = Wide::kMetadataBytes / 4;
    const int i = thread / kWords, shift = thread % 2 * 16;
    const uint2 rows = reinterpret_cast<const uint2*>(metadata)[thread / 2];  // g and g + 8
    if (exists(i))
      reinterpret_cast<uint32_t*>(p.wide_metadata +
                                  wide_tile(i) * Wide::kMetadataBytes)[thread % kWords] =
          (rows.x >> shift & 0xFFFF) | (rows.y >> shift << 16);
  }
}

template <class W>
Params make_params(const WidenProblem& w) {
  Params p = {};
  p.values = static_cast<const uint8_t*>(w.weight.values);
  p.metadata = static_cast<const uint8_t*>(w.weight.metadata);
  p.channel_scale = w.channel_scale;
  p.out_features = w.out_features;
  p.narrow = tile64::Extent::of<tile64::Tile<Element<W>::kStorageBits>>(w.out_features,
                                                                        w.in_features);
  p.wide = tile64::Extent::of<tile64::Tile<16>>(w.out_features, w.in_features);
  p.wide_values = static_cast<uint8_t*>(w.widened);
  p.wide_metadata = p.wide_values + widened_value_bytes(w.out_features, w.in_features);
  return p;
}

}  // namespace sparsekern::widen

// widen.cuh: a weight of 8 or 4 bits in layout "tile64" (layout/tile64.cuh) -> the same weight with
// values of 16 bits, in the same layout, for the kernels that multiply those.
//
//   number = level * scale, in float32, rounded once to X; +0 for what becomes -0
//
// This is what `pack` makes of the dequantised weight, bit for bit. A tile of 8-bit values is two
// tiles of 16 bits, one of int4 is four. A block takes two neighbouring narrow tiles, in the order of
// memory; a thread widens the 16 bytes of a row of one chunk of each:
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
constexpr int kPanels = 2;                                 // narrow tiles of a block

struct Params {
  const uint8_t *values, *metadata;
  const float* channel_scale;  // [out_features], or null
  uint8_t *wide_values, *wide_metadata;
  tile64::Extent narrow, wide;
  int out_features;
};

inline dim3 grid_of(const Params& p) {
  return dim3(tile64::kPanelsPerGroup / kPanels, p.narrow.k_tiles, p.narrow.groups);
}

// Two levels in 16 bits -> two numbers.
template <class X>
__device__ __forceinline__ uint32_t scaled_pair(uint32_t levels, float scale) {
  const float2 pair = unpack_pair<ExactOf8Bits>(levels);
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
        to[j][t] = scaled_pair<X>(decode::widened_int4<ExactOf8Bits>(words[t], j), scale);
    }
  } else {
    const decode::Widen<W, ExactOf8Bits> levels(0);  // of an even lane: in order
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
  constexpr bool kInt4 = Element<W>::kStorageBits == 4;
  constexpr int kTiles = Narrow::kDenseK / Wide::kDenseK;  // that a narrow one becomes: 4 or 2
  constexpr int kOfTile = tile64::kChunks / kTiles;        // chunks of one of them: 1 or 2
  constexpr int kWideChunks = tile64::kChunks / kOfTile;   // that a chunk becomes: 4 or 2
  constexpr int kMetadataBytes = Narrow::kMetadataBytes + tile64::scale_bytes(kScaleGroup);
  // Of a wide tile's metadata a thread writes a word, of int4 16 bytes.
  using Word = std::conditional_t<kInt4, uint4, uint32_t>;
  constexpr int kWords = Wide::kMetadataBytes / sizeof(Word);
  const int k_tile = blockIdx.y, group = blockIdx.z, first = blockIdx.x * kPanels;
  const int panels = p.narrow.panels_in(group) - first;  // to do here, or more
  if (panels <= 0) return;
  const int thread = threadIdx.x, chunk = thread / tile64::kRows, row = thread % tile64::kRows;
  const size_t tile = p.narrow.first_tile(group, k_tile) + first;
  const uint8_t* const metadata = p.metadata + tile * kMetadataBytes;

  uint4 narrow[kPanels];
  float scale[kPanels];
  Word words[kPanels];
#pragma unroll
  for (int i = 0; i < kPanels; ++i) {
    if (i >= panels) break;
    const uint8_t* of_tile = metadata + i * kMetadataBytes;
    narrow[i] = reinterpret_cast<const uint4*>(p.values +
                                               tile * Narrow::kValueBytes)[i * kThreads + thread];
    if constexpr (kScaleGroup != 0) {
      scale[i] = reinterpret_cast<const float*>(
          of_tile +
          Narrow::kMetadataBytes)[chunk * Wide::kDenseK / kScaleGroup * tile64::kRows + row];
    } else {
      const int panel = group * tile64::kPanelsPerGroup + first + i;
      const int channel = panel * tile64::kRows + row;
      const bool scaled = p.channel_scale != nullptr && channel < p.out_features;
      scale[i] = scaled ? p.channel_scale[channel] : 1.0f;
    }
    if constexpr (kInt4) {
      if (thread < kTiles * kWords) words[i] = reinterpret_cast<const uint4*>(of_tile)[thread];
    } else {
      const uint2 rows = reinterpret_cast<const uint2*>(of_tile)[thread / 2];  // g and g + 8
      const int shift = thread % 2 * 16;
      words[i] = (rows.x >> shift & 0xFFFF) | (rows.y >> shift << 16);
    }
  }

  // The wide tile t of the first of these narrow ones; the last may lie outside the weight.
  const auto exists = [&](int t) { return k_tile * kTiles + t < p.wide.k_tiles; };
  const auto wide_tile = [&](int t) {
    return p.wide.first_tile(group, k_tile * kTiles + t) + first;
  };
  if (const int t = chunk / kOfTile; exists(t)) {
    auto* to = reinterpret_cast<uint4*>(p.wide_values + wide_tile(t) * Wide::kValueBytes) +
               chunk % kOfTile * kWideChunks * tile64::kRows + row;
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
      if (i >= panels) break;
      uint4 wide[kWideChunks];
      widened_chunks<W, X>(wide, narrow[i], scale[i]);
#pragma unroll
      for (int j = 0; j < kWideChunks; ++j) to[(i * tile64::kChunks + j) * tile64::kRows] = wide[j];
    }
  }
  if (const int t = thread / kWords; t < kTiles && exists(t)) {
    auto* to = reinterpret_cast<Word*>(p.wide_metadata + wide_tile(t) * Wide::kMetadataBytes) +
               thread % kWords;
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
      if (i < panels) to[i * kWords] = words[i];
    }
  }
}

template <class W>
Params make_params(const WidenProblem& w) {
  Params p = {};
  p.values = static_cast<const uint8_t*>(w.weight.values);
  p.metadata = static_cast<const uint8_t*>(w.weight.metadata);
  p.channel_scale = w.channel_scale;
  p.out_features = w.out_features;
  p.narrow =
      tile64::Extent::of<tile64::Tile<Element<W>::kStorageBits>>(w.out_features, w.in_features);
  p.wide = tile64::Extent::of<tile64::Tile<16>>(w.out_features, w.in_features);
  p.wide_values = static_cast<uint8_t*>(w.widened);
  p.wide_metadata = p.wide_values + widened_value_bytes(w.out_features, w.in_features);
  return p;
}

}  // namespace sparsekern::widen

// widen.h: a weight of 8 or 4 bits in layout "tile64" -> its numbers in 16 bits, in the same layout.
// Kernel: widen.cuh.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/problem.h"
#include "layout/tile64.cuh"

namespace sparsekern {

struct WidenProblem {
  int out_features, in_features;
  DType from, to;
  int scale_group;  // as in LinearProblem
  Operand weight;
  const float* channel_scale;  // [out_features]; null: 1. With a scale_group it is not read
  void* widened;               // widened_bytes, on 16 bytes: values, then metadata
};

// Of the values of 16 bits, and of them and their metadata.
inline size_t widened_value_bytes(int out_features, int in_features) {
  using Wide = tile64::Tile<16>;
  return tile64::Extent::of<Wide>(out_features, in_features).tiles() * Wide::kValueBytes;
}
inline size_t widened_bytes(int out_features, int in_features) {
  using Wide = tile64::Tile<16>;
  const auto tiles = tile64::Extent::of<Wide>(out_features, in_features).tiles();
  return tiles * (Wide::kValueBytes + Wide::kMetadataBytes);
}

Status launch_widen(const WidenProblem& problem, cudaStream_t stream);

}  // namespace sparsekern

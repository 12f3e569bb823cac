// workspace.h: the memory through which thread blocks of the prefill and of the split kernel share
// a tile.
//
//   counters   kPrefillCounterBytes, zero before the first launch; each launch leaves them so
//   sums       float32, of at most one tile per SM
//
// Launches that may overlap must not share one. Null: the prefill kernel never cuts tiles along K,
// clusters of the split kernel share none, which is slower when there are few.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/status.h"

namespace sparsekern {

constexpr size_t kPrefillCounterBytes = 16384;
// The largest tile of configs.h has 256 rows and 7 blocks of 32 tokens.
constexpr size_t kPrefillTileBytes = 256 * 224 * sizeof(float);

// Bytes of a workspace on the current device.
inline Status prefill_workspace_bytes(size_t& bytes) {
  constexpr const char* kOp = "sparsekern.linear (prefill)";
  constexpr size_t kCountersPerTile = 4;  // two of each consumer warpgroup
  int device = 0, sms = 0;
  SK_CUDA(kOp, cudaGetDevice(&device));
  SK_CUDA(kOp, cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  SK_CHECK_REL(kOp, sms * kCountersPerTile * sizeof(uint32_t), <=, kPrefillCounterBytes,
               "Raise kPrefillCounterBytes.");
  bytes = kPrefillCounterBytes + sms * kPrefillTileBytes;
  return {};
}

}  // namespace sparsekern

// prune_compress.cu: dense 16-bit weight -> magnitude 2:4 mask -> row-major values and metadata, in
// one pass over memory.
//
//   w         [out, in] contiguous, in % 8 == 0              values    [out, in / 2]
//   metadata  [out, in / 8], low nibble = lower group        bad       += chunks with NaN or Inf
//
// Specification: sparsekern/reference.py. Bytes: 2 read and 1.125 written per weight; a thread
// turns 16-byte chunks (two groups) into 8 bytes of values and one of metadata, four independent
// chunks at a time, neighbouring lanes side by side.
#include <cstdint>

#include "../launch.h"

namespace sparsekern {
namespace {

constexpr int kThreads = 256, kChunks = 4;
constexpr int kChunkElements = 8;
constexpr uint32_t kMagnitude = 0x7FFF;

// Nibble for each set of kept non-zero columns (bit c = column c), 4 bits each:
// compression.SLOT_TABLE.
constexpr uint64_t kNibbles = 0x000E0DCE098E4D8Eull;

// One group: elements 0, 1 in `low`, 2, 3 in `high`. Returns the nibble, and the two survivors in
// `pair`. An element is kept when it beats two others; of equal magnitudes the higher column wins.
__device__ __forceinline__ uint32_t keep_two(uint32_t low, uint32_t high, uint32_t infinity,
                                             uint32_t& pair, bool& bad) {
  const uint32_t a0 = low & kMagnitude, a1 = low >> 16 & kMagnitude;
  const uint32_t a2 = high & kMagnitude, a3 = high >> 16 & kMagnitude;
  const int b01 = a0 > a1, b02 = a0 > a2, b03 = a0 > a3, b12 = a1 > a2, b13 = a1 > a3,
            b23 = a2 > a3;
  const uint32_t kept =
      (b01 + b02 + b03 >= 2 && a0 != 0 ? 1 : 0) | (1 - b01 + b12 + b13 >= 2 && a1 != 0 ? 2 : 0) |
      (2 - b02 - b12 + b23 >= 2 && a2 != 0 ? 4 : 0) | (3 - b03 - b13 - b23 >= 2 && a3 != 0 ? 8 : 0);
  bad |= a0 >= infinity || a1 >= infinity || a2 >= infinity || a3 >= infinity;
  const uint32_t nibble = static_cast<uint32_t>(kNibbles >> 4 * kept) & 0xF;
  // The bytes 2 i, 2 i + 1 of both survivors; a free slot holds a zero, which is stored as +0.0.
  pair = __byte_perm(low, high, 0x1010 + 0x22 * (nibble & 3) + 0x2200 * (nibble >> 2));
  if ((pair & kMagnitude) == 0) pair &= 0xFFFF0000;
  if ((pair >> 16 & kMagnitude) == 0) pair &= 0x0000FFFF;
  return nibble;
}

__global__ void __launch_bounds__(kThreads)
    prune_compress_kernel(const uint4* w, uint2* values, uint8_t* metadata, int* bad_chunks,
                          size_t chunks, uint32_t infinity) {
  const size_t first = static_cast<size_t>(blockIdx.x) * kThreads * kChunks + threadIdx.x;
  uint4 chunk[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    if (first + i * kThreads < chunks) chunk[i] = __ldcs(w + first + i * kThreads);
  }
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const size_t at = first + i * kThreads;
    if (at >= chunks) break;
    bool bad = false;
    uint2 kept;
    const uint32_t low = keep_two(chunk[i].x, chunk[i].y, infinity, kept.x, bad);
    const uint32_t high = keep_two(chunk[i].z, chunk[i].w, infinity, kept.y, bad);
    values[at] = kept;
    metadata[at] = static_cast<uint8_t>(low | high << 4);
    if (bad) atomicAdd(bad_chunks, 1);
  }
}

}  // namespace

Status launch_prune_compress(const void* w, void* values, void* metadata, int* bad_chunks,
                             int64_t elements, DType dtype, cudaStream_t stream) {
  constexpr const char* kOp = "sparsekern.prune_compress";
  SK_CHECK_MULTIPLE(kOp, elements, int64_t{kChunkElements}, "Pad in_features to 8.");
  SK_CHECK_MULTIPLE(kOp, reinterpret_cast<uintptr_t>(w), uintptr_t{16},
                    "Copy w to aligned memory.");
  if (elements == 0) return {};
  const size_t chunks = elements / kChunkElements;
  const size_t blocks = (chunks + kThreads * kChunks - 1) / (kThreads * kChunks);
  SK_CHECK_REL(kOp, blocks, <, size_t{1} << 31, "Split the weight.");
  const dim3 grid(static_cast<unsigned>(blocks));
  prune_compress_kernel<<<grid, kThreads, 0, stream>>>(
      static_cast<const uint4*>(w), static_cast<uint2*>(values), static_cast<uint8_t*>(metadata),
      bad_chunks, chunks, dtype == DType::kBFloat16 ? 0x7F80 : 0x7C00);
  return launch_status(kOp, "prune_compress_kernel", grid, dim3(kThreads), 0);
}

}  // namespace sparsekern

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

#include "core/problem.h"

namespace sparsekern {
namespace {

constexpr int kThreads = 256, kChunks = 4;
constexpr int kChunkElements = 8;
constexpr uint32_t kMagnitudes = 0x7FFF7FFF;  // of two elements in a word
constexpr uint32_t kTops = 0x80008000;        // bit 15 of both halves

// What to do with a group, by which columns are kept and not zero. Index: bit 0 column 2, bit 1
// column 3, bit 2 column 0, bit 3 column 1. Bits 16..19: the nibble, as in SLOT_TABLE of
// sparsekern/formats/codec.py; bits 0..15: the byte selector that moves both survivors into one
// word.
__constant__ uint32_t kGroups[16] = {0xE7654, 0xE7654, 0xE7654, 0xE7654, 0x85410, 0x85410,
                                     0xC7610, 0x01010, 0xD7632, 0x95432, 0xD7632, 0x01010,
                                     0x43210, 0x01010, 0x01010, 0x01010};

// One group: elements 0, 1 in `low`, 2, 3 in `high`. An element is kept when it beats two others;
// of equal magnitudes the higher column wins. Two elements at a time, in the halves of a word:
// (b | 0x8000) - a has bit 15 clear exactly when a > b, and two of three is LOP3's majority.
// `groups` is kGroups. Returns the nibble, and the two survivors in `pair`, zeros as +0.0; `bad`
// collects magnitudes of at least infinity in its bits 15 and 31.
__device__ __forceinline__ uint32_t keep_two(uint32_t low, uint32_t high, uint32_t infinity,
                                             const uint32_t* groups, uint32_t& pair,
                                             uint32_t& bad) {
  const auto majority = [](uint32_t x, uint32_t y, uint32_t z) {
    return (x & y) | (x & z) | (y & z);
  };
  const uint32_t a01 = low & kMagnitudes, a23 = high & kMagnitudes;
  const uint32_t a32 = __byte_perm(a23, 0, 0x1032);
  const uint32_t a02 = __byte_perm(a01, a23, 0x5410), a13 = __byte_perm(a01, a23, 0x7632);
  const uint32_t n02_n13 = (a23 | kTops) - a01;  // bit 15: not a0 > a2; bit 31: not a1 > a3
  const uint32_t n03_n12 = (a32 | kTops) - a01;
  const uint32_t n01_n23 = (a13 | kTops) - a02;
  const uint32_t b01_n01 = __byte_perm(n01_n23, 0, 0x1010) ^ 0x8000;
  const uint32_t b23_n23 = __byte_perm(n01_n23, 0, 0x3232) ^ 0x8000;
  const uint32_t n12_n03 = __byte_perm(n03_n12, 0, 0x1032);
  // x + 0x7FFF has bit 15 set exactly when x is not zero.
  const uint32_t keep01 = majority(b01_n01, ~n02_n13, ~n03_n12) & (a01 + kMagnitudes) & kTops;
  const uint32_t keep23 = majority(b23_n23, n02_n13, n12_n03) & (a23 + kMagnitudes) & kTops;
  const uint32_t keep = (keep01 | keep23 >> 2) >> 13;  // bits 0, 2 and 16, 18
  const uint32_t group = groups[(keep | keep >> 15) & 0xF];
  pair = __byte_perm(low, high, group);
  const uint32_t zeros = ~((pair & kMagnitudes) + kMagnitudes) & kTops;
  pair &= ~zeros;  // only the sign of a zero can be set
  bad |= (a01 + 0x80008000 - infinity) | (a23 + 0x80008000 - infinity);
  return group >> 16;
}

__global__ void __launch_bounds__(kThreads)
    prune_compress_kernel(const uint4* w, uint2* values, uint8_t* metadata, int* bad_chunks,
                          size_t chunks, uint32_t infinity) {
  __shared__ uint32_t groups[16];  // lanes look up different entries: one bank each
  if (threadIdx.x < 16) groups[threadIdx.x] = kGroups[threadIdx.x];
  __syncthreads();
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
    uint32_t bad = 0;
    uint2 kept;
    const uint32_t low = keep_two(chunk[i].x, chunk[i].y, infinity, groups, kept.x, bad);
    const uint32_t high = keep_two(chunk[i].z, chunk[i].w, infinity, groups, kept.y, bad);
    values[at] = kept;
    metadata[at] = static_cast<uint8_t>(low | high << 4);
    if (bad & kTops) atomicAdd(bad_chunks, 1);
  }
}

}  // namespace

Status launch_prune_compress(const void* w, void* values, void* metadata, int* bad_chunks,
                             int64_t elements, DType dtype, cudaStream_t stream) {
  constexpr const char* kOp = "sparsekern.prune_compress";
  const int bits = info(dtype).storage_bits;
  SK_CHECK_REL(kOp, bits, ==, 16, "Quantise the compressed weight.");
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
      bad_chunks, chunks, info(dtype).infinity * 0x10001u);
  return launch_status(kOp, "prune_compress_kernel", grid, dim3(kThreads), 0);
}

}  // namespace sparsekern

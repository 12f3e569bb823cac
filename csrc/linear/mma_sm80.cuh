// mma_sm80.cuh: D[M,N] = A[M,K] · B[K,N] for any number of tokens, A 2:4-sparse. Ampere, Ada
// and every later GPU: cp.async + ldmatrix + mma.sp.
//
//   M = out_features   N = tokens   K = in_features (dense count)
//   Specification: sparsekern/reference.py, linear
//
// Values and x of 16 bits, or both of 8 (int8; e4m3 from 8.9 on), whose sums are scaled. The bytes
// and the fragments are the same, only a row's metadata is twice as much.
//
// One block computes BLOCK_M x BLOCK_N outputs. It walks along K in stages of kWarpsK column tiles
// (64 columns each, 128 at 8 bits); a ring of kStages of them lies in shared memory:
//
//   stage = kWarpsK x [ x, BLOCK_N x 128 bytes | values, BLOCK_M x 64 | metadata, BLOCK_M x 8 or 16 ]
//                       chunks XORed with token % 8    as packed ("tile64")
//
// The warps are a box of kWarpsM x kWarpsN x kWarpsK. A warp owns a part of the rows and of the
// tokens, and in every stage the column tile of its place along K. With few tokens a block is
// small; the split along K then gives it the warps and the bytes in flight that a stream of
// weights needs. The partial sums meet in shared memory and are added in a fixed order.
//
// Timeline of a warp; (s, n) is k-step s and token tile n of the present stage:
//
//   multiply        (0,0)   (0,1) ... (0,last)  (1,0) ...           (1,last)
//   load from smem  b(0,1)  b(0,2)    b(1,0)    b(1,1)   | barrier | a(0), b(0,0), metadata of the
//                   a(1), metadata of k-step 1 where it is another |            next stage
//   copy            stage i + kStages - 1, a part each   |         |
//
// so every fragment is loaded one multiplication ahead. At the barrier all warps have read this
// stage, and the copies of the next one have arrived: one barrier per stage does both.
//
// Sums: int8 in int32, exactly. The tensor cores of 8.9 add up products of e4m3 with some 14 bits,
// and nothing here promotes them; on 9.0 the instruction is made of ones for float16, whose sums
// are float32.
//
// Edges: columns and tokens outside x are filled with zeros by the copies; a row panel or a column
// tile outside the weight is replaced by one inside, whose results are not stored, or meet zeros.
#pragma once
#include "layout/tile64.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/dependent_launch.cuh"
#include "ptx/matrix.cuh"
#include "ptx/memory.cuh"
#include "ptx/mma_sp.cuh"
#include "linear/epilogue.cuh"

namespace sparsekern::mma {

constexpr int kSmemCapacity = 99 * 1024;  // of a block on compute capability 8.6 and 8.9
constexpr int kXRowBytes = 128;           // of a token: the dense columns of a tile

// Byte offset of 16-byte chunk 0..7 of a token's row. The 8 rows of a matrix that ldmatrix
// reads, one chunk of 8 tokens, lie in 8 different groups of 4 banks.
constexpr __host__ __device__ int x_offset(int token, int chunk) {
  return token * kXRowBytes + (chunk ^ token % 8) * 16;
}

// T: type of x and of the weight's values. Y: of y. The rest is one of SK_MMA_CONFIGS; rows: 32, or
// a multiple of 64.
template <class T_, class Y_, int kRows_, int kTokens_, int kWarpsM_, int kWarpsN_, int kWarpsK_,
          int kStages_>
struct Config {
  using T = T_;
  using Y = Y_;
  using Tile = tile64::Tile<Element<T>::kStorageBits>;
  using Accumulator = typename Element<T>::Accumulator;
  static constexpr bool kScaled = Element<T>::kStorageBits < 16;
  using Out = Epilogue<Y, kScaled>;
  static constexpr int kRows = kRows_, kTokens = kTokens_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kWarpsK = kWarpsK_;
  static constexpr int kStages = kStages_;
  static constexpr int kThreads = kWarpsM * kWarpsN * kWarpsK * 32;
  static constexpr int kWarpRows = kRows / kWarpsM, kWarpTokens = kTokens / kWarpsN;
  static constexpr int kRowTiles = kWarpRows / 16, kTokenTiles = kWarpTokens / 8;  // of a warp
  static constexpr int kPanelRows = kRows < tile64::kRows ? kRows : tile64::kRows;
  static constexpr int kPanels = kRows / kPanelRows;

  // Of one column tile, in the order of shared memory.
  static constexpr int kXBytes = kTokens * kXRowBytes;
  static constexpr int kValueBytes = kRows * Tile::kValueBytes / tile64::kRows;
  static constexpr int kMetadataBytes = kRows * Tile::kMetadataBytes / tile64::kRows;
  static constexpr int kTileBytes = kXBytes + kValueBytes + kMetadataBytes;
  static constexpr int kStageBytes = kWarpsK * kTileBytes;
  static constexpr int kSmemBytes = kStages * kStageBytes;

  // In shared memory a panel is as packed, but for its rows that the block does not have.
  static constexpr int kPanelBytes = kPanelRows * tile64::kChunks * 16;
  static constexpr int kChunkStride = kPanelRows * 16;
  static constexpr int kWordsBytes = kPanelRows * 8;  // one word of metadata of every lane
  static constexpr int kPanelMetadataBytes = kWordsBytes * Tile::kWords;

  // The epilogue's sums: kPassTiles token tiles of each warp at a time.
  static constexpr int kSumPitch = kRows + 4;  // words; +4 spreads the banks
  static constexpr int pass_bytes(int tiles) {
    return kWarpsK * kWarpsN * tiles * 8 * kSumPitch * 4;
  }
  static constexpr int pass_tiles() {
    int tiles = kTokenTiles;
    while (kTokenTiles % tiles != 0 || pass_bytes(tiles) > kSmemBytes) --tiles;
    return tiles;
  }
  static constexpr int kPassTiles = pass_tiles();
  static constexpr int kPassTokens = kWarpsN * kPassTiles * 8;

  static_assert(kSmemBytes <= kSmemCapacity && kStages >= 2);
  static_assert(kRows % kPanelRows == 0 && tile64::kRows % kPanelRows == 0);
  static_assert(tile64::kGroupRows % kRows == 0);
  static_assert(Tile::kWords == 1 || kPanelRows == tile64::kRows, "metadata is copied by panels");
  static_assert(kPanelRows % kWarpRows == 0 && kWarpRows % 16 == 0, "a warp has rows of one panel");
  static_assert(kTileBytes % 128 == 0, "x_offset swizzles address bits 4 to 6");
};

template <class Cfg>
struct Params {
  const uint8_t* x;
  const uint8_t* values;
  const uint8_t* metadata;
  typename Cfg::Out out;
  tile64::Extent extent;
  int64_t x_stride;  // bytes
  int tokens, in_features;
  int row_blocks, token_blocks;
  bool halves;  // rows of x are 8-byte aligned only: a piece of x is copied in two
};

template <class Cfg>
Params<Cfg> make_params(const LinearProblem& p) {
  Params<Cfg> params = {};
  params.x = static_cast<const uint8_t*>(p.x.data);
  params.values = static_cast<const uint8_t*>(p.weight.values);
  params.metadata = static_cast<const uint8_t*>(p.weight.metadata);
  params.out = make_epilogue<typename Cfg::Y, Cfg::kScaled>(p);
  params.extent = tile64::Extent::of<typename Cfg::Tile>(p.out_features, p.in_features);
  params.x_stride = p.x.stride * kBytes<typename Cfg::T>;
  params.tokens = p.tokens;
  params.in_features = p.in_features;
  params.halves = params.x_stride % 16 != 0 || reinterpret_cast<uintptr_t>(p.x.data) % 16 != 0;
  params.row_blocks = tile64::ceil_div(p.out_features, Cfg::kRows);
  params.token_blocks = tile64::ceil_div(p.tokens, Cfg::kTokens);
  return params;
}

// Which outputs a block computes. Eight row blocks at a time, through all tokens: the blocks that
// run at once share both weights and x in L2.
struct BlockTile {
  int row_block, token_block;

  static constexpr __host__ __device__ BlockTile of(int block, int row_blocks, int token_blocks) {
    constexpr int kGroup = 8;
    const int group = block / (kGroup * token_blocks), rest = block % (kGroup * token_blocks);
    const int left = row_blocks - group * kGroup;
    const int rows = left < kGroup ? left : kGroup;
    return {group * kGroup + rest % rows, rest / rows};
  }
};

// A thread's share of the copies of a stage: pieces of 16 bytes, first of x, then of the values,
// then of the metadata. What depends on the thread is in the pointers, the rest is constant.
template <class Cfg>
struct Copier {
  static constexpr int kXPieces = Cfg::kWarpsK * Cfg::kXBytes / 16;
  static constexpr int kXRowPieces = Cfg::kWarpsK * 8;  // of one token, adjacent in memory
  static constexpr int kTokenStep =
      Cfg::kThreads / kXRowPieces;  // from a thread's piece to its next
  static constexpr int kTilePieces = Cfg::kValueBytes / 16, kPanelPieces = Cfg::kPanelBytes / 16;
  static constexpr int kMetadataPieces = Cfg::kMetadataBytes / 16;  // of a column tile
  static constexpr int kX = kXPieces / Cfg::kThreads;
  static constexpr int kValues = Cfg::kWarpsK * kTilePieces / Cfg::kThreads;
  static constexpr int kCount = kX + kValues + 1;
  static_assert(kXPieces % Cfg::kThreads == 0 && Cfg::kThreads % kXRowPieces == 0,
                "a thread keeps its columns of x");
  static_assert(kPanelPieces % Cfg::kThreads == 0 && Cfg::kThreads % Cfg::kPanelRows == 0,
                "a thread keeps its row of values");
  static_assert(Cfg::kWarpsK * kMetadataPieces <= Cfg::kThreads, "one piece of metadata at most");

  // Of the stage to copy next; the pieces of x are copied in order.
  const uint8_t* x;
  const uint8_t* x_piece;
  const uint8_t* values;
  const uint8_t* metadata;
  int columns_left;  // of x, from this thread's columns on
  int k_tiles_left;  // of the weight, from the stage's first on
  // The same for all stages.
  int64_t x_step;    // bytes from a piece of x to the next
  int tokens_left;   // from this thread's first token on
  int group_panels;  // tiles from one column tile to the next
  int panels_left;   // from the block's first panel on
  int metadata_k;    // the column tile of this thread's piece; none: kWarpsK
  int x_smem;        // offset of the first piece of x in a stage
  bool halves;       // of x, as in Params

  __device__ __forceinline__ Copier(const Params<Cfg>& p, const BlockTile& tile) {
    const int thread_idx = threadIdx.x;
    const int in_row = thread_idx % kXRowPieces, first_token = thread_idx / kXRowPieces;
    const int token = tile.token_block * Cfg::kTokens + first_token;
    x = x_piece = p.x + token * p.x_stride + in_row * 16;
    x_step = kTokenStep * p.x_stride;
    x_smem = in_row / 8 * Cfg::kTileBytes + x_offset(first_token, in_row % 8);
    halves = p.halves;
    tokens_left = p.tokens - token;
    columns_left = p.in_features - in_row * Cfg::Tile::kChunkValues;

    const int row = tile.row_block * Cfg::kRows;
    const int group = row / tile64::kGroupRows;
    const int panel = row % tile64::kGroupRows / tile64::kRows;
    k_tiles_left = p.extent.k_tiles;
    group_panels = p.extent.panels_in(group);
    panels_left = group_panels - panel;
    const size_t first = p.extent.first_tile(group, 0) + panel;
    values = p.values + first * Cfg::Tile::kValueBytes +
             thread_idx / Cfg::kPanelRows * tile64::kChunkStride +
             (row % tile64::kRows + thread_idx % Cfg::kPanelRows) * 16;
    const int in_tile = thread_idx % kMetadataPieces * 16;
    constexpr int kPanelMetadata = Cfg::kPanelMetadataBytes;
    metadata_k = thread_idx / kMetadataPieces;
    metadata = p.metadata + (first + inside(in_tile / kPanelMetadata)) * Cfg::Tile::kMetadataBytes +
               row % tile64::kRows * 8 + in_tile % kPanelMetadata;
  }

  __device__ __forceinline__ void next_stage() {
    x += Cfg::kWarpsK * kXRowBytes;
    x_piece = x;
    values += static_cast<int64_t>(Cfg::kWarpsK * Cfg::Tile::kValueBytes) * group_panels;
    metadata += static_cast<int64_t>(Cfg::kWarpsK * Cfg::Tile::kMetadataBytes) * group_panels;
    columns_left -= Cfg::kWarpsK * Cfg::Tile::kDenseK;
    k_tiles_left -= Cfg::kWarpsK;
  }

  // The panel, or tiles to the column tile, when it is inside the weight; else of one that is.
  __device__ __forceinline__ int inside(int panel) const {
    return Cfg::kPanels > 1 && panel >= panels_left ? 0 : panel;
  }
  __device__ __forceinline__ int tiles_to(int k) const {
    return (Cfg::kWarpsK > 1 && k >= k_tiles_left ? k_tiles_left - 1 : k) * group_panels;
  }

  __device__ __forceinline__ void copy_x(int j, uint32_t stage) {
    // A step of 4 tokens flips a bit of the swizzle; the others keep it.
    static_assert(kTokenStep % 8 == 0 || kTokenStep == 4);
    const int smem = (x_smem ^ (j * kTokenStep % 8 * 16)) + j * kTokenStep * kXRowBytes;
    const int bytes =
        j * kTokenStep < tokens_left ? min(max(columns_left, 0) * kBytes<typename Cfg::T>, 16) : 0;
    const uint8_t* from = bytes > 0 ? x_piece : values;
    if (Element<typename Cfg::T>::kStorageBits == 16 && halves) {
      ptx::cp_async_8(stage + smem, from, min(bytes, 8));
      ptx::cp_async_8(stage + (smem + 8), bytes > 8 ? from + 8 : from, max(bytes - 8, 0));
    } else {
      ptx::cp_async_16(stage + smem, from, bytes);
    }
    x_piece += x_step;
  }
  __device__ __forceinline__ void copy_values(int j, uint32_t stage) const {
    const int piece = j * Cfg::kThreads;  // of thread 0
    const int k = piece / kTilePieces, in_tile = piece % kTilePieces;
    const int panel = in_tile / kPanelPieces, chunk = in_tile % kPanelPieces / Cfg::kPanelRows;
    ptx::cp_async_16(stage + k * Cfg::kTileBytes + Cfg::kXBytes + in_tile * 16 + threadIdx.x * 16,
                     values + (tiles_to(k) + inside(panel)) * Cfg::Tile::kValueBytes +
                         chunk * tile64::kChunkStride);
  }
  __device__ __forceinline__ void copy_metadata(uint32_t stage) const {
    if (metadata_k >= Cfg::kWarpsK) return;
    ptx::cp_async_16(stage + metadata_k * Cfg::kTileBytes + Cfg::kXBytes + Cfg::kValueBytes +
                         threadIdx.x % kMetadataPieces * 16,
                     metadata + tiles_to(metadata_k) * Cfg::Tile::kMetadataBytes);
  }

  // All pieces of a stage, in two steps.
  __device__ __forceinline__ void copy_weights(uint32_t stage) const {
#pragma unroll
    for (int j = 0; j < kValues; ++j) copy_values(j, stage);
    copy_metadata(stage);
  }
  __device__ __forceinline__ void copy_tokens(uint32_t stage) {
#pragma unroll
    for (int j = 0; j < kX; ++j) copy_x(j, stage);
  }
  // Part `part` of `parts` of the pieces, to the stage at `stage` in shared memory.
  __device__ __forceinline__ void copy_part(int part, int parts, uint32_t stage) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (j * parts / kCount != part) continue;
      if (j >= kX + kValues) copy_metadata(stage);
      else if (j >= kX) copy_values(j - kX, stage);
      else copy_x(j, stage);
    }
    if (part == parts - 1) next_stage();
  }
};

// A warp's place in the box of warps.
template <class Cfg>
struct WarpPlace {
  int m, n, k, lane_idx;

  __device__ __forceinline__ explicit WarpPlace(int thread_idx) : lane_idx(thread_idx % 32) {
    const int warp_idx = thread_idx / 32;
    m = warp_idx % Cfg::kWarpsM;
    n = warp_idx / Cfg::kWarpsM % Cfg::kWarpsN;
    k = warp_idx / (Cfg::kWarpsM * Cfg::kWarpsN);
  }
};

// Where a lane reads its fragments, as byte offsets in a stage (mma_sp.cuh has the registers). Lane
// i names row i % 8 of matrix i / 8. A: the matrices are rows 0-7 and 8-15 of the first 8 kept
// columns, then of the next 8. B: 8 tokens, four chunks of 8 columns.
template <class Cfg>
struct FragmentOffsets {
  int a, b[2], metadata;  // b: of each k-step

  __device__ __forceinline__ explicit FragmentOffsets(const WarpPlace<Cfg>& warp) {
    const int row_in_matrix = warp.lane_idx % 8, matrix = warp.lane_idx / 8;
    const int row = warp.m * Cfg::kWarpRows, tile = warp.k * Cfg::kTileBytes;
    a = tile + Cfg::kXBytes + row / Cfg::kPanelRows * Cfg::kPanelBytes +
        matrix / 2 * Cfg::kChunkStride +
        (row % Cfg::kPanelRows + matrix % 2 * 8 + row_in_matrix) * 16;
    metadata = tile + Cfg::kXBytes + Cfg::kValueBytes + row * 8 + warp.lane_idx * 4 +
               row / Cfg::kPanelRows * (Cfg::kPanelMetadataBytes - Cfg::kWordsBytes);
    for (int step = 0; step < 2; ++step)
      b[step] = tile + x_offset(warp.n * Cfg::kWarpTokens + row_in_matrix, step * 4 + matrix);
  }
};

// The warp's registers: sums, and the fragments of the multiplications to come.
template <class Cfg>
struct WarpTile {
  typename Cfg::Accumulator d[Cfg::kRowTiles][Cfg::kTokenTiles][4];
  uint32_t a[2][Cfg::kRowTiles][4];  // of each k-step
  uint32_t b[2][4];                  // of the present token tile and of the next
  uint32_t metadata[Cfg::Tile::kWords][Cfg::kRowTiles];

  __device__ __forceinline__ void load_a(int step, uint32_t stage,
                                         const FragmentOffsets<Cfg>& offsets) {
#pragma unroll
    for (int i = 0; i < Cfg::kRowTiles; ++i)
      ptx::ldmatrix_x4(a[step][i], stage + offsets.a + step * 2 * Cfg::kChunkStride + i * 256);
  }
  // Multiplication `index` of a stage: k-step index / kTokenTiles, token tile index % kTokenTiles.
  __device__ __forceinline__ void load_b(int index, uint32_t stage,
                                         const FragmentOffsets<Cfg>& offsets) {
    const int step = index / Cfg::kTokenTiles, n = index % Cfg::kTokenTiles;
    ptx::ldmatrix_x4(b[index % 2], stage + offsets.b[step] + n * 8 * kXRowBytes);
  }
  __device__ __forceinline__ void multiply(int index) {
    using T = typename Cfg::T;
    using Tile = typename Cfg::Tile;
    const int step = index / Cfg::kTokenTiles, n = index % Cfg::kTokenTiles;
#pragma unroll
    for (int i = 0; i < Cfg::kRowTiles; ++i) {
      if (step == 0) ptx::mma_sp<T, 0>(d[i][n], a[0][i], b[index % 2], metadata[0][i]);
      else
        ptx::mma_sp<T, Tile::selector(1)>(d[i][n], a[1][i], b[index % 2],
                                          metadata[Tile::word(1)][i]);
    }
  }
};

template <class Cfg>
__device__ __forceinline__ void load_metadata(uint32_t (&words)[Cfg::kRowTiles], int word,
                                              uint32_t stage, const FragmentOffsets<Cfg>& offsets) {
#pragma unroll
  for (int i = 0; i < Cfg::kRowTiles; ++i)
    words[i] = ptx::load_shared_u32(stage + offsets.metadata + word * Cfg::kWordsBytes + i * 128);
}

template <class Cfg>
__device__ __forceinline__ void main_loop(WarpTile<Cfg>& warp_tile, Copier<Cfg> copier,
                                          const FragmentOffsets<Cfg>& offsets, uint32_t smem,
                                          int stages) {
  constexpr int kMultiplications = 2 * Cfg::kTokenTiles;
  // The first turn of the ring: weights at once, x when the kernel that made it has finished.
  Copier<Cfg> ahead = copier;
  for (int s = 0; s < Cfg::kStages - 1 && s < stages; ++s, ahead.next_stage())
    ahead.copy_weights(smem + s * Cfg::kStageBytes);
  ptx::wait_for_predecessor();
  for (int s = 0; s < Cfg::kStages - 1; ++s, copier.next_stage()) {
    if (s < stages) copier.copy_tokens(smem + s * Cfg::kStageBytes);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<Cfg::kStages - 2>();
  __syncthreads();
  warp_tile.load_a(0, smem, offsets);
  warp_tile.load_b(0, smem, offsets);
  load_metadata<Cfg>(warp_tile.metadata[0], 0, smem, offsets);

  uint32_t stage = smem, filled = smem + (Cfg::kStages - 1) * Cfg::kStageBytes;
#pragma unroll 1
  for (int i = 0; i < stages; ++i) {
    const bool copies = i + Cfg::kStages - 1 < stages;
    warp_tile.load_a(1, stage, offsets);
    if constexpr (Cfg::Tile::kWords > 1)
      load_metadata<Cfg>(warp_tile.metadata[1], 1, stage, offsets);
#pragma unroll
    for (int index = 0; index < kMultiplications - 1; ++index) {
      warp_tile.load_b(index + 1, stage, offsets);
      if (index < Cfg::kTokenTiles && copies) copier.copy_part(index, Cfg::kTokenTiles, filled);
      warp_tile.multiply(index);
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<Cfg::kStages - 2>();
    __syncthreads();
    // After the last stage these loads find old data, which nobody uses.
    filled = stage;
    stage = stage + Cfg::kStageBytes == smem + Cfg::kSmemBytes ? smem : stage + Cfg::kStageBytes;
    uint32_t next_metadata[Cfg::kRowTiles];
    warp_tile.load_a(0, stage, offsets);
    warp_tile.load_b(0, stage, offsets);
    load_metadata<Cfg>(next_metadata, 0, stage, offsets);
    warp_tile.multiply(kMultiplications - 1);
#pragma unroll
    for (int m = 0; m < Cfg::kRowTiles; ++m) warp_tile.metadata[0][m] = next_metadata[m];
  }
}

// Sums on their way through shared memory: float32, or int32 as its bits.
__device__ __forceinline__ float word_of(float sum) { return sum; }
__device__ __forceinline__ float word_of(int32_t sum) { return __int_as_float(sum); }
__device__ __forceinline__ void add_word(float& sum, int word) { sum += __int_as_float(word); }
__device__ __forceinline__ void add_word(int32_t& sum, int word) { sum += word; }

// Sums -> shared memory [place along K][token][row] -> y, some token tiles of every warp at a time.
template <class Cfg>
__device__ __forceinline__ void store_outputs(const WarpTile<Cfg>& warp_tile,
                                              const WarpPlace<Cfg>& warp, const Params<Cfg>& p,
                                              const BlockTile& tile, uint32_t smem) {
  constexpr int kPlaneWords = Cfg::kPassTokens * Cfg::kSumPitch, kSegments = Cfg::kRows / 4;
  constexpr int kWarpPassTokens = Cfg::kPassTiles * 8;
  const int g = warp.lane_idx / 4, t = warp.lane_idx % 4;
  const uint32_t lane = smem + 4 * (warp.k * kPlaneWords + warp.m * Cfg::kWarpRows + g +
                                    (warp.n * kWarpPassTokens + 2 * t) * Cfg::kSumPitch);
#pragma unroll 1
  for (int pass = 0; pass < Cfg::kTokenTiles / Cfg::kPassTiles; ++pass) {
    __syncthreads();  // the stages, or the sums of the pass before, have been read
#pragma unroll
    for (int n = 0; n < Cfg::kTokenTiles; ++n) {
      if (n / Cfg::kPassTiles != pass) continue;
#pragma unroll
      for (int i = 0; i < Cfg::kRowTiles; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          ptx::store_shared_f32(
              lane + 4 * ((n % Cfg::kPassTiles * 8 + e % 2) * Cfg::kSumPitch + i * 16 + e / 2 * 8),
              word_of(warp_tile.d[i][n][e]));
      }
    }
    __syncthreads();
    const int first_token = tile.token_block * Cfg::kTokens + pass * kWarpPassTokens;
#pragma unroll 1
    for (int item = threadIdx.x; item < Cfg::kPassTokens * kSegments; item += Cfg::kThreads) {
      const int in_pass = item / kSegments, row = item % kSegments * 4;
      const int token =
          first_token + in_pass / kWarpPassTokens * Cfg::kWarpTokens + in_pass % kWarpPassTokens;
      if (token >= p.tokens) continue;
      typename Cfg::Accumulator sums[4] = {};
#pragma unroll
      for (int k = 0; k < Cfg::kWarpsK; ++k) {
        const int4 part =
            ptx::load_shared_int4(smem + 4 * (k * kPlaneWords + in_pass * Cfg::kSumPitch + row));
        add_word(sums[0], part.x), add_word(sums[1], part.y);
        add_word(sums[2], part.z), add_word(sums[3], part.w);
      }
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = static_cast<float>(sums[i]);
      p.out.template store<4>(v, token, tile.row_block * Cfg::kRows + row);
    }
  }
}

template <class Cfg>
__global__ void __launch_bounds__(Cfg::kThreads)
    spmm_mma_sm80_kernel(const __grid_constant__ Params<Cfg> p) {
  extern __shared__ __align__(128) uint8_t raw_smem[];
  ptx::let_successor_start();
  const uint32_t smem = ptx::smem_address(raw_smem);
  const BlockTile tile = BlockTile::of(blockIdx.x, p.row_blocks, p.token_blocks);
  const WarpPlace<Cfg> warp(threadIdx.x);
  WarpTile<Cfg> warp_tile = {};
  main_loop<Cfg>(warp_tile, Copier<Cfg>(p, tile), FragmentOffsets<Cfg>(warp), smem,
                 tile64::ceil_div(p.extent.k_tiles, Cfg::kWarpsK));
  store_outputs<Cfg>(warp_tile, warp, p, tile, smem);
}

}  // namespace sparsekern::mma

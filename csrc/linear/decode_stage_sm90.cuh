// decode_stage_sm90.cuh: what a consumer warp of the decode kernel does with a stage: its rows of the
// weights times all tokens, with weights of 16, 8 and 4 bits.
#pragma once
#include "ptx/matrix.cuh"
#include "ptx/memory.cuh"
#include "ptx/mma_sp.cuh"
#include "ptx/registers.cuh"
#include "linear/decode_tile_sm90.cuh"
#include "linear/decode_widen.cuh"

namespace sparsekern::decode {

// Where a warp's rows are in the values and the metadata of a stage: offsets of lane i, which names
// row i % 8 of matrix i / 8 of the first ldmatrix and has word i of the first m16 tile's metadata
// and the scale of its row i / 4.
template <class Cfg>
struct WarpRows {
  uint32_t values, metadata, scales;

  __device__ __forceinline__ WarpRows(int warp_idx, int lane_idx) {
    const int panel = warp_idx * Cfg::kWarpRows / tile64::kRows;
    const int first_m16 = warp_idx * Cfg::kWarpRows % tile64::kRows / 16;
    const int row_in_matrix = lane_idx % 8, matrix = lane_idx / 8;
    values = panel * Cfg::Tile::kValueBytes + (matrix / 2) * tile64::kChunkStride +
             (first_m16 * 2 + matrix % 2) * tile64::kRowGroupStride + row_in_matrix * 16;
    metadata = panel * Cfg::kTileMetadataBytes + first_m16 * 128 + lane_idx * 4;
    scales = panel * Cfg::kTileMetadataBytes + Cfg::Tile::kMetadataBytes +
             (first_m16 * 16 + lane_idx / 4) * 4;
  }
};

// One stage for one warp: its m16 tiles of each weight times all tokens, two k-steps.
template <class Cfg>
__device__ __forceinline__ void multiply_stage(Accumulators<Cfg>& d, const Smem<Cfg>& smem,
                                               int stage, int warp_idx, int lane_idx) {
  const WarpRows<Cfg> rows(warp_idx, lane_idx);
  const int row_in_matrix = lane_idx % 8, matrix = lane_idx / 8;
  const uint32_t b_lane = smem.x(stage) + row_in_matrix * 128;

  uint32_t metadata[Cfg::kWeights][Cfg::kWarpTiles];
#pragma unroll
  for (int w = 0; w < Cfg::kWeights; ++w) {
#pragma unroll
    for (int i = 0; i < Cfg::kWarpTiles; ++i)
      metadata[w][i] = ptx::load_shared_u32(smem.metadata(stage, w) + rows.metadata + i * 128);
  }
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    uint32_t a[Cfg::kWeights][Cfg::kWarpTiles][4];
#pragma unroll
    for (int w = 0; w < Cfg::kWeights; ++w) {
#pragma unroll
      for (int i = 0; i < Cfg::kWarpTiles; ++i)
        ptx::ldmatrix_x4(a[w][i], smem.values(stage, w) + rows.values +
                                      step * 2 * tile64::kChunkStride +
                                      i * 2 * tile64::kRowGroupStride);
    }
#pragma unroll
    for (int n = 0; n < Cfg::kTokenTiles; ++n) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, b_lane + n * 1024 + ((step * 4 + matrix) ^ row_in_matrix) * 16);
#pragma unroll
      for (int w = 0; w < Cfg::kWeights; ++w) {
#pragma unroll
        for (int i = 0; i < Cfg::kWarpTiles; ++i) {
          if (step == 0) ptx::mma_sp<typename Cfg::X, 0>(d[w][i][n], a[w][i], b, metadata[w][i]);
          else ptx::mma_sp<typename Cfg::X, 1>(d[w][i][n], a[w][i], b, metadata[w][i]);
        }
      }
    }
  }
}

// Pairs with 16 tokens have no register to keep what follows from a thread's place between stages: it
// is asked for again.
template <class Cfg>
constexpr bool kFewRegisters = Cfg::kPaired != kAlone && Cfg::kTokenTiles == 2;

template <class Cfg>
__device__ __forceinline__ void place_again(int& warp_idx, int& lane_idx) {
  if constexpr (kFewRegisters<Cfg>) {
    const int thread = static_cast<int>(ptx::thread_idx_again());
    warp_idx = thread / 32 % Cfg::kTeamWarps, lane_idx = thread % 32;
  }
}

// The same with weights of 8 bits: two units of two k-steps. See decode_widen.cuh.
template <class Cfg>
__device__ __forceinline__ void multiply_widened_stage(Accumulators<Cfg>& d, const Smem<Cfg>& smem,
                                                       int stage, int warp_idx, int lane_idx) {
  constexpr int kUnits = Cfg::Tile::kDenseK / 64, kUnitMetadataBytes = 512;
  place_again<Cfg>(warp_idx, lane_idx);
  const WarpRows<Cfg> rows(warp_idx, lane_idx);
  const Widen<typename Cfg::W, typename Cfg::X> widen(lane_idx);
  const uint32_t metadata_pair = rows.metadata & ~7u;  // rows g and g + 8 of the lane's k-step
  const uint32_t b_lane = smem.x(stage) + widened_b_offset(lane_idx);
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    uint32_t narrow[Cfg::kWeights][Cfg::kWarpTiles][4], metadata[Cfg::kWeights][Cfg::kWarpTiles];
#pragma unroll
    for (int w = 0; w < Cfg::kWeights; ++w) {
#pragma unroll
      for (int i = 0; i < Cfg::kWarpTiles; ++i) {
        ptx::ldmatrix_x4(narrow[w][i], smem.values(stage, w) + rows.values +
                                           unit * 2 * tile64::kChunkStride +
                                           i * 2 * tile64::kRowGroupStride);
        metadata[w][i] =
            widened_metadata(ptx::load_shared_u64(smem.metadata(stage, w) + metadata_pair +
                                                  unit * kUnitMetadataBytes + i * 128),
                             lane_idx);
      }
    }
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t a[Cfg::kWeights][Cfg::kWarpTiles][4];
#pragma unroll
      for (int w = 0; w < Cfg::kWeights; ++w) {
#pragma unroll
        for (int i = 0; i < Cfg::kWarpTiles; ++i) {
          widen(a[w][i][0], a[w][i][2], narrow[w][i][2 * step]);
          widen(a[w][i][1], a[w][i][3], narrow[w][i][2 * step + 1]);
        }
      }
#pragma unroll
      for (int n = 0; n < Cfg::kTokenTiles; ++n) {
        uint32_t b[4];
#pragma unroll
        for (int r = 0; r < 4; ++r)
          b[r] = ptx::load_shared_u32((b_lane ^ widened_b_flip(step, r)) + unit * Cfg::kXBoxBytes +
                                      n * 1024);
#pragma unroll
        for (int w = 0; w < Cfg::kWeights; ++w) {
#pragma unroll
          for (int i = 0; i < Cfg::kWarpTiles; ++i) {
            if (step == 0) ptx::mma_sp<typename Cfg::X, 0>(d[w][i][n], a[w][i], b, metadata[w][i]);
            else ptx::mma_sp<typename Cfg::X, 1>(d[w][i][n], a[w][i], b, metadata[w][i]);
          }
        }
      }
    }
  }
}

// The same with weights of 4 bits, in parts of one or two boxes of columns (two or four k-steps), whose
// sums are scaled. With many tokens a part is one box even where two have the same scale, and parts are
// not interleaved, for the registers. Where two CTAs share the registers of an SM, the boxes of a part
// are widened in turn, and the sums of all tokens wait for the last.
template <class Cfg>
__device__ __forceinline__ void multiply_int4_stage(Accumulators<Cfg>& d, const Smem<Cfg>& smem,
                                                    int stage, int warp_idx, int lane_idx) {
  constexpr bool kManyTokens = Cfg::kTokenTiles >= 8;
  constexpr int kBoxes = kManyTokens || Cfg::kScaleGroup == 64 ? 1 : 2;  // of a part
  constexpr int kParts = Cfg::kXBoxes / kBoxes;
  constexpr int kTurns = kFewRegisters<Cfg> ? kBoxes : 1,
                kWide = kBoxes / kTurns;                    // boxes of a turn
  constexpr int kHeld = kTurns > 1 ? Cfg::kTokenTiles : 1;  // sums that wait
  place_again<Cfg>(warp_idx, lane_idx);
  const WarpRows<Cfg> rows(warp_idx, lane_idx);
  const int row_in_matrix = lane_idx % 8, matrix = lane_idx / 8;
  // ldmatrix takes both chunks of a part for one m16 tile, or one chunk for the warp's one or two.
  constexpr int kLoads = kBoxes == 2 ? Cfg::kWarpTiles : 1;
  const int upper = matrix / 2;
  const uint32_t values =
      smem.values(stage, 0) + rows.values +
      (kBoxes == 2 ? 0
                   : upper * (Cfg::kWarpTiles - 1) * 2 * tile64::kRowGroupStride -
                         upper * tile64::kChunkStride);
  const uint32_t metadata_lane = smem.metadata(stage, 0) + rows.metadata;
  const uint32_t scales_lane = smem.metadata(stage, 0) + rows.scales;
  const uint32_t b_lane = smem.x(stage) + row_in_matrix * 128;
#pragma unroll(kManyTokens || kFewRegisters<Cfg> ? 1 : 2)
  for (int part = 0; part < kParts; ++part) {
    uint32_t narrow[kLoads][4];
#pragma unroll
    for (int load = 0; load < kLoads; ++load)
      ptx::ldmatrix_x4(narrow[load], values + part * kBoxes * tile64::kChunkStride +
                                         load * 2 * tile64::kRowGroupStride);
    float scale[Cfg::kWarpTiles][2];  // of rows g and g + 8
    float sums[kHeld][Cfg::kWarpTiles][4];
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      uint32_t a[2 * kWide][Cfg::kWarpTiles][4], metadata[kWide][Cfg::kWarpTiles];
#pragma unroll
      for (int i = 0; i < Cfg::kWarpTiles; ++i) {
#pragma unroll
        for (int box = 0; box < kWide; ++box) {
          const int of_part = turn * kWide + box;
          const uint32_t* words =
              kBoxes == 2 ? &narrow[i % kLoads][2 * of_part] : &narrow[0][2 * i];
#pragma unroll
          for (int step = 0; step < 2; ++step) {
#pragma unroll
            for (int r = 0; r < 4; ++r)
              a[2 * box + step][i][r] =
                  widened_int4<typename Cfg::X>(words[r % 2], step * 2 + r / 2);
          }
          metadata[box][i] = ptx::load_shared_u32(
              metadata_lane + (part * kBoxes + of_part) * tile64::kWordsBytes + i * 128);
        }
        if constexpr (Cfg::kScaleGroup != 0) {
          if (turn + 1 < kTurns) continue;
          const int group = part * kBoxes * Cfg::kXBoxColumns / Cfg::kScaleGroup;
#pragma unroll
          for (int half = 0; half < 2; ++half)
            scale[i][half] = __uint_as_float(ptx::load_shared_u32(
                scales_lane + (group * tile64::kRows + i * 16 + half * 8) * 4));
        }
      }
#pragma unroll
      for (int n = 0; n < Cfg::kTokenTiles; ++n) {
        float (&group_sums)[Cfg::kWarpTiles][4] = sums[n % kHeld];
#pragma unroll
        for (int step = 0; step < 2 * kWide; ++step) {
          uint32_t b[4];
          ptx::ldmatrix_x4(b, b_lane + (part * kBoxes + turn * kWide + step / 2) * Cfg::kXBoxBytes +
                                  n * 1024 + ((step % 2 * 4 + matrix) ^ row_in_matrix) * 16);
#pragma unroll
          for (int i = 0; i < Cfg::kWarpTiles; ++i) {
            float (&to)[4] = Cfg::kScaleGroup != 0 ? group_sums[i] : d[0][i][n];
            if (Cfg::kScaleGroup != 0 && turn == 0 && step == 0)
              to[0] = to[1] = to[2] = to[3] = 0.0f;
            if (step % 2 == 0)
              ptx::mma_sp<typename Cfg::X, 0>(to, a[step][i], b, metadata[step / 2][i]);
            else ptx::mma_sp<typename Cfg::X, 1>(to, a[step][i], b, metadata[step / 2][i]);
          }
        }
        if constexpr (Cfg::kScaleGroup != 0) {
          if (turn + 1 < kTurns) continue;
#pragma unroll
          for (int i = 0; i < Cfg::kWarpTiles; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e)
              d[0][i][n][e] = fmaf(group_sums[i][e], scale[i][e / 2], d[0][i][n][e]);
          }
        }
      }
    }
  }
}

}  // namespace sparsekern::decode

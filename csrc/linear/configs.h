// configs.h: the one list of kernel configurations. It makes the instantiations, the dispatch, what
// Python sees (kernels.h), the tests' parameters and the sweep.
//
// X(index, panels per consumer, BLOCK_N tokens, cluster along out_features, cluster along tokens,
//   streamed, promoted)
// BLOCK_M = 128 * panels. A cluster of CM x CN shares x among its CM rows and the weights among its
// CN columns. Streamed: the tiles of the last, partly filled wave are laid end to end along K, and
// every cluster takes an equal piece of that; otherwise each tile is cut into equal parts, if there
// are clusters for two parts or more. Promoted: e4m3 alone, sums in float32 (mainloop_sm90.cuh).
#pragma once

#define SK_PREFILL_CONFIGS(X)                                                       \
  X(0, 2, 192, 1, 1, 0, 0) /* 256 x 192: most FLOPs per byte */                     \
  X(1, 2, 192, 2, 1, 0, 0)                                                          \
  X(2, 2, 192, 1, 2, 0, 0)                                                          \
  X(3, 2, 192, 2, 2, 0, 0)                                                          \
  X(4, 2, 192, 4, 1, 0, 0)                                                          \
  X(5, 2, 192, 4, 2, 0, 0) /* eight share: fewest bytes from L2 */                  \
  X(6, 2, 192, 2, 1, 1, 0)                                                          \
  X(7, 2, 160, 1, 1, 0, 0)                                                          \
  X(8, 2, 160, 2, 1, 0, 0)                                                          \
  X(9, 2, 128, 1, 1, 0, 0) /* 256 x 128: fills the chip at fewer tokens */          \
  X(10, 2, 128, 2, 1, 0, 0)                                                         \
  X(11, 2, 128, 1, 2, 0, 0)                                                         \
  X(12, 2, 128, 2, 2, 0, 0)                                                         \
  X(13, 2, 128, 4, 2, 0, 0)                                                         \
  X(14, 2, 128, 2, 1, 1, 0)                                                         \
  X(15, 2, 96, 1, 1, 0, 0)                                                          \
  X(16, 2, 64, 1, 1, 0, 0)                                                          \
  X(17, 2, 64, 2, 1, 0, 0)                                                          \
  X(18, 2, 208, 2, 1, 0, 0) /* five columns are 1024 tokens, nearly */              \
  X(19, 2, 208, 1, 2, 0, 0)                                                         \
  X(20, 1, 192, 1, 1, 0, 1) /* promoted: a tile and its sums share the registers */ \
  X(21, 1, 192, 2, 1, 0, 1)                                                         \
  X(22, 1, 128, 1, 1, 0, 1)                                                         \
  X(23, 1, 128, 2, 1, 0, 1)
#define SK_PREFILL_UNPROMOTED 20  // the first of them, which all types have

// The split kernel's tiles.
// X(index, panels per consumer, BLOCK_N tokens, CTAs that share the K of a tile, across clusters)
// Across clusters: as many such clusters as are resident share the K of a tile.
#define SK_SPLIT_CONFIGS(X) \
  X(0, 1, 64, 1, 0)         \
  X(1, 1, 64, 2, 0)         \
  X(2, 1, 64, 3, 0)         \
  X(3, 1, 64, 4, 0)         \
  X(4, 1, 64, 6, 0)         \
  X(5, 1, 96, 1, 0)         \
  X(6, 1, 96, 2, 0)         \
  X(7, 1, 96, 3, 0)         \
  X(8, 1, 128, 1, 0)        \
  X(9, 1, 128, 2, 0)        \
  X(10, 1, 128, 3, 0)       \
  X(11, 1, 128, 4, 0)       \
  X(12, 2, 64, 1, 0)        \
  X(13, 2, 96, 1, 0)        \
  X(14, 2, 96, 2, 0)        \
  X(15, 2, 128, 1, 0)       \
  X(16, 2, 128, 2, 0)       \
  X(17, 1, 128, 6, 0)       \
  X(18, 2, 64, 2, 0)        \
  X(19, 1, 64, 8, 0)        \
  X(20, 1, 64, 16, 0)       \
  X(21, 1, 128, 8, 0)       \
  X(22, 1, 128, 16, 0)      \
  X(23, 1, 64, 4, 1)        \
  X(24, 1, 64, 8, 1)        \
  X(25, 1, 128, 1, 1)       \
  X(26, 1, 128, 2, 1)       \
  X(27, 1, 128, 4, 1)       \
  X(28, 2, 128, 1, 1)       \
  X(29, 2, 128, 2, 1)
#define SK_SPLIT_BOTH 17  // the first of them, which 8 bits have, too

#define SK_SPLIT_ACROSS 23  // the first of them across clusters

// The narrow kernel's tiles of 256 rows.
// X(index, BLOCK_N tokens, CTAs of a cluster along out_features that share x, CTAs that share the K
//   of a tile)
#define SK_NARROW_CONFIGS(X) \
  X(0, 32, 1, 1)             \
  X(1, 32, 2, 1)             \
  X(2, 32, 4, 1)             \
  X(3, 32, 1, 2)             \
  X(4, 32, 1, 3)             \
  X(5, 32, 1, 4)             \
  X(6, 32, 1, 6)             \
  X(7, 32, 1, 8)             \
  X(8, 32, 2, 2)             \
  X(9, 32, 2, 4)             \
  X(10, 64, 1, 1)            \
  X(11, 64, 2, 1)            \
  X(12, 64, 4, 1)            \
  X(13, 64, 1, 2)            \
  X(14, 64, 1, 3)            \
  X(15, 64, 1, 4)            \
  X(16, 64, 1, 6)            \
  X(17, 64, 1, 8)            \
  X(18, 64, 2, 2)            \
  X(19, 64, 2, 4)            \
  X(20, 96, 1, 1)            \
  X(21, 96, 2, 1)            \
  X(22, 96, 4, 1)            \
  X(23, 96, 1, 2)            \
  X(24, 96, 1, 3)            \
  X(25, 96, 1, 4)            \
  X(26, 96, 1, 6)            \
  X(27, 96, 1, 8)            \
  X(28, 96, 2, 2)            \
  X(29, 96, 2, 4)            \
  X(30, 128, 1, 1)           \
  X(31, 128, 2, 1)           \
  X(32, 128, 4, 1)           \
  X(33, 128, 1, 2)           \
  X(34, 128, 1, 3)           \
  X(35, 128, 1, 4)           \
  X(36, 128, 1, 6)           \
  X(37, 128, 1, 8)           \
  X(38, 128, 2, 2)           \
  X(39, 128, 2, 4)

// The decode kernel's row blocks and splits of K, with one weight or gated.
// X(index, row panels of 64 per CTA, CTAs that share the K of a row block, paired)
// Paired, up to 16 tokens: 1, two CTAs of an SM have half the ring each; 2, two teams of a CTA have
// half the ring and half its K each.
#define SK_DECODE_CONFIGS(X) \
  X(0, 4, 1, 0)              \
  X(1, 4, 2, 0)              \
  X(2, 4, 4, 0)              \
  X(3, 4, 8, 0)              \
  X(4, 2, 2, 0)              \
  X(5, 2, 1, 0)              \
  X(6, 2, 4, 0)              \
  X(7, 2, 8, 0)              \
  X(8, 4, 1, 1)              \
  X(9, 4, 2, 1)              \
  X(10, 4, 4, 1)             \
  X(11, 4, 8, 1)             \
  X(12, 2, 1, 1)             \
  X(13, 4, 1, 2)             \
  X(14, 4, 2, 2)             \
  X(15, 4, 4, 2)             \
  X(16, 4, 8, 2)             \
  X(17, 2, 16, 0)            \
  X(18, 1, 8, 0)             \
  X(19, 1, 16, 0)
#define SK_DECODE_GATED 5    // the first of them, which a gated pair has, too
#define SK_DECODE_NARROW 17  // and those that weights of 8 and 4 bits have

// The mma.sp kernel's tiles.
// X(index, BLOCK_M rows, BLOCK_N tokens, warps along rows, along tokens, along K, stages)
// Bytes of a stage: (72 * rows + 128 * tokens) * warps along K, 80 instead of 72 at 8 bits; all
// stages: at most 99 KiB.
#define SK_MMA_CONFIGS(X)                                              \
  X(0, 256, 128, 4, 2, 1, 2) /* warps of 64 x 64: least smem reads  */ \
  X(1, 128, 64, 2, 2, 1, 4)                                            \
  X(2, 64, 32, 2, 1, 2, 5) /* few tokens: warps share K             */ \
  X(3, 64, 16, 2, 1, 4, 3)                                             \
  X(4, 256, 96, 4, 2, 1, 3) /* from here on 16 bits alone           */ \
  X(5, 128, 256, 2, 4, 1, 2)                                           \
  X(6, 128, 128, 2, 4, 1, 3)                                           \
  X(7, 128, 128, 2, 2, 1, 3)                                           \
  X(8, 64, 128, 1, 4, 1, 4)                                            \
  X(9, 64, 64, 2, 2, 2, 3)                                             \
  X(10, 64, 8, 2, 1, 4, 4)                                             \
  X(11, 32, 32, 1, 1, 4, 3) /* few out_features: more blocks        */ \
  X(12, 32, 16, 1, 1, 4, 5)                                            \
  X(13, 32, 8, 1, 1, 4, 6)
#define SK_MMA_BOTH 4  // the first of them, which 8 bits have, too

// The naive kernel's one tile.
// X(index, rows, tokens)
#define SK_NAIVE_CONFIGS(X) X(0, 64, 64)

namespace sparsekern {

// The rows above in the words of Python: names of the columns ("?": true or false), then rows.
struct ConfigTable {
  const char* const* fields;
  const int* values;
  int columns, rows;

  constexpr int at(int row, int column) const { return values[row * columns + column]; }
};

#define SK_PREFILL_ROW(index, panels, tokens, cluster_m, cluster_n, streamed, promoted) \
  index, 128 * panels, tokens, cluster_m, cluster_n, streamed, promoted,
#define SK_SPLIT_ROW(index, panels, tokens, split, across) \
  index, 128 * panels, tokens, split, across,
#define SK_DECODE_ROW(index, panels, split, paired) index, 64 * panels, split, paired,
#define SK_NARROW_ROW(index, tokens, cluster_rows, split) index, 256, tokens, cluster_rows, split,
#define SK_MMA_ROW(...) __VA_ARGS__,
#define SK_NAIVE_ROW(...) __VA_ARGS__,

#define SK_CONFIG_TABLE(name, configs, row, ...)                                       \
  inline constexpr const char* k##name##Fields[] = {__VA_ARGS__};                      \
  inline constexpr int k##name##Values[] = {configs(row)};                             \
  inline constexpr ConfigTable k##name##Configs = {                                    \
      k##name##Fields, k##name##Values, sizeof(k##name##Fields) / sizeof(const char*), \
      sizeof(k##name##Values) / sizeof(int) * sizeof(const char*) / sizeof(k##name##Fields)};

SK_CONFIG_TABLE(Prefill, SK_PREFILL_CONFIGS, SK_PREFILL_ROW, "index", "rows", "tokens",
                "cluster_rows", "cluster_tokens", "streamed?", "promoted?")
SK_CONFIG_TABLE(Split, SK_SPLIT_CONFIGS, SK_SPLIT_ROW, "index", "rows", "tokens", "split",
                "across?")
SK_CONFIG_TABLE(Decode, SK_DECODE_CONFIGS, SK_DECODE_ROW, "index", "rows", "split", "paired")
SK_CONFIG_TABLE(Narrow, SK_NARROW_CONFIGS, SK_NARROW_ROW, "index", "rows", "tokens", "cluster_rows",
                "split")
SK_CONFIG_TABLE(Mma, SK_MMA_CONFIGS, SK_MMA_ROW, "index", "rows", "tokens", "warps_rows",
                "warps_tokens", "split", "stages")
SK_CONFIG_TABLE(Naive, SK_NAIVE_CONFIGS, SK_NAIVE_ROW, "index", "rows", "tokens")

#undef SK_PREFILL_ROW
#undef SK_SPLIT_ROW
#undef SK_DECODE_ROW
#undef SK_NARROW_ROW
#undef SK_MMA_ROW
#undef SK_NAIVE_ROW
#undef SK_CONFIG_TABLE

}  // namespace sparsekern

// prefill_plan.cpp: walks a streamed last wave (tile_scheduler_sm90.cuh) as the kernel's clusters
// do, on the host, for many grids. Prints what is wrong; test_prefill_plan.py compiles it with
// nvcc.
#include <cstdio>
#include <vector>

#include "linear/tile_scheduler_sm90.cuh"

using namespace sparsekern::prefill;
using Streamed = Config<__half, __half, 2, 128, true>;

struct Grid {
  int clusters, tiles, k_tiles, waves;  // tiles: of the last wave
};

int fail(const Grid& g, const char* what, int cluster, int tile) {
  std::printf("%s: %d clusters, %d tiles of %d, %d waves before; cluster %d, tile %d\n", what,
              g.clusters, g.tiles, g.k_tiles, g.waves, cluster, tile);
  return 1;
}

int check(const Grid& g) {
  Params<Streamed::Output> p = {};
  p.clusters = g.clusters;
  p.stream_units = g.tiles * g.k_tiles;
  p.whole_tiles = g.waves * g.clusters;
  p.extent.k_tiles = g.k_tiles;
  std::vector<std::vector<int>> owner(g.tiles, std::vector<int>(g.k_tiles, -1));
  std::vector<int> given(g.tiles, 0), finisher(g.tiles, -1);
  for (int cluster = 0; cluster < g.clusters; ++cluster) {
    bool finished = false;
    for (int index = cluster;; index += g.clusters) {
      const WorkItem item = work_item<Streamed>(p, index);
      if (index < p.whole_tiles) {
        if (item.tile != index || item.k_begin != 0 || item.k_end != g.k_tiles)
          return fail(g, "a whole tile is cut", cluster, index);
      } else {
        const int tile = item.tile - p.whole_tiles;
        if (tile < 0 || tile >= g.tiles || item.k_begin >= item.k_end || item.k_end > g.k_tiles)
          return fail(g, "outside the last wave, or empty", cluster, tile);
        for (int unit = item.k_begin; unit < item.k_end; ++unit) {
          if (owner[tile][unit] >= 0) return fail(g, "computed twice", cluster, tile);
          owner[tile][unit] = cluster;
        }
        if (item.k_end == g.k_tiles) {
          finisher[tile] = cluster;
          finished = true;
        } else {
          if (finished) return fail(g, "waits before it gives", cluster, tile);
          ++given[tile];
        }
      }
      if (!has_next<Streamed>(p, index)) break;
    }
  }
  for (int tile = 0; tile < g.tiles; ++tile) {
    for (int unit = 0; unit < g.k_tiles; ++unit)
      if (owner[tile][unit] < 0) return fail(g, "not computed", -1, tile);
    const int first = cluster_of_unit(p, tile * g.k_tiles);
    if (first != owner[tile].front()) return fail(g, "wrong first cluster", first, tile);
    if (finisher[tile] != owner[tile].back()) return fail(g, "wrong finisher", -1, tile);
    if (given[tile] != finisher[tile] - first) return fail(g, "sums missing", -1, tile);
  }
  return 0;
}

int main() {
  long grids = 0;
  for (const int clusters : {1, 2, 3, 5, 16, 31, 66, 132})
    for (int tiles = 1; tiles <= clusters; ++tiles)
      for (const int k_tiles : {4, 5, 7, 32, 64, 225, 448})
        for (const int waves : {0, 1, 3})
          if (tiles * k_tiles >= 4 * clusters) {  // choose_stream asks for this
            if (check({clusters, tiles, k_tiles, waves})) return 1;
            ++grids;
          }
  std::printf("%ld grids\n", grids);
  return 0;
}

"""Which kernel variant is chosen: pure arithmetic, no GPU."""

import re
from pathlib import Path

import pytest

from sparsekern import heuristics
from sparsekern.heuristics import RATES, Tile, cost, prefill_tile

CONFIGS = Path(__file__).resolve().parent.parent / "csrc" / "configs.h"
H100 = 132  # multiprocessors


def tiles_of_the_source():
    """The entries of SK_PREFILL_CONFIGS: X(index, panels, tokens, cluster rows, cluster tokens)."""
    found = re.findall(r"X\((\d+), (\d+), (\d+), (\d+), (\d+)\)", CONFIGS.read_text())
    rows = [tuple(map(int, entry)) for entry in found]
    assert [row[0] for row in rows] == list(range(len(rows))), "indices count up from 0"
    return [Tile(128 * panels, *rest) for _, panels, *rest in rows]


def test_every_rated_tile_is_compiled():
    assert set(RATES) <= set(tiles_of_the_source())
    assert max(RATES.values()) == 1.0 and min(RATES.values()) > 0


def test_names():
    assert str(Tile(256, 192, 2, 1)) == "256x192 cluster 2x1"


def test_a_full_gpu_gets_the_fastest_tile():
    best = max(RATES, key=RATES.get)
    rows, tokens = best.rows * best.cluster_rows, best.tokens * best.cluster_tokens
    slots = heuristics.resident_clusters(best.cluster_rows * best.cluster_tokens, H100)
    assert prefill_tile(tokens * 4, rows * slots, H100) == best


def test_few_tokens_get_a_tile_that_wastes_little():
    """100 tokens: three quarters of a tile of 384 would be padding."""
    assert prefill_tile(100, 28672, H100).tokens <= 128


def test_the_choice_is_the_cheapest():
    for tokens in (65, 128, 500, 1024, 4096):
        for out_features in (64, 4096, 6144, 28672):
            chosen = prefill_tile(tokens, out_features, H100)
            costs = {tile: cost(tile, tokens, out_features, H100) for tile in RATES}
            assert costs[chosen] == min(costs.values())


def test_cost_is_the_useful_work_over_rate_and_share_of_busy_tiles():
    """66 clusters of two fit: 67 take two waves, of which 67 / 132 is busy."""
    tile = Tile(256, 192, 2, 1)
    one = cost(tile, 192, 512 * 66, H100)
    assert one == 256 * 192 / RATES[tile]
    assert cost(tile, 192, 512 * 66 + 1, H100) == 2 * one
    useful = 192 * (512 * 67)
    busy = 67 / (2 * 66)
    assert cost(tile, 192, 512 * 67, H100) == pytest.approx(useful / (RATES[tile] * busy * H100))


def test_tiles_that_are_not_compiled_are_left_out():
    only = Tile(256, 128, 1, 1)
    assert prefill_tile(4096, 28672, H100, (only, Tile(1, 1, 1, 1))) == only
    with pytest.raises(ValueError):
        prefill_tile(4096, 28672, H100, (Tile(1, 1, 1, 1),))

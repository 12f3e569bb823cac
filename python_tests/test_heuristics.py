"""Which kernel variant is chosen: pure arithmetic, no GPU."""

import re
from pathlib import Path

import pytest

from sparsekern import heuristics
from sparsekern.heuristics import (
    CONSUMER,
    DATA_CENTER,
    TIMES,
    MmaTile,
    Tile,
    mma_clocks,
    mma_rates,
    mma_tile,
    predicted_us,
    prefill_tile,
)

CONFIGS = Path(__file__).resolve().parent.parent / "csrc" / "configs.h"
H100 = 132  # multiprocessors


def tiles_of_the_source():
    """The entries of SK_PREFILL_CONFIGS: X(index, panels, tokens, cluster rows, cluster tokens,
    streamed)."""
    found = re.findall(r"X\((\d+), (\d+), (\d+), (\d+), (\d+), ([01])\)", CONFIGS.read_text())
    rows = [tuple(map(int, entry)) for entry in found]
    assert [row[0] for row in rows] == list(range(len(rows))), "indices count up from 0"
    return [Tile(128 * panels, *rest, bool(last)) for _, panels, *rest, last in rows]


def test_every_tile_is_compiled():
    assert set(TIMES) <= set(tiles_of_the_source())
    assert all(time.stage > 0 and min(time) >= 0 for time in TIMES.values())


def test_names():
    assert str(Tile(256, 192, 2, 1)) == "256x192 cluster 2x1"
    assert str(Tile(256, 192, 2, 1, True)) == "256x192 cluster 2x1, streamed"


def test_resident_clusters():
    assert [heuristics.resident_clusters(size, H100) for size in (1, 2, 4)] == [132, 66, 31]
    assert heuristics.resident_clusters(4, 4) == 1


@pytest.mark.parametrize(
    "tokens, out_features, in_features, expected",
    [
        (4096, 57344, 8192, Tile(256, 192, 2, 1)),
        (4096, 28672, 4096, Tile(256, 192, 2, 1)),
        (256, 4096, 14336, Tile(256, 128, 1, 1)),
        (128, 4096, 4096, Tile(128, 128, 1, 1)),
    ],
)
def test_known_picks(tokens, out_features, in_features, expected):
    """Problems at which this tile was the fastest measured."""
    assert prefill_tile(tokens, out_features, in_features, H100) == expected


def test_a_tile_is_chosen_only_at_token_counts_at_which_it_was_timed():
    alone = Tile(256, 128, 1, 1)
    for tile, expected in (
        (Tile(256, 160, 2, 1), {100: alone, 512: alone, 513: Tile(256, 160, 2, 1)}),
        (Tile(128, 128, 1, 1), {100: Tile(128, 128, 1, 1), 513: alone, 8192: alone}),
    ):
        for tokens, pick in expected.items():  # a small problem is cut up: both tiles beat `alone`
            assert prefill_tile(tokens, 256, 4096, H100, (alone, tile)) == pick


def test_the_choice_is_the_fastest_prediction():
    for tokens in (65, 128, 500, 1024, 4096):
        for out_features, in_features in ((64, 64), (4096, 14336), (28672, 4096)):
            problem = tokens, out_features, in_features, H100
            allowed = [t for t, of in TIMES.items() if of.above < tokens <= of.up_to]
            fastest = min(predicted_us(tile, *problem) for tile in allowed)
            chosen = prefill_tile(*problem)
            assert chosen in allowed and predicted_us(chosen, *problem) == fastest


def test_prediction_by_hand():
    """256x192, a cluster of one: 132 tiles at once; 4096 in_features are 64 stages."""
    tile = Tile(256, 192, 1, 1)
    stage, item, exchange, constant, *_ = TIMES[tile]

    def us(tokens, out_features, in_features=4096):
        return pytest.approx(predicted_us(tile, tokens, out_features, in_features, H100))

    # One full wave, and two.
    assert us(192, 256 * 132) == 64 * stage + item + constant
    assert us(384, 256 * 132) == 2 * (64 * stage + item) + constant
    # One token or one row more is one more row of tiles, or one more tile; parts outside count.
    assert us(193, 256 * 66) == us(384, 256 * 66)
    # 133 tiles: the last is cut into 192 / 32 = 6 parts of 11 stages, which exchange 5/6.
    assert us(192, 256 * 132 + 1) == (64 + 11) * stage + 2 * item + exchange * 5 / 6 + constant
    # 40 tiles leave room for 3 parts each, 100 for one.
    assert us(192, 256 * 40) == 22 * stage + item + exchange * 2 / 3 + constant
    assert us(192, 256 * 100) == 64 * stage + item + constant
    # A part has four stages or more: 10 stages make two, 3 stages one.
    assert us(192, 256, 640) == 5 * stage + item + exchange / 2 + constant
    assert us(192, 256, 130) == 3 * stage + item + constant


def test_long_launches_prefer_256_rows_in_clusters_of_two():
    """Three tiles per cluster and more: a factor for every other tile."""
    for tile, factor in (
        (Tile(256, 192, 1, 1), heuristics.LONG), (Tile(256, 192, 4, 1), heuristics.LONG),
        (Tile(128, 256, 2, 1), heuristics.LONG), (Tile(256, 192, 2, 1), 1.0),
    ):  # fmt: skip
        stage, item, _, constant, *_ = TIMES[tile]
        size = tile.cluster_rows * tile.cluster_tokens
        resident = heuristics.resident_clusters(size, H100)
        for waves in (2, 3):
            problem = tile.tokens * waves, tile.rows * tile.cluster_rows * resident, 4096, H100
            expected = waves * (64 * stage + item) + constant
            expected *= factor if waves == 3 else 1
            assert predicted_us(tile, *problem) == pytest.approx(expected)


def test_clusters_count_as_one():
    """Clusters of 2 x 1: 512 rows each, 66 at once."""
    tile = Tile(256, 192, 2, 1)
    stage, item, _, constant, *_ = TIMES[tile]
    expected = 64 * stage + item + constant
    assert predicted_us(tile, 192, 512 * 66, 4096, H100) == pytest.approx(expected)


def test_tiles_that_are_not_compiled_are_left_out():
    only = Tile(256, 128, 1, 1)
    assert prefill_tile(4096, 28672, 4096, H100, (only, Tile(1, 1, 1, 1))) == only
    with pytest.raises(ValueError):
        prefill_tile(4096, 28672, 4096, H100, (Tile(1, 1, 1, 1),))


# ---- the mma.sp kernel ---------------------------------------------------------------------------


def mma_tiles_of_the_source():
    """The entries of SK_MMA_CONFIGS: X(index, then the fields of MmaTile)."""
    found = re.findall(r"X\((\d+)" + r", (\d+)" * 6 + r"\)", CONFIGS.read_text())
    assert [int(entry[0]) for entry in found] == list(range(len(found))) and found
    return tuple(MmaTile(*map(int, entry[1:])) for entry in found)


def test_mma_tiles_fit_the_shared_memory_of_every_gpu():
    for tile in mma_tiles_of_the_source():
        assert tile.stages * tile.split * (72 * tile.rows + 128 * tile.tokens) <= 99 * 1024


def test_mma_names_and_rates():
    assert str(MmaTile(64, 8, 2, 1, 4, 4)) == "64x8, 2x1x4 warps"
    assert mma_rates((8, 0)) == mma_rates((9, 0)) == DATA_CENTER
    assert mma_rates((8, 6)) == mma_rates((8, 9)) == mma_rates((12, 0)) == CONSUMER


def test_mma_estimate_by_hand():
    """64x64, 4 x 8 x 2 mma.sp per stage of one column tile: on a consumer chip 512 clocks."""
    tile = MmaTile(64, 64, 2, 2, 1, 4)

    def clocks(tokens, out_features, rates=CONSUMER, sms=10):
        return mma_clocks(tile, tokens, out_features, 1024, sms, rates)

    block = 1500 + 64 * 64 / 8
    # L2 at 16 bytes a clock: 4608 + 8192 bytes, 800 clocks; one token needs 4608 + 128.
    assert clocks(64, 640) == 16 * (800 + 60) + block
    assert clocks(1, 640) == 16 * (512 + 60) + block
    assert clocks(65, 640) == 2 * clocks(64, 640), "two waves"
    # With L2 out of the way: 2 * 4608 + 2 * 8192 bytes of fragments and the stage's own 12800.
    fast = CONSUMER._replace(l2=1000, mma=0)
    assert clocks(64, 640, fast) == 16 * (38400 / 128 + 60) + block
    # A ring of two has one stage in flight: its latency counts.
    ring = mma_clocks(tile._replace(stages=2), 64, 640, 1024, 10, fast)
    assert ring == 16 * (800 + 60) + block


def test_mma_tiles_grow_with_the_tokens():
    tiles = mma_tiles_of_the_source()
    for multiprocessors, rates in ((108, DATA_CENTER), (82, CONSUMER), (128, CONSUMER)):
        for shape in ((4096, 4096), (28672, 4096), (4096, 14336)):
            one = mma_tile(1, *shape, multiprocessors, rates, tiles)
            many = mma_tile(8192, *shape, multiprocessors, rates, tiles)
            assert one.tokens == 8 and one.split == 4
            assert many.rows * many.tokens >= 128 * 128 and many.split == 1
            for tokens in (1, 16, 100, 1024):
                picked = mma_tile(tokens, *shape, multiprocessors, rates, tiles)
                problem = tokens, *shape, multiprocessors, rates
                assert all(mma_clocks(picked, *problem) <= mma_clocks(t, *problem) for t in tiles)


def test_mma_tiles_that_are_not_compiled_are_left_out():
    only = MmaTile(128, 128, 2, 4, 1, 3)
    assert mma_tile(1, 4096, 4096, 108, DATA_CENTER, (only,)) == only

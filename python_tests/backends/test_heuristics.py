"""Which kernel variant is chosen: pure arithmetic, no GPU."""

import math
import re
from pathlib import Path

import pytest

from sparsekern.backends.cuda import coefficients, narrow_model
from sparsekern.backends.cuda import cost_model as heuristics
from sparsekern.backends.cuda.coefficients import TIMES, Times
from sparsekern.backends.cuda.cost_model import (
    Work,
    considered,
    fastest,
    may_cut,
    predicted_us,
    work,
)
from sparsekern.backends.cuda.mma_model import (
    CONSUMER,
    DATA_CENTER,
    mma_clocks,
    mma_rates,
    mma_tile,
)
from sparsekern.backends.cuda.narrow_model import NarrowTile
from sparsekern.backends.cuda.variant import (
    PLAIN,
    Bits,
    MmaTile,
    RowBlocks,
    SplitTile,
    Tile,
    variant_name,
)

CONFIGS = Path(__file__).resolve().parents[2] / "csrc" / "linear/configs.h"
H100 = 132  # multiprocessors


def tiles_of_the_source():
    """The entries of SK_PREFILL_CONFIGS: X(index, panels, tokens, cluster rows, cluster tokens,
    streamed, promoted)."""
    rows = entries("SK_PREFILL_CONFIGS")
    assert [row[0] for row in rows] == list(range(len(rows))), "indices count up from 0"
    tiles = [Tile(128 * row[1], *row[2:5], *map(bool, row[5:])) for row in rows]
    assert len(tiles[0]) == 6 and any(tile.promoted for tile in tiles)
    return tiles


def entries(name):
    """The entries X(index, a, b) or X(index, a, b, c) of this list, as rows of numbers."""
    part = CONFIGS.read_text().partition(f"#define {name}(X)")[2].partition("\n\n")[0]
    return [tuple(map(int, row.split(","))) for row in re.findall(r"X\(([\d, ]+)\)", part)]


def blocks_of_the_source():
    """The entries of SK_DECODE_CONFIGS: X(index, panels, split, paired)."""
    found = entries("SK_DECODE_CONFIGS")
    assert [entry[0] for entry in found] == list(range(len(found))) and found
    return [RowBlocks(64 * panels, *rest) for _, panels, *rest in found]


def splits_of_the_source():
    """The entries of SK_SPLIT_CONFIGS: X(index, panels, tokens, split, across clusters)."""
    found = entries("SK_SPLIT_CONFIGS")
    assert [entry[0] for entry in found] == list(range(len(found))) and found
    return [SplitTile(128 * panels, *rest, bool(across)) for _, panels, *rest, across in found]


def test_every_variant_is_compiled():
    built = [*tiles_of_the_source(), *blocks_of_the_source(), *mma_tiles_of_the_source()]
    built += splits_of_the_source()
    assert set(TIMES) | set(coefficients.TIMES_8) <= set(built)
    assert all(
        times.stage + times.extra > 0 and times.rate > 0 and min(times) >= 0
        for times in (*TIMES.values(), *coefficients.TIMES_8.values())
    )


def test_names():
    assert str(Tile(256, 192, 2, 1)) == "256x192 cluster 2x1"
    assert str(Tile(256, 192, 2, 1, True)) == "256x192 cluster 2x1, streamed"
    assert variant_name(Tile(256, 192, 2, 1)) == "prefill 256x192 cluster 2x1"
    assert variant_name(RowBlocks(128, 4)) == "decode 128 rows, split 4"
    assert variant_name(RowBlocks(128, 4, 1)) == "decode 128 rows, split 4, two a multiprocessor"
    assert variant_name(RowBlocks(128, 4, 2)) == "decode 128 rows, split 4, two teams"
    assert variant_name(MmaTile(64, 8, 2, 1, 4, 4)) == "mma 64x8, 2x1x4 warps"
    assert variant_name(SplitTile(128, 64, 4)) == "split 128x64, 4 parts"
    assert variant_name(SplitTile(128, 64, 1)) == "split 128x64, 1 part"
    across = SplitTile(128, 64, 4, True)
    assert variant_name(across) == "split 128x64, 4 parts, across clusters"


def test_split_work_by_hand():
    """128x128 with 4 parts, 33 clusters fit and 31 are resident; 2048 in_features are 32 stages."""
    of = work(SplitTile(128, 128, 4), 192, 2048, 2048, H100)
    assert (of.stages, of.items, of.exchanges) == (16, 2, 1.5), "32 tiles"
    assert of.extras == 16 * 96 / 128, "two columns of 96 tokens"
    assert of.totals == pytest.approx(32 * 32 * (128 * 72 + 96 * 128) / 1e6)
    assert work(SplitTile(128, 128, 4), 128, 2048, 2048, H100).stages == 8
    three = work(SplitTile(128, 64, 1), 130, 2048, 2048, H100)
    assert three.extras == 32 * 48 / 64, "three columns of 44 tokens, rounded up to 48"


def test_rows_of_y_that_are_not_aligned_by_hand():
    for variant, us in (
        (Tile(256, 64, 1, 1), 0.5 + 0.6),
        (SplitTile(256, 64, 1), 0.5 + 0.6),
        (SplitTile(128, 64, 1), 0.5 + 1.0),
        (MmaTile(64, 8, 2, 1, 4, 4), 0.3 + 2),
    ):
        assert work(variant, 500, 1001, 2048, H100).ragged == pytest.approx(us, rel=0.01), "1 MB"
        assert work(variant, 500, 1000, 2048, H100).ragged == 0
        of = work(variant, 500, 1001, 2048, H100)
        without = heuristics.us(TIMES[variant], of._replace(ragged=0.0))
        assert heuristics.us(TIMES[variant], of) == pytest.approx(without + us, rel=0.01)


def test_mma_is_for_little_to_compute():
    """And, where the copy engine can fetch x, for few tokens; where not, for short rows."""
    tile = MmaTile(64, 16, 2, 1, 4, 3)
    for tokens, columns, expected in (
        (1024, 64, True),
        (1025, 64, False),
        (1025, 68, True),
        (65, 4092, True),
        (65, 4100, False),
        (64, 4100, True),
        (64, 30_000, True),
        (512, 30_000, False),
    ):
        assert heuristics.considered(tile, tokens, 72, columns) == expected, (tokens, columns)


def test_rows_of_x_that_are_no_multiple_of_a_stage():
    """Two rows of tiles read x from memory twice."""
    x = 1000 * 2056 * 2 / 1e6
    for rows, more in ((129, x), (128, 0.0)):
        of, tile = [], SplitTile(128, 128, 2)
        for columns in (2056, 2112):  # as many stages
            counts = work(tile, 1000, rows, columns, H100)
            of.append(counts.megabytes - 1000 * columns * 2 / 1e6)
        assert of[0] - of[1] == pytest.approx(more)


def test_columns_of_few_rows_by_hand():
    """x of more tokens than the weight has rows, in one row of tiles: as many columns as run."""
    two, alone = SplitTile(128, 128, 2), SplitTile(128, 64, 1)
    assert heuristics.columns_of_tiles(two, 6915, 64, H100) == 66, "not 55"
    assert heuristics.columns_of_tiles(alone, 4654, 64, H100) == 132, "not 73"
    assert heuristics.columns_of_tiles(alone, 300, 64, H100) == 10, "of 30 tokens, not 5"
    assert heuristics.columns_of_tiles(alone, 20000, 64, H100) == 313
    assert heuristics.columns_of_tiles(two, 6915, 129, H100) == 55, "two rows of tiles"
    assert heuristics.columns_of_tiles(alone, 100, 100, H100) == 2, "as many rows as tokens"
    assert heuristics.columns_of_tiles(two._replace(across=True), 6915, 64, H100) == 55
    of = work(alone, 4654, 64, 832, H100)
    assert of.items == 1 and of.extras == 13 * 40 / 64, "117 columns of 40 tokens"
    assert of.totals == pytest.approx(13 * 117 * (64 * 72 + 40 * 128) / 1e6)


def test_tiles_across_clusters_by_hand():
    """64x23168 are 362 stages of one tile of 40 tokens; 15 clusters of 8 and 31 of 4 are resident,
    and each part has four stages at least."""
    eight, four = SplitTile(128, 64, 8, True), SplitTile(128, 64, 4, True)
    problem = 40, 64, 23168, H100
    assert heuristics.clusters_of_tile(eight, *problem) == 11, "362 / (8 * 4)"
    assert heuristics.clusters_of_tile(four, *problem) == 16, "the most"
    assert heuristics.clusters_of_tile(four, 40, 900, 23168, H100) == 3, "8 tiles of 31"
    assert heuristics.clusters_of_tile(four._replace(across=False), *problem) == 1
    alone, of = work(eight._replace(across=False), *problem), work(eight, *problem)
    assert (alone.stages, alone.crowds) == (46, 0) and of.stages == 5
    assert of.crowds == 1 + 11 * 16 * 128 * 4 / heuristics.SUMS_READ, "16 tokens of 11 clusters"
    same = ("totals", "megabytes", "items", "exchanges")
    assert all(getattr(of, name) == getattr(alone, name) for name in same)
    wide = work(SplitTile(256, 128, 1, True), 128, 256, 4096, H100)
    assert wide.crowds == 1 + 16 * 128 * 256 * 4 / heuristics.SUMS_READ
    eights = heuristics.clusters_of_tile(four, 40, 64, 23168, H100, EIGHT)
    assert eights == 181 // 16, "half the stages"


def test_tiles_across_clusters_are_chosen_for_few_rows_and_long_in_features():
    """What clusters give each other costs something. Where none share a tile, a variant without is
    chosen."""
    for shape, tokens in (((64, 23168), 40), ((128, 27456), 51), ((320, 20992), 977)):
        chosen = fastest(tokens, *shape, H100)
        assert isinstance(chosen, SplitTile) and chosen.across, shape
        assert heuristics.clusters_of_tile(chosen, tokens, *shape, H100) > 1
    alone, shared = (64, 8192, 256, H100), (64, 256, 8192, H100)
    for across in (v for v in TIMES if isinstance(v, SplitTile) and v.across):
        assert heuristics.same_as_another(across, *alone)
        assert not heuristics.same_as_another(across, *shared)
        assert fastest(*alone, (across, RowBlocks(256, 1))) == RowBlocks(256, 1)
        assert fastest(*shared, (across,)) == across
        assert TIMES[across].crowd * work(across, *shared).crowds > 0.5
    assert not heuristics.same_as_another(SplitTile(128, 64, 4), *alone)


def test_what_a_copy_of_x_costs():
    """Of rows that 16 bytes do not divide, but for the mma.sp kernel; nothing of 8-bit x."""
    few = 55, 48504, 92, H100  # much to write, little to read
    of = {v: work(v, *few).copy for v in TIMES}
    assert {type(v) for v, us in of.items() if us == 0} == {MmaTile}
    assert max(of.values()) == heuristics.copy_us(55, 92)
    assert heuristics.copy_us(16, 7500) == pytest.approx(4.12)
    tile = SplitTile(256, 64, 1)
    assert work(tile, 55, 48504, 96, H100).copy == 0 == work(tile, *few, EIGHT).copy
    assert work(tile, 1, *few[1:]).copy == 0, "one row has no stride"
    without = heuristics.us(TIMES[tile], work(tile, *few)._replace(copy=0.0))
    assert predicted_us(tile, *few) - without == pytest.approx(heuristics.copy_us(55, 92))
    assert work(RowBlocks(128, 2), 16, 98, 7500, H100, Bits(8, 16)).copy > 4


def test_a_copy_of_half_and_two_launches():
    """Where they are expected to be faster than a copy of all and one."""
    long, tile = (5025, 110, 4068, H100), SplitTile(128, 96, 2)
    both = work(tile, *long)
    even, odd = (work(tile, tokens, 110, 4072, H100) for tokens in (2513, 2512))
    apart = Work(*map(sum, zip(even, odd, strict=True)))  # of 4 columns more
    assert both._replace(megabytes=apart.megabytes, copy=0.0) == apart._replace(ragged=both.ragged)
    assert both.ragged == pytest.approx(0.5 + 1.0 * 5025 * 110 * 2 / 1e6), "one y"
    assert both.launches == 2 and both.copy == heuristics.copy_us(2512, 4068)
    for problem in (long, (2, 64, 68, H100), (3, 4096, 4092, H100), (989, 1000, 1020, H100)):
        tokens, *layer = problem
        for variant in TIMES:
            of = work(variant, *problem)
            if isinstance(variant, MmaTile):
                assert (of.launches, of.copy) == (1, 0)
                assert not heuristics.in_halves(variant, *problem)
                continue
            few = tokens // 2
            whole, rest, half = (
                heuristics.us(TIMES[variant], work(variant, part, layer[0], layer[1] + 4, H100))
                for part in (tokens, tokens - few, few)
            )
            whole += heuristics.copy_us(tokens, layer[1])
            apart = rest + half + heuristics.copy_us(few, layer[1])
            assert predicted_us(variant, *problem) == pytest.approx(min(whole, apart), rel=0.02)
            halves = heuristics.in_halves(variant, *problem)
            assert of.launches == 1 + halves and (tokens > 3 or not halves)
            assert of.copy == heuristics.copy_us(few if halves else tokens, layer[1])
    assert not heuristics.in_halves(tile, *long, EIGHT)
    assert not heuristics.in_halves(tile, *long, Bits(8, 16)), "it would be widened twice"
    assert not heuristics.in_halves(SplitTile(1, 2, 3), *long), "nobody knows its time"
    assert not heuristics.in_halves(tile, 1, *long[1:])


def test_the_split_kernel_is_considered_for_small_problems():
    tile = SplitTile(128, 128, 4)
    assert heuristics.considered(tile, 256, 2048, 2048)
    assert not heuristics.considered(tile, 31, 2048, 2048)
    assert not heuristics.considered(tile, 4096, 8192, 8192)


EIGHT = Bits(8, 8)


def test_work_of_8_bits_by_hand():
    """Half the stages of 128 in_features, and the bytes of the types: 80 a row of a stage."""
    for variant in (Tile(256, 192, 2, 1), SplitTile(128, 128, 2), RowBlocks(256, 2)):
        plain, eight = (
            work(variant, 64, 4096, 4096, H100),
            work(variant, 64, 4096, 4096, H100, EIGHT),
        )
        assert (eight.items, eight.exchanges) == (plain.items, plain.exchanges)
        assert eight.stages == work(variant, 64, 4096, 2048, H100).stages < plain.stages
        assert eight.megabytes == (4096 * 32 * 80 + 64 * (2 * 4096 + 4096)) / 1e6
    split = work(SplitTile(128, 128, 4), 192, 2048, 4096, H100, EIGHT)
    assert split.totals == pytest.approx(32 * 32 * (128 * 80 + 96 * 128) / 1e6)
    widened = work(RowBlocks(256, 1), 8, 512, 1024, H100, Bits(8, 16))
    assert widened.megabytes == (512 * 8 * 80 + 8 * (2 * 512 + 2 * 1024)) / 1e6


def test_8_bit_x_of_few_tokens_has_a_variant():
    tiles = tuple(v for v in TIMES if isinstance(v, (Tile, SplitTile)))
    for tokens in (1, 16, 31, 4096):
        chosen = fastest(tokens, 4096, 4096, H100, tiles, EIGHT)
        assert chosen in tiles and considered(chosen, tokens, 4096, 4096, EIGHT)
    assert not considered(SplitTile(128, 64, 2), 1, 4096, 4096), "x of 16 bits has decode"
    assert isinstance(fastest(4096, 28672, 4096, H100, tiles, EIGHT), Tile)


def test_8_bits_have_coefficients_of_their_own():
    """Two picks that are measured winners: bench/records, and csrc/notes/splitk.md."""
    assert coefficients.table(PLAIN) is TIMES
    tiles = tuple(v for v in coefficients.TIMES_8 if not isinstance(v, RowBlocks))
    assert fastest(16, 8192, 8192, H100, tiles, EIGHT) == SplitTile(128, 64, 2)
    blocks = tuple(v for v in coefficients.TIMES_8 if isinstance(v, RowBlocks))
    widened = Bits(8, 16)
    assert fastest(8, 8192, 8192, H100, blocks, widened) == RowBlocks(128, 2)


def test_int4_has_coefficients_of_its_own():
    """Picks that an H200 measured as the fastest, or within 3 % of it, and their times."""
    four, blocks = Bits(4, 16), tuple(coefficients.TIMES_4)
    for tokens, shape, variant, us in (
        (2, (28672, 4096), RowBlocks(256, 1, 2), 14.4),
        (16, (28672, 4096), RowBlocks(256, 1), 18.22),
        (8, (10240, 8192), RowBlocks(256, 4, 1), 12.87),
        (8, (640, 6464), RowBlocks(128, 8), 3.67),
        (16, (55168, 2752), RowBlocks(256, 1, 1), 22.59),
    ):
        assert fastest(tokens, *shape, H100, blocks, four) == variant
        assert predicted_us(variant, tokens, *shape, H100, four) == pytest.approx(us, rel=0.25)
    one = tuple(v for v in blocks if v.paired == 0)
    assert fastest(17, 28672, 4096, H100, blocks, four) in one, "two an SM take 16 tokens at most"


def test_two_blocks_on_a_multiprocessor_by_hand():
    """264 blocks of split 1 run at once; 33 clusters of four fit, but for two, twice. Of two teams
    each has half the stages."""
    assert work(RowBlocks(128, 1, 1), 8, 28672, 4096, H100, Bits(4, 16)).stages == 16, "224 blocks"
    assert work(RowBlocks(128, 1), 8, 28672, 4096, H100, Bits(4, 16)).stages == 2 * 16
    assert work(RowBlocks(256, 4, 1), 8, 256 * 62, 4096, H100, Bits(4, 16)).stages == 4
    assert work(RowBlocks(256, 4, 1), 8, 256 * 63, 4096, H100, Bits(4, 16)).stages == 2 * 4
    assert work(RowBlocks(256, 1, 2), 8, 28672, 4096, H100, Bits(4, 16)).stages == 8, "112 blocks"


def narrow_tiles_of_the_source():
    """The entries of SK_NARROW_CONFIGS: X(index, tokens, cluster rows, split)."""
    rows = entries("SK_NARROW_CONFIGS")
    assert [row[0] for row in rows] == list(range(len(rows)))
    return tuple(NarrowTile(256, *row[1:]) for row in rows)


def test_the_narrow_kernel_for_int4():
    """Every tile has whole slices of x and a cluster that fits; more tokens take longer."""
    tiles, four = narrow_tiles_of_the_source(), Bits(4, 16)
    for tile in tiles:
        assert tile.tokens // 8 % tile.cluster_rows == 0 and tile.cluster_rows * tile.split <= 8
    variants = (*coefficients.TIMES_4, *tiles)

    def chosen(tokens, *shape):
        return fastest(tokens, *shape, H100, variants, four)

    for shape in ((28672, 4096), (4096, 4096)):
        times = [
            predicted_us(chosen(tokens, *shape), tokens, *shape, H100, four)
            for tokens in (17, 64, 128, 256, 512)
        ]
        assert times == sorted(times) and times[0] > 0
    assert isinstance(chosen(16, 4096, 4096), RowBlocks)
    assert chosen(17, 28672, 4096).tokens == 32
    assert chosen(64, 28672, 4096).split == 1, "tiles for most multiprocessors"
    assert chosen(64, 4096, 4096).split > 2, "sixteen tiles"
    assert variant_name(NarrowTile(256, 64, 2, 1)) == "narrow 256x64 cluster 2x1, 1 part"


def test_clusters_of_three_that_would_take_two_waves():
    """10240x8192 is 40 tiles of rows, 20 pairs: 3 parts of each at once are too many."""
    tiles, four = narrow_tiles_of_the_source(), Bits(4, 16)
    for tokens in (32, 64, 128):
        best = min(tiles, key=lambda v: heuristics.predicted_us(v, tokens, 10240, 8192, H100, four))
        assert best.split in (1, 2, 4), best
    one, two = NarrowTile(256, 64, 1, 3), NarrowTile(256, 64, 1, 2)
    us = {t: heuristics.predicted_us(t, 64, 10240, 8192, H100, four) for t in (one, two)}
    assert us[one] == pytest.approx(37.1, rel=0.15) and us[two] < 0.8 * us[one]


def test_the_narrow_kernel_as_measured():
    """On an H200, a single run: the fastest configuration and its time, the model within 10 %."""
    tiles, four = narrow_tiles_of_the_source(), Bits(4, 16)
    for tokens, shape, tile, us in (
        (17, (28672, 4096), NarrowTile(256, 32, 1, 1), 22.3),
        (64, (28672, 4096), NarrowTile(256, 64, 1, 1), 28.0),
        (256, (28672, 4096), NarrowTile(256, 128, 1, 1), 78.7),
        (64, (4096, 14336), NarrowTile(256, 64, 1, 6), 19.3),
        (128, (4096, 14336), NarrowTile(256, 128, 1, 6), 24.9),
        (512, (4096, 14336), NarrowTile(256, 128, 1, 2), 57.8),
        (256, (6144, 4096), NarrowTile(256, 128, 1, 2), 21.1),
        (512, (4096, 4096), NarrowTile(256, 128, 1, 2), 22.2),
    ):
        problem = tokens, *shape, H100
        assert predicted_us(tile, *problem, four) == pytest.approx(us, rel=0.1)
        picked = fastest(*problem, tiles, four)
        assert (picked.tokens, picked.split) == (tile.tokens, tile.split)


def test_where_int4_pays_in_registers_with_many_tokens():
    tiles, four = narrow_tiles_of_the_source(), Bits(4, 16)

    def pays(tokens, *shape):
        problem = tokens, *shape, H100
        us = predicted_us(fastest(*problem, tiles, four), *problem, four)
        plain = predicted_us(fastest(*problem), *problem)
        return narrow_model.pays(tokens, *shape, us, plain)

    assert pays(1024, 4096, 14336) and pays(1024, 4096, 4096), "128 tiles, a wave"
    assert not pays(1024, 28672, 4096), "seven waves"
    assert not pays(600, 64, 256), "a short copy"
    assert not narrow_model.pays(narrow_model.PAYING_TOKENS + 1, 4096, 14336, 1.0, 1e3)
    # Records of 2cb7fa2: what the copy takes on top of the 16-bit kernel at 1024 tokens.
    for shape, us in (((4096, 4096), 8.5), ((4096, 14336), 24.7), ((28672, 4096), 47.5)):
        assert narrow_model.copy_us(*shape) == pytest.approx(us, rel=0.1)


def test_quantising_takes_longer_with_more_of_it():
    us = heuristics.quantize_us
    assert 0 < us(1, 4096) < us(16, 4096) < us(64, 4096) < us(64, 28672) < 10


def test_the_promoted_tile():
    tiles = [tile for tile in tiles_of_the_source() if tile.promoted]
    assert not set(tiles) & set(TIMES), "asked for by name alone"
    assert str(tiles[0]) == "128x192 cluster 1x1, promoted"

    def chosen(tokens, out_features):
        return heuristics.promoted_tile(tokens, out_features, H100, tuple(tiles))

    assert (
        chosen(192, 4096) == Tile(128, 128, 2, 1, promoted=True) or chosen(192, 4096).tokens == 192
    )
    assert chosen(8192, 28672).cluster_rows == 2
    assert chosen(1, 64) in tiles


def test_resident_clusters():
    found = [heuristics.resident_clusters(size, H100) for size in (1, 2, 3, 4, 6, 8, 16)]
    assert found == [132, 66, 39, 31, 17, 15, 6]
    assert heuristics.resident_clusters(4, 4) == 1


# ---- the choice ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens, out_features, in_features, expected",
    [
        (4096, 57344, 8192, "prefill 256x208 cluster 2x1"),
        (4096, 28672, 4096, "prefill 256x208 cluster"),
        (128, 4096, 4096, "split 128x"),
        (1, 28672, 4096, "decode 256 rows, split 1"),
        (1, 4096, 4096, "mma 32x8"),
        (96, 1024, 4096, "split 128x64, 6 parts"),
    ],
)
def test_known_picks(tokens, out_features, in_features, expected):
    """Problems at which this variant, or one of these, was the fastest measured."""
    chosen = variant_name(fastest(tokens, out_features, in_features, H100))
    assert chosen.startswith(expected)


def test_the_choice_is_the_fastest_prediction():
    for tokens in (1, 31, 32, 65, 128, 500, 1024, 4096):
        for shape in ((64, 64), (4096, 14336), (28672, 4096)):
            problem = tokens, *shape, H100
            allowed = [v for v in TIMES if considered(v, tokens, *shape)]
            chosen = fastest(*problem)
            assert chosen in allowed
            assert all(predicted_us(chosen, *problem) <= predicted_us(v, *problem) for v in allowed)


def test_what_is_considered():
    tile, blocks, mma = Tile(256, 128, 1, 1), RowBlocks(256, 4), MmaTile(32, 16, 1, 1, 4, 5)
    large = 2**12, 2**13
    for tokens, of in (
        (1, {blocks, mma}),
        (31, {blocks, mma}),
        (32, {tile, blocks, mma}),
        (64, {tile, blocks, mma}),
        (65, {tile}),
    ):
        assert {v for v in (tile, blocks, mma) if considered(v, tokens, *large)} == of
    assert considered(mma, 2**10, 2**10, 2**10), "little to compute"
    assert not considered(mma, 2**10 + 1, 2**10, 2**10)


def test_variants_that_are_not_compiled_are_left_out():
    only = next(variant for variant in TIMES if isinstance(variant, Tile))
    assert fastest(4096, 28672, 4096, H100, (only, Tile(1, 1, 1, 1))) == only
    with pytest.raises(ValueError):
        fastest(4096, 28672, 4096, H100, (Tile(1, 1, 1, 1),))
    with pytest.raises(ValueError):
        fastest(1, 28672, 4096, H100, (only,))


# ---- the model -----------------------------------------------------------------------------------


def test_time_of_some_work_by_hand():
    """Three limits of 16, 16 and 0 us are 16 * 2^(1/4) together; the rest is added."""
    times = Times(2.0, 1.0, 0.5, 3.0, 5.0, 7.0, 11.0, 13.0)
    of = Work(stages=6, extras=4, totals=32, megabytes=0, items=1, exchanges=2, crowds=3)
    assert heuristics.us(times, of) == pytest.approx(16 * 2**0.25 + 5 + 14 + 33 + 13)
    memory = Work(0, 0, 0, 30, 0, 0, 0)
    assert heuristics.us(times, memory) == pytest.approx(10 + 13)
    assert predicted_us(first := next(iter(TIMES)), 1, 512, 2048, H100) == pytest.approx(
        heuristics.us(TIMES[first], work(first, 1, 512, 2048, H100))
    )


def test_megabytes():
    """70 x 100 weights are stored as 128 x 128, 9/8 bytes each; x and y as they are."""
    expected = (128 * 128 * 9 / 8 + 2 * 3 * (70 + 100)) / 1e6
    for variant in (Tile(256, 128, 1, 1), RowBlocks(256, 4), MmaTile(32, 16, 1, 1, 4, 5)):
        assert work(variant, 3, 70, 100, H100).megabytes == pytest.approx(expected)


def prefill(tile, tokens, out_features, in_features=4096):
    return work(tile, tokens, out_features, in_features, H100)


def test_prefill_work_by_hand():
    """256x192, a cluster of one: 132 tiles at once; 4096 in_features are 64 stages."""
    tile = Tile(256, 192, 1, 1)

    def counts(*problem):
        of = prefill(tile, *problem)
        return of.stages, of.items, of.exchanges, of.crowds

    # One full wave, and two.
    assert counts(192, 256 * 132) == (64, 1, 0, 0)
    assert counts(384, 256 * 132) == (128, 2, 0, 0)
    # One token or one row more is one more row of tiles, or one more tile.
    assert counts(193, 256 * 66) == counts(384, 256 * 66) == (64, 1, 0, 0)
    # 133 tiles: the last is cut into 192 / 32 = 6 parts of 11 stages, which exchange 5/6.
    assert counts(192, 256 * 132 + 1) == (64 + 11, 2, 5 / 6, 5 / 132)
    # 40 tiles leave room for 3 parts each, 100 for one.
    assert counts(192, 256 * 40) == (22, 1, 2 / 3, pytest.approx(80 / 132))
    assert counts(192, 256 * 100) == (64, 1, 0, 0)
    # A part has four stages or more: 10 stages make two, 3 stages one.
    assert counts(192, 256, 640) == (5, 1, 1 / 2, 1 / 132)
    assert counts(192, 256, 130) == (3, 1, 0, 0)


def test_launches_that_surely_cut_no_tile():
    """gate_up of the 8B shape at 128 tokens: 112 tiles on 132 multiprocessors, or 56 pairs."""
    assert not may_cut(Tile(256, 128, 1, 1), 128, 28672, H100)
    assert not may_cut(Tile(256, 128, 2, 1), 128, 28672, H100)
    assert may_cut(Tile(256, 128, 1, 1, streamed=True), 128, 28672, H100)
    tile = Tile(256, 128, 1, 1)
    cut = {tiles for tiles in range(1, 400) if may_cut(tile, 128, 256 * tiles, H100)}
    assert cut == {*range(1, 67), *range(133, 400)}
    exchange = {n for n in range(1, 133) if prefill(tile, 128, 256 * n).exchanges}
    assert exchange == {*range(1, 67)}


def test_a_streamed_wave_is_shared_out_equally():
    tile = Tile(256, 192, 1, 1, True)
    of = prefill(tile, 192, 256 * (132 + 33))
    assert (of.stages, of.items, of.exchanges, of.crowds) == (64 + 16, 2, 1, 4)
    # Fewer than four stages for each cluster: cut into parts as without streaming.
    assert prefill(tile, 192, 256 * 8) == prefill(tile._replace(streamed=False), 192, 256 * 8)


def test_clusters_count_as_one():
    """Clusters of 2 x 1: 512 rows each, 66 at once."""
    assert prefill(Tile(256, 192, 2, 1), 192, 512 * 66).stages == 64
    of = prefill(Tile(256, 192, 2, 1), 192, 512 * 22)
    assert (of.stages, of.exchanges, of.crowds) == (22, 2 / 3, 2 / 3 * 66 * 2 / 132)


def test_power_counts_in_sustained_work():
    """1024 tokens are 8 columns: 8 tiles among 132 multiprocessors."""
    tile = Tile(256, 128, 1, 1)
    in_features = heuristics.SUSTAINED_PRODUCTS // 1024 // 256
    assert work(tile, 1023, 256, in_features, H100).totals == 0
    totals = work(tile, 1024, 256, in_features, H100).totals
    assert totals == pytest.approx(8 * in_features / 64 / 132)


def test_missing_tokens_are_extra():
    tile = Tile(256, 128, 1, 1)
    assert prefill(tile, 128, 256 * 132).extras == 0
    assert prefill(tile, 96, 256 * 132).extras == 64 / 4
    assert prefill(tile, 128 + 96, 256 * 66).extras == 64 / 8, "half of the tiles are such"


def test_decode_work_by_hand():
    """4096x4096: 16 blocks of 256 rows, 64 stages. 31 clusters of 4 and 66 of 2 run at once."""
    of = work(RowBlocks(256, 4), 1, 4096, 4096, H100)
    assert (of.stages, of.extras, of.items, of.exchanges) == (16, 2, 1, 1 / 8)
    assert of.totals == pytest.approx(16 * 64 / 8 / 132)
    for tokens, wide in ((8, 1 / 8), (9, 1 / 4), (32, 1 / 2), (33, 1), (64, 1)):
        assert work(RowBlocks(256, 4), tokens, 4096, 4096, H100).extras == 16 * wide
    assert work(RowBlocks(128, 4), 1, 4096, 4096, H100).stages == 2 * 16, "32 clusters: two waves"
    assert work(RowBlocks(128, 2), 1, 4096, 4096, H100).stages == 32
    assert work(RowBlocks(64, 16), 1, 64, 23168, H100).stages == 23, "362 stages"
    assert work(RowBlocks(64, 16), 1, 64 * 8, 4096, H100).stages == 2 * 4, "7 clusters of 16"


def test_few_out_features_and_long_in_features():
    """An H200 took 8.2, 9.7 and 8.0 us with 8 thread blocks of 128 rows."""
    eight, sixteen = RowBlocks(128, 8), RowBlocks(128, 16)
    for tokens, shape, us in ((1, (64, 23168), 8.2), (6, (128, 27456), 9.7), (1, (64, 23040), 8.0)):
        problem = tokens, *shape, H100
        assert predicted_us(eight, *problem) == pytest.approx(us, rel=0.1)
        assert predicted_us(sixteen, *problem) < 0.7 * predicted_us(eight, *problem)
        assert fastest(*problem) == RowBlocks(64, 16)
        built = tuple(v for v in TIMES if v != RowBlocks(64, 16))
        assert fastest(*problem, built) in (sixteen, RowBlocks(64, 8))


def test_weights_of_fewer_bits_have_only_the_row_blocks_that_are_built_for_them():
    of_16_bits = {RowBlocks(128, 16), RowBlocks(64, 8), RowBlocks(64, 16)}
    assert not of_16_bits & (set(coefficients.TIMES_8) | set(coefficients.TIMES_4))


def test_mma_work_by_hand():
    """32x32 with 4 places along K: 76.8 KB of shared memory, three blocks on a multiprocessor."""
    tile = MmaTile(32, 32, 1, 1, 4, 3)
    of = work(tile, 64, 32 * 132, 4096, H100)  # 264 blocks of 16 stages
    assert (of.stages, of.extras, of.items) == (16, 32, 1)
    assert of.totals == pytest.approx(264 * 16 * 4 * (32 * 72 + 32 * 128) / 1e6)
    assert work(tile, 1, 32 * 132, 4096, H100).totals == pytest.approx(
        132 * 16 * 4 * (32 * 72 + 128) / 1e6
    )
    assert work(tile, 64, 32 * 132 * 2, 4096, H100).items == 2


@pytest.mark.parametrize("variant", TIMES, ids=variant_name)
def test_predictions_are_times(variant):
    """Positive, finite, and no shorter for more in_features or many more rows."""
    tokens = 64
    for shape in ((8, 8), (512, 2048), (57344, 8192)):
        assert 0 < predicted_us(variant, tokens, *shape, H100) < 1e5
    small = predicted_us(variant, tokens, 4096, 4096, H100)
    assert small <= predicted_us(variant, tokens, 4096, 8192, H100)
    assert small < predicted_us(variant, tokens, 65536, 4096, H100) < math.inf


# ---- the mma.sp kernel on other GPUs -------------------------------------------------------------


def mma_tiles_of_the_source():
    """The entries of SK_MMA_CONFIGS: X(index, then the fields of MmaTile)."""
    found = entries("SK_MMA_CONFIGS")
    assert [entry[0] for entry in found] == list(range(len(found))) and found
    return tuple(MmaTile(*entry[1:]) for entry in found)


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

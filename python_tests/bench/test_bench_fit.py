"""bench/fit.py: a table is found again from the times that it makes; the gaps of its picks."""

import json
import math

import numpy
import pytest

from bench import fit
from sparsekern.backends.cuda import coefficients
from sparsekern.backends.cuda import cost_model as heuristics
from sparsekern.backends.cuda.coefficients import Times
from sparsekern.backends.cuda.variant import Bits, MmaTile, RowBlocks, SplitTile, Tile, variant_name

SMS = 132
TRUE = {
    RowBlocks(256, 4): Times(0.2, 0.25, 0, 3.0, 0.6, 3.2, 0, 1.1),
    Tile(256, 192, 2, 1): Times(0.69, 0.1, 0.55, 2.8, 2.7, 7.5, 9.6, 1.8),
    Tile(256, 128, 1, 1): Times(0.48, 0.1, 0.45, 2.9, 1.9, 6.0, 4.9, 2.0),
    Tile(256, 96, 1, 1): Times(0.29, 0.28, 0.35, 3.0, 1.5, 3.4, 3.2, 3.1),
    MmaTile(32, 16, 1, 1, 4, 5): Times(0.16, 0.08, 0.075, 3.1, 1.1, 0, 0, 1.4),
}
SHAPES = ((512, 2048), (2048, 8192), (4096, 4096), (10240, 8192), (28672, 4096))
TOKENS = (1, 16, 48, 96, 192, 256, 1024, 4096)


def line(shape, tokens, table=TRUE, noise=lambda: 1.0, **more):
    """What `sparsekern tune --log` would write of a cell."""
    times = {
        variant_name(variant): noise()
        * heuristics.us(of, heuristics.work(variant, tokens, *shape, SMS))
        for variant, of in table.items()
        if not isinstance(variant, RowBlocks) or tokens <= 64
    }
    best = min(times, key=times.get)
    us = times[best]
    return (
        dict(
            shape=list(shape),
            tokens=tokens,
            best=best,
            us=us,
            h=best,
            hus=us,
            refused={},
            times=times,
            gpu="G",
            dtype="bfloat16",
        )
        | more
    )


def write(path, lines):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    return str(path)


@pytest.fixture
def cells(tmp_path):
    lines = [line(shape, tokens) for shape in SHAPES for tokens in TOKENS]
    return write(tmp_path / "cells.jsonl", lines)


def test_names_are_those_of_the_kernels():
    named = fit.variants()
    assert all(variant_name(variant) == name for name, variant in named.items())
    assert set(TRUE) | set(coefficients.TIMES) <= set(named.values())


def test_a_known_table_is_found_again(cells, monkeypatch):
    """Its times, to within a per cent where nothing is held: single coefficients may stand in for
    each other."""
    monkeypatch.setattr(fit, "HELD", 1e-3)
    monkeypatch.setattr(fit, "HELD_NEW", 1e-3)
    read = fit.read([cells])
    table = fit.fit_all(read, SMS)
    assert set(table) == set(TRUE)
    for cell in read:
        for variant, us in cell.times.items():
            if cell.offers(variant):
                of = heuristics.work(variant, cell.tokens, *cell.shape, SMS)
                assert heuristics.us(table[variant], of) == pytest.approx(us, rel=0.02)
    found = fit.gaps(read, fit.fit_table(read, SMS), SMS)
    assert len(found) == len(read) and max(gap.share for gap in found) < 0.01


def test_what_no_cell_speaks_of_stays_as_it_is(cells):
    """Of a variant in one cell; and a variant that the table lacks begins as its neighbour."""
    variant = SplitTile(128, 64, 2)
    assert fit.start_of(variant, coefficients.TIMES) == coefficients.TIMES[variant]
    assert (
        fit.start_of(SplitTile(128, 64, 99), coefficients.TIMES)
        == coefficients.TIMES[SplitTile(128, 64, 16)]
    )
    start = Times(0.3, 0.1, 0.1, 3.0, 1.0, 1.5, 0.2, 0.5)
    of = heuristics.work(variant, 64, 2048, 2048, SMS)
    us = 1.3 * heuristics.us(start, of)
    arrays = heuristics.Work(*(numpy.array([count]) for count in of))
    held = fit.fit_variant(start, arrays, numpy.array([us]), numpy.ones(1), fit.HELD)
    assert heuristics.us(start, of) < heuristics.us(held, of) < us
    assert all(0.5 < b / a < 2 for a, b in zip(start[:6], held[:6]))


def test_some_wild_samples_change_little(tmp_path):
    random = numpy.random.default_rng(0)

    def noise():
        return 3.0 if random.random() < 0.05 else math.exp(random.normal(0, 0.01))

    path = write(tmp_path / "n.jsonl", [line(s, t, noise=noise) for s in SHAPES for t in TOKENS])
    table = fit.fit_all(fit.read([path]), SMS)
    for variant, of in table.items():
        work = heuristics.work(variant, 48, 4096, 4096, SMS)
        expected = heuristics.us(TRUE[variant], work)
        assert heuristics.us(of, work) == pytest.approx(expected, rel=0.05)


def test_counts_that_are_always_zero_get_no_coefficient(cells):
    table = fit.fit_all(fit.read([cells]), SMS)
    assert table[MmaTile(32, 16, 1, 1, 4, 5)][5:7] == (0, 0)
    assert table[RowBlocks(256, 4)].crowd == 0


def test_a_slow_variant_is_left_out(tmp_path, monkeypatch):
    """10 % slower than another one everywhere: not close enough to be fitted. 2 %: it is."""
    monkeypatch.setattr(fit, "FEW_CELLS", 3)
    for factor, fitted in ((1.1, False), (1.02, True)):
        tile, slow = Tile(256, 128, 1, 1), Tile(256, 128, 2, 2)
        lines = [line(shape, tokens) for shape in SHAPES for tokens in TOKENS]
        for entry in lines:
            us = entry["times"][variant_name(tile)]
            entry["times"][variant_name(slow)] = factor * us
        read = fit.read([write(tmp_path / "slow.jsonl", lines)])
        assert (slow in fit.that_matter(read)) == fitted
        assert (slow in fit.fit_table(read, SMS)) == fitted


def test_cells_of_8_bits_are_fitted_by_scaling_what_there_is(tmp_path, capsys):
    """Times of 8 bits made from TIMES by one factor per kernel, and of row blocks of their own."""
    tiles = [v for v in coefficients.TIMES if isinstance(v, (Tile, SplitTile))]
    tiles = [v for v in tiles if not getattr(v, "across", False)]  # of 16 bits alone
    factors = {Tile: 1.2, SplitTile: 1.1}
    lines = []
    for shape in SHAPES:
        for tokens in TOKENS:
            for bits, dtype, table in (
                (Bits(8, 8), "float8_e4m3fn", tiles),
                (Bits(8, 16), "float8_e4m3fn weight, bfloat16", [RowBlocks(256, 4)]),
            ):
                if bits.x == 16 and tokens > 64:
                    continue
                times = {}
                for v in table:
                    of = TRUE[v] if bits.x == 16 else coefficients.TIMES[v]
                    us = heuristics.us(of, heuristics.work(v, tokens, *shape, SMS, bits))
                    times[variant_name(v)] = us * factors.get(type(v), 1.0)
                lines.append(line(shape, tokens) | dict(times=times, dtype=dtype))
    path = write(tmp_path / "eight.jsonl", lines)
    read = fit.read([path])
    assert {cell.bits for cell in read} == {Bits(8, 8), Bits(8, 16)}
    table = fit.fit_table(read, SMS)
    assert set(table) == {*tiles, RowBlocks(256, 4)}
    gaps = [gap.share for gap in fit.gaps(read, table, SMS)]
    assert max(gaps) < 0.02
    assert fit.main([path, "--check"]) == 0
    assert capsys.readouterr().out.startswith("all cells, ")
    with pytest.raises(ValueError, match="cells of one table"):
        fit.main([path, write(tmp_path / "16.jsonl", [line((512, 2048), 1)]), "--check"])


def test_gaps_are_those_of_the_picks(cells):
    read = fit.read([cells])
    only = {Tile(256, 192, 2, 1): TRUE[Tile(256, 192, 2, 1)]}
    found = fit.gaps(read, only, SMS)
    assert all(gap.cell.tokens >= heuristics.PREFILL_TOKENS for gap in found)
    for gap in found:
        assert gap.picked in only
        assert gap.share == pytest.approx(gap.cell.times[gap.picked] / gap.cell.best - 1)
    text = fit.summary(found, worst=2).splitlines()
    assert text[0].startswith(f"all cells, {len(found)}: mean ") and len(text) == 4
    assert text[1].startswith("Llama-3 8B and 70B from 96 tokens, 15: mean ")
    assert "prefill 256x192 cluster 2x1 instead of " in text[2]


def test_the_later_of_two_lines_counts_and_wrong_results_do_not(tmp_path):
    once, again = line((512, 2048), 16), line((512, 2048), 16)
    name = variant_name(RowBlocks(256, 4))
    again["times"] = {name: 2.5, "prefill of another build": 1.0, "mma 32x16, 1x1x4 warps": 1.5}
    again["refused"] = {"mma 32x16, 1x1x4 warps": "3 of 9 elements are wrong"}
    other = line((512, 2048), 16, dtype="float16")
    paths = [write(tmp_path / "a.jsonl", [once, other]), write(tmp_path / "b.jsonl", [again])]
    first, second = fit.read(paths)
    assert first.times == {RowBlocks(256, 4): 2.5} and first.best == 2.5
    assert len(second.times) == len(other["times"])


@pytest.mark.parametrize("text", ["{", "[]", '{"shape": [1, 2]}', '{"times": {}, "tokens": 1}'])
def test_a_line_that_is_no_cell_is_named(tmp_path, text):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(line((512, 2048), 1)) + "\n" + text + "\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: not a cell of `sparsekern tune --log`"):
        fit.read([path])


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no cell"):
        fit.read([write(tmp_path / "none.jsonl", [])])


def test_flags_are_printed_where_they_are_set():
    plain, across = SplitTile(128, 64, 4), SplitTile(128, 64, 4, True)
    table = {v: coefficients.TIMES[v] for v in (plain, across, Tile(256, 128, 2, 1, True))}
    printed = fit.source(table)
    for text in ("SplitTile(128, 64, 4):", "SplitTile(128, 64, 4, True):", "1, True):"):
        assert text in printed
    scope = dict(vars(heuristics))
    exec(printed, scope)
    assert scope["TIMES"] == table
    new = SplitTile(256, 64, 2, True)
    assert fit.start_of(new, coefficients.TIMES).crowd > 0, "that of a tile across clusters"


def test_what_is_printed_is_python_and_the_table(cells, capsys):
    assert fit.main([cells]) == 0
    printed = capsys.readouterr().out
    source, gaps = printed.split("\n\n")
    scope = vars(heuristics) | {}
    exec(source, scope)
    table = fit.fit_table(fit.read([cells]), SMS)
    assert scope["TIMES"] == table and list(scope["TIMES"]) == list(table)
    assert gaps.startswith("all cells, 40: mean 0.")


def test_check_fits_nothing_and_tells_the_gaps_of_heuristics(cells, capsys):
    assert fit.main([cells, "--check"]) == 0
    read = fit.read([cells])
    found = fit.gaps(read, coefficients.TIMES, SMS)
    assert capsys.readouterr().out.strip() == fit.summary(found)


def test_gaps_in_cells_that_were_not_fitted(cells, tmp_path, capsys):
    other = write(tmp_path / "other.jsonl", [line((512, 4096), 1), line((512, 4096), 256)])
    assert fit.main([cells, "--check", "--test", other]) == 0
    found = fit.gaps(fit.read([other]), coefficients.TIMES, SMS)
    text = capsys.readouterr().out.strip()
    assert text.endswith(f"Cells that were not fitted:\n{fit.summary(found)}") and len(found) == 2


def test_random_shapes_are_seeded_and_in_no_table(capsys):
    shapes = fit.random_shapes(60, seed=3)
    assert shapes == fit.random_shapes(60, seed=3) != fit.random_shapes(60, seed=4)
    assert len(set(shapes)) == 60 and not set(shapes) & set(fit.SHAPES)
    assert all(64 <= out <= 60_000 and 64 <= into <= 30_000 for out, into in shapes)
    assert all(into % 4 == 0 for _, into in shapes)
    assert sum(out % 64 == 0 and into % 64 == 0 for out, into in shapes) >= 30
    assert sum(out <= 2048 for out, _ in shapes) >= 20, "few output features"
    assert any(out % 64 and into % 64 for out, into in shapes)
    assert fit.main(["--shapes", "2", "--seed", "3"]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed == ",".join(f"{out}x{into}" for out, into in fit.random_shapes(2, seed=3))


def test_cross_fits_without_the_shape(cells, capsys, monkeypatch):
    fitted = []

    def fit_table(of, multiprocessors):
        fitted.append({cell.shape for cell in of})
        assert multiprocessors == 114
        return TRUE

    monkeypatch.setattr(fit, "fit_table", fit_table)
    assert fit.main([cells, "--cross", "--multiprocessors", "114"]) == 0
    assert fitted == [set(SHAPES), *(set(SHAPES) - {shape} for shape in sorted(SHAPES))]
    assert "Shapes left out of the fit:\nall cells, 40: mean " in capsys.readouterr().out


def test_moving_keeps_the_rest_of_the_table(cells):
    """Only tiles of the kernel that is named move, and the variant that was an estimate."""
    blocks = RowBlocks(256, 4)
    table = fit.moved(fit.read([cells]), SMS, ["prefill"], [variant_name(blocks)])
    assert set(table) == set(coefficients.TIMES)
    moved = {v for v, times in table.items() if times != coefficients.TIMES[v]}
    assert moved == {v for v in TRUE if isinstance(v, Tile)} | {blocks}
    assert fit.main([cells, "--move", "prefill", "--new", variant_name(blocks)]) == 0

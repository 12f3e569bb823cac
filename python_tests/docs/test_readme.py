"""README.md and CHANGELOG.md say only what is so: size, commands, targets, numbers, versions. Code
blocks are run by test_blocks.py."""

import re
import shlex

import pytest

from bench import engines, figure, headline, record, table
from python_tests.docs.pages import ROOT, blocks
from sparsekern import __version__
from sparsekern.cli import main as cli

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = blocks(ROOT / "README.md")
MOST_BYTES = 14 * 1024


def test_the_readme_is_short():
    assert len(README.encode()) <= MOST_BYTES


def test_the_example_is_as_short_as_promised():
    first = next(block for block in BLOCKS if block.language == "python")
    lines = first.code.strip().splitlines()
    assert len([line for line in lines if line and "import" not in line]) <= 6


def test_numbers_and_figure_are_those_of_the_records():
    assert table.main(["--check"]) == 0
    assert figure.up_to_date(record.read())


def test_the_promise_is_that_of_the_records():
    """Its numbers are typed by hand: of the newest campaign with 2:4 fp8 in vLLM."""
    clean = [entry for entry in record.read() if entry["dirty"] is False]
    run = next(c for c in engines.campaigns(clean) if {"sparse-fp8", "fp8"} <= set(c.engines))
    over = {
        peer: {case: run.ratio("sparse-fp8", peer, case) for case in run.cases}
        for peer in ("dense", "fp8")
    }
    decoding = [value for case, value in over["dense"].items() if "batch" in case]
    prefill = next(value for case, value in over["dense"].items() if "prefill" in case)
    share = run.weights_gb("sparse-fp8") / run.weights_gb("dense")
    promise = " ".join(README.partition("## ")[0].split())
    for text in (
        f"{share:.2f} of the bfloat16 weights' bytes",
        f"{min(decoding):.2f} to {max(decoding):.2f} times as fast as bfloat16 in decoding",
        f"{prefill:.2f} times in prefill",
        f"{min(over['fp8'].values()):.2f} to {max(over['fp8'].values()):.2f} times as fast as "
        "dense fp8",
    ):
        assert text in promise, text


def test_the_figure_holds_what_it_shows():
    shown = figure.drawn(figure.path("light"))
    assert shown == figure.drawn(figure.path("dark")) and shown["shapes"] > 10
    tokens = [row[0] for row in shown["peers"]["dense"]]
    assert tokens == sorted(tokens) and {1, 64, 1024} <= set(tokens)
    rows = [row for of in shown["peers"].values() for row in of]
    assert all(least <= mean <= most for _, mean, least, most in rows)


def test_a_figure_is_drawn_again_from_its_data(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib (the extra bench)")
    figure.draw(record.read(), tmp_path)
    assert figure.up_to_date(record.read(), tmp_path)
    dark = figure.path("dark", tmp_path)
    dark.write_text(dark.read_text().replace(headline.DTYPE, "float16"))
    assert not figure.up_to_date(record.read(), tmp_path)


def test_commands_are_all_named():
    help_text = cli.build_parser().format_help()
    listed = set(re.findall(r"^    ([a-z]\w+)\s", help_text, re.MULTILINE))
    lines = [line for b in BLOCKS if b.language == "bash" for line in b.code.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    shown = {line[1] for line in words if line and line[0] == "sparsekern"}
    named = set(re.findall(r"`(\w+)`", README))
    assert shown and shown <= listed and listed <= shown | named


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = re.findall(r"`make [\w-]+`|^ +make [\w-]+", README, re.MULTILINE)
    named = set(re.findall(r"make ([\w-]+)", "\n".join(lines)))
    assert {"demo", "test", "docs"} <= named <= targets


def test_extras_and_names_exist():
    import sparsekern as sk

    pyproject = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r'"\.\[(\w+)\]"', README):
        assert re.search(rf"^{extra} = \[", pyproject, re.MULTILINE)
    for name in set(re.findall(r"\bsk\.(\w+)", README)):
        assert hasattr(sk, name), name


def test_changelog_has_the_form_and_knows_its_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.*?)\]", text, re.MULTILINE)
    assert headings[0] == "Unreleased" or headings[0] == __version__
    assert set(re.findall(r"^### (\w+)", text, re.MULTILINE)) <= {
        "Added",
        "Changed",
        "Deprecated",
        "Removed",
        "Fixed",
        "Security",
    }

"""Tuned tables: which tuned number of tokens decides, damaged files, unknown names, writers."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import sparsekern
from sparsekern.backends.cuda import tuned_tables as tuning

GPU = "Test GPU, 132 multiprocessors"
ROOT = Path(sparsekern.__file__).parent.parent
KNOWN = {"decode a", "decode b", "prefill a"}


@pytest.fixture(autouse=True)
def places(monkeypatch, tmp_path):
    """No tables but those that a test writes."""
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path / "user"))
    monkeypatch.setattr(tuning, "TABLES", tmp_path / "shipped")
    tuning.forget()
    yield tmp_path
    tuning.forget()


def lookup(tokens, dtype="bfloat16", shape=(64, 128), known=KNOWN):
    return tuning.lookup(GPU, dtype, *shape, tokens, known)


def store(cells, path=None, dtype="bfloat16", shape=(64, 128)):
    tuning.store(path or tuning.user_path(), GPU, dtype, shape, cells)


# ---- what dense took -----------------------------------------------------------------------------


def dense_us(tokens, **options):
    return tuning.dense_us(lookup(tokens, **options), GPU, 64, 128)


def test_the_time_of_dense_stands_beside(places):
    tuning.store(
        tuning.user_path(), GPU, "bfloat16", (64, 128), {1: ("decode a", 2.0)}, {1: 1.23456}
    )
    assert lookup(1) == ("decode a", 2.0, 1, tuning.YOURS, "bfloat16")
    assert dense_us(1) == dense_us(1, dtype="float16") == 1.235
    entries = json.loads(tuning.user_path().read_text())["entries"][GPU]
    assert entries["bfloat16, dense"] == {"64x128": {"1": ["dense", 1.235]}}


def test_a_time_of_dense_goes_with_the_cell_that_it_was_measured_with(places):
    path, cells = tuning.user_path(), {1: ("decode a", 2.0), 16: ("decode a", 3.0)}
    tuning.store(path, GPU, "bfloat16", (64, 128), cells, {1: 1.0, 16: 4.0})
    store({16: ("decode b", 2.5)})
    assert dense_us(1) == 1.0 and dense_us(16) is None, "it is older than the cell"
    shipped = places / "shipped" / "a.json"
    tuning.store(shipped, GPU, "bfloat16", (64, 128), {4: ("decode a", 2.0)}, {4: 9.0, 16: 9.0})
    assert dense_us(4) == 9.0 and dense_us(16) is None, "that of another table"


def test_the_summary_counts_where_dense_is_faster(places):
    cells = {1: ("decode a", 2.0), 16: ("decode a", 3.0), 64: ("decode b", 4.0)}
    tuning.store(tuning.user_path(), GPU, "bfloat16", (64, 128), cells, {1: 1.0, 16: 4.0})
    store({1: ("decode a", 1.0)}, shape=(8, 8), dtype="float16")
    text = "yours: 2 shapes, dense is faster in 1 of 2 cells; heuristics decide for others"
    assert tuning.summary(GPU) == text


# ---- which number of tokens decides --------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens, decides",
    [
        (1, 1),
        (2, 2),
        (3, 4),
        (4, 4),
        (5, None),
        (8, 16),
        (16, 16),
        (17, None),
        (31, None),
        (32, 64),
        (64, 64),
        (65, 100),
        (100, 100),
        (101, None),
        (127, None),
        (128, 256),
        (256, 256),
        (257, None),
    ],
)
def test_the_next_higher_count_decides_down_to_half_of_it(tokens, decides):
    assert tuning.deciding_tokens({1, 2, 4, 16, 64, 100, 256}, tokens) == decides


def test_a_count_above_the_decode_limit_decides_nothing_below_it():
    """At 100 tokens the decode kernels took no part, so 100 cannot decide for 60."""
    assert tuning.deciding_tokens({100}, 64) is None and tuning.deciding_tokens({100}, 65) == 100


def test_above_all_counts_a_large_one_decides():
    assert tuning.deciding_tokens({1, 4096, 8192}, 9000) == 8192
    assert tuning.deciding_tokens({1, 4096}, 10**6) == 4096
    assert tuning.deciding_tokens({1, 2048}, 2049) is None


def test_no_tuned_count_decides_nothing():
    assert tuning.deciding_tokens({}, 1) is None


# ---- lookup --------------------------------------------------------------------------------------


def test_lookup_tells_variant_time_count_and_source(places):
    store({16: ("decode a", 3.5)}, places / "shipped" / "any-name.json")
    expected = ("decode a", 3.5, 16, tuning.SHIPPED, "bfloat16")
    assert lookup(16) == lookup(9) == expected
    assert lookup(7) is None and lookup(16, shape=(128, 64)) is None
    assert tuning.lookup("Another GPU", "bfloat16", 64, 128, 16, KNOWN) is None


def test_yours_first_and_shipped_where_yours_says_nothing(places):
    store({1: ("decode a", 1.0), 16: ("decode a", 3.0)}, places / "shipped" / "a.json")
    store({16: ("decode b", 2.0)})
    assert lookup(16) == ("decode b", 2.0, 16, tuning.YOURS, "bfloat16")
    assert lookup(1) == ("decode a", 1.0, 1, tuning.SHIPPED, "bfloat16")


def test_a_dtype_that_was_not_tuned_takes_the_other_16_bit_one(places):
    store({1: ("decode a", 1.0), 16: ("decode a", 3.0)})
    store({16: ("decode b", 2.0)}, places / "shipped" / "a.json", dtype="float16")
    assert lookup(16, dtype="float16") == ("decode b", 2.0, 16, tuning.SHIPPED, "float16")
    assert lookup(1, dtype="float16") == ("decode a", 1.0, 1, tuning.YOURS, "bfloat16")


def test_several_shipped_files_are_one_table(places):
    store({1: ("decode a", 1.0)}, places / "shipped" / "a.json")
    store({1: ("decode b", 1.0)}, places / "shipped" / "b.json", shape=(8, 8))
    assert lookup(1).variant == "decode a" and lookup(1, shape=(8, 8)).variant == "decode b"


def test_an_unknown_variant_is_as_good_as_no_cell():
    store({8: ("decode of the future", 1.0), 16: ("decode a", 3.0)})
    assert lookup(8) == ("decode a", 3.0, 16, tuning.YOURS, "bfloat16")
    assert lookup(8, known={"decode b"}) is None


def test_stored_cells_add_up_and_the_file_can_be_read():
    store({8: ("decode a", 1.23456)})
    store({8: ("decode b", 1.0), 128: ("prefill a", 9.0)})
    store({8: ("decode a", 2.0)}, dtype="float16")
    assert json.loads(tuning.user_path().read_text())["entries"] == {
        GPU: {
            "bfloat16": {"64x128": {"8": ["decode b", 1.0], "128": ["prefill a", 9.0]}},
            "float16": {"64x128": {"8": ["decode a", 2.0]}},
        }
    }


def test_where_your_table_is(monkeypatch, tmp_path):
    assert tuning.user_path() == tmp_path / "user" / "tuning.json"
    monkeypatch.delenv("SPARSEKERN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuning.user_path() == tmp_path / "xdg" / "sparsekern" / "tuning.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.user_path() == tmp_path / ".cache" / "sparsekern" / "tuning.json"


def test_summary(places):
    assert tuning.summary(GPU).startswith("none for this GPU: heuristics decide")
    store({1: ("decode a", 1.0)}, places / "shipped" / "a.json")
    assert tuning.summary(GPU) == "shipped: 1 shapes; heuristics decide for others"
    store({1: ("decode a", 1.0)}, shape=(8, 8))
    store({1: ("decode a", 1.0)}, shape=(8, 16))
    assert tuning.summary(GPU).startswith("yours: 2 shapes; shipped: 1 shapes")


# ---- damage --------------------------------------------------------------------------------------


def entry(**changes):
    cells = {"8": ["decode a", 1.0]}
    return {"version": 1, "entries": {GPU: {"bfloat16": {"64x128": cells}}}} | changes


DAMAGED = {
    "half a file": json.dumps(entry())[:40],
    "no JSON": "\x00\xff",
    "a list": "[]",
    "another version": json.dumps(entry(version=99)),
    "no dict for the GPU": json.dumps(entry(entries={GPU: [1]})),
    "no dict for a dtype": json.dumps(entry(entries={GPU: {"bfloat16": 3}})),
    "a shape": json.dumps(entry(entries={GPU: {"bfloat16": {"64": {"8": ["decode a", 1.0]}}}})),
    "tokens": json.dumps(entry(entries={GPU: {"bfloat16": {"8x8": {"-8": ["decode a", 1.0]}}}})),
    "a cell": json.dumps(entry(entries={GPU: {"bfloat16": {"8x8": {"8": ["decode a"]}}}})),
    "a time": json.dumps(entry(entries={GPU: {"bfloat16": {"8x8": {"8": ["decode a", "1"]}}}})),
    "a time of 400 digits": json.dumps(
        entry(entries={GPU: {"bfloat16": {"8x8": {"8": ["decode a", 10**400]}}}})
    ),
    "an endless time": json.dumps(
        entry(entries={GPU: {"bfloat16": {"8x8": {"8": ["decode a", float("inf")]}}}})
    ),
    "a time beyond float64": json.dumps(
        entry(entries={GPU: {"bfloat16": {"8x8": {"8": ["decode a", 0.5]}}}})
    ).replace("0.5", "1e400"),
    "no number": json.dumps(
        entry(entries={GPU: {"bfloat16": {"8x8": {"8": ["decode a", float("nan")]}}}})
    ),
    "tokens of 5000 digits": json.dumps(
        entry(entries={GPU: {"bfloat16": {"8x8": {"1" + "0" * 5000: ["decode a", 1.0]}}}})
    ),
    "digits of another script": json.dumps(
        entry(entries={GPU: {"bfloat16": {"8x8": {"\u0668": ["decode a", 1.0]}}}})
    ),
    "nested without end": '{"a":' * 100_000,
    "no time": json.dumps(entry(entries={GPU: {"bfloat16": {"8x8": {"8": ["decode a", 0]}}}})),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_ignored_with_one_warning(damage, places):
    store({8: ("decode b", 1.0)}, places / "shipped" / "a.json")
    tuning.user_path().parent.mkdir()
    tuning.user_path().write_text(DAMAGED[damage], encoding="latin-1")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert lookup(8).source == tuning.SHIPPED and lookup(9) is None
    assert len(caught) == 1, [str(warning.message) for warning in caught]
    assert str(tuning.user_path()) in str(caught[0].message) and "ignored" in str(caught[0].message)


@pytest.mark.parametrize("damage", DAMAGED)
def test_tuning_again_replaces_a_damaged_file(damage):
    tuning.user_path().parent.mkdir()
    tuning.user_path().write_text(DAMAGED[damage], encoding="latin-1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store({8: ("decode a", 1.0)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lookup(8).variant == "decode a"


def test_the_rest_of_a_file_survives_a_damaged_entry():
    store({8: ("decode a", 1.0)})
    content = json.loads(tuning.user_path().read_text())
    content["entries"]["Another GPU"] = ["damaged"]
    tuning.user_path().write_text(json.dumps(content))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lookup(8).variant == "decode a"


# ---- writers -------------------------------------------------------------------------------------

WRITER = """
import sys
from sparsekern.backends.cuda import tuned_tables as tuning
for i in range(10):
    number = 10 * int(sys.argv[1]) + i + 1
    tuning.store(sys.argv[2], "GPU", "bfloat16", (8 * number, 16), {number: ("decode a", 1.0)})
    tuning.store(sys.argv[2], "GPU", "bfloat16", (8, 8), {number: ("decode a", 1.0)})
"""


def test_writers_in_several_processes_lose_nothing(tmp_path):
    path = tmp_path / "tuning.json"
    children = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(i), str(path)], cwd=ROOT)
        for i in range(3)
    ]
    assert [child.wait(timeout=900) for child in children] == [0, 0, 0]
    shapes = json.loads(path.read_text())["entries"]["GPU"]["bfloat16"]
    assert len(shapes) == 31 and len(shapes["8x8"]) == 30


# ---- what is shipped -----------------------------------------------------------------------------


def test_shipped_tables_are_whole_and_name_variants_of_the_source():
    """Every cell of every shipped file names a line of csrc/linear/configs.h that may run there."""
    from bench import fit
    from sparsekern.backends.cuda.variant import RowBlocks
    from sparsekern.profiling.tune import KINDS

    names = fit.variants()
    paths = sorted((Path(tuning.__file__).parent / "tables").glob("*.json"))
    assert len(paths) >= 2
    found = set()
    for path in paths:
        content = json.loads(path.read_text())
        assert content["version"] == tuning.VERSION and content["entries"]
        tables = {gpu: of for gpu, of in content["entries"].items() if not gpu.endswith(", runs")}
        for table in map(tuning._parse, tables.values()):
            for dtype, shapes in table.items():
                if dtype.endswith(tuning.dense_key("")):  # what dense took, beside a cell
                    own = table[dtype.removesuffix(tuning.dense_key(""))]
                    assert all({*cells} <= {*own[shape]} for shape, cells in shapes.items())
                    continue
                found.add(dtype)
                for cells in shapes.values():
                    for tokens, (name, _) in cells.items():
                        variant = names[name]
                        assert not getattr(variant, "promoted", False)
                        assert tokens <= 64 or not isinstance(variant, RowBlocks)
                        assert KINDS[dtype].bits.x == 16 or not isinstance(variant, RowBlocks)
    assert {"bfloat16", "float8_e4m3fn", "float8_e4m3fn weight, bfloat16"} <= found

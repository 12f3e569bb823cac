"""sparsekern tune: which variant wins a cell, what is stored, and on a GPU the real thing."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from python_tests.profiling.fakes import Fakes
from sparsekern.backends.cuda import configs
from sparsekern.backends.cuda import cost_model as heuristics
from sparsekern.backends.cuda import linear as cuda_backend
from sparsekern.backends.cuda import tuned_tables as tuning
from sparsekern.backends.cuda.coefficients import TIMES
from sparsekern.backends.cuda.configs import Types
from sparsekern.backends.cuda.narrow_model import NarrowTile
from sparsekern.backends.cuda.variant import RowBlocks, Tile
from sparsekern.cli import main as cli
from sparsekern.formats.sparse24 import decompress
from sparsekern.profiling import layer_bench
from sparsekern.profiling import tune as tuner

GPU = "Test GPU, 132 multiprocessors"
TILES = [variant for variant in TIMES if isinstance(variant, Tile)]
BLOCKS = [variant for variant in TIMES if isinstance(variant, RowBlocks)]


# ---- all cells -----------------------------------------------------------------------------------


class FakeLayer:
    """Two variants: "decode a" is the faster one up to 8 tokens. No GPU is asked."""

    made = []

    def __init__(self, out_features, in_features, dtype, device):
        self.shape = out_features, in_features
        FakeLayer.made.append((self.shape, dtype))

    def warm_up(self):
        pass

    def names(self, tokens):
        return ["decode a", "decode b"]

    def cell(self, tokens):
        fast = {"decode a": 2.0, "decode b": 3.0}
        slow = {"decode a": 3.0, "decode b": 2.0}
        return Fakes(dense=2.5, **(fast if tokens <= 8 else {**slow, "decode b": 2.6}))


@pytest.fixture
def fake_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path / "user"))
    monkeypatch.setattr(tuning, "gpu_name", lambda index: GPU)
    monkeypatch.setattr(cuda_backend, "refusal", lambda index: "")
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(FakeLayer, "made", [])
    tuning.forget()
    yield tmp_path
    tuning.forget()


def run(shapes, tokens, dtypes=("bfloat16",), **options):
    said = []
    cells = tuner.tune(
        shapes, tokens, dtypes, "cuda:0", make_layer=FakeLayer, say=said.append, **options
    )
    return cells, said


def test_every_cell_gets_a_line_and_an_entry(fake_gpu):
    cells, said = run([(64, 64), (8, 16)], [16, 1], ["bfloat16", "float16"])
    assert len(cells) == 8 and len(said) == 10
    assert said[0] == f"{GPU}: 8 cells, about 4 s, into {fake_gpu / 'user' / 'tuning.json'}"
    assert (
        said[1] == "bfloat16 64x64, 1 tokens: decode a 2.00 us; heuristics: the same; 1.25 x dense"
    )
    assert said[2] == (
        "bfloat16 64x64, 16 tokens: decode b 2.60 us; heuristics: decode a, 15.4% slower; "
        "0.96 x dense"
    )
    assert said[-1].startswith("8 cells tuned in ")
    assert said[-1].endswith(
        "; heuristics were 7.7% slower on average, 15.4% at worst; dense is faster in 4"
    )
    known = {"decode a", "decode b"}
    assert tuning.lookup(GPU, "float16", 8, 16, 16, known) == (
        "decode b",
        2.6,
        16,
        "yours",
        "float16",
    )
    assert [dtype for _, dtype in FakeLayer.made] == [torch.bfloat16] * 2 + [torch.float16] * 2


def test_the_log_has_all_times_and_is_added_to(fake_gpu):
    log = fake_gpu / "cells.jsonl"
    run([(64, 64)], [1, 16], log=log)
    run([(8, 16)], [1], ["float16"], log=log)
    first, second, third = map(json.loads, log.read_text().splitlines())
    assert first == {
        "shape": [64, 64],
        "tokens": 1,
        "best": "decode a",
        "us": 2.0,
        "h": "decode a",
        "hus": 2.0,
        "refused": {},
        "times": {"decode a": 2.0, "decode b": 3.0},
        "dense_us": 2.5,
        "gpu": GPU,
        "dtype": "bfloat16",
    }
    assert (second["tokens"], second["best"]) == (16, "decode b")
    assert second["hus"] == pytest.approx(3.0)
    assert (third["shape"], third["dtype"]) == ([8, 16], "float16")


def test_another_file(fake_gpu):
    run([(64, 64)], [1], path=fake_gpu / "table.json")
    assert not tuning.user_path().exists()
    entries = json.loads((fake_gpu / "table.json").read_text())["entries"]
    assert entries.pop(f"{GPU}, runs") and entries == {
        GPU: {
            "bfloat16": {"64x64": {"1": ["decode a", 2.0]}},
            "bfloat16, dense": {"64x64": {"1": ["dense", 2.5]}},
        }
    }


def test_an_interruption_loses_at_most_the_present_shape(fake_gpu):
    class Interrupted(FakeLayer):
        def cell(self, tokens):
            if self.shape == (8, 16) and tokens == 4:
                raise KeyboardInterrupt
            return super().cell(tokens)

    with pytest.raises(KeyboardInterrupt):
        tuner.tune(
            [(64, 64), (8, 16)],
            [1, 4],
            ["bfloat16"],
            "cuda:0",
            make_layer=Interrupted,
            say=lambda text: None,
        )
    entries = json.loads(tuning.user_path().read_text())["entries"]
    assert list(entries[GPU]["bfloat16"]) == ["64x64"]


def test_the_budget_stops_between_cells_and_says_what_is_missing(fake_gpu):
    times = iter([0.0, 0.0, 0.0, 5.0, 11.0, 11.0, 11.0])
    cells, said = run([(64, 64), (8, 16)], [1, 2, 4], budget=10, clock=lambda: next(times))
    assert [cell.tokens for cell in cells] == [1, 2]
    assert said[-1].startswith("2 cells tuned in 11 s") and said[-1].endswith(
        "; 4 cells not reached in the budget"
    )
    entries = json.loads(tuning.user_path().read_text())["entries"]
    assert list(entries[GPU]["bfloat16"]["64x64"]) == ["1", "2"]


def test_a_cell_without_a_correct_variant_is_said_and_not_stored(fake_gpu, monkeypatch):
    cell = Fakes(**{"decode a": 1.0}, wrong=["decode a"])
    monkeypatch.setattr(FakeLayer, "cell", lambda self, tokens: cell)
    monkeypatch.setattr(FakeLayer, "names", lambda self, n: ["decode a"])
    cells, said = run([(64, 64)], [1])
    assert cells == [] and "1 tokens: NO CORRECT VARIANT" in said[1]
    assert not tuning.user_path().exists()


def test_later_calls_use_the_new_table(fake_gpu):
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_backend, "forget_plans", lambda: calls.append(1))
        run([(64, 64)], [1])
    assert calls == [1]


def test_refusals():
    with pytest.raises(NotImplementedError, match="a GPU with the CUDA kernels, got device cpu"):
        tuner.tune([(64, 64)], [1], ["bfloat16"], "cpu")


def test_sizes_are_checked(fake_gpu):
    for shapes, tokens in (([(64, 6)], [1]), ([(0, 64)], [1]), ([(64, 64)], [0])):
        with pytest.raises(ValueError, match="in_features a multiple of 4"):
            run(shapes, tokens)
    assert FakeLayer.made == []


def test_default_shapes_and_tokens():
    assert len(set(tuner.SHAPES)) == len(tuner.SHAPES) == 24
    assert all(in_features % 64 == 0 for _, in_features in tuner.SHAPES)
    assert (28672, 4096) in tuner.SHAPES and (8192, 28672) in tuner.SHAPES
    reached = [tuning.deciding_tokens(set(tuner.TOKENS), n) for n in range(1, 8193)]
    assert None not in reached, "between two counts the higher one always decides"


# ---- the pieces ----------------------------------------------------------------------------------


def test_copies_beyond_the_cache():
    size = layer_bench.CACHE_BYTES
    assert layer_bench.copies_beyond_cache(size) == 1
    assert layer_bench.copies_beyond_cache(size // 4) == 4
    assert layer_bench.copies_beyond_cache(size // 4 + 1, size // 2) == 2
    assert layer_bench.copies_beyond_cache(1) == layer_bench.MAX_COPIES
    assert layer_bench.copies_beyond_cache(size // 4, 3 * size) == 1


PLAIN = [("float16",) * 3, ("bfloat16",) * 3]
INT4 = Types("int4", "bfloat16", "bfloat16")


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A GPU of which the CPU computes everything: two decode configs, three tiles, one of each not
    in the model of backends/cuda/cost_model.py."""
    tiles, blocks = [*TILES[:2], Tile(64, 32, 1, 1)], [BLOCKS[0], RowBlocks(64, 3)]
    native = SimpleNamespace(
        prefill_workspace_bytes=lambda: 16,
        kernels=lambda: {
            "decode": [b._asdict() | {"index": i, "types": PLAIN} for i, b in enumerate(blocks, 1)],
            "mma": [],
            "split": [],
            "prefill": [
                tile._asdict() | {"index": i, "types": PLAIN} for i, tile in enumerate(tiles)
            ],
        },
    )
    launched = []

    def launcher(name, x, w24, y, workspace):
        def launch():
            launched.append((name, len(x)))
            y.copy_(x.float() @ decompress(w24.rowmajor()).float().t())

        return launch

    properties = SimpleNamespace(name="Test GPU", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(cuda_backend._native, "module", lambda: native)
    monkeypatch.setattr(cuda_backend, "launcher", launcher)
    monkeypatch.setattr(configs, "_capability", lambda index: (9, 0))
    for cached in (cuda_backend._tiles, cuda_backend._mma_tiles, cuda_backend.variants):
        cached.cache_clear()
    yield launched
    for cached in (cuda_backend._tiles, cuda_backend._mma_tiles, cuda_backend.variants):
        cached.cache_clear()


def test_candidates_start_with_the_choice_of_the_heuristics(stand_in):
    layer = tuner.Layer(96, 68, torch.bfloat16, torch.device("cpu"))
    decode, tiles = f"decode {BLOCKS[0]}", [f"prefill {tile}" for tile in TILES[:2]]
    unknown = ["decode 64 rows, split 3", f"prefill {Tile(64, 32, 1, 1)}"]
    few, many = layer.names(64), layer.names(65)
    assert few[0] == cuda_backend.heuristic(64, 96, 68, None)
    assert sorted(few[:3]) == sorted([decode, *tiles]) and few[3:] == unknown
    assert many[0] == cuda_backend.heuristic(65, 96, 68, None)
    assert sorted(many[:2]) == sorted(tiles) and many[2:] == unknown[1:]


def test_candidates_of_int4(stand_in, monkeypatch):
    """Two blocks on a multiprocessor for few tokens, the narrow kernel from 17 on, and whole
    numbers are their own levels whatever the groups are."""
    pair, narrow = RowBlocks(256, 1, 1), NarrowTile(256, 32, 1, 1)
    kernels = cuda_backend._native.module().kernels()
    kernels["decode"] += [pair._asdict() | {"index": 9, "types": [INT4]}]
    kernels["narrow"] = [narrow._asdict() | {"index": 0, "types": [INT4]}]
    for row in kernels["decode"]:
        row["types"] = [*row["types"], INT4]
    monkeypatch.setattr(cuda_backend._native.module(), "kernels", lambda: kernels)
    cuda_backend.variants.cache_clear()
    layer = tuner.Layer(96, 196, torch.bfloat16, torch.device("cpu"), INT4)
    few, some = {*layer.names(16)}, {*layer.names(17)}
    assert f"decode {pair}" in few and f"narrow {narrow}" not in few
    assert f"decode {pair}" not in some and f"narrow {narrow}" in some
    assert layer.names(65) == layer.names(512) == [f"narrow {narrow}"] and not layer.names(513)
    assert torch.equal(decompress(layer.exact.rowmajor()), layer.exact_dense)


def test_other_kernels_are_candidates_where_they_may_be_chosen(stand_in, monkeypatch):
    everything = {f"{kernel} a": (kernel, 0) for kernel in ("decode", "prefill", "mma", "split")}
    monkeypatch.setattr(cuda_backend, "runnable", lambda index, types: everything)
    monkeypatch.setattr(cuda_backend, "heuristic", lambda *problem: "prefill a")
    layer = tuner.Layer(96, 68, torch.bfloat16, torch.device("cpu"))
    assert {"mma a", "split a"} < set(layer.names(1000)), "little to compute"
    layer.shape = 8192, 8192
    few, many = heuristics.MMA_TOKENS, heuristics.MMA_TOKENS + 1
    assert "mma a" in layer.names(few) and layer.names(many) == ["prefill a", "split a"]
    assert layer.names(heuristics.SPLIT_PRODUCTS // 2**26 + 1) == ["prefill a"]
    del everything["prefill a"]
    assert "mma a" in layer.names(many), "there is nothing else"


def test_a_layer_runs_checks_and_times_every_variant(stand_in, monkeypatch):
    monkeypatch.setattr(layer_bench, "CACHE_BYTES", 50_000)
    layer = tuner.Layer(96, 68, torch.bfloat16, torch.device("cpu"))
    assert len(layer.weights) == 3, "two panels of two column tiles: 18432 bytes each"
    layer.warm_up()
    warmed = {tokens for name, tokens in stand_in if name == f"decode {BLOCKS[0]}"}
    assert warmed == {1, 9, 17, 33}, "one of each form of the decode kernel"
    assert {name for name, _ in stand_in} == set(cuda_backend.variants())
    for tokens in (3, 100):
        cell = layer.cell(tokens)
        wrong = [cell.wrong(name) for name in layer.names(tokens)]
        assert wrong == [""] * (5 if tokens == 3 else 3)
        assert cell.x.shape == (tokens, 68) and cell.x.stride() == (68, 1)
        graphs = []
        monkeypatch.setattr(tuner, "graph_sampler", lambda *a, graphs=graphs: graphs.append(a))
        cell.sampler(layer.names(tokens)[0])
        ((calls, passes),) = graphs
        assert len(calls) == (3 if tokens == 3 else 1) and passes == (34 if tokens == 3 else 100)
        assert calls[0]() is None and stand_in[-1] == (layer.names(tokens)[0], tokens)


def test_a_layer_sees_a_wrong_element(stand_in, monkeypatch):
    layer = tuner.Layer(96, 68, torch.float16, torch.device("cpu"))
    right = cuda_backend.launcher

    def launcher(name, x, w24, y, workspace):
        run = right(name, x, w24, y, workspace)
        return lambda: (run(), y[-1, -1:].add_(1))

    monkeypatch.setattr(cuda_backend, "launcher", launcher)
    assert layer.cell(3).wrong("decode 128 rows, split 1") == "1 of 288 elements are wrong"


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """What `tuner.tune` was called with."""
    calls = []
    monkeypatch.setattr(tuner, "tune", lambda *a, **more: calls.append((*a[:6], more)))
    monkeypatch.setattr(cli, "device_of", lambda name: name or "cuda")
    return calls


def test_command_defaults(asked):
    assert cli.main(["tune"]) == 0
    more = dict(log=None, shard=(1, 1), most_s=None)
    assert asked == [(tuner.SHAPES, tuner.TOKENS, ["bfloat16"], "cuda", None, math.inf, more)]


def test_command_options(asked):
    arguments = "tune --shapes 64x128,8X16 --tokens 1,16 --dtype fp16,bf16,float16 --out t.json"
    arguments += " --budget 90 --device cuda:1 --log l --shard 2/3 --cell-seconds 2.5"
    assert cli.main(arguments.split()) == 0
    shapes, more = [(64, 128), (8, 16)], dict(log="l", shard=(2, 3), most_s=2.5)
    assert asked == [(shapes, [1, 16], ["float16", "bfloat16"], "cuda:1", "t.json", 90.0, more)]


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--shapes", "64x128,8"], "expected OUTxIN such as 4096x14336, got '8'"),
        (["--dtype", "fp32"], "expected some of bf16, fp16, fp8, int8, int4, got 'fp32'"),
        (["--tokens", "0"], "got '0'"),
        (["model", "--shapes", "8x8"], "not allowed with"),
        (["--shapes", "8x8", "--merge", "t.json"], "not allowed with"),
        (["--shard", "3/2"], "expected a part such as 1/2, got '3/2'"),
    ],
)
def test_command_usage_errors(arguments, text, capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(["tune", *arguments])
    assert raised.value.code == 2 and text in capsys.readouterr().err


def test_command_without_a_gpu(capsys):
    assert cli.main(["tune", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: sparsekern tune: expected a GPU with the CUDA kernels")
    assert error.count("\n") == 1


# ---- on a GPU ------------------------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    if reason := cuda_backend.refusal(torch.cuda.current_device()):
        pytest.skip(reason)
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path))
    cuda_backend.forget_plans()
    yield tmp_path
    cuda_backend.forget_plans()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tuned_cells_are_what_runs_next(hopper, dtype):
    import sparsekern as sk

    narrow, square = (
        tuner.tune([shape], [1, 33, 64, 100], [dtype], "cuda")
        for shape in ((320, 580), (2048, 2048))
    )
    cells = narrow + square
    assert len(cells) == 8 and not any(cell.refused for cell in cells)
    assert all(0 < cell.us < 1000 and cell.gap >= 0 for cell in cells)
    layer = sk.SparseLinear(2048, 2048, bias=False, dtype=tuner.DTYPES[dtype], device="cuda")
    for cell in square:
        x = torch.ones(cell.tokens, 2048, dtype=tuner.DTYPES[dtype], device="cuda")
        told = sk.explain(x, layer.weight)
        assert told.config == cell.best and told.expected_us == pytest.approx(cell.us, abs=1e-3)
        assert "your tuned table" in told.reason


@pytest.mark.gpu
def test_every_variant_is_checked_and_a_wrong_kernel_is_seen(hopper):
    layer = tuner.Layer(320, 576, torch.bfloat16, torch.device("cuda", 0))
    for tokens in (1, 33, 100):
        cell = layer.cell(tokens)
        names = layer.names(tokens)
        assert names[0] == cuda_backend.heuristic(tokens, 320, 576, 0)
        kernels = {name.split()[0] for name in names}
        few, more = {"decode"} if tokens <= 64 else set(), {"split"} if tokens >= 32 else set()
        assert kernels == {"prefill", "mma"} | few | more
        assert {cell.wrong(name) for name in names} == {""}
        right = cuda_backend.launcher

        def launcher(name, x, w24, y, workspace, right=right):
            run = right(name, x, w24, y, workspace)
            return lambda: (run(), y[-1, -1:].add_(64))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_backend, "launcher", launcher)
            assert cell.wrong(names[0]) == f"1 of {320 * tokens} elements are wrong"


@pytest.mark.gpu
def test_graph_sampler_counts_calls(hopper):
    x = torch.randn(2048, 2048, device="cuda")
    y = torch.empty_like(x)
    call = lambda: torch.add(x, 1, out=y)  # noqa: E731
    call()
    one, four = tuner.graph_sampler([call], 8), tuner.graph_sampler([call] * 4, 2)
    times = [min(sample() for _ in range(20)) for sample in (one, four)]
    assert 0 < times[0] < 1000 and times[1] == pytest.approx(times[0], rel=0.5)
    assert torch.equal(y, x + 1)

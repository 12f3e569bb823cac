"""The narrow kernel, int4 weights with x of 16 bits: numbers, guards, edges, clusters, graphs."""

import pytest
import torch

import sparsekern as sk
from python_tests.backends.cuda_cases import BF16, DEVICE, F16, guarded, needs_hopper
from python_tests.backends.widened_cases import F32, INT4, Problem, assert_exact, launcher
from python_tests.linear_cases import (
    PAIRS,
    assert_within,
    error_bound,
    random_input,
    random_weight,
)
from python_tests.widen_cases import numbers_in_registers, packed
from sparsekern import _native, reference
from sparsekern.backends.cuda import cost_model
from sparsekern.backends.cuda import linear as cuda_backend
from sparsekern.formats.sparse24 import Sparse24, decompress

pytestmark = pytest.mark.gpu

GROUPS, DTYPES = (64, 128, 0), (BF16, F16)
TOKENS = (0, 1, 9, 17, 32, 33, 64, 100, 128, 129, 200)
# (out_features, in_features), with what each is there for.
SHAPES = (
    (1, 128),  # one row of half a tile
    (7, 4),  # less than a core matrix, one group
    (65, 132),  # one row and one group past a panel and a half tile
    (200, 520),  # four panels, the last ragged; two tiles and two groups
    (320, 1152),  # a second row group of one panel; fewer tiles than parts
    (800, 3080),  # four row groups; deep in the rings; x whose rows 16 bytes divide, not 128
)


@pytest.fixture(autouse=True)
def needs_kernels():
    if reason := cuda_backend.refusal(torch.cuda.current_device()):
        pytest.skip(reason)
    needs_hopper()


def configs():
    return [config["index"] for config in _native.module().kernels()["narrow"]]


def exact(p, config, tokens, y64, **options):
    assert_exact(p, config, tokens, y64, kernel="narrow", **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_on_small_integers_in_every_config(shape, group, dtype):
    p = Problem(max(TOKENS), *shape, INT4, group, dtype)
    for config in configs():
        for tokens in TOKENS:
            exact(p, config, tokens, p.product, scaled=False)
        exact(p, config, max(TOKENS), p.product * p.scale)


@pytest.mark.parametrize("group, dtype", [(128, BF16), (64, F16), (0, BF16)], ids=str)
def test_exact_with_more_tiles_than_multiprocessors(group, dtype):
    p = Problem(150, 256 * 150 + 70, 320, INT4, group, dtype)
    for config in configs():
        for tokens in (17, 150):
            exact(p, config, tokens, p.product * p.scale)


@pytest.mark.parametrize("out_features", [320, 323], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_epilogue_in_every_config(group, dtype, out_features):
    p = Problem(60, out_features, 132, INT4, group, dtype)
    scaled, bias, residual = p.product * p.scale, p.bias.double(), p.residual.double()
    for config in configs():
        run = (p, config, 60)
        exact(*run, scaled + bias, bias=p.bias)
        exact(*run, scaled + residual, residual=p.residual)
        everything = dict(bias=p.bias, residual=p.residual, activation="relu")
        exact(*run, (scaled + bias).relu() + residual, **everything)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_every_code_of_the_weight(group, dtype):
    """All levels in all places of a tile, through an x of unit vectors."""
    codes = torch.tensor([v for v in range(-8, 8) if v != 0]).float()
    w = torch.zeros(256, 256)
    for row in range(256):
        for four in range(64):
            first, second = PAIRS[(row + four) % 6].tolist()
            w[row, 4 * four + first] = codes[(row * 7 + four * 2) % len(codes)]
            w[row, 4 * four + second] = codes[(row * 7 + four * 2 + 1) % len(codes)]
    p = Problem(256, 256, 256, INT4, group, dtype, levels=w)
    p.x = p.rows(torch.eye(256, dtype=dtype))
    for config in configs():
        exact(p, config, 256, p.w.t().double(), scaled=False)


@pytest.mark.parametrize("activation", [None, "gelu", "silu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_random_within_bound_in_every_config(group, dtype, activation):
    """Any scales: of groups, against the numbers that the kernel has; within the error of a sum."""
    host = packed(323, 1032, INT4, group, dtype)
    rows = host.rowmajor()
    kept = numbers_in_registers(host, dtype) if group else rows.numbers(F32)
    w = decompress(Sparse24(kept, rows.metadata, tuple(rows.shape))).double()
    p = Problem(140, 323, 1032, INT4, group, dtype)
    p.w24, x, bias = host.to(DEVICE), random_input((140, 1032), dtype), p.bias.cpu()
    p.x = p.rows(x)
    p.scale = rows.tensors["weight_scale"].flatten().float().to(DEVICE)
    y64 = reference.linear(x.double(), w, bias.double(), activation)
    bound = error_bound(x, w, bias, y64, dtype)
    for config in configs():
        _, y = guarded(140, 323, dtype)
        options = dict(scaled=not group, bias=p.bias, activation=activation)
        launcher(p, config, 140, y, kernel="narrow", **options)()
        assert_within(y, y64, bound)


def test_infinite_and_nan_tokens_stay_alone():
    p = Problem(40, 320, 576, INT4, 128, BF16)
    p.x[3], p.x[5] = float("nan"), float("inf")
    others = [token for token in range(40) if token not in (3, 5)]
    for config in configs():
        _, y = guarded(40, 320, BF16)
        launcher(p, config, 40, y, kernel="narrow")()
        assert y[3].isnan().all() and torch.equal(y[others], (p.product * p.scale)[others].to(BF16))


@pytest.mark.parametrize("group", [128, 0])
def test_bitwise_identical_over_50_runs(group):
    p = Problem(150, 1100, 3080, INT4, group, BF16)
    p.x = p.rows(random_input((150, 3080), BF16))
    for config in configs():
        first = torch.full((150, 1100), float("nan"), dtype=BF16, device=DEVICE)
        launcher(p, config, 150, first, kernel="narrow")()
        y = torch.empty_like(first)
        run = launcher(p, config, 150, y, kernel="narrow")
        differences = torch.zeros((), dtype=torch.int64, device=DEVICE)
        for _ in range(50):
            y.fill_(float("nan"))
            run()
            differences += (y.view(torch.int16) != first.view(torch.int16)).sum()
        assert not first.isnan().any() and differences.item() == 0, config


def test_a_launch_reads_what_the_one_before_it_wrote():
    """In a graph, launches in a row, each on the output of the last; W permutes columns."""
    size, steps, tokens = 2048, 6, 40
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    w = torch.zeros(size, size)
    w[torch.arange(size), order] = 1
    expected = torch.arange(size)
    for _ in range(2 * steps):
        expected = expected[order]
    p = Problem(tokens, size, size, INT4, 0, BF16, levels=w)
    for config in configs():
        start = random_input((tokens, size), BF16, integers=True).to(DEVICE)
        here, there = start.clone(), torch.full_like(start, float("nan"))

        def move(x, y, config=config):
            p.x = x
            launcher(p, config, tokens, y, scaled=False, kernel="narrow")()

        move(here, there), move(there, here)  # a first launch cannot be captured
        here.copy_(start)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(steps):
                move(here, there)
                move(there, here)
        graph.replay()
        assert torch.equal(here, start[:, expected.to(DEVICE)]), config


def test_the_layer_takes_it_between_few_and_many_tokens():
    w24 = sk.quantize(sk.compress(random_weight(520, 1024, BF16)).to(DEVICE), "int4", group=128)
    for tokens, start in (
        (16, "decode "),
        (17, "narrow "),
        (cost_model.NARROW_TOKENS, "narrow "),
        (cost_model.NARROW_TOKENS + 1, "widen + "),
    ):
        x = torch.ones(tokens, 1024, dtype=BF16, device=DEVICE)
        told = sk.explain(x, w24)
        assert told.config.startswith(start), str(told)


def test_refusals():
    p = Problem(64, 64, 128, INT4, 128, BF16)
    _, y = guarded(64, 64, BF16)
    with pytest.raises(ValueError, match="config index"):
        launcher(p, len(configs()), 8, y, kernel="narrow")
    p.weight = "int8"
    p.scale_group = 0
    with pytest.raises(ValueError, match="of kernel 'narrow'"):
        launcher(p, 0, 8, y, kernel="narrow")

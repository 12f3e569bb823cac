"""The decode kernel with weights of 8 and 4 bits and x of 16: numbers, guards, edges, graphs."""

import pytest
import torch

import sparsekern as sk
from python_tests.backends.cuda_cases import BF16, DEVICE, F16, guarded, needs_hopper
from python_tests.backends.widened_cases import (
    E4M3,
    F32,
    INT4,
    INT8,
    Problem,
    assert_exact,
    launcher,
)
from python_tests.linear_cases import (
    PAIRS,
    assert_same,
    assert_within,
    error_bound,
    random_input,
    random_weight,
)
from sparsekern import _native, reference
from sparsekern.backends.cuda import linear as cuda_backend
from sparsekern.nn.sparse_linear import SparseLinear

pytestmark = pytest.mark.gpu

# (storage type of the weight, columns that share a scale or 0 for one per row, x)
TYPES = [
    (weight, group, x)
    for weight, group in ((E4M3, 0), (INT8, 0), (INT4, 64), (INT4, 128), (INT4, 0))
    for x in (BF16, F16)
]
TOKENS = (0, 1, 2, 7, 8, 9, 16, 17, 32, 33, 63, 64)

# (out_features, in_features), with what each is there for.
SHAPES = (
    (1, 128),  # one row of one tile
    (7, 4),  # less than a core matrix, one group
    (64, 64),  # half a tile
    (65, 132),  # one row and one group past a tile
    (200, 196),  # four panels, the last ragged; half a tile and a group more
    (320, 1152),  # a last row group of one panel; more tiles than CTAs of a cluster
    (520, 3080),  # deep in the ring; x whose rows 16 bytes divide, not 128
)


@pytest.fixture(autouse=True)
def needs_kernels():
    if reason := cuda_backend.refusal(torch.cuda.current_device()):
        pytest.skip(reason)
    needs_hopper()


def configs():
    """Those that narrow weights have, whatever their type."""
    rows = _native.module().kernels()["decode"]
    return [row["index"] for row in rows if ("int8", "bfloat16", "bfloat16") in row["types"]]


@pytest.mark.parametrize("weight, group, dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_on_small_integers_in_every_config(shape, weight, group, dtype):
    p = Problem(max(TOKENS), *shape, weight, group, dtype)
    for config in configs():
        for tokens in TOKENS:
            assert_exact(p, config, tokens, p.product, scaled=False)
        assert_exact(p, config, max(TOKENS), p.product * p.scale)


@pytest.mark.parametrize(
    "weight, group, dtype", [(E4M3, 0, BF16), (INT8, 0, F16), (INT4, 128, BF16)], ids=str
)
def test_exact_with_more_row_blocks_than_multiprocessors(weight, group, dtype):
    """Without a split a thread block walks several row blocks then."""
    p = Problem(60, 256 * 300 + 70, 320, weight, group, dtype)
    for config in configs():
        for tokens in (1, 16, 40, 60):
            assert_exact(p, config, tokens, p.product * p.scale)


@pytest.mark.parametrize("out_features", [320, 323], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("weight, group, dtype", TYPES, ids=str)
def test_epilogue_in_every_config(weight, group, dtype, out_features):
    p = Problem(60, out_features, 132, weight, group, dtype)
    scaled, bias, residual = p.product * p.scale, p.bias.double(), p.residual.double()
    for config in configs():
        run = (p, config, 60)
        assert_exact(*run, scaled + bias, bias=p.bias)
        assert_exact(*run, scaled + residual, residual=p.residual)
        assert_exact(*run, scaled.relu(), activation="relu")
        everything = dict(bias=p.bias, residual=p.residual, activation="relu")
        assert_exact(*run, (scaled + bias).relu() + residual, **everything)


@pytest.mark.parametrize("weight, group, dtype", TYPES, ids=str)
def test_every_code_of_the_weight(weight, group, dtype):
    """All numbers that the storage type has, subnormals too, through an x of unit vectors."""
    if weight == INT4:
        codes = torch.arange(-8.0, 8.0)
    else:
        codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
        codes = codes.view(getattr(torch, weight)).float()
        codes = codes[codes.isfinite() & ((codes > -128) | (weight == E4M3))]
    codes = codes[codes != 0]
    w = torch.zeros(256, 256)
    for row in range(256):
        for four in range(64):
            first, second = PAIRS[(row + four) % 6].tolist()
            w[row, 4 * four + first] = codes[(row * 7 + four * 2) % len(codes)]
            w[row, 4 * four + second] = codes[(row * 7 + four * 2 + 1) % len(codes)]
    p = Problem(64, 256, 256, weight, group, dtype, levels=w)
    for first in range(0, 256, 64):
        p.x = p.rows(torch.eye(256, dtype=dtype)[first : first + 64])
        for config in configs():
            assert_exact(p, config, 64, p.w.t()[first : first + 64].double(), scaled=False)


@pytest.mark.parametrize("activation", [None, "gelu", "silu"])
@pytest.mark.parametrize("weight, group, dtype", TYPES, ids=str)
def test_random_within_bound_in_every_config(weight, group, dtype, activation):
    levels = random_weight(323, 1032, F32)
    levels = levels * ((7 if weight == INT4 else 100) / levels.abs().max())
    levels = levels.to(getattr(torch, weight)).float() if weight == E4M3 else levels.round()
    p = Problem(60, 323, 1032, weight, group, dtype, levels=levels)
    p.scale = torch.rand(323, generator=torch.Generator().manual_seed(4)).to(DEVICE) / 50 + 0.001
    p.x = p.rows(random_input((60, 1032), dtype))
    x, bias = p.x.cpu(), p.bias.cpu()
    w = p.w.cpu().double() * p.scale.cpu().double()[:, None]
    y64 = reference.linear(x.double(), w, bias.double(), activation)
    bound = error_bound(x, w, bias, y64, dtype)
    for config in configs():
        _, y = guarded(60, 323, dtype)
        launcher(p, config, 60, y, bias=p.bias, activation=activation)()
        assert_within(y, y64, bound)


def test_infinite_and_nan_tokens_stay_alone():
    p = Problem(16, 320, 576, E4M3, 0, BF16)
    p.x[3], p.x[5] = float("nan"), float("inf")
    others = [token for token in range(16) if token not in (3, 5)]
    for config in configs():
        _, y = guarded(16, 320, BF16)
        launcher(p, config, 16, y)()
        assert y[3].isnan().all() and torch.equal(y[others], (p.product * p.scale)[others].to(BF16))


@pytest.mark.parametrize("weight, group", [(E4M3, 0), (INT4, 128)])
def test_bitwise_identical_over_100_runs(weight, group):
    p = Problem(64, 1100, 3080, weight, group, BF16)
    p.x = p.rows(random_input((64, 3080), BF16))
    for config in configs():
        first = torch.full((64, 1100), float("nan"), dtype=BF16, device=DEVICE)
        launcher(p, config, 64, first)()
        y = torch.empty_like(first)
        run = launcher(p, config, 64, y)
        differences = torch.zeros((), dtype=torch.int64, device=DEVICE)
        for _ in range(100):
            y.fill_(float("nan"))
            run()
            differences += (y.view(torch.int16) != first.view(torch.int16)).sum()
        assert not first.isnan().any() and differences.item() == 0, config


def test_a_launch_reads_what_the_one_before_it_wrote():
    """In a graph, launches in a row, each on the output of the last; W permutes columns."""
    size, steps, tokens = 2048, 12, 16
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    w = torch.zeros(size, size)
    w[torch.arange(size), order] = 1
    expected = torch.arange(size)
    for _ in range(2 * steps):
        expected = expected[order]
    for weight in (E4M3, INT8, INT4):
        p = Problem(tokens, size, size, weight, 0, BF16, levels=w)
        for config in configs():
            start = random_input((tokens, size), BF16, integers=True).to(DEVICE)
            here, there = start.clone(), torch.full_like(start, float("nan"))
            p.x = here
            forth = launcher(p, config, tokens, there, scaled=False)
            graph = torch.cuda.CUDAGraph()

            def back(p=p, config=config, here=here, there=there):
                p.x = there
                launcher(p, config, tokens, here, scaled=False)()
                p.x = here

            forth(), back()  # warm: what a first launch asks of the driver cannot be captured
            here.copy_(start)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                for _ in range(steps):
                    forth()
                    back()
            graph.replay()
            assert torch.equal(here, start[:, expected.to(DEVICE)]), (weight, config)


def test_refusals():
    p = Problem(64, 64, 128, E4M3, 0, BF16)
    _, y = guarded(64, 64, BF16)
    with pytest.raises(ValueError, match="config index"):
        launcher(p, len(configs()), 8, y)
    p.dtype = F16
    with pytest.raises(ValueError, match="tokens <= max_tokens .*got 65"):
        launcher(p, 0, 65, y)
    p.scale_group = 64
    with pytest.raises(ValueError, match="expected scale_group 0 with .*'float8_e4m3fn'"):
        launcher(p, 0, 8, y)
    p.weight, p.scale_group = INT4, 32
    with pytest.raises(ValueError, match="expected scale_group 0, 64 or 128 .*got 32"):
        launcher(p, 0, 8, y)
    p.weight, p.scale_group = "float32", 0
    with pytest.raises(ValueError, match="weight_dtype"):
        launcher(p, 0, 8, y)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("group", [64, 128, 0])
@pytest.mark.parametrize("tokens", [0, 1, 16, 64, 65, 300])
def test_int4_through_the_public_function(tokens, group, dtype):
    """Any number of tokens; packed for Hopper by SparseLinear."""
    p = Problem(300, 323, 580, INT4, group, dtype)
    y64 = p.product if p.scale_group else p.product * p.scale
    x, w24 = p.x[:tokens], p.w24
    y = sk.linear(x, w24, p.bias, "relu")
    assert_same(y, (y64[:tokens] + p.bias.double()).relu().to(dtype), "bias, relu")
    three = sk.linear(x.reshape(tokens, 1, 580), w24)
    assert_same(three, y64[:tokens, None].to(dtype), "three dimensions")
    told = sk.explain(x, w24)
    assert told.backend == "cuda" and "W4A16" in told.reason, str(told)
    module = SparseLinear.from_sparse24(w24.rowmajor(), p.bias).to(DEVICE)
    assert module.weight.layout == "tile64"
    assert_same(module(x), (y64[:tokens] + p.bias.double()).to(dtype), "SparseLinear")

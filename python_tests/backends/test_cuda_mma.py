"""The mma.sp kernel, on any GPU from compute capability 8.0: what is its own among the tests.

test_cuda_linear.py runs every kernel of the GPU over shapes, epilogues and random data, this one
included; on Ampere and Ada all of that file is about this kernel. Here: every config at the edges
of its own tile, the six patterns, strides, and the backend "cuda-mma", which a Hopper GPU has
besides its own kernels.
"""

import pytest
import torch

import sparsekern as sk
from python_tests.backends.cuda_cases import (
    BF16,
    DEVICE,
    F16,
    GUARD,
    Problem,
    assert_exact,
    call,
    guarded,
    mma_variants,
    same_bits,
)
from python_tests.linear_cases import PAIRS, random_input, random_weight
from sparsekern import _native, reference
from sparsekern.backends.cuda import linear as cuda_backend
from sparsekern.backends.cuda.variant import MmaTile
from sparsekern.formats.sparse24 import compress
from sparsekern.formats.tile64 import pack

pytestmark = pytest.mark.gpu
MMA = "cuda-mma"


@pytest.fixture(autouse=True)
def needs_kernel():
    if reason := cuda_backend.refusal(torch.cuda.current_device()):
        pytest.skip(reason)


def integers(*shape, dtype=BF16, seed=1):
    return random_input(shape, dtype, seed=seed, integers=True).to(DEVICE)


def weight(out_features, in_features, dtype=BF16, seed=0):
    w = random_weight(out_features, in_features, dtype, seed, integers=True)
    return w.to(DEVICE), pack(compress(w).to(DEVICE))


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_exact_at_the_edges_of_every_tile(dtype):
    """One less, as many and one more than the tile: tokens, rows, and stages of the ring."""
    for config in _native.module().kernels()["mma"]:
        stage = 64 * config["split"]
        ring = stage * config["stages"]
        rows, tokens = config["rows"], config["tokens"]
        shapes = [(rows, stage), (rows + 1, stage - 4), (2 * rows - 1, stage + 4)]
        shapes += [(rows, ring - stage), (rows, ring), (rows + 64, ring + stage + 36)]
        for out_features, in_features in shapes:
            p = Problem(tokens + 1, out_features, in_features, dtype)
            for few in (1, tokens - 1, tokens, tokens + 1):
                assert_exact("mma", config["index"], p, few, p.product)


def test_exact_over_many_blocks():
    """More row blocks than a group of the block order, the last group not whole; rows unaligned."""
    p = Problem(700, 2635, 324, BF16)
    expected = (p.product + p.bias.double()).relu() + p.residual.double()
    options = dict(bias=p.bias, activation="relu", residual=p.residual)
    for kernel, variant in mma_variants():
        assert_exact(kernel, variant, p, 700, expected, **options)


def test_every_pattern_alone_in_every_config():
    """Row r uses pattern r % 6 in every group; an identity as x returns the weight."""
    w = torch.zeros(258, 324, dtype=BF16)
    for row in range(258):
        first, second = PAIRS[row % 6].tolist()
        w[row, first::4], w[row, second::4] = 1 + row % 5, -2 - row % 3
    p = Problem(324, 258, 324, BF16)
    p.w24, p.x = pack(compress(w).to(DEVICE)), p.rows(torch.eye(324, dtype=BF16))
    for kernel, variant in mma_variants():
        assert_exact(kernel, variant, p, 324, w.t().double())


@pytest.mark.parametrize("row_padding", [0, 8, 16, 3], ids="padding {}".format)
def test_strided_outputs_and_residuals(row_padding):
    """Strides that keep 16-byte alignment and one that does not; out_features likewise."""
    for out_features in (64, 76, 203):
        p = Problem(70, out_features, 132, BF16)
        wide = integers(70, out_features + row_padding, seed=4)
        residual = wide[:, :out_features]
        expected = (p.product + residual.double()).to(BF16)
        for kernel, variant in mma_variants():
            buffer = torch.full_like(wide, float("nan"))
            call(kernel, variant, p, 70, buffer[:, :out_features], residual=residual)
            assert same_bits(buffer[:, :out_features], expected), (variant, out_features)
            assert buffer[:, out_features:].isnan().all()


@pytest.mark.parametrize("in_features", [4, 68, 72, 1028])
def test_rows_of_x_on_8_bytes(in_features):
    """Every row and the first address, NaN around them."""
    p = Problem(130, 203, in_features, BF16)
    stride = -(-in_features // 8) * 8 + 4
    wide = torch.full((130 * stride + 8,), float("nan"), dtype=BF16, device=DEVICE)
    x = wide[4 : 4 + 130 * stride].view(130, stride)[:, :in_features].copy_(p.x)
    p.x = x
    for kernel, variant in mma_variants():
        for tokens in (1, 7, 130):
            assert_exact(kernel, variant, p, tokens, p.product)


def test_nan_beside_x_and_in_other_tokens_is_not_read():
    """Rows of x end in NaN (cuda_cases); a token of NaN spoils its own row of y alone."""
    p = Problem(70, 100, 68, BF16)
    p.x[3] = float("nan")
    for kernel, variant in mma_variants():
        _, y = guarded(70, 100, BF16)
        call(kernel, variant, p, 70, y)
        others = torch.arange(70, device=DEVICE) != 3
        assert y[3].isnan().all()
        assert torch.equal(y[others], p.product[others].to(BF16)), variant


def test_bitwise_identical_over_20_runs():
    p = Problem(130, 700, 1032, F16, integers=False)
    for kernel, variant in mma_variants():
        results = []
        for _ in range(20):
            buffer, y = guarded(130, 700, F16)
            call(kernel, variant, p, 130, y)
            results.append(buffer)
        assert not results[0][GUARD:-GUARD, GUARD:-GUARD].isnan().any()
        assert all(same_bits(results[0], other) for other in results[1:]), variant


# ---- the backend ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("tokens", [0, 1, 5, 16, 33, 64, 65, 300])
def test_backend_is_exact_and_says_what_ran(tokens, dtype):
    w, w24 = weight(320, 576, dtype)
    x, bias = integers(tokens, 576, dtype=dtype), integers(320, dtype=dtype, seed=5)
    y = sk.linear(x, w24, bias, "relu", backend=MMA)
    assert torch.equal(y, reference.linear(x, w, bias, "relu").to(dtype))
    told = sk.explain(x, w24, backend=MMA)
    assert (told.backend, told.layout) == (MMA, "tile64")
    assert told.config in {f"mma {tile}" for tile in cuda_backend._mma_tiles()}
    assert all(isinstance(tile, MmaTile) for tile in cuda_backend._mma_tiles())


@pytest.mark.parametrize("in_features", [576, 68], ids=["aligned", "rows to be copied"])
@pytest.mark.parametrize("tokens", [1, 6, 90])
def test_strided_x(tokens, in_features):
    w, w24 = weight(70, in_features)
    wide = integers(tokens, 3 * in_features)
    for x in (
        wide[:, in_features : 2 * in_features],
        wide[:, 3 : in_features + 3],
        wide[:, : 2 * in_features : 2],
        integers(2 * tokens, in_features)[::2],
        integers(in_features, tokens).t(),
        wide[:1, :in_features].expand(tokens, in_features),
        integers(2, tokens, in_features).transpose(0, 1),
        wide[0, 1 : in_features + 1],
    ):
        y = sk.linear(x, w24, backend=MMA)
        assert y.is_contiguous() and torch.equal(y, reference.linear(x, w, None).to(BF16))


def test_degenerate_and_refused_problems():
    _, w24 = weight(8, 16)
    bias = torch.arange(8, device=DEVICE).to(BF16) - 4
    empty = pack(compress(torch.zeros(8, 0, device=DEVICE, dtype=BF16)))
    y = sk.linear(integers(3, 0), empty, bias, "relu", backend=MMA)
    assert torch.equal(y, bias.relu().expand(3, 8))
    with pytest.raises(NotImplementedError, match="needs layout 'tile64'.*got 'rowmajor'"):
        sk.linear(integers(3, 16), w24.rowmajor(), backend=MMA)


def test_gated_linear_on_gpus_without_the_fused_kernel(monkeypatch):
    """On such a GPU the op is two layers and a product, and both run here."""
    monkeypatch.setattr(cuda_backend, "hopper_refusal", lambda index: "not Hopper")
    (_, gate24), (_, up24) = weight(70, 84, seed=0), weight(70, 84, seed=1)
    x = integers(5, 84)
    expected = sk.linear(x, gate24, None, "silu") * sk.linear(x, up24)
    assert torch.equal(sk.gated_linear(x, gate24, up24), expected)


# ---- streams and graphs --------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [4, 100])
def test_graph_capture_and_replay_with_new_data(tokens):
    (_, first), (_, second) = weight(320, 576), weight(128, 320, seed=1)

    def both(x):
        return sk.linear(sk.linear(x, first, backend=MMA), second, backend=MMA)

    x = integers(tokens, 576)
    both(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = both(x)
    for seed in (2, 3):
        x.copy_(integers(tokens, 576, seed=seed))
        graph.replay()
        assert same_bits(y, both(x))


@pytest.mark.parametrize("tokens", [4, 100])
def test_on_another_stream(tokens):
    w, w24 = weight(320, 576)
    stream, new = torch.cuda.Stream(), integers(tokens, 576)
    x = torch.zeros(tokens, 576, device=DEVICE, dtype=BF16)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # x is still zero when a launch on the wrong stream would run
        x.copy_(new)
        y = sk.linear(x, w24, backend=MMA)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y, reference.linear(new, w, None).to(BF16))


# ---- native arguments ----------------------------------------------------------------------------


def test_refusals_of_the_native_module():
    p = Problem(100, 64, 64, BF16)
    _, y = guarded(100, 64, BF16)
    for variant in (-1, len(_native.module().kernels()["mma"])):
        with pytest.raises(ValueError, match=f"config index below .*got {variant}"):
            call("mma", variant, p, 100, y)
    p.x = p.x[:, 2:]
    p.in_features -= 2
    with pytest.raises(ValueError, match="multiple of 8"):
        call("mma", 0, p, 8, y)
    p.in_features = 0
    p.x = p.x[:, 2:]
    with pytest.raises(ValueError, match="p.in_features > 0"):
        call("mma", 0, p, 8, y)

"""The mma.sp kernel at 8 bits, on any GPU from compute capability 8.0 (e4m3: 8.9).

On Hopper test_cuda_scaled.py runs it, too, over shapes, epilogues and random data; on Ampere and
Ada this file is all there is. Here: every tile at its edges, epilogues, the six patterns, int8
against int64, bounds of random numbers, and the backends that run it.
"""

import pytest
import torch

import sparsekern as sk
from python_tests.backends.cuda_cases import BF16, DEVICE, F16, guarded, same_bits
from python_tests.backends.scaled_cases import E4M3, INT8, STORAGES, Problem, call, name_of
from python_tests.linear_cases import (
    PAIRS,
    assert_same,
    assert_within,
    random_input,
    random_weight,
)
from sparsekern import _native
from sparsekern.backends import cpu, quantize_rows
from sparsekern.backends.cuda import configs
from sparsekern.formats.tile64 import pack

pytestmark = pytest.mark.gpu
MMA = "cuda-mma"
KINDS = {E4M3: "fp8", INT8: "int8"}
ROUNDOFF = {F16: 2.0**-11, BF16: 2.0**-8}


@pytest.fixture(params=STORAGES)
def storage(request):
    types = configs.Types(request.param, request.param, "bfloat16")
    if reason := configs.mma_refusal(torch.cuda.current_device(), types):
        pytest.skip(reason)
    return request.param


def tiles(storage):
    """The rows of kernels() for this type."""
    types = storage, storage, "bfloat16"
    rows = [row for row in _native.module().kernels()["mma"] if types in row["types"]]
    assert rows
    return rows


def assert_exact(index, p, tokens, y64, **options):
    """The kernel writes y64, rounded once, and nothing outside of it."""
    buffer, y = guarded(tokens, p.out_features, p.dtype)
    expected, inside = guarded(tokens, p.out_features, p.dtype)
    inside.copy_(y64[:tokens])
    call("mma", index, p, tokens, y, **options)
    wrong = (buffer.view(torch.int16) != expected.view(torch.int16)).nonzero()
    what = f"{p.storage}, config {index}, {tokens} x {p.out_features} x {p.in_features}"
    assert not len(wrong), f"{what}: {len(wrong)} wrong, the first {wrong[0].tolist()}"


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_exact_at_the_edges_of_every_tile(storage, dtype):
    """One less, as many and one more than the tile: tokens, rows, and stages of the ring."""
    for row in tiles(storage):
        stage = 128 * row["split"]
        ring, rows, tokens = stage * row["stages"], row["rows"], row["tokens"]
        shapes = [(rows, stage), (rows + 1, stage - 4), (2 * rows - 1, stage + 4)]
        shapes += [(rows, ring - stage), (rows + 64, ring + stage + 68)]
        for out_features, in_features in shapes:
            p = Problem(tokens + 1, out_features, in_features, storage, dtype)
            for few in (1, tokens - 1, tokens, tokens + 1):
                assert_exact(row["index"], p, few, p.product)


def test_exact_over_many_blocks_with_everything(storage):
    """More row blocks than a group of the block order; rows unaligned; each scale and both."""
    p = Problem(700, 2635, 324, storage, BF16)
    channel, token = p.channel.double(), p.token.double()[:, None]
    rest = dict(bias=p.bias, activation="relu", residual=p.residual)
    for scales, factor in (
        (dict(channel_scale=p.channel), channel),
        (dict(token_scale=p.token), token),
        (dict(channel_scale=p.channel, token_scale=p.token), channel * token),
    ):
        expected = (p.product * factor + p.bias.double()).relu() + p.residual.double()
        for row in tiles(storage):
            assert_exact(row["index"], p, 700, expected, **scales, **rest)


def test_every_pattern_alone_in_every_config(storage):
    """Row r uses pattern r % 6 in every group; an identity as x returns the weight."""
    w = torch.zeros(258, 324, dtype=BF16)
    for row in range(258):
        first, second = PAIRS[row % 6].tolist()
        w[row, first::4], w[row, second::4] = 1 + row % 5, -2 - row % 3
    p = Problem(324, 258, 324, storage, BF16, w, torch.eye(324))
    for row in tiles(storage):
        assert_exact(row["index"], p, 324, w.t().double())


def test_int8_sums_are_those_of_int64():
    """Levels up to 127, sums beyond 2^24: rounded to float32 once, then scaled."""
    tokens, out_features, in_features = 150, 392, 4096
    generator = torch.Generator().manual_seed(5)
    kept = random_weight(out_features, in_features, BF16, integers=True) != 0
    w = torch.randint(60, 128, (out_features, in_features), generator=generator) * kept
    x = torch.randint(-127, 128, (tokens, in_features), generator=generator)
    x[:20] = 127
    p = Problem(tokens, out_features, in_features, INT8, BF16, w.to(BF16), x.float())
    assert p.product.abs().max() > 2**24
    channel = torch.full((out_features,), 2.0**-7, device=DEVICE)
    expected = p.product.float().double() * 2.0**-7
    for row in tiles(INT8):
        assert_exact(row["index"], p, tokens, expected, channel_scale=channel)


def test_nan_in_other_tokens_is_not_read():
    """Rows of x end in NaN (scaled_cases); a token of NaN spoils its own row of y alone."""
    types = configs.Types(E4M3, E4M3, "bfloat16")
    if reason := configs.mma_refusal(torch.cuda.current_device(), types):
        pytest.skip(reason)
    p = Problem(70, 100, 68, E4M3, BF16)
    p.x.view(torch.uint8)[3] = 0x7F
    others = torch.arange(70, device=DEVICE) != 3
    for row in tiles(E4M3):
        _, y = guarded(70, 100, BF16)
        call("mma", row["index"], p, 70, y)
        assert y[3].isnan().all()
        assert torch.equal(y[others], p.product[others].to(BF16)), row


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_random_numbers_lie_within_their_bound(storage, dtype):
    """K of 4096. e4m3: the tensor cores of 8.9 keep some 14 bits of a sum; int8: no error."""
    tokens, out_features, in_features = 90, 328, 4096
    host = sk.quantize(sk.compress(random_weight(out_features, in_features, dtype)), KINDS[storage])
    levels = sk.dequantize(host.to(torch.float32), layout="rowmajor").to_dense().double()
    channel = host.tensors["weight_scale"].double().view(1, -1)
    levels = levels / channel.view(-1, 1)
    x, token = quantize_rows.quantize_torch(random_input((tokens, in_features), dtype), storage)
    scales = token.double()[:, None] * channel
    y64 = x.double() @ levels.t() * scales
    share = 2.0**-8 if storage == E4M3 else 2.0**-22
    bound = share * (x.double().abs() @ levels.abs().t()) * scales
    bound += (ROUNDOFF[dtype] + 2.0**-21) * y64.abs() + 1e-6
    p = Problem.__new__(Problem)
    p.storage, p.dtype, p.out_features, p.in_features = storage, dtype, out_features, in_features
    p.w24, p.x = pack(host.to(DEVICE)), x.to(DEVICE).contiguous()
    operands = dict(
        channel_scale=host.tensors["weight_scale"].view(-1).to(DEVICE), token_scale=token.to(DEVICE)
    )
    for row in tiles(storage):
        results = []
        for _ in range(5):
            y = torch.full((tokens, out_features), float("nan"), dtype=dtype, device=DEVICE)
            call("mma", row["index"], p, tokens, y, **operands)
            results.append(y)
        assert_within(results[0], y64, bound)
        assert all(same_bits(results[0], other) for other in results[1:]), row


# ---- the backends --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("in_features", [1024, 1044], ids=["aligned", "rows to be copied"])
def test_linear_and_what_explain_says(storage, dtype, in_features):
    w = random_weight(520, in_features, dtype)
    host = sk.quantize(sk.compress(w), KINDS[storage])
    w24 = pack(host.to(DEVICE))
    bias = random_input((520,), dtype, seed=4)
    levels = sk.dequantize(host.to(torch.float32), layout="rowmajor").to_dense().double().abs()
    for tokens in (1, 17, 64, 65, 300):
        x = random_input((tokens, in_features), dtype)
        y = sk.linear(x.to(DEVICE), w24, bias.to(DEVICE), "silu", backend=MMA)
        told = sk.explain(x.to(DEVICE), w24, backend=MMA)
        assert told.backend == MMA and told.config.startswith("mma ") and "W8A8" in told.reason
        q, scale = quantize_rows.quantize_torch(x, storage)
        y64 = cpu.quantized_linear(q, scale, host, bias, "silu").double()
        share = 2.0**-8 if storage == E4M3 else 2.0**-20
        bound = 1.2 * share * (q.double().abs() @ levels.t()) * scale.double()[:, None]
        bound += 2 * ROUNDOFF[dtype] * y64.abs() + 1e-5
        assert_within(y, y64, bound)


def test_the_default_backend_of_gpus_that_are_not_hopper(storage):
    """At every number of tokens the bits of the backend by name, and of x quantised before."""
    if configs.hopper(torch.cuda.current_device()):
        pytest.skip("Hopper has other kernels")
    w24 = sk.quantize(sk.compress(random_weight(520, 1044, BF16).to(DEVICE)), KINDS[storage])
    assert w24.layout == "tile64"
    for tokens in (1, 64, 300):
        x = random_input((tokens, 1044), BF16).to(DEVICE)
        y, (q, scale) = sk.linear(x, w24), sk.quantize_rows(x, storage)
        assert sk.explain(x, w24).backend == "cuda"
        assert_same(sk.linear(x, w24, backend=MMA), y, f"{tokens} tokens, by name")
        assert_same(sk.linear_quantized(q, scale, w24), y, f"{tokens} tokens, quantised before")


def test_x_of_8_bits(storage):
    w24 = pack(sk.quantize(sk.compress(random_weight(520, 1044, BF16)), KINDS[storage]).to(DEVICE))
    for shape in ((1, 1044), (2, 100, 1044)):
        x = random_input(shape, BF16).to(DEVICE)
        q, scale = sk.quantize_rows(x, storage)
        y = sk.linear_quantized(q, scale, w24, backend=MMA)
        assert y.shape == (*shape[:-1], 520)
        assert_same(y, sk.linear(x, w24, backend=MMA), f"{shape}")


@pytest.mark.parametrize("tokens", [4, 100])
def test_a_graph_captures_all_of_it(storage, tokens):
    w24 = pack(sk.quantize(sk.compress(random_weight(520, 1024, BF16)), KINDS[storage]).to(DEVICE))
    x = random_input((tokens, 1024), BF16).to(DEVICE)
    sk.linear(x, w24, backend=MMA)  # kernels are loaded, or compiled, at their first launch
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sk.linear(x, w24, backend=MMA)
    for seed in (7, 8):
        x.copy_(random_input((tokens, 1024), BF16, seed=seed))
        graph.replay()
        torch.cuda.synchronize()
        assert_same(y, sk.linear(x, w24, backend=MMA), f"{tokens} tokens, replayed")


def test_refusals_of_the_native_module(storage):
    p = Problem(20, 64, 128, storage, BF16)
    _, y = guarded(20, 64, BF16)
    many = len(_native.module().kernels()["mma"])
    for index in (-1, len(tiles(storage)), many):
        with pytest.raises(ValueError, match=f"config index below .*got {index}"):
            call("mma", index, p, 20, y)
    p.x = p.x[:, 4:]
    p.in_features -= 4
    with pytest.raises(ValueError, match="multiple of 16"):
        call("mma", 0, p, 8, y)
    with pytest.raises(ValueError, match="of kernel 'mma' to be one of"):
        _native.module().Linear(
            kernel="mma",
            config=0,
            tokens=1,
            out_features=64,
            in_features=64,
            x_stride=64,
            y_stride=64,
            dtype=name_of(BF16),
            weight_dtype=storage,
        )

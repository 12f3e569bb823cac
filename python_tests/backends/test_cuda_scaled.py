"""The 8-bit kernels on the GPU: W8A8 prefill, split and naive, every config and both types.

Whole numbers and scales of few bits must come out exactly; random ones lie within a bound of the
float64 product of the levels. The tensor cores add up products of e4m3 with some 14 bits, so that
bound is wide for the fast sums and narrow for the promoted ones.
"""

import pytest
import torch

import sparsekern as sk
from python_tests.backends.cuda_cases import (
    BF16,
    DEVICE,
    F16,
    GUARD,
    guarded,
    needs_hopper,
    same_bits,
)
from python_tests.backends.scaled_cases import (
    CONFIGS,
    E4M3,
    INT8,
    STORAGES,
    Problem,
    call,
    promoted,
)
from python_tests.linear_cases import assert_same, assert_within, random_input, random_weight
from sparsekern import _native
from sparsekern.backends import cpu, quantize_rows
from sparsekern.formats.tile64 import pack

pytestmark = pytest.mark.gpu

ROUNDOFF = {F16: 2.0**-11, BF16: 2.0**-8}


def assert_exact(kernel, index, p, tokens, y64, **options):
    """The kernel writes y64, rounded once, and nothing outside of it."""
    buffer, y = guarded(tokens, p.out_features, p.dtype)
    expected, inside = guarded(tokens, p.out_features, p.dtype)
    inside.copy_(y64[:tokens])
    call(kernel, index, p, tokens, y, **options)
    if same_bits(buffer, expected):
        return
    wrong = (buffer.view(torch.int16) != expected.view(torch.int16)).nonzero()
    token, row = (wrong[0] - GUARD).tolist()
    got, wanted = (t[tuple(wrong[0].tolist())].item() for t in (buffer, expected))
    raise AssertionError(
        f"{p.storage} {kernel} {index} {[*options]}, {p.dtype}, {tokens} tokens, "
        f"{p.out_features} x {p.in_features}: {len(wrong)} wrong; "
        f"the first at token {token}, row {row}: got {got}, expected {wanted}"
    )


# ---- exact ---------------------------------------------------------------------------------------

# (tokens, out_features, in_features): rows and columns past tiles, few and many tiles
SHAPES = ((1, 4, 4), (70, 325, 900), (257, 200, 388), (700, 520, 1156), (64, 64, 128))


@pytest.fixture(scope="module")
def problems():
    needs_hopper()
    known = {}

    def problem(shape, storage, dtype):
        key = shape, storage, dtype
        if key not in known:
            known[key] = Problem(*shape, storage, dtype)
        return known[key]

    yield problem
    known.clear()


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("storage, kernel, index", CONFIGS)
def test_whole_numbers_are_exact(problems, storage, kernel, index, dtype):
    for shape in SHAPES:
        p = problems(shape, storage, dtype)
        assert_exact(kernel, index, p, shape[0], p.product)
        scaled = p.product * p.channel.double() * p.token.double()[:, None]
        scales = dict(channel_scale=p.channel, token_scale=p.token)
        assert_exact(kernel, index, p, shape[0], scaled, **scales)
        assert_exact(
            kernel, index, p, shape[0], scaled + p.bias.double(), bias=p.bias, cut_k=False, **scales
        )
        y64 = (scaled + p.bias.double()).relu() + p.residual.double()
        rest = dict(bias=p.bias, residual=p.residual, activation="relu")
        assert_exact(kernel, index, p, shape[0], y64, **scales, **rest)


@pytest.mark.parametrize("storage, kernel, index", CONFIGS)
def test_every_number_of_tokens_around_the_tiles(problems, storage, kernel, index):
    """Scales of the tokens in the tile's last, partly filled step; one scale at a time."""
    p = problems((700, 520, 1156), storage, BF16)
    by_token = p.product * p.token.double()[:, None]
    by_channel = p.product * p.channel.double() + p.bias.double()
    for tokens in (1, 7, 8, 9, 31, 33, 63, 65, 95, 97, 127, 129, 159, 191, 193, 207, 209, 415, 417):
        assert_exact(kernel, index, p, tokens, by_token, token_scale=p.token)
        assert_exact(kernel, index, p, tokens, by_channel, channel_scale=p.channel, bias=p.bias)


@pytest.mark.parametrize("storage, kernel, index", CONFIGS)
def test_long_sums_of_few_tiles_are_shared_and_exact(storage, kernel, index):
    """Tiles whose K several thread blocks share; the sums stay below 2^13, which e4m3 needs."""
    needs_hopper()
    w = random_weight(520, 8192, BF16, integers=True).sign()
    x = random_input((200, 8192), torch.float32, integers=True).sign()
    p = Problem(200, 520, 8192, storage, BF16, w, x)
    scales = dict(channel_scale=p.channel, token_scale=p.token)
    scaled = p.product * p.channel.double() * p.token.double()[:, None]
    for tokens in (200, 33):
        assert_exact(kernel, index, p, tokens, scaled + p.bias.double(), bias=p.bias, **scales)
        assert_exact(kernel, index, p, tokens, scaled.relu(), activation="relu", **scales)


@pytest.mark.parametrize("kernel, index", [c[1:] for c in CONFIGS if c[0] == INT8])
def test_int8_sums_are_those_of_int64(kernel, index):
    """Levels up to 127, sums beyond 2^24: rounded to float32 once, then scaled."""
    needs_hopper()
    tokens, out_features, in_features = 150, 392, 4096
    generator = torch.Generator().manual_seed(5)
    kept = random_weight(out_features, in_features, BF16, integers=True) != 0
    w = torch.randint(60, 128, (out_features, in_features), generator=generator) * kept
    x = torch.randint(-127, 128, (tokens, in_features), generator=generator)
    x[:20] = 127
    p = Problem(tokens, out_features, in_features, INT8, BF16, w.to(BF16), x.float())
    assert p.product.abs().max() > 2**24
    channel = torch.full((out_features,), 2.0**-7, device=DEVICE)
    token = torch.full((tokens,), 0.75, device=DEVICE)
    sums = p.product.float().double()
    expected = (sums * 2.0**-7 * 0.75).float().to(BF16)
    y = torch.empty(tokens, out_features, dtype=BF16, device=DEVICE)
    for cut_k in (True, False):
        call(kernel, index, p, tokens, y, cut_k, channel_scale=channel, token_scale=token)
        assert torch.equal(y, expected)


# ---- random numbers ------------------------------------------------------------------------------


def quantized(storage, tokens, out_features, in_features, dtype=BF16):
    """(weight packed, x of levels, its scales, float64 levels of both)."""
    w24 = sk.quantize(
        sk.prune_compress(random_weight(out_features, in_features, dtype).to(DEVICE)),
        "fp8" if storage == E4M3 else storage,
        layout="rowmajor",
    )
    x = random_input((tokens, in_features), dtype).to(DEVICE)
    q, scale = quantize_rows.quantize(x, storage, 16)
    levels = sk.dequantize(w24.to(torch.float32), layout="rowmajor")
    w = sk.decompress(levels).double() / w24.tensors["weight_scale"].double()
    return w24, q, scale, w.round() if storage == INT8 else w


def error_of(y64, sums, magnitudes, scale, storage, precise, dtype):
    """Bound of |y - y64|: truncated sums of e4m3, then float32, then one rounding to dtype."""
    share = {INT8: 2.0**-22, E4M3: 2.0**-10 if precise else 2.0**-8}[storage]
    return share * magnitudes * scale + (ROUNDOFF[dtype] + 2.0**-21) * y64.abs() + 1e-6


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("storage", STORAGES)
def test_random_numbers_lie_within_their_bound(storage, dtype):
    needs_hopper()
    tokens, out_features, in_features = 300, 712, 2308
    w24, q, scale, w = quantized(storage, tokens, out_features, in_features, dtype)
    x = q.double()
    scales = scale.double()[:, None] * w24.tensors["weight_scale"].double().view(1, -1)
    sums, magnitudes = x @ w.t(), x.abs() @ w.abs().t()
    y64 = sums * scales
    packed = pack(w24)
    p = Problem.__new__(Problem)
    p.storage, p.dtype, p.w24, p.x = storage, dtype, packed, q
    p.out_features, p.in_features = out_features, in_features
    channel = w24.tensors["weight_scale"].view(-1)
    y = torch.empty(tokens, out_features, dtype=dtype, device=DEVICE)
    for of, kernel, index in CONFIGS:
        if of != storage:
            continue
        y.fill_(float("nan"))
        call(kernel, index, p, tokens, y, channel_scale=channel, token_scale=scale)
        precise = promoted(kernel, index)
        bound = error_of(y64, sums, magnitudes, scales, storage, precise, dtype)
        assert_within(y, y64.cpu(), bound.cpu())


def test_promoted_sums_are_closer_than_those_of_the_tensor_cores():
    """And the same for what is summed in float32 by the plain, slow product of levels."""
    needs_hopper()
    w24, q, scale, w = quantized(E4M3, 128, 512, 16384)
    y64 = q.double() @ w.t() * scale.double()[:, None]
    y64 *= w24.tensors["weight_scale"].double().view(1, -1)
    errors = {}
    for backend in ("cuda", "cuda-precise"):
        y = sk.linear_quantized(q, scale, pack(w24), backend=backend)
        errors[backend] = float((y.double() - y64).square().mean().sqrt())
    rounding = float((y64.to(BF16).double() - y64).square().mean().sqrt())
    print(f"rms errors {errors}, of the rounding to bfloat16 {rounding}")
    assert errors["cuda-precise"] <= errors["cuda"]
    assert errors["cuda-precise"] < 1.5 * rounding


# ---- what is refused -----------------------------------------------------------------------------


def test_problems_that_do_nothing_and_operands_that_do_not_fit(problems):
    p = problems((70, 325, 900), INT8, BF16)
    _, y = guarded(8, 325, BF16)
    for storage, kernel, index in CONFIGS:
        if storage == INT8:
            call(kernel, index, p, 0, y)
    assert y.isnan().all()
    unaligned = Problem.__new__(Problem)
    unaligned.__dict__.update(p.__dict__)
    for shift, text in ((1, "x to be a multiple of 16"),):
        unaligned.x = p.x[:, shift:]
        with pytest.raises(ValueError, match=text):
            call("prefill", 0, unaligned, 8, y)
    unaligned.x = p.x[:, :890].contiguous()
    with pytest.raises(ValueError, match="x_stride to be a multiple of 16"):
        call("prefill", 0, unaligned, 8, y)
    rows = _native.module().kernels()["prefill"]
    last = [row["index"] for row in rows if row["promoted"]]
    assert last
    for index in last:
        with pytest.raises(ValueError, match="expected a config index below"):
            call("prefill", index, p, 8, y)
    with pytest.raises(ValueError, match="expected .* of kernel 'prefill' to be one of"):
        _native.module().Linear(
            kernel="prefill",
            config=0,
            tokens=1,
            out_features=64,
            in_features=64,
            x_stride=64,
            y_stride=64,
            dtype="bfloat16",
            weight_dtype="int8",
        )
    torch.cuda.synchronize()


# ---- sparsekern.linear ---------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("in_features", [1024, 1044])
def test_linear_of_a_quantised_weight(storage, dtype, in_features):
    """Few tokens as W8A16, many as W8A8, against the CPU."""
    needs_hopper()
    w = random_weight(520, in_features, dtype)
    short = "fp8" if storage == E4M3 else storage
    host = sk.quantize(sk.compress(w), short)
    w24 = sk.quantize(sk.compress(w).to(DEVICE), short)
    assert w24.layout == "tile64"
    for name, tensor in w24.rowmajor().tensors.items():
        assert_same(tensor.view(torch.uint8), host.tensors[name].view(torch.uint8), name)
    numbers = sk.dequantize(host.to(torch.float32), layout="rowmajor").to_dense().double()
    bias = random_input((520,), dtype, seed=4)
    for tokens in (1, 8, 64, 65, 300):
        x = random_input((tokens, in_features), dtype)
        y = sk.linear(x.to(DEVICE), w24, bias.to(DEVICE), "silu")
        told = sk.explain(x.to(DEVICE), w24)
        assert told.backend == "cuda"
        if "W8A16" in told.reason:
            assert tokens <= 64
            z = x.double() @ numbers.t() + bias.double()
            y64 = torch.nn.functional.silu(z)
            magnitude = x.double().abs() @ numbers.abs().t()
            bound = 2.0**-11 * magnitude + 2 * ROUNDOFF[dtype] * y64.abs() + 1e-5
        else:
            assert "W8A8" in told.reason
            q, scale = quantize_rows.quantize_torch(x, storage)
            y64 = cpu.quantized_linear(q, scale, host, bias, "silu").double()
            scales = scale.double()[:, None] * host.tensors["weight_scale"].double().view(1, -1)
            levels = numbers.abs() / host.tensors["weight_scale"].double()
            share = 2.0**-8 if storage == E4M3 else 2.0**-20
            bound = 1.2 * share * (q.double().abs() @ levels.t()) * scales
            bound += 2 * ROUNDOFF[dtype] * y64.abs() + 1e-5
        assert_within(y, y64, bound)
    empty = sk.linear(torch.empty(0, in_features, dtype=dtype, device=DEVICE), w24)
    assert empty.shape == (0, 520) and empty.dtype == dtype


@pytest.mark.parametrize("storage", STORAGES)
def test_linear_quantized_gives_the_bits_of_linear(storage):
    needs_hopper()
    w = random_weight(520, 1044, BF16).to(DEVICE)
    w24 = sk.quantize(sk.compress(w), "fp8" if storage == E4M3 else storage)
    for shape in ((300, 1044), (2, 100, 1044)):
        x = random_input(shape, BF16).to(DEVICE)
        q, scale = sk.quantize_rows(x, storage)
        y = sk.linear_quantized(q, scale, w24)
        assert y.shape == (*shape[:-1], 520)
        assert_same(y, sk.linear(x, w24), f"{shape}")
    one = sk.linear_quantized(q[0, :1], scale[0, :1], w24)
    assert one.shape == (1, 520)
    none = sk.linear_quantized(q[0, :0], scale[0, :0], w24)
    assert none.shape == (0, 520) and none.dtype == BF16


def test_the_precise_backend():
    needs_hopper()
    w = random_weight(512, 2048, BF16).to(DEVICE)
    x = random_input((200, 2048), BF16).to(DEVICE)
    fp8, int8 = (sk.quantize(sk.compress(w), storage) for storage in ("fp8", "int8"))
    told = sk.explain(x, fp8, backend="cuda-precise")
    assert "promoted" in told.config and "float32" in told.reason
    y, fast = sk.linear(x, fp8, backend="cuda-precise"), sk.linear(x, fp8)
    assert (y - fast).abs().max() <= 0.02 * fast.abs().max()
    with pytest.raises(NotImplementedError, match="exact"):
        sk.linear(x, int8, backend="cuda-precise")
    with pytest.raises(NotImplementedError, match="quantised weights"):
        sk.linear(x, sk.compress(w), backend="cuda-precise")


@pytest.mark.parametrize("storage", STORAGES)
def test_a_graph_captures_all_of_it(storage):
    """Quantisation, the product and its workspace, replayed with other numbers."""
    needs_hopper()
    w = random_weight(1032, 4096, BF16).to(DEVICE)
    w24 = sk.quantize(sk.compress(w), "fp8" if storage == E4M3 else storage)
    for tokens in (4, 300):
        x = random_input((tokens, 4096), BF16).to(DEVICE)
        sk.linear(x, w24)  # kernels are loaded at their first launch
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = sk.linear(x, w24)
        for seed in (7, 8):
            x.copy_(random_input((tokens, 4096), BF16, seed=seed))
            graph.replay()
            torch.cuda.synchronize()
            assert_same(y, sk.linear(x, w24), f"{tokens} tokens, replayed")


@pytest.mark.parametrize("group", [64, 128, 1024])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_linear_of_int4_at_every_number_of_tokens(dtype, group):
    """Widened for x as it is: with more than 16 tokens and scales of groups, and with more than 512
    in memory, with numbers of 16 bits."""
    needs_hopper()
    w = sk.compress(random_weight(520, 1024, dtype))
    host, w24 = sk.quantize(w, "int4", group=group), sk.quantize(w.to(DEVICE), "int4", group=group)
    assert w24.layout == "tile64"
    bias = random_input((520,), dtype, seed=4)
    for tokens in (1, 16, 17, 64, 200, 600):
        exact = tokens <= 16 or tokens <= 512 and group == 1024
        of = host.to(torch.float32) if exact else host
        numbers = sk.dequantize(of, layout="rowmajor").to_dense().double()
        x = random_input((tokens, 1024), dtype)
        y = sk.linear(x.to(DEVICE), w24, bias.to(DEVICE), "relu")
        assert sk.explain(x.to(DEVICE), w24).backend == "cuda"
        y64 = (x.double() @ numbers.t() + bias.double()).relu()
        magnitude = x.double().abs() @ numbers.abs().t()
        assert_within(y, y64, 2.0**-11 * magnitude + 2 * ROUNDOFF[dtype] * y64.abs() + 1e-5)

"""quantize_rows, rms_norm_quantize, silu_mul_quantize: the rule, the fused forms, the kernels."""

import math

import numpy as np
import pytest
import torch

import sparsekern as sk
from sparsekern import _native
from sparsekern.backends import quantize_rows as rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STORAGES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
LIMITS = {"fp8": 448.0, "int8": 127.0}
# What the kernels cut differently: warps of a row, chunks of a thread, several rows in a block, an
# element at a time, and rows that they read twice.
FEATURES = (0, 1, 8, 24, 100, 512, 520, 1024, 4096, 4100, 8192, 14336, 28672, 40000, 65544)


def name_of(dtype):
    return str(STORAGES[dtype]).removeprefix("torch.")


def normal(*shape, dtype=torch.bfloat16, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)


def same(a, b):
    """Equal bits, NaN too."""
    a, b = (torch.atleast_1d(t).contiguous() for t in (a, b))
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def levels(dtype):
    """Every finite level, and whether its last bit is 0, in ascending order."""
    if dtype == "int8":
        numbers = torch.arange(-127, 128).double()
        return numbers, numbers.long() % 2 == 0
    bits = torch.arange(256, dtype=torch.int16)
    numbers = bits.to(torch.uint8).view(torch.float8_e4m3fn).double()
    finite = numbers.isfinite() & ~((numbers == 0) & (bits > 127))
    numbers, even = numbers[finite], bits[finite] % 2 == 0
    order = numbers.argsort()
    return numbers[order], even[order]


def nearest(value, numbers, even):
    """The nearest level, of two as near the one whose last bit is 0."""
    distance = (numbers - value).abs()
    close = distance == distance.min()
    return numbers[close & even if int(close.sum()) > 1 else close][0].item()


# ---- the rule ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STORAGES)
def test_by_hand(dtype):
    limit = LIMITS[dtype]
    x = torch.tensor([[limit, -limit / 2, 0.0, 1.0], [2 * limit, 2.0, -6.0, 0.0], [0.0] * 4])
    q, scale = sk.quantize_rows(x, dtype)
    assert scale.tolist() == [1.0, 2.0, 1.0] and q.dtype == STORAGES[dtype]
    halved = -limit / 2 if dtype == "fp8" else -64.0  # 63.5 rounds to the even 64
    assert q.float().tolist() == [[limit, halved, 0, 1], [limit, 1, -3, 0], [0] * 4]


@pytest.mark.parametrize("dtype", STORAGES)
def test_every_level_is_the_nearest_one(dtype):
    numbers, even = levels(dtype)
    x = torch.cat((normal(3, 200), normal(1, 200, seed=1) * 1e-30, normal(1, 200, seed=2) * 1e30))
    q, scale = sk.quantize_rows(x, dtype)
    for row in range(len(x)):
        most = np.float32(x[row].float().abs().max().item())
        wanted = most / np.float32(LIMITS[dtype])
        assert scale[row].item() == wanted
        inverse = np.float32(1) / wanted
        for column in range(x.shape[1]):
            ratio = float(np.float32(x[row, column].item()) * inverse)
            assert q[row, column].float().item() == nearest(ratio, numbers, even)


def test_ties_go_to_the_even_level():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert sk.quantize_rows(x, "int8")[0].tolist() == [[127, 0, 2, 2, 0, -2]]
    x = torch.tensor([[448.0, 17.0, 19.0, -17.0]])  # levels of 2 between 16 and 32
    assert sk.quantize_rows(x, "fp8")[0].float().tolist() == [[448, 16, 20, -16]]


@pytest.mark.parametrize("dtype", STORAGES)
def test_zeros_small_numbers_nan_and_infinity(dtype):
    x = normal(6, 64, dtype=torch.float32)
    x[1], x[2], x[3, 5], x[4, 0], x[5] = 0, x[2] * 1e-42, float("nan"), -float("inf"), x[0]
    q, scale = sk.quantize_rows(x, dtype)
    assert scale[1] == 1 and not q[1].float().any()
    assert scale[2] == torch.finfo(torch.float32).tiny and q[2].float().isfinite().all()
    assert scale[3:5].isnan().all() and not q[3:5].float().any()
    assert same(q[5], q[0]) and scale[5] == scale[0], "no token touches another"
    w24 = sk.quantize(sk.prune_compress(normal(8, 64, dtype=torch.float32)), dtype)
    y = sk.linear_quantized(q, scale, w24)
    assert y[3:5].isnan().all() and y[:3].isfinite().all() and y[5].isfinite().all()


@pytest.mark.parametrize("dtype", STORAGES)
@pytest.mark.parametrize("kind", DTYPES, ids=str)
def test_shapes_and_strides(dtype, kind):
    x = normal(3, 4, 48, dtype=kind)
    q, scale = sk.quantize_rows(x, dtype)
    assert q.shape == x.shape and scale.shape == (3, 4) and q.is_contiguous()
    flat = sk.quantize_rows(x.reshape(12, 48), dtype)
    assert same(q.view(12, 48), flat[0]) and same(scale.view(12), flat[1])
    for other in (x.transpose(0, 1), x[:, :, ::2], x[:, 1], x[1, 2], x[:0], x[..., :0]):
        found, of_rows = sk.quantize_rows(other, dtype)
        wanted, wanted_scale = sk.quantize_rows(other.contiguous(), dtype)
        assert same(found, wanted) and same(of_rows, wanted_scale)
        assert found.shape == other.shape and of_rows.shape == other.shape[:-1]
    padded, of_rows = rows.quantize(x[0], name_of(dtype), 64)
    assert padded.stride(0) == 64 and same(padded, q[0]) and same(of_rows, scale[0])


# ---- fused ---------------------------------------------------------------------------------------


def reference_norm(h, weight, eps):
    h = h.double()
    return h * weight.double() / (h.square().mean(-1, keepdim=True) + eps).sqrt()


def close(y, y64):
    """Within one rounding of the float64 result, and a little of float32."""
    bound = 1.01 * torch.finfo(y.dtype).eps / 2 * y64.abs() + 1e-6 * y64.abs().max()
    return bool(((y.double() - y64).abs() <= bound).all())


def check_fused(dtype, kind, tokens, features, device):
    x, weight = normal(tokens, features, dtype=kind), normal(features, dtype=kind, seed=1)
    residual, up = (normal(tokens, features, dtype=kind, seed=seed) for seed in (2, 3))
    x, weight, residual, up = (t.to(device) for t in (x, weight, residual, up))
    h = (x.float() + residual.float()).to(kind)
    found = {
        "norm": (
            sk.rms_norm_quantize(x, weight, dtype, eps=1e-5, with_y=True),
            reference_norm(x, weight, 1e-5),
        ),
        "residual": (
            sk.rms_norm_quantize(x, weight, dtype, residual=residual, with_y=True),
            reference_norm(h, weight, 1e-6),
        ),
        "gated": (
            sk.silu_mul_quantize(x, up, dtype, with_y=True),
            torch.nn.functional.silu(x.double()) * up.double(),
        ),
        "one tensor": (
            sk.silu_mul_quantize(torch.cat((x, up), 1), None, dtype, with_y=True),
            torch.nn.functional.silu(x.double()) * up.double(),
        ),
    }
    assert same(residual, h), "the sum is written back"
    for name, ((q, scale, y), y64) in found.items():
        where = f"{name} {dtype} {kind} {tokens}x{features}"
        assert close(y, y64) if y.numel() else y.shape == y64.shape, where
        wanted, wanted_scale = rows.quantize_torch(y, str(q.dtype).removeprefix("torch."))
        assert same(q, wanted) and same(scale, wanted_scale), where
    q, scale, y = sk.silu_mul_quantize(x, up, dtype)
    assert y is None and same(q, found["gated"][0][0]) and same(scale, found["gated"][0][1])
    q, scale, y = sk.rms_norm_quantize(x, weight, dtype, eps=1e-5)
    assert y is None and same(q, found["norm"][0][0]) and same(scale, found["norm"][0][1])


@pytest.mark.parametrize("dtype", STORAGES)
@pytest.mark.parametrize("kind", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, features", [(1, 8), (5, 100), (3, 520), (0, 16)])
def test_fused_forms_quantise_what_they_compute(dtype, kind, tokens, features):
    check_fused(dtype, kind, tokens, features, "cpu")


def test_a_residual_of_any_strides_is_changed_in_place():
    x, weight = normal(2, 3, 16), normal(16, seed=1)
    wide = normal(3, 2, 16, seed=2)
    wanted = (x.float() + wide.transpose(0, 1).float()).bfloat16()
    q, scale, _ = sk.rms_norm_quantize(x, weight, "int8", residual=wide.transpose(0, 1))
    assert same(wide.transpose(0, 1), wanted)
    for shared in (
        normal(1, 1, 16).expand(2, 3, 16),
        normal(99).as_strided((2, 3, 16), (24, 8, 1)),
    ):
        before = shared.clone()
        with pytest.raises(ValueError, match="residual with memory for each .*residual.clone()"):
            sk.rms_norm_quantize(x, weight, "int8", residual=shared)
        assert same(shared, before)
    alone = sk.rms_norm_quantize(wanted, weight, "int8")
    assert same(q, alone[0]) and same(scale, alone[1]) and q.shape == x.shape


# ---- errors --------------------------------------------------------------------------------------


def test_errors_name_the_argument():
    x, weight = normal(2, 16), normal(16)
    grad = x.clone().requires_grad_()
    cases = [
        (lambda: sk.quantize_rows(x, "fp4"), ValueError, "dtype 'fp8' or 'int8', got 'fp4'"),
        (lambda: sk.quantize_rows([1.0], "fp8"), TypeError, "x of type Tensor, got list"),
        (lambda: sk.quantize_rows(x.double(), "fp8"), TypeError, "x of dtype .*got torch.float64"),
        (lambda: sk.quantize_rows(x.sum(), "fp8"), ValueError, r"x \[\.\.\., features\]"),
        (lambda: sk.quantize_rows(grad, "fp8"), ValueError, "without gradients"),
        (lambda: sk.rms_norm_quantize(x, weight[:8], "int8"), ValueError, r"weight of shape .*16"),
        (lambda: sk.rms_norm_quantize(x, weight.float(), "int8"), TypeError, "weight.dtype"),
        (lambda: sk.rms_norm_quantize(x, weight, "int8", eps=-1), ValueError, "eps finite"),
        (lambda: sk.rms_norm_quantize(x, weight, "int8", eps=math.nan), ValueError, "got nan"),
        (
            lambda: sk.rms_norm_quantize(x, weight, "int8", residual=x[:1]),
            ValueError,
            r"residual.shape == x.shape \(\[2, 16\]\)",
        ),
        (lambda: sk.silu_mul_quantize(x, x.float(), "fp8"), TypeError, "up.dtype == gate.dtype"),
        (lambda: sk.silu_mul_quantize(x[:, :15], None, "fp8"), ValueError, "2 \\* features"),
        (lambda: sk.silu_mul_quantize(grad, x, "fp8"), ValueError, "under torch.no_grad"),
        (lambda: sk.quantize_rows(x.to_sparse(), "fp8"), NotImplementedError, "a dense x, got"),
        (
            lambda: sk.rms_norm_quantize(x, weight.to_sparse(), "int8"),
            NotImplementedError,
            "a dense weight",
        ),
        (
            lambda: sk.silu_mul_quantize(x, x.to_sparse(), "int8"),
            NotImplementedError,
            r"a dense up, .*Call up.to_dense\(\)",
        ),
    ]
    for call, kind, words in cases:
        with pytest.raises(kind, match=rf"^sparsekern\.\w+: expected .*{words}"):
            call()
    with torch.no_grad():
        assert same(sk.quantize_rows(grad, "fp8")[0], sk.quantize_rows(x, "fp8")[0])


# ---- registered ----------------------------------------------------------------------------------


def op_arguments(device="cpu"):
    x, weight, up = (normal(*s, seed=i).to(device) for i, s in enumerate([(4, 32), (32,), (4, 32)]))
    ops = torch.ops.sparsekern
    yield ops.quantize_rows, (x, "float8_e4m3fn")
    yield ops.rms_norm_quantize, (x, weight, 1e-6, "int8", None, False)
    yield ops.rms_norm_quantize, (x, weight, 1e-6, "int8", up, True)
    yield ops.silu_mul_quantize, (x, up, "float8_e4m3fn", True)
    yield ops.silu_mul_quantize, (x, None, "int8", False)


def test_ops_are_registered_as_they_behave():
    for op, arguments in op_arguments():
        torch.library.opcheck(op, arguments)


def test_meta_tensors_have_the_shapes_of_the_results():
    x = torch.empty(2, 3, 16, dtype=torch.bfloat16, device="meta")
    q, scale = sk.quantize_rows(x, "fp8")
    assert (q.shape, q.dtype, scale.shape) == (x.shape, torch.float8_e4m3fn, (2, 3))
    q, scale, y = sk.silu_mul_quantize(x, None, "int8", with_y=True)
    assert q.shape == y.shape == (2, 3, 8) and y.dtype == x.dtype and q.device.type == "meta"


def a_layer(x, residual, weight, w24, bias):
    q, scale, _ = sk.rms_norm_quantize(x, weight, "int8", residual=residual)
    y = sk.linear_quantized(q, scale, w24, bias, "silu")
    q, scale = sk.quantize_rows(y, "int8")
    return q, scale, y + 1


def check_compiled(device, backend):
    x, residual = (normal(4, 64, seed=seed).to(device) for seed in (0, 1))
    weight, bias = normal(64, seed=2).to(device), normal(64, seed=3).to(device)
    w24 = sk.quantize(sk.prune_compress(normal(64, 64, seed=4).to(device)), "int8")
    other = residual.clone()
    with torch.no_grad():
        wanted = a_layer(x, residual, weight, w24, bias)
        compiled = torch.compile(a_layer, fullgraph=True, backend=backend)
        found = compiled(x, other, weight, w24, bias)
    assert same(residual, other)
    for a, b in zip(found, wanted):
        assert same(a, b)


def test_compiles_as_one_graph():
    check_compiled("cpu", "aot_eager")


def test_compiles_as_one_graph_for_any_number_of_tokens():
    """Where sizes are symbols, no text of a message may be made of them."""
    weight, bias = normal(16), normal(8)
    w24 = sk.quantize(sk.prune_compress(normal(8, 16)), "int8")

    def chain(x):
        q, scale, y = sk.rms_norm_quantize(x, weight, "int8", residual=x.clone(), with_y=True)
        gated = sk.silu_mul_quantize(x, y, "fp8")
        halves = sk.silu_mul_quantize(x, None, "int8")
        return (sk.linear_quantized(q, scale, w24, bias, "silu"), *gated[:2], *halves[:2])

    torch._dynamo.reset()
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 9, 2):
        x = normal(tokens, 16, seed=tokens)
        assert all(same(a, b) for a, b in zip(compiled(x), chain(x), strict=True))


# ---- on a GPU ------------------------------------------------------------------------------------


def needs_native():
    if not _native.available():
        pytest.skip(_native.reason())
    assert rows.native(torch.empty(1, 8, dtype=torch.float16, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", STORAGES)
@pytest.mark.parametrize("kind", DTYPES[1:], ids=str)
def test_kernel_gives_the_bits_of_the_rule(dtype, kind):
    needs_native()
    for features in FEATURES:
        for tokens in (1, 5, 300):
            x = normal(tokens, features, dtype=kind, seed=features)
            if features > 4 and tokens > 4:
                x[1], x[2, 3], x[3, 1], x[4] = 0, float("nan"), float("inf"), x[4] * 2.0**-14
            wanted = rows.quantize_torch(x, name_of(dtype))
            found = sk.quantize_rows(x.cuda(), dtype)
            where = f"{dtype} {kind} {tokens}x{features}"
            assert same(found[0].cpu(), wanted[0]), where
            assert torch.equal(found[1].cpu().nan_to_num(-1), wanted[1].nan_to_num(-1)), where


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", STORAGES)
@pytest.mark.parametrize("kind", DTYPES[1:], ids=str)
def test_every_finite_16_bit_number_is_rounded_right(dtype, kind):
    needs_native()
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(kind)
    x = x[x.isfinite()]
    x = torch.cat((x, x[: -len(x) % 8])).view(8, -1)
    wanted = rows.quantize_torch(x, name_of(dtype))
    found = sk.quantize_rows(x.cuda(), dtype)
    assert same(found[0].cpu(), wanted[0]) and same(found[1].cpu(), wanted[1])
    by_size = x[:, x[0].float().abs().argsort()].T.contiguous()  # rows of near magnitudes
    wanted = rows.quantize_torch(by_size, name_of(dtype))
    found = sk.quantize_rows(by_size.cuda(), dtype)
    assert same(found[0].cpu(), wanted[0]) and same(found[1].cpu(), wanted[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", STORAGES)
def test_rows_of_any_address_and_stride(dtype):
    needs_native()
    base = normal(40, 1100, dtype=torch.float16).cuda()
    for x in (
        base[:, :1024],
        base[:, 8:1032],
        base[:, 1:1025],
        base[:, 3:1000],
        base[::2, :512],
        base.flatten()[1 : 1 + 30 * 512].view(30, 512),
        base[:, ::2],
    ):
        found, wanted = sk.quantize_rows(x, dtype), sk.quantize_rows(x.contiguous(), dtype)
        assert same(found[0], wanted[0]) and same(found[1], wanted[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", STORAGES)
@pytest.mark.parametrize("kind", DTYPES[1:], ids=str)
def test_fused_kernels_quantise_what_they_compute(dtype, kind):
    needs_native()
    for features in FEATURES[1:]:
        for tokens in (0, 1, 7, 150):
            check_fused(dtype, kind, tokens, features, "cuda")


@pytest.mark.gpu
def test_nan_and_infinity_through_a_norm():
    needs_native()
    x, weight = normal(5, 4096).cuda(), normal(4096, seed=1).cuda()
    x[1, 7], x[3, 9] = float("nan"), float("inf")
    for dtype in STORAGES:
        q, scale, _ = sk.rms_norm_quantize(x, weight, dtype)
        assert scale[[1, 3]].isnan().all() and not q[[1, 3]].float().any()
        assert scale[[0, 2, 4]].isfinite().all()


@pytest.mark.gpu
def test_a_token_has_the_same_bits_in_every_batch():
    needs_native()
    for features in (4096, 8192, 28672, 4100):
        x, weight = normal(700, features).cuda(), normal(features, seed=1).cuda()
        q, scale, y = sk.rms_norm_quantize(x, weight, "fp8", with_y=True)
        for part in (slice(0, 1), slice(13, 20), slice(200, 700)):
            found = sk.rms_norm_quantize(x[part], weight, "fp8", with_y=True)
            assert same(found[0], q[part]) and same(found[1], scale[part])
            assert same(found[2], y[part])


@pytest.mark.gpu
def test_nothing_else_is_written():
    """q, y and the scales in the middle of guards; features that end within a chunk and a warp."""
    needs_native()
    for features in (8, 520, 4100, 4104):
        x = normal(9, features).cuda()
        q = torch.full((11, features + 24), 0x55, dtype=torch.uint8, device="cuda")
        scale = torch.full((11,), -5.0, device="cuda")
        inner = q.view(torch.int8)[1:10, 8 : 8 + features]
        rows._launch(x, "int8", inner, scale[1:10])
        wanted = sk.quantize_rows(x, "int8")
        assert same(inner, wanted[0]) and same(scale[1:10], wanted[1])
        q.view(torch.int8)[1:10, 8 : 8 + features] = 0x55
        assert (q == 0x55).all() and scale[0] == scale[10] == -5


@pytest.mark.gpu
def test_captured_and_replayed_with_new_data():
    needs_native()
    x, weight = normal(64, 4096).cuda(), normal(4096, seed=1).cuda()
    residual = torch.zeros_like(x)
    sk.rms_norm_quantize(x, weight, "fp8", residual=residual.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q, scale, _ = sk.rms_norm_quantize(x, weight, "fp8", residual=residual)
    x.copy_(normal(64, 4096, seed=7))
    residual.zero_()
    graph.replay()
    wanted = sk.rms_norm_quantize(x, weight, "fp8")
    assert same(q, wanted[0]) and same(scale, wanted[1]) and same(residual, x)


@pytest.mark.gpu
def test_compiled_on_a_gpu():
    needs_native()
    check_compiled("cuda", "inductor")

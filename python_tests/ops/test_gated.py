"""gated_linear: silu(x · Gᵀ) · (x · Uᵀ), composed on every backend and fused on Hopper."""

import pytest
import torch

import sparsekern as sk
from python_tests.linear_cases import (
    DTYPES,
    assert_within,
    error_bound,
    random_input,
    random_weight,
)
from sparsekern import reference
from sparsekern.backends.cuda import linear as cuda_backend
from sparsekern.formats.sparse24 import compress
from sparsekern.formats.tile64 import pack

BF16 = torch.bfloat16
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, BF16: 2.0**-8}


def problem(tokens, out_features, in_features, dtype):
    gate = random_weight(out_features, in_features, dtype) * 0.25
    up = random_weight(out_features, in_features, dtype, seed=7)
    return random_input((tokens, in_features), dtype), gate, up


def bound(x, gate, up, dtype):
    """Errors of the two halves, each rounded to dtype in the composed form, and of the product."""
    g64 = reference.linear(x, gate, activation="silu")
    u64 = reference.linear(x, up)
    g_error = error_bound(x, gate, None, g64, dtype)
    u_error = error_bound(x, up, None, u64, dtype)
    y64 = g64 * u64
    return g_error * u64.abs() + u_error * (g64.abs() + g_error) + 1.1 * ROUNDOFF[dtype] * y64.abs()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 8, 16), (5, 70, 36), (40, 33, 132)], ids=str)
def test_within_the_bound(size, dtype, device):
    x, gate, up = problem(*size, dtype)
    y = sk.gated_linear(x.to(device), compress(gate.to(device)), compress(up.to(device)))
    assert y.dtype == dtype and y.is_contiguous()
    assert_within(y, reference.gated_linear(x, gate, up), bound(x, gate, up, dtype))


def test_reference_is_the_two_layers():
    x, gate, up = problem(3, 4, 8, torch.float64)
    expected = torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())
    torch.testing.assert_close(reference.gated_linear(x, gate, up), expected)


@pytest.mark.parametrize("leading", [(), (0,), (2, 3)], ids=str)
def test_leading_dimensions(leading, device):
    x, gate, up = problem(6, 8, 16, torch.float32)
    x = x[: torch.Size(leading).numel()].reshape(*leading, 16)
    y = sk.gated_linear(x.to(device), compress(gate.to(device)), compress(up.to(device)))
    assert y.shape == (*leading, 8)
    assert_within(y, reference.gated_linear(x, gate, up), bound(x, gate, up, torch.float32))


def test_gradient_for_x(device):
    x, gate, up = problem(3, 8, 16, torch.float32)
    ours = x.clone().to(device).requires_grad_()
    sk.gated_linear(ours, compress(gate.to(device)), compress(up.to(device))).sum().backward()
    exact = x.double().requires_grad_()
    reference.gated_linear(exact, gate, up).sum().backward()
    torch.testing.assert_close(ours.grad.double().cpu(), exact.grad, rtol=1e-4, atol=1e-4)


def test_compile_fullgraph_and_the_registration(device):
    x, gate, up = problem(3, 8, 16, torch.float32)
    x, gate24, up24 = x.to(device), compress(gate.to(device)), compress(up.to(device))
    compiled = torch.compile(sk.gated_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, gate24, up24), sk.gated_linear(x, gate24, up24))
    gate_part = list(gate24.tensors.values()), gate24.spec.text
    arguments = (x, *gate_part, list(up24.tensors.values()), up24.spec.text)
    torch.library.opcheck(torch.ops.sparsekern.gated_linear.default, arguments)


def test_autocast_casts_x():
    x, gate, up = problem(3, 8, 16, BF16)
    with torch.autocast("cpu", dtype=BF16):
        y = sk.gated_linear(x.float(), compress(gate), compress(up))
    assert torch.equal(y, sk.gated_linear(x, compress(gate), compress(up)))


def test_errors():
    x, gate, up = problem(3, 8, 16, torch.float32)
    gate24, up24 = compress(gate), compress(up)
    for arguments, exception, pattern in (
        ((x, gate24, compress(up[:4])), ValueError, r"of one shape \(\[8, 16\]\), got \[4, 16\]"),
        ((x[:, :8], gate24, up24), ValueError, r"in_features \(16\)"),
        ((x, gate24, up24.to(BF16)), TypeError, r"weight\.dtype \(torch\.bfloat16\)"),
        ((x, gate, up24), TypeError, "Sparse24, got Tensor"),
        ((x, gate24, up), TypeError, "Sparse24, got Tensor"),
    ):
        with pytest.raises(exception, match=r"^sparsekern\.gated_linear: expected .*" + pattern):
            sk.gated_linear(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_fused_on_hopper(dtype, monkeypatch):
    if reason := cuda_backend.hopper_refusal(torch.cuda.current_device()):
        pytest.skip(reason)
    fused = []
    bind = cuda_backend.bind_gated
    monkeypatch.setattr(cuda_backend, "bind_gated", lambda *a: fused.append(1) or bind(*a))
    for out_features, in_features in ((1, 64), (70, 84), (520, 1032), (256 * 140 + 5, 128)):
        x, gate, up = problem(40, out_features, in_features, dtype)
        gate24, up24 = pack(compress(gate).to("cuda")), pack(compress(up).to("cuda"))
        y64, limit = reference.gated_linear(x, gate, up), bound(x, gate, up, dtype)
        for tokens in (1, 7, 8, 9, 16, 17, 32, 33, 40):
            del fused[:]
            on_gpu = x[:tokens].to("cuda")
            y = sk.gated_linear(on_gpu, gate24, up24)
            assert bool(fused) == (tokens <= 32)
            assert_within(y, y64[:tokens], limit[:tokens])
            for _ in range(5):
                assert torch.equal(sk.gated_linear(on_gpu, gate24, up24), y)


@pytest.mark.gpu
def test_fused_in_a_cuda_graph():
    if reason := cuda_backend.hopper_refusal(torch.cuda.current_device()):
        pytest.skip(reason)
    x, gate, up = problem(2, 70, 84, BF16)
    gate24, up24, x = pack(compress(gate).cuda()), pack(compress(up).cuda()), x.cuda()
    sk.gated_linear(x, gate24, up24)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sk.gated_linear(x, gate24, up24)
    x.copy_(random_input((2, 84), BF16, seed=9))
    graph.replay()
    assert torch.equal(y, sk.gated_linear(x, gate24, up24))

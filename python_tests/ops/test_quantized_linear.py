"""linear_quantized: exact sums of levels, scales, bias and activation, the op, its errors."""

import pytest
import torch

import sparsekern as sk
from python_tests.linear_cases import random_input, random_weight
from sparsekern.formats.sparse24 import Sparse24, compress, decompress
from sparsekern.ops.quantized_linear import explain_quantized

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STORAGES = ("float8_e4m3fn", "int8")
SHAPES = ((1, 64, 128), (3, 7, 4), (16, 70, 36), (33, 129, 132), (0, 8, 16), (2, 5, 0))


def weight(out_features, in_features, storage, dtype=torch.bfloat16, seed=0):
    """Random levels with random scales."""
    w = random_weight(out_features, in_features, torch.float32, seed)
    return sk.quantize(compress(w).to(dtype), storage)


def levels_of(w24):
    """Dense levels, float64."""
    plain = Sparse24(w24.rowmajor().values.float(), w24.rowmajor().metadata, w24.shape)
    return decompress(plain).double()


def expected(x, x_scale, w24, bias=None, activation=None):
    """The specification by another way: int64, or float64 rounded to float32."""
    dense = levels_of(w24.cpu())
    if x.dtype == torch.int8:
        sums = (x.cpu().long() @ dense.long().t()).float()
    else:
        sums = (x.cpu().double() @ dense.t()).float()
    z = sums * w24.tensors["weight_scale"].cpu().view(-1) * x_scale.cpu().reshape(*x.shape[:-1], 1)
    z = z if bias is None else z + bias.cpu().float()
    functions = {"relu": torch.relu, "silu": torch.nn.functional.silu}
    functions["gelu"] = torch.nn.functional.gelu
    return (functions[activation](z) if activation else z).to(w24.dtype)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_specification(storage, dtype, shape):
    tokens, out_features, in_features = shape
    w24 = weight(out_features, in_features, storage, dtype)
    q, scale = sk.quantize_rows(random_input((tokens, in_features), dtype), storage)
    bias = random_input((out_features,), dtype, seed=2)
    for case in ((None, None), (bias, None), (bias, "relu"), (None, "gelu"), (bias, "silu")):
        y = sk.linear_quantized(q, scale, w24, *case)
        assert y.dtype == dtype and y.is_contiguous()
        assert torch.equal(y, expected(q, scale, w24, *case))


def test_largest_sums_of_int8_are_exact():
    in_features = 4096
    w = compress(torch.tensor([127.0, 127, 0, 0, -127, 0, 0, 126]).repeat(2, in_features // 8))
    w24 = sk.quantize(w, "int8", scale=torch.ones(2, 1))
    x = torch.full((2, in_features), 127, dtype=torch.int8)
    x[1, ::4] = -127
    y = sk.linear_quantized(x, torch.ones(2), w24)
    assert torch.equal(y.double(), (x.long() @ levels_of(w24).long().t()).float().double())


@pytest.mark.parametrize("storage", STORAGES)
def test_stands_for_the_product_of_the_numbers(storage):
    x, w24 = random_input((5, 256), torch.float32), weight(40, 256, storage, torch.float32)
    q, scale = sk.quantize_rows(x, storage)
    y64 = (q.double() * scale[:, None].double()) @ decompress(w24).double().t()
    torch.testing.assert_close(
        sk.linear_quantized(q, scale, w24).double(), y64, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("storage", STORAGES)
def test_shapes_strides_and_scales(storage):
    w24 = weight(12, 32, storage)
    q, scale = sk.quantize_rows(random_input((2, 3, 32), torch.bfloat16), storage)
    y = sk.linear_quantized(q, scale, w24)
    assert y.shape == (2, 3, 12)
    assert torch.equal(sk.linear_quantized(q, scale[..., None], w24), y)
    assert torch.equal(sk.linear_quantized(q[0, 0], scale[0, 0], w24), y[0, 0])
    swapped = sk.linear_quantized(q.transpose(0, 1), scale.t(), w24)
    assert torch.equal(swapped, y.transpose(0, 1))


def test_errors_name_the_argument():
    w24 = weight(8, 16, "int8")
    q, scale = sk.quantize_rows(random_input((3, 16), torch.bfloat16), "int8")
    bias = torch.zeros(8, dtype=torch.bfloat16)
    call = sk.linear_quantized
    plain = compress(random_weight(8, 16, torch.bfloat16))
    int4 = sk.quantize(plain, "int4")
    cases = [
        (lambda: call(q, scale, plain), TypeError, "storage 'float8_e4m3fn' or 'int8', got 'bfl"),
        (lambda: call(q, scale, int4), TypeError, "got 'int4'"),
        (lambda: call(q.float(), scale, w24), TypeError, r"storage type \(torch.int8\)"),
        (lambda: call(q[:, :8], scale, w24), ValueError, r"in_features \(16\)"),
        (lambda: call(q, scale[:2], w24), ValueError, r"x_scale of shape .*\(\[3\]\), got \[2\]"),
        (lambda: call(q, scale.double(), w24), TypeError, "x_scale float32, got torch.float64"),
        (lambda: call(q, 1.0, w24), TypeError, "x_scale of type Tensor, got float"),
        (lambda: call(q, scale, w24, bias[:4]), ValueError, "bias of shape"),
        (lambda: call(q, scale, w24, bias.float()), TypeError, "bias.dtype == weight.dtype"),
        (lambda: call(q.to_sparse(), scale, w24), NotImplementedError, "a dense x, got"),
        (lambda: call(q, scale.to_sparse(), w24), NotImplementedError, "a dense x_scale"),
        (lambda: call(q, scale, w24, bias.to_sparse()), NotImplementedError, "a dense bias"),
        (lambda: call(q, scale, w24, None, "tanh"), ValueError, "activation in .*got 'tanh'"),
        (lambda: call(q, scale, w24, backend="cuda"), NotImplementedError, "backend 'cuda'"),
        (lambda: call(q, scale, w24, backend="tpu"), ValueError, "got 'tpu'"),
        (lambda: call(q, scale, w24, bias.requires_grad_()), ValueError, "bias.requires_grad"),
        (lambda: call(q, scale, "w"), TypeError, "Sparse24"),
    ]
    for function, kind, words in cases:
        with pytest.raises(kind, match=rf"^sparsekern\.linear_quantized: expected .*{words}"):
            function()
    with pytest.raises(TypeError, match="x.dtype == weight.dtype"):
        sk.linear(q, w24)


def test_explain_says_what_runs():
    w24 = weight(8, 16, "int8")
    q = torch.zeros(3, 16, dtype=torch.int8)
    assert str(explain_quantized(q, w24)).startswith("cpu (fp64_matmul, layout rowmajor)")
    with pytest.raises(NotImplementedError):
        explain_quantized(q, w24, backend="cuda")


def test_a_backend_without_such_kernels_is_not_asked(monkeypatch):
    class Plain:
        name = "test-plain"

        def supports(self, problem):
            raise AssertionError("asked")

        bind = explain = supports

    sk.register_backend(Plain(), "cpu", before="cpu")
    try:
        q, scale = sk.quantize_rows(random_input((3, 16), torch.bfloat16), "int8")
        assert sk.linear_quantized(q, scale, weight(8, 16, "int8")).shape == (3, 8)
    finally:
        from sparsekern.backends.registry import unregister_backend

        unregister_backend("test-plain")


@pytest.mark.parametrize("storage", STORAGES)
def test_registered_as_it_behaves(storage):
    w24 = weight(8, 16, storage)
    q, scale = sk.quantize_rows(random_input((3, 16), torch.bfloat16), storage)
    bias = random_input((8,), torch.bfloat16)
    arguments = (q, scale, list(w24.tensors.values()), w24.spec.text, bias, "relu", None)
    # torch's check of the schema compares arguments before and after, which it cannot in e4m3.
    some = ("test_faketensor", "test_aot_dispatch_dynamic")
    checks = ("test_schema", "test_autograd_registration", *some) if storage == "int8" else some
    op = torch.ops.sparsekern.linear_quantized
    torch.library.opcheck(op, arguments, test_utils=checks)
    y = torch.ops.sparsekern.linear_quantized(*arguments)
    assert torch.equal(y, sk.linear_quantized(q, scale, w24, bias, "relu"))
    meta = sk.linear_quantized(q.to("meta"), scale.to("meta"), w24.to("meta"))
    assert (meta.shape, meta.dtype) == ((3, 8), torch.bfloat16)


# ---- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 65, 300, 1030])
def test_on_a_gpu_as_on_the_cpu(storage, dtype, tokens):
    """int8 bit for bit; e4m3 with small whole numbers too, whatever the tensor cores keep."""
    w24 = weight(320, 512, storage, dtype)
    bias = random_input((320,), dtype, seed=2)
    if storage == "int8":
        q, scale = sk.quantize_rows(random_input((tokens, 512), dtype), storage)
    else:
        whole = compress(random_weight(320, 512, dtype, integers=True))
        of_channels = torch.exp2(torch.randint(-2, 3, (320, 1)).float())
        levels = whole.values.float().to(torch.float8_e4m3fn)
        tensors = {"values": levels, "metadata": whole.metadata, "weight_scale": of_channels}
        w24 = Sparse24.from_tensors(w24.spec, tensors)
        q = torch.randint(-2, 3, (tokens, 512)).float().to(torch.float8_e4m3fn)
        scale = torch.exp2(torch.randint(-2, 3, (tokens,)).float())
    on_gpu = q.cuda(), scale.cuda(), w24.cuda()
    wanted = sk.linear_quantized(q, scale, w24)
    assert torch.equal(sk.linear_quantized(*on_gpu).cpu(), wanted)
    wanted = sk.linear_quantized(q, scale, w24, bias, "relu")
    y = sk.linear_quantized(*on_gpu, bias.cuda(), "relu").cpu()
    torch.testing.assert_close(y, wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.gpu
def test_strides_that_kernels_do_not_take_and_other_streams():
    w24 = weight(128, 256, "int8").cuda()
    base = torch.randint(-127, 128, (40, 300), dtype=torch.int8, device="cuda")
    scale = torch.rand(40, device="cuda") + 0.5
    for x in (base[:, :256], base[:, 1:257], base[:, 16:272], base.t()[:256].t()):
        wanted = sk.linear_quantized(x.contiguous(), scale, w24)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            y = sk.linear_quantized(x, scale, w24)
        stream.synchronize()
        assert torch.equal(y, wanted)

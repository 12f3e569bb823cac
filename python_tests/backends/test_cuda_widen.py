"""Weights of 8 and 4 bits that are widened in memory: the copy byte by byte, who waits for it, and
the whole layer with so many tokens that it is made: more than 64, of int4 more than 512."""

import pytest
import torch

import sparsekern as sk
from python_tests.backends.cuda_cases import BF16, DEVICE, F16, needs_hopper, stream, workspace
from python_tests.linear_cases import (
    assert_same,
    assert_within,
    error_bound,
    random_input,
    random_weight,
)
from python_tests.widen_cases import E4M3, INT4, INT8, KINDS, SHAPES, assert_widened, packed
from sparsekern import _native, reference
from sparsekern.backends.cuda import linear as cuda_backend
from sparsekern.formats.layouts import WeightSpec
from sparsekern.formats.scaled import SCALE
from sparsekern.formats.sparse24 import Sparse24, compress, decompress, of_levels
from sparsekern.formats.tile64 import pack, scale_group
from sparsekern.nn.sparse_linear import SparseLinear

pytestmark = pytest.mark.gpu

TOKENS = (65, 100, 1000)
MANY = 1100  # with which int4 is widened in memory, too


@pytest.fixture(autouse=True)
def needs_kernels():
    if reason := cuda_backend.refusal(torch.cuda.current_device()):
        pytest.skip(reason)
    needs_hopper()


def name(dtype):
    return str(dtype).removeprefix("torch.")


def call(kernel, config, x, w24, y, widened, scaled=True):
    """One native launch that widens w24 into the bytes `widened`, then multiplies."""
    out_features, in_features = w24.shape
    group = scale_group(w24.spec)
    linear = _native.module().Linear(
        kernel=kernel,
        config=config,
        tokens=x.shape[0],
        out_features=out_features,
        in_features=in_features,
        x_stride=x.stride(0),
        y_stride=y.stride(0),
        dtype=name(x.dtype),
        stored_dtype=w24.spec.storage,
        scale_group=group,
    )
    assert linear.widened_bytes == widened.numel()
    linear(
        x=x.data_ptr(),
        values=w24.values.data_ptr(),
        metadata=w24.metadata.data_ptr(),
        y=y.data_ptr(),
        stream=stream(),
        channel_scale=w24.tensors[SCALE].data_ptr() if scaled and not group else 0,
        workspace=workspace().data_ptr() if linear.needs_workspace else 0,
        widened=widened.data_ptr(),
    )


def memory_for(w24):
    """Bytes that are NaN as numbers, and metadata that is none."""
    tiles = -(-w24.shape[0] // 64) * -(-w24.shape[1] // 64)
    return torch.full((tiles * 4608,), 0xFF, dtype=torch.uint8, device=DEVICE)


def rows_of_zeros(tokens, in_features, dtype):
    """x with rows of a multiple of 16 bytes."""
    wide = torch.zeros(tokens, -(-in_features // 8) * 8, dtype=dtype, device=DEVICE)
    return wide[:, :in_features]


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("storage, group", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES, (1100, 4132)], ids=str)
def test_widened_is_what_pack_makes_of_the_numbers(shape, storage, group, dtype):
    """Every code of the type, ragged rows and columns, padding."""
    host = packed(*shape, storage, group, dtype)
    w24, x = host.to(DEVICE), rows_of_zeros(72, shape[1], dtype)
    widened, y = memory_for(w24), torch.empty(72, shape[0], dtype=dtype, device=DEVICE)
    call("naive", 0, x, w24, y, widened)
    assert_widened(widened, host, f"{shape} {storage} {group} {dtype}")


@pytest.mark.parametrize("storage, group", [(E4M3, 0), (INT8, 0), (INT4, 128)])
def test_numbers_that_round_to_zero_are_not_negative(storage, group):
    host = packed(64, 256, storage, group, F16, 2.0**-30, 2.0**-29)
    w24, x = host.to(DEVICE), rows_of_zeros(72, 256, F16)
    widened, y = memory_for(w24), torch.empty(72, 64, dtype=F16, device=DEVICE)
    call("naive", 0, x, w24, y, widened)
    assert_widened(widened, host)


def integers(out_features, in_features, storage, group, dtype):
    """A packed weight of small whole levels with scales that are powers of two, and its numbers."""
    plain = compress(random_weight(out_features, in_features, torch.float32, integers=True))
    columns = (group or in_features) if storage == INT4 else 0
    spec = WeightSpec.of((out_features, in_features), storage, dtype=dtype, group=columns)
    count = -(-in_features // columns) if columns else 1
    scale = 2.0 ** (torch.arange(out_features * count).view(out_features, count) % 3 - 1)
    rows = of_levels(spec, plain.values, scale, plain.metadata)
    numbers = decompress(Sparse24(rows.numbers(dtype), rows.metadata, (out_features, in_features)))
    return pack(rows.to(DEVICE)), numbers.double().to(DEVICE)


def kernels():
    """Every (kernel, config) of weights of 16 bits with any number of tokens."""
    if not _native.available():
        return []
    return [
        (kernel, config["index"])
        for kernel, configs in _native.module().kernels().items()
        if kernel in ("prefill", "split", "mma", "naive")
        for config in configs
        if ("bfloat16",) * 3 in config["types"]
    ]


@pytest.mark.parametrize("storage, group", [(INT4, 128), (INT8, 0)])
def test_every_kernel_waits_for_the_copy(storage, group):
    """Large enough that widening takes longer than a start; the memory is NaN before every call."""
    w24, numbers = integers(8192, 4096, storage, group, BF16)
    x = random_input((130, 4096), BF16, integers=True).to(DEVICE)
    expected = (x.double() @ numbers.t()).to(BF16)
    widened = memory_for(w24)
    for kernel, config in kernels():
        y = torch.empty_like(expected)
        for _ in range(3):
            widened.fill_(0xFF)
            y.fill_(float("nan"))
            call(kernel, config, x, w24, y, widened)
            assert torch.equal(y, expected), (kernel, config)


def test_decode_waits_for_the_copy_too():
    w24, numbers = integers(8192, 4096, INT4, 64, BF16)
    x = random_input((60, 4096), BF16, integers=True).to(DEVICE)
    expected = (x.double() @ numbers.t()).to(BF16)
    widened = memory_for(w24)
    for config in range(len(_native.module().kernels()["decode"])):
        widened.fill_(0xFF)
        y = torch.full_like(expected, float("nan"))
        call("decode", config, x, w24, y, widened)
        assert torch.equal(y, expected), config


def backend(storage):
    """What widens: the default for int4, asked for with 8 bits."""
    return None if storage == INT4 else "cuda-a16"


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("storage, group", KINDS)
def test_the_layer_is_within_bounds_of_the_float64_result(storage, group, dtype, activation):
    for out_features, in_features in ((323, 1036), (70, 132), (1024, 2048)):
        host = packed(out_features, in_features, storage, group, dtype, 1e-3, 3e-3)
        rows = host.rowmajor()
        w = decompress(Sparse24(rows.numbers(dtype), rows.metadata, tuple(rows.shape))).double()
        w24, bias = host.to(DEVICE), random_input((out_features,), dtype, seed=2)
        for tokens in TOKENS if storage != INT4 else (513, MANY):
            x = random_input((tokens, in_features), dtype)
            told = sk.explain(x.to(DEVICE), w24, backend=backend(storage))
            assert told.config.startswith("widen + "), str(told)
            y = sk.linear(x.to(DEVICE), w24, bias.to(DEVICE), activation, backend=backend(storage))
            y64 = reference.linear(x.double(), w, bias.double(), activation)
            assert_within(y, y64, error_bound(x, w, bias, y64, dtype))


@pytest.mark.parametrize("storage, group", KINDS)
def test_the_layer_is_exact_on_small_integers(storage, group):
    w24, numbers = integers(520, 1156, storage, group, BF16)
    for shape in ((65, 1156), (2, 50, 1156), (2, MANY // 2, 1156), (1000, 1156)):
        x = random_input(shape, BF16, integers=True).to(DEVICE)
        y = sk.linear(x, w24, backend=backend(storage))
        assert_same(y, (x.double() @ numbers.t()).to(BF16), f"{storage} {shape}")
    odd = random_input((MANY, 2 * 1156), BF16, integers=True).to(DEVICE)[:, ::2]
    y = sk.linear(odd, w24, backend=backend(storage))
    assert_same(y, (odd.double() @ numbers.t()).to(BF16), "x with gaps")


def test_the_copy_lives_as_long_as_the_call():
    w24, _ = integers(4096, 4096, INT4, 128, BF16)
    x = random_input((MANY, 4096), BF16).to(DEVICE)
    sk.linear(x, w24)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = sk.linear(x, w24)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before <= y.nbytes + 1024


def test_a_graph_holds_several_layers_and_is_replayed():
    """Their copies take turns in the graph's memory; x changes between replays."""
    first, numbers = integers(1024, 1024, INT4, 128, BF16)
    second, others = integers(1024, 1024, INT8, 0, BF16)
    x = random_input((MANY, 1024), BF16, integers=True).to(DEVICE)

    def layers():
        here = sk.linear(x, first)
        there = sk.linear(x, second, backend="cuda-a16")
        return here, there, sk.linear(x, first)

    layers()  # what a first launch asks of the driver cannot be captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = layers()
    for seed in (5, 6, 7):
        x.copy_(random_input((MANY, 1024), BF16, seed=seed, integers=True))
        graph.replay()
        torch.cuda.synchronize()
        for y, w in zip(results, (numbers, others, numbers), strict=True):
            assert_same(y, (x.double() @ w.t()).to(BF16), f"seed {seed}")


def test_compiled_with_graphs_and_differentiable():
    w24, numbers = integers(512, 1024, INT4, 128, BF16)
    module = SparseLinear.from_sparse24(w24.rowmajor()).to(DEVICE)
    x = random_input((MANY, 1024), BF16, integers=True).to(DEVICE)
    expected = (x.double() @ numbers.t()).to(BF16)
    compiled = torch.compile(module, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        with torch.no_grad():
            assert_same(compiled(x).clone(), expected, "compiled")
    x.requires_grad_()
    y = sk.linear(x, w24)
    assert_same(y, expected, "with gradients")
    y.backward(torch.ones_like(y))
    assert x.grad is not None and x.grad.isfinite().all()


def test_two_streams_do_not_share_a_copy():
    w24, numbers = integers(4096, 2048, INT4, 128, BF16)
    x = random_input((MANY, 2048), BF16, integers=True).to(DEVICE)
    expected = (x.double() @ numbers.t()).to(BF16)
    sk.linear(x, w24)
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in range(2)], []
    for _ in range(8):
        for side in streams:
            with torch.cuda.stream(side):
                results.append(sk.linear(x, w24))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in results)

"""The CUDA kernels for weights in layout "tile64": numbers, memory, streams, graphs, devices."""

import threading
import time

import pytest
import torch

import sparsekern as sk
from python_tests.backends.cuda_cases import (
    BF16,
    DEVICE,
    F16,
    Problem,
    assert_exact,
    call,
    guarded,
    needs_hopper,
    same_bits,
    variants,
    workspace,
)
from python_tests.linear_cases import assert_within, error_bound, random_input, random_weight
from sparsekern import _native, reference
from sparsekern.backends.cuda import coefficients
from sparsekern.backends.cuda import linear as cuda_backend
from sparsekern.backends.cuda.variant import variant_name
from sparsekern.formats.sparse24 import compress
from sparsekern.formats.tile64 import pack
from sparsekern.nn.sparse_linear import SparseLinear

pytestmark = pytest.mark.gpu

DECODE_TOKENS = (0, 1, 7, 8, 9, 16, 17, 33, 64)
PREFILL_TOKENS = (*DECODE_TOKENS, 65, 100, 128, 200, 500, 1000)

# (out_features, in_features), with what each is there for.
SHAPES = (
    (1, 64),  # one row of one tile
    (7, 4),  # less than a core matrix, one group
    (64, 64),  # one whole tile
    (65, 68),  # one row and one group past it
    (200, 132),  # a superpanel of four panels, the last ragged
    (320, 576),  # a last superpanel of one panel; more steps than stages
    (520, 1032),  # a tail of 8 columns, deep in the ring
    (1100, 200),  # more rows than a cluster of four tiles
    (130, 27452),  # more steps than the stages of 16 thread blocks with two rings each
    (130, 8200),  # few tiles, whose in_features several clusters share
)


@pytest.fixture(autouse=True)
def needs_kernels():
    if reason := cuda_backend.refusal(torch.cuda.current_device()):
        pytest.skip(reason)


def layer(out_features=320, in_features=576, dtype=BF16, bias=True, seed=0):
    w24 = compress(random_weight(out_features, in_features, dtype, seed, integers=True))
    vector = random_input((out_features,), dtype, seed=5, integers=True) if bias else None
    return SparseLinear.from_sparse24(w24, vector).to(DEVICE).requires_grad_(False)


def integers(*shape, dtype=BF16, seed=1):
    return random_input(shape, dtype, seed=seed, integers=True).to(DEVICE)


def dense(module, x, activation=None):
    """The layer in float64, rounded once."""
    w = module.weight.to_dense()
    return reference.linear(x, w, module.bias, activation).to(x.dtype)


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_on_small_integers_in_every_variant(shape, dtype):
    p = Problem(max(PREFILL_TOKENS), *shape, dtype)
    for kernel, variant in variants():
        for tokens in DECODE_TOKENS if kernel == "decode" else PREFILL_TOKENS:
            assert_exact(kernel, variant, p, tokens, p.product)
            if kernel in ("prefill", "split"):
                assert_exact(kernel, variant, p, tokens, p.product, cut_k=False)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_exact_with_more_row_blocks_than_multiprocessors(dtype):
    """Decode walks several superpanels per thread block then."""
    p = Problem(100, 256 * 300 + 70, 192, dtype)
    for kernel, variant in variants():
        for tokens in (1, 16, 40, 60) if kernel == "decode" else (100,):
            assert_exact(kernel, variant, p, tokens, p.product)


@pytest.mark.parametrize("in_features", [132, 4100], ids=["short", "long"])
@pytest.mark.parametrize("out_features", [320, 323], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_epilogue_in_every_variant(dtype, out_features, in_features):
    p = Problem(130, out_features, in_features, dtype)
    with_bias = p.product + p.bias.double()
    for kernel, variant in variants():
        tokens = 60 if kernel == "decode" else 130
        run = (kernel, variant, p, tokens)
        assert_exact(*run, with_bias, bias=p.bias)
        assert_exact(*run, p.product + p.residual.double(), residual=p.residual)
        assert_exact(*run, p.product.relu(), activation="relu")
        everything = dict(bias=p.bias, residual=p.residual, activation="relu")
        assert_exact(*run, with_bias.relu() + p.residual.double(), **everything)
        assert_exact(*run, with_bias.relu() + p.residual.double(), **everything, cut_k=False)


@pytest.mark.parametrize("before, halves", [(0, True), (4, True), (0, False), (4, False)])
@pytest.mark.parametrize("shape", [(110, 4068), (64, 92), (323, 132), (65, 27452)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_rows_of_x_that_16_bytes_do_not_divide_in_every_variant(dtype, shape, before, halves):
    """All copied, or every other one, for two launches, which share a workspace."""
    p = Problem(5024, *shape, dtype, before=before)
    with_all = (p.product + p.bias.double()).relu() + p.residual.double()
    everything = dict(bias=p.bias, residual=p.residual, activation="relu", halves=halves)
    for kernel, variant in variants():
        few = (1, 2, 3, 7, 16, 31, 64)
        for tokens in few if kernel == "decode" else (*few, 65, 127, 200, 989, 5024):
            assert_exact(kernel, variant, p, tokens, p.product, halves=halves)
            assert_exact(kernel, variant, p, tokens, with_all, **everything)


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_random_within_bound_in_every_variant(dtype, activation):
    p = Problem(130, 323, 1032, dtype, integers=False)
    x, w, bias = p.x.cpu(), p.w.cpu(), p.bias.cpu()
    y64 = reference.linear(x, w, bias, activation)
    bound = error_bound(x, w, bias, y64, dtype)
    for kernel, variant in variants():
        tokens = 60 if kernel == "decode" else 130
        _, y = guarded(tokens, p.out_features, dtype)
        call(kernel, variant, p, tokens, y, bias=p.bias, activation=activation)
        assert_within(y, y64[:tokens], bound[:tokens])


@pytest.mark.parametrize("in_features", [576, 580])
def test_infinite_and_nan_tokens_stay_alone(in_features):
    module = layer(in_features=in_features, bias=False)
    for tokens in (8, 100, 3000):
        x = integers(tokens, in_features)
        expected = module(x)
        x[3] = float("nan")
        y = module(x)
        others = torch.arange(tokens, device=DEVICE) != 3
        assert y[3].isnan().all() and torch.equal(y[others], expected[others])


@pytest.mark.parametrize("size", [(500, 1100, 1032), (100, 130, 16392)], ids=str)
def test_bitwise_identical_over_100_runs(size):
    """And the counters of the workspace are zero again."""
    p = Problem(*size, BF16, integers=False)
    for kernel, variant in variants():
        tokens = 64 if kernel == "decode" else size[0]
        first = torch.full((tokens, p.out_features), float("nan"), dtype=BF16, device=DEVICE)
        call(kernel, variant, p, tokens, first)
        differences = torch.zeros((), dtype=torch.int64, device=DEVICE)
        y = torch.empty_like(first)
        for _ in range(100):
            y.fill_(float("nan"))
            call(kernel, variant, p, tokens, y)
            differences += (y.view(torch.int16) != first.view(torch.int16)).sum()
        assert not first.isnan().any() and differences.item() == 0, (kernel, variant)
        assert not workspace()[: _native.module().PREFILL_COUNTER_BYTES].any(), (kernel, variant)


def test_a_launch_reads_what_the_one_before_it_wrote():
    """Launches in a row, each on the output of the last, in two buffers that take turns: kernels
    that start early must wait with both. The weight permutes columns, so that all stays exact."""
    size, steps = 2048, 12
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    w = torch.zeros(size, size, dtype=BF16)
    w[torch.arange(size), order] = 1
    w24 = pack(compress(w).to(DEVICE))
    twice = order[order]
    expected_order = torch.arange(size)
    for _ in range(steps):
        expected_order = expected_order[twice]
    bytes_needed = _native.module().prefill_workspace_bytes()
    space = torch.zeros(bytes_needed, dtype=torch.uint8, device=DEVICE)
    for name, (kernel, _) in cuda_backend.runnable(torch.cuda.current_device()).items():
        for tokens in (16,) if kernel == "decode" else (16, 300):
            start = integers(tokens, size)
            here, there = start.clone(), torch.full_like(start, float("nan"))
            forth = cuda_backend.launcher(name, here, w24, there, space)
            back = cuda_backend.launcher(name, there, w24, here, space)
            torch.cuda.synchronize()
            for _ in range(steps):
                forth()
                back()
            assert torch.equal(here, start[:, expected_order.to(DEVICE)]), (name, tokens)


# ---- the public function -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("tokens", [0, 1, 5, 64, 65, 300])
def test_module_is_exact_and_says_what_ran(tokens, dtype):
    module, x = layer(dtype=dtype), integers(tokens, 576, dtype=dtype)
    assert torch.equal(module(x), dense(module, x))
    told = sk.explain(x, module.weight)
    assert (told.backend, told.layout) == ("cuda", "tile64")
    on_hopper = not cuda_backend.hopper_refusal(torch.cuda.current_device())
    kernels = ("decode", "prefill", "mma") if on_hopper else ("mma",)
    assert told.config.split()[0] in kernels and told.config in cuda_backend.variants()


def test_forced_backends():
    module, x = layer(), integers(4, 576)
    plain = module.weight.rowmajor()
    assert torch.equal(sk.linear(x, module.weight, module.bias, backend="cuda"), module(x))
    assert torch.equal(sk.linear(x, plain, module.bias, backend="triton"), module(x))
    with pytest.raises(NotImplementedError, match="needs layout 'tile64'.*got 'rowmajor'"):
        sk.linear(x, plain, backend="cuda")
    with pytest.raises(NotImplementedError, match="needs layout 'rowmajor', got 'tile64'"):
        sk.linear(x, module.weight, backend="triton")


@pytest.mark.parametrize("in_features", [576, 68], ids=["aligned", "rows to be copied"])
@pytest.mark.parametrize("tokens", [1, 6, 90])
def test_strided_x(tokens, in_features):
    module = layer(70, in_features)
    wide = integers(tokens, 3 * in_features)
    views = {
        "columns": wide[:, in_features : 2 * in_features],
        "odd address": wide[:, 3 : in_features + 3],
        "every other column": wide[:, : 2 * in_features : 2],
        "every other row": integers(2 * tokens, in_features)[::2],
        "transposed": integers(in_features, tokens).t(),
        "one row for all": wide[:1, :in_features].expand(tokens, in_features),
        "three dimensions": integers(tokens, 2, in_features),
        "permuted": integers(2, tokens, in_features).transpose(0, 1),
        "vector": wide[0, :in_features],
        "vector at an odd address": wide[0, 1 : in_features + 1],
    }
    for name, x in views.items():
        y = module(x)
        assert y.is_contiguous() and torch.equal(y, dense(module, x)), name


@pytest.mark.parametrize("out_features, in_features", [(110, 4068), (65, 92), (320, 1020)])
@pytest.mark.parametrize("copied", [False, True], ids=["two launches", "a copy"])
def test_rows_of_x_that_16_bytes_do_not_divide(out_features, in_features, copied, monkeypatch):
    """Whatever is expected to be faster; alone and in a graph."""
    monkeypatch.setattr(cuda_backend, "in_halves", lambda *problem: not copied)
    module = layer(out_features, in_features)
    w = module.weight.to_dense()
    for tokens in (*range(1, 201), 989, 5024):
        x, residual = integers(tokens, in_features), integers(tokens, out_features, seed=7)
        y64 = reference.linear(x, w, module.bias, "relu")
        y = cuda_backend.linear(x, module.weight, module.bias, "relu", residual)
        assert torch.equal(y, (y64 + residual.double()).to(BF16)), tokens
        y = cuda_backend.linear(x, module.weight, module.bias, "relu")
        assert torch.equal(y, y64.to(BF16)), tokens
    graph, y = torch.cuda.CUDAGraph(), None
    with torch.cuda.graph(graph):
        y = cuda_backend.linear(x, module.weight, module.bias, "relu")
    for seed in (1, 2):
        x.copy_(integers(5024, in_features, seed=seed))
        graph.replay()
        assert torch.equal(y, reference.linear(x, w, module.bias, "relu").to(BF16))


def test_strided_residual_and_bias():
    module, x = layer(bias=False), integers(6, 576)
    bias = integers(640)[::2]
    expected = reference.linear(x, module.weight.to_dense(), bias)
    wide = integers(6, 700, seed=7)
    for residual in (wide[:, :320], wide[:, 3:323], wide[:, :640:2], wide[:1, :320].expand(6, 320)):
        y = cuda_backend.linear(x, module.weight, bias, None, residual)
        assert torch.equal(y, (expected + residual.double()).to(BF16))


@pytest.mark.parametrize("tokens, out_features, in_features", [(0, 8, 8), (3, 0, 8), (3, 8, 0)])
def test_empty_sides(tokens, out_features, in_features):
    bias = torch.arange(out_features, device=DEVICE).to(BF16) - 4
    w24 = pack(compress(torch.zeros(out_features, in_features, device=DEVICE, dtype=BF16)))
    y = sk.linear(torch.ones(tokens, in_features, device=DEVICE, dtype=BF16), w24, bias, "relu")
    assert torch.equal(y, bias.relu().expand(tokens, out_features))


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 1, 3), (4, 40), (0,), (2, 0)], ids=str)
def test_leading_dimensions(leading):
    module, x = layer(), integers(*leading, 576)
    y = module(x)
    assert y.shape == (*leading, 320) and y.is_contiguous() and torch.equal(y, dense(module, x))


@pytest.mark.parametrize("tokens", [3, 40], ids=["decode", "prefill"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_gradients_of_a_strided_batch(dtype, activation, tokens):
    """x is a transposed 3-D view that wants a gradient, as does the bias."""
    module = layer(96, 132, dtype=dtype, bias=False)
    start = integers(tokens, 2, 132, dtype=dtype).requires_grad_()
    bias = integers(96, dtype=dtype, seed=5).requires_grad_()
    direction = integers(2, tokens, 96, dtype=dtype, seed=6)
    y = sk.linear(start.transpose(0, 1), module.weight, bias, activation)
    grads = torch.autograd.grad(y, (start, bias), direction)
    exact = [t.detach().double().requires_grad_() for t in (start, bias)]
    w = module.weight.to_dense().double()
    z = torch.nn.functional.linear(exact[0].transpose(0, 1), w, exact[1])
    y64 = z.relu() if activation else z
    expected = torch.autograd.grad(y64, exact, direction.double())
    assert torch.equal(y, y64.to(dtype))
    for grad, grad64 in zip(grads, expected):
        assert torch.equal(grad, grad64.to(dtype))


@pytest.mark.parametrize("tokens", [0, 4, 100])
def test_dtypes_of_bias_and_x(tokens):
    """Both have to be the weight's; under autocast they are cast."""
    module = layer(bias=False)
    x, bias = integers(tokens, 576), integers(320, seed=5)
    with pytest.raises(TypeError, match=r"bias\.dtype == x\.dtype .*got torch\.float32"):
        sk.linear(x, module.weight, bias.float())
    with pytest.raises(TypeError, match=r"x\.dtype == weight\.dtype .*got torch\.float16"):
        sk.linear(x.half(), module.weight, bias)
    with torch.autocast("cuda", dtype=BF16):
        y = sk.linear(x.float(), module.weight, bias.float())
    assert y.dtype == BF16 and torch.equal(y, sk.linear(x, module.weight, bias))


def test_gradient_for_x():
    module = layer(64, 128, bias=False)
    x = integers(5, 128).requires_grad_()
    y = module(x)
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, module.weight.to_dense().double().sum(0).expand(5, 128).to(BF16))


def test_an_output_of_more_than_2_31_elements_in_every_tile():
    tokens, out_features = 131_200, 16_400
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free memory")
    module, x = layer(out_features, 64, bias=False), integers(tokens, 64)
    parts = [slice(0, 2), slice(65_500, 65_502), slice(130_940, 130_942), slice(tokens - 2, tokens)]
    expected = [dense(module, x[part]) for part in parts]
    y = module(x)
    assert y.numel() > 2**31
    space = torch.zeros(
        _native.module().prefill_workspace_bytes(), dtype=torch.uint8, device=DEVICE
    )
    names = [name for name in cuda_backend.variants() if name.startswith("prefill ")]
    for name in ["as chosen", *names]:
        if name != "as chosen":
            y.fill_(float("nan"))
            cuda_backend.launcher(name, x, module.weight, y, space)()
        for part, rows in zip(parts, expected):
            assert torch.equal(y[part], rows), (name, part)
        assert not any(rows.isnan().any() for rows in y.split(2**15)), name


def test_a_residual_and_a_bias_of_an_output_of_more_than_2_31_elements():
    tokens, out_features = 131_200, 16_400
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free memory")
    module, x = layer(out_features, 64, bias=False), integers(tokens, 64)
    bias = integers(out_features, seed=5)
    residual = torch.empty(tokens, out_features, dtype=BF16, device=DEVICE).random_(0, 9).sub_(4)
    y = cuda_backend.linear(x, module.weight, bias, "relu", residual)
    w = module.weight.to_dense()
    for part in (slice(0, 2), slice(130_940, 130_942), slice(tokens - 2, tokens)):
        y64 = reference.linear(x[part], w, bias, "relu") + residual[part].double()
        assert torch.equal(y[part], y64.to(BF16))


@pytest.mark.parametrize("in_features", [32_768, 32_772], ids=["as it is", "copied"])
def test_an_x_of_more_than_2_31_elements(in_features):
    tokens = 66_000
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free memory")
    module = layer(72, in_features, bias=False)
    x = torch.empty(tokens, in_features, dtype=BF16, device=DEVICE).random_(0, 3).sub_(1)
    assert x.numel() > 2**31
    y = module(x)
    for part in (slice(0, 2), slice(65_530, 65_540), slice(tokens - 2, tokens)):
        assert torch.equal(y[part], dense(module, x[part]))


# ---- streams, graphs, devices, threads -----------------------------------------------------------


def test_a_chain_of_layers_reads_finished_inputs():
    """Decode launches overlap; each must wait for its x, which the one before it writes."""
    chain = [layer(512, 512, bias=False, seed=seed) for seed in range(4)]
    x = expected = integers(3, 512)
    for module in chain:
        expected = module(expected)
        torch.cuda.synchronize()
    for _ in range(50):
        y = x
        for module in chain:
            y = module(y)
        assert same_bits(y, expected)


@pytest.mark.parametrize("tokens", [4, 100])
def test_graph_capture_and_replay_with_new_data(tokens):
    first, second = layer(320, 576), layer(128, 320, seed=1)
    x = integers(tokens, 576)
    second(first(x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = second(first(x))
    for seed in (2, 3):
        x.copy_(integers(tokens, 576, seed=seed))
        graph.replay()
        assert same_bits(y, second(first(x)))


@pytest.mark.parametrize("tokens", [4, 100])
def test_on_another_stream(tokens):
    module, stream = layer(), torch.cuda.Stream()
    x = torch.zeros(tokens, 576, device=DEVICE, dtype=BF16)
    new = integers(tokens, 576)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # x is still zero when a launch on the wrong stream would run
        x.copy_(new)
        y = module(x)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y, dense(module, new))


@pytest.mark.parametrize("variant", [None, "split 128x64, 4 parts, across clusters"])
def test_overlapping_launches_have_their_own_workspaces(variant):
    """Two streams, and two graphs replayed on two streams, at the same time; variant: None for what
    is chosen."""
    if variant is not None:
        needs_hopper()
    module, x = layer(320, 2048), integers(100, 2048)

    def planned(x):
        found = cuda_backend.variants()[variant]
        return cuda_backend.linear(x, module.weight, module.bias, plan=lambda *problem: found)

    run = module if variant is None else planned
    expected = dense(module, x)
    streams, graphs, outputs = [torch.cuda.Stream() for _ in range(2)], [], []
    for _ in range(2):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            outputs.append([run(x) for _ in range(20)])
    eager = [[], []]
    torch.cuda.synchronize()
    for _ in range(10):
        for i in range(2):
            with torch.cuda.stream(streams[i]):
                graphs[i].replay()
                eager[i] += [run(x) for _ in range(3)]
    torch.cuda.synchronize()
    for y in (*outputs[0], *outputs[1], *eager[0], *eager[1]):
        assert torch.equal(y, expected)


def test_in_a_new_thread():
    module, x, results = layer(), integers(4, 576), []

    def work():
        results.append(module(x))
        torch.cuda.synchronize()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(results) == 1 and torch.equal(results[0], dense(module, x))


@pytest.mark.parametrize("tokens", [4, 100])
def test_on_a_device_that_is_not_the_current_one(tokens):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    module = layer().to("cuda:1")
    x = integers(tokens, 576).to("cuda:1")
    assert torch.cuda.current_device() == 0
    y = module(x)
    assert y.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert torch.equal(y, dense(module, x))
    with torch.cuda.device(1):
        assert torch.equal(module(x), y)


def test_two_gpus_in_turn_each_on_its_own_stream():
    """Plans, workspaces and tables belong to a GPU; nothing leaks to the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    devices = [torch.device("cuda", i) for i in range(2)]
    modules = [layer(320, 2048).to(device) for device in devices]
    streams = [torch.cuda.Stream(device) for device in devices]
    for tokens in (4, 100, 4, 100):
        inputs = [integers(tokens, 2048).to(device) for device in devices]
        expected = [dense(module, x) for module, x in zip(modules, inputs)]
        for device in devices:
            torch.cuda.synchronize(device)
        results = []
        for module, x, stream in zip(modules, inputs, streams):
            with torch.cuda.stream(stream):
                results.append(module(x))
        for y, wanted, stream in zip(results, expected, streams):
            stream.synchronize()
            assert y.device == wanted.device and torch.equal(y, wanted)


@pytest.mark.parametrize("tokens", [4, 300])
def test_compiled_with_cuda_graphs(tokens):
    """torch owns the memory pool of these graphs, and refuses what stays allocated in it."""
    module = layer(320, 4096)
    compiled = torch.compile(module, mode="reduce-overhead", fullgraph=True)
    with torch.inference_mode():
        for seed in range(4):  # two warm-ups, the recording, a replay
            x = integers(tokens, 4096, seed=seed)
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(compiled(x).clone(), dense(module, x))


def test_compile_fullgraph():
    module = layer()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for tokens in (4, 100):
        x = integers(tokens, 576)
        assert torch.equal(compiled(x), module(x))


# ---- native arguments ----------------------------------------------------------------------------


def test_refusals_of_the_native_module():
    needs_hopper()
    p = Problem(100, 64, 64, BF16)
    _, y = guarded(100, 64, BF16)
    for kernel, variant, tokens, pattern in (
        ("decode", -1, 8, "config index .*got -1"),
        ("decode", len(_native.module().kernels()["decode"]), 8, "config index"),
        ("decode", 0, 65, "tokens <= max_tokens .*got 65"),
        ("prefill", -1, 100, "config index .*got -1"),
        ("prefill", len(_native.module().kernels()["prefill"]), 100, "config index"),
    ):
        with pytest.raises(ValueError, match=pattern):
            call(kernel, variant, p, tokens, y)
    p.x = p.x[:, 4:]
    p.in_features -= 4
    with pytest.raises(ValueError, match="multiple of 16"):
        call("decode", 0, p, 8, y)


def test_the_heuristics_choose_among_what_was_built():
    assert set(map(variant_name, coefficients.TIMES)) <= set(cuda_backend.variants())


# ---- the cost of a call --------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 100])
def test_eager_overhead(tokens, record_property, capsys):
    """Host time of a call while the GPU keeps up. Reported; it fails only at ten times the goal."""
    module, x = layer(64, 64), integers(tokens, 64)
    times = []
    with torch.inference_mode():
        for _ in range(30):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(100):
                module(x)
            times.append((time.perf_counter() - start) / 100 * 1e6)
    torch.cuda.synchronize()
    median = sorted(times)[len(times) // 2]
    record_property("host_us_per_call", median)
    with capsys.disabled():
        print(f"\nSparseLinear.forward, {tokens} tokens: {median:.1f} us of host time a call")
    assert median < 120

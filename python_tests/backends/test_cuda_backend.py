"""The host side of the CUDA backend that needs no GPU: refusals, choices, names, workspaces."""

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sparsekern
from python_tests.linear_cases import random_weight
from sparsekern.backends import memory, registry
from sparsekern.backends.cuda import coefficients, configs, scaled_linear
from sparsekern.backends.cuda import cost_model as heuristics
from sparsekern.backends.cuda import linear as cuda_backend
from sparsekern.backends.cuda import tuned_tables as tuning
from sparsekern.backends.cuda.backend import CudaBackend, PreciseBackend, SixteenBitBackend
from sparsekern.backends.cuda.coefficients import TIMES
from sparsekern.backends.cuda.narrow_model import NarrowTile
from sparsekern.backends.cuda.native import _indices, gated_config
from sparsekern.backends.cuda.variant import Bits, MmaTile, RowBlocks, SplitTile, Tile, variant_name
from sparsekern.backends.protocol import problem_of
from sparsekern.backends.triton.backend import TritonBackend
from sparsekern.formats.layouts import WeightSpec
from sparsekern.formats.sparse24 import compress
from sparsekern.formats.tile64 import pack
from sparsekern.ops import linear_op as ops
from sparsekern.utils import torch_raw

GPU = "Test GPU, 132 multiprocessors"
F16, BF16 = "float16", "bfloat16"
CACHED = ("_tiles", "variants", "_plan", "_mma_tiles", "_mma_plan", "refusal", "_native_linear")
TILES = [variant for variant in TIMES if isinstance(variant, Tile)]
# Two that tests name, then those that heuristics know.
BLOCKS = [RowBlocks(64, 2), RowBlocks(128, 4)]
BLOCKS += [v for v in TIMES if isinstance(v, RowBlocks) and v not in BLOCKS]
# Stages (and below, parts) that no tile of configs.h has: TIMES lacks them, so that Hopper chooses
# another kernel.
MMA_TILES = (MmaTile(128, 128, 2, 4, 1, 2), MmaTile(64, 8, 2, 1, 4, 3))


ACROSS = 99  # the config of a split tile across clusters, where a test has one
# Tiles for e4m3 alone, and the types of kernels: of the weight, of x and of y.
PROMOTED = [Tile(128, 192, 1, 1, promoted=True), Tile(128, 128, 2, 1, promoted=True)]
PLAIN = [(F16,) * 3, (BF16,) * 3]
EIGHT = [("float8_e4m3fn", "float8_e4m3fn", y) for y in (F16, BF16)]
WIDENED = [(w, x, x) for w in ("float8_e4m3fn", "int8", "int4") for x in (F16, BF16)]


def rows(variants, first=0, types=None):
    """What kernels() says of variants; types: None for those of a kernel that has all but W8A16."""
    every = [*PLAIN, *EIGHT, *(("int8", "int8", y) for y in (F16, BF16))]
    of = dict(types=every if types is None else types)
    return [v._asdict() | {"index": i} | of for i, v in enumerate(variants, first)]


class FakeLinear:
    """sparsekern._C.Linear: notes what it was made with and what it is called with."""

    def __init__(self, calls, problem):
        self.calls, self.problem = calls, dict(residual_stride=0, activation=None) | problem
        self.needs_workspace = problem["kernel"] == "prefill" or problem["config"] == ACROSS
        self.widened_bytes = 4608 if "stored_dtype" in problem else 0

    def __call__(self, **arguments):
        self.calls.append(self.problem | arguments)


@pytest.fixture
def native(monkeypatch, tmp_path):
    """A native module of which only the questions are answered, tensors on the CPU, no tables, and
    GPUs that are Hopper until the test changes `capability`."""
    module = SimpleNamespace(
        capability=(9, 0),
        build_info=lambda: {"archs": module.archs},
        archs=["80", "89", "90a"],
        capture=0,
        capture_id=lambda stream: module.capture,
        prefill_workspace_bytes=lambda: 64,
        PREFILL_COUNTER_BYTES=16,
        kernels=lambda: module.rows,
        rows={
            "prefill": rows(TILES) + rows(PROMOTED, len(TILES), EIGHT),
            "decode": rows(BLOCKS, 1, [*PLAIN, *WIDENED]),
            "decode_gated": rows(BLOCKS, 1, PLAIN),
            "mma": rows(MMA_TILES, 0, PLAIN),
            "split": rows([SplitTile(128, 64, 32)]),
        },
        Linear=lambda **problem: FakeLinear(module.calls, problem),
        calls=[],
    )
    empty = torch.empty

    def used_memory(*size, device=None, **options):
        """Memory of "GPU" 0, 1, ... on the CPU, with something in it."""
        tensor = empty(*size, **options)
        return tensor.fill_(7) if isinstance(device, int) else tensor

    monkeypatch.setattr(torch, "empty", used_memory)
    monkeypatch.setattr(cuda_backend._native, "module", lambda: module)
    monkeypatch.setattr(cuda_backend._native, "available", lambda: True)
    monkeypatch.setattr(configs, "_capability", lambda index: module.capability)
    monkeypatch.setattr(cuda_backend, "_workspaces", {})
    properties = SimpleNamespace(name="Test GPU", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path / "user"))
    monkeypatch.setattr(tuning, "TABLES", tmp_path / "shipped")
    forget()
    yield module
    forget()


def forget():
    for name in CACHED:
        getattr(cuda_backend, name).cache_clear()
    for cached in (scaled_linear._built_for, configs.in_halves, gated_config, _indices):
        cached.cache_clear()
    tuning.forget()
    registry.changed()


def tune(path, cells, dtype="bfloat16", shape=(4096, 4096)):
    tuning.store(path, GPU, dtype, shape, cells)
    cuda_backend.forget_plans()


def explained(tokens, out_features, in_features, dtype=BF16):
    return tuple(
        configs.choose(tokens, out_features, in_features, dtype, 0)[place] for place in range(3)
    )


def problem(x, w24, **more):
    return problem_of(x, w24.spec, **more)


def test_why_not():
    w24 = compress(random_weight(8, 16, torch.bfloat16))
    x = torch.ones(1, 16, dtype=torch.bfloat16)
    backend = CudaBackend()
    assert "needs layout 'tile64'" in backend.supports(problem(x, w24))
    assert "needs x on a GPU, got cpu" in backend.supports(problem(x, pack(w24)))
    assert "both weights" in backend.supports(problem(x, pack(w24), gated=w24.spec))
    many = problem(x.expand(33, 16), pack(w24), gated=pack(w24).spec)
    assert "up to 32 tokens, got 33" in backend.supports(many)


def test_packs_nothing_on_the_cpu_and_no_float32():
    assert not cuda_backend.packs(torch.device("cpu"), torch.bfloat16)
    assert not cuda_backend.packs(torch.device("cuda", 0), torch.float32)


@pytest.mark.parametrize(
    "capability, archs, runs",
    [
        ((8, 0), ["80", "89", "90a"], True),
        ((8, 6), ["80", "89", "90a"], True),  # code for 8.0
        ((8, 9), ["80", "90a"], True),
        ((12, 0), ["80", "89", "90a"], True),  # PTX for 8.9
        ((8, 0), ["86"], False),
        ((8, 6), ["90a"], False),
        ((12, 0), ["80", "100a"], True),  # PTX for 8.0
        ((8, 0), ["80", "89"], True),  # the PTX is too new, the machine code is not
    ],
)
def test_gpus_that_the_module_has_code_for(native, capability, archs, runs):
    assert cuda_backend.has_code(capability, archs) == runs
    native.capability, native.archs = capability, archs
    assert bool(cuda_backend.refusal(0)) != runs


def test_refusals_name_the_gpu_and_what_is_missing(native):
    native.capability = (7, 5)
    assert "needs compute capability 8.0 or newer, cuda:1 has 7.5" in cuda_backend.refusal(1)
    native.capability, native.archs = (8, 6), ["90a"]
    assert "was built for 90a, cuda:0 has 8.6" in cuda_backend.refusal(0)
    assert "needs compute capability 9.x, cuda:0 has 8.6" in cuda_backend.hopper_refusal(0)
    native.capability, native.archs = (9, 0), ["90a"]
    assert cuda_backend.refusal(2) == cuda_backend.hopper_refusal(2) == ""


def test_other_gpus_than_hopper_run_mma_at_every_number_of_tokens(native):
    w24 = SimpleNamespace(shape=(4096, 4096))
    for capability in ((8, 0), (8, 6), (8, 9), (12, 0)):
        native.capability = capability
        cuda_backend._plan.cache_clear()
        cuda_backend._mma_plan.cache_clear()
        for tokens, index in ((1, 1), (8, 1), (4096, 0)):
            assert cuda_backend._plan(tokens, 4096, 4096, BF16, 0) == ("mma", index)
            assert explained(tokens, 4096, 4096)[0] == f"mma {MMA_TILES[index]}"
            x = torch.empty(tokens, 4096, device="meta", dtype=torch.bfloat16)
    native.capability = (9, 0)
    cuda_backend._plan.cache_clear()
    assert cuda_backend._plan(1, 4096, 4096, BF16, 0)[0] == "decode"
    on_request = cuda_backend._mma_plan(1, 4096, 4096, BF16, 0)
    assert on_request == ("mma", 1), "on Hopper, too"
    assert cuda_backend.mma_config(x, w24) == f"mma {MMA_TILES[0]}"


def test_tuned_tables_choose_among_what_the_gpu_runs(native, tmp_path):
    """An entry for a Hopper kernel is nothing for another GPU; Hopper can run them all."""
    both = {8: ("decode 128 rows, split 4", 3.0)}, {8: (f"mma {MMA_TILES[0]}", 3.0)}
    for capability, cells, used in (
        ((9, 0), both[0], True),
        ((9, 0), both[1], True),
        ((8, 9), both[0], False),
        ((8, 9), both[1], True),
    ):
        native.capability = capability
        tune(tmp_path / "shipped" / "gpu.json", cells)
        chosen = cuda_backend.choose(8, 4096, 4096, BF16, 0)
        assert ("shipped tuned table" in chosen.why) == used
        assert not used or chosen.variant == cells[8][0]


def test_without_a_table_heuristics_choose(native):
    for tokens, kernel in ((1, "decode"), (8192, "prefill")):
        run, config = cuda_backend._plan(tokens, 28672, 4096, BF16, 0)
        known = [*BLOCKS, *TILES, *(tile for tile in MMA_TILES if tile in TIMES)]
        chosen = heuristics.fastest(tokens, 28672, 4096, 132, tuple(known))
        assert run == kernel
        name, why, us = explained(tokens, 28672, 4096)
        assert name == variant_name(chosen) and us is None
        assert cuda_backend.variants()[name] == (kernel, config)
        assert why == "variant by heuristics, no tuned table knows this problem"


def test_heuristics_may_choose_mma_on_hopper(native, monkeypatch):
    """32x16: the fastest at 64 tokens of a weight with few rows."""
    tile = MmaTile(32, 16, 1, 1, 4, 5)
    native.rows["mma"] = rows([tile], 7, PLAIN)
    assert cuda_backend._plan(64, 512, 1024, BF16, 0) == ("mma", 7)
    assert explained(64, 512, 1024)[0] == "mma 32x16, 1x1x4 warps"


def test_a_tuned_table_decides_what_runs(native, tmp_path):
    last = TILES[-1]
    cells = {16: ("decode 128 rows, split 4", 3.25), 64: (f"prefill {last}", 7.0)}
    tune(tmp_path / "shipped" / "gpu.json", cells)
    assert cuda_backend._plan(16, 4096, 4096, BF16, 0) == ("decode", 2)
    assert cuda_backend._plan(64, 4096, 4096, BF16, 0) == ("prefill", len(TILES) - 1)
    name, why, us = explained(16, 4096, 4096)
    assert (name, us) == ("decode 128 rows, split 4", 3.25) and "the shipped tuned table" in why
    name, why, us = explained(40, 4096, 4096)
    assert (name, us) == (f"prefill {last}", None) and "shipped tuned table at 64 tokens" in why
    assert "heuristics" in cuda_backend.choose(16, 4096, 8192, BF16, 0).why
    sibling = cuda_backend.choose(16, 4096, 4096, F16, 0)
    assert (sibling.variant, sibling.us) == ("decode 128 rows, split 4", None)
    assert "measured in bfloat16" in sibling.why


def test_your_own_table_comes_before_the_shipped_one(native, tmp_path):
    tune(tmp_path / "shipped" / "gpu.json", {8: ("decode 128 rows, split 4", 3.0)})
    assert cuda_backend._plan(8, 4096, 4096, BF16, 0)[1] == 2
    tune(tuning.user_path(), {8: ("decode 64 rows, split 2", 2.0)})
    assert cuda_backend._plan(8, 4096, 4096, BF16, 0)[1] == 1
    assert "your tuned table" in explained(8, 4096, 4096)[1]


def test_a_variant_that_this_build_lacks_is_ignored(native, tmp_path):
    tune(tmp_path / "shipped" / "gpu.json", {8: ("decode 128 rows, split 4", 3.0)})
    tune(tuning.user_path(), {8: ("decode 512 rows, split 16", 1.0)})
    name, why, _ = explained(8, 4096, 4096)
    assert name == "decode 128 rows, split 4" and "shipped" in why


def test_a_config_is_found_by_its_meaning_wherever_it_stands_in_the_list(native, tmp_path):
    tune(tmp_path / "shipped" / "gpu.json", {8: ("decode 128 rows, split 4", 3.0)})
    native.rows["decode"] = rows([RowBlocks(128, 4), RowBlocks(64, 2)], 1, PLAIN)
    forget()
    assert cuda_backend._plan(8, 4096, 4096, BF16, 0) == ("decode", 1)


def test_explain_tells_the_expected_time(native, tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_backend, "why_not", lambda problem: None)
    monkeypatch.setitem(registry._PREFERENCE, "cpu", ["cuda"])
    w24 = pack(compress(random_weight(64, 64, torch.bfloat16)))
    x = torch.ones(8, 64, dtype=torch.bfloat16)
    before = ops.explain(x, w24)
    assert before.expected_us is None and "heuristics" in before.reason
    tune(tuning.user_path(), {8: ("decode 128 rows, split 4", 3.5)}, shape=(64, 64))
    told = ops.explain(x, w24)
    assert (told.config, told.expected_us) == ("decode 128 rows, split 4", 3.5)
    assert str(told).endswith("variant from your tuned table; expected 3.5 us")


def test_explain_tells_that_dense_is_faster(native, tmp_path, monkeypatch):
    name, cells = "decode 128 rows, split 4", {8: ("decode 128 rows, split 4", 3.5)}
    gpu = tuning.gpu_name(0)
    tuning.store(tuning.user_path(), gpu, BF16, (64, 64), cells, {8: 3.25})
    forget()
    told = configs.choose(8, 64, 64, BF16, 0)
    assert told == (
        name,
        "variant from your tuned table; dense is faster: 3.25 us, measured beside 3.5",
        3.5,
        3.25,
    )
    near = configs.choose(5, 64, 64, BF16, 0)
    assert "dense is faster" in near.why and (near.us, near.dense_us) == (None, None)
    tuning.store(tuning.user_path(), gpu, BF16, (64, 64), cells, {8: 3.75})
    forget()
    told = configs.choose(8, 64, 64, BF16, 0)
    assert told == (name, "variant from your tuned table", 3.5, 3.75)


def test_sizes_that_the_kernels_cannot_count_are_refused(native):
    cuda_backend._plan(2**31 - 1024, 8, 8, BF16, 0)
    with pytest.raises(ValueError, match=r"up to 2147482624, got 2147482625\. Split x"):
        cuda_backend._plan(2**31 - 1023, 8, 8, BF16, 0)


def test_a_launcher_passes_what_the_module_takes(native, monkeypatch):
    monkeypatch.setattr(cuda_backend, "_current_stream", lambda index: 77)
    w24 = pack(compress(random_weight(64, 128, torch.bfloat16)))
    x, y = torch.ones(3, 128, dtype=torch.bfloat16), torch.ones(3, 64, dtype=torch.bfloat16)
    space = torch.zeros(64, dtype=torch.uint8)
    for name, index in (
        ("decode 128 rows, split 4", 2),
        (f"prefill {TILES[1]}", 1),
        (f"mma {MMA_TILES[1]}", 1),
    ):
        cuda_backend.launcher(name, x, w24, y, space)()
        kernel = name.split()[0]
        assert native.calls.pop() == dict(
            kernel=kernel,
            config=index,
            tokens=3,
            out_features=64,
            in_features=128,
            x_stride=128,
            y_stride=64,
            residual_stride=0,
            dtype="bfloat16",
            weight_dtype="bfloat16",
            x_dtype="bfloat16",
            activation=None,
            channel_scale=0,
            token_scale=0,
            x=x.data_ptr(),
            values=w24.values.data_ptr(),
            metadata=w24.metadata.data_ptr(),
            y=y.data_ptr(),
            workspace=space.data_ptr() if kernel == "prefill" else 0,
            stream=77,
        )


def test_the_stub_declares_what_is_passed():
    """The names above, and no other, are those of sparsekern/_C.pyi."""
    stub = (Path(sparsekern.__file__).parent / "_C.pyi").read_text()
    if "class Linear" not in stub:
        pytest.skip("the stub has no Linear yet")
    functions = {}
    exec(stub.replace("from typing import", "TypedDict = object\nfrom typing import"), functions)
    made = inspect.signature(functions["Linear"].__init__).parameters
    called = inspect.signature(functions["Linear"].__call__).parameters
    assert {"kernel", "config", "x_stride", "y_stride", "dtype", "activation"} <= set(made)
    assert {"x", "values", "metadata", "y", "stream", "bias", "residual"} <= set(called)
    assert {"workspace", "up_values", "up_metadata"} <= set(called)


@pytest.fixture
def on_cpu(native, monkeypatch):
    """`native`, and tensors on the CPU count as those of GPU -1, which is current."""
    monkeypatch.setattr(cuda_backend, "_current_device", lambda: -1)
    monkeypatch.setattr(cuda_backend, "_current_stream", lambda index: 77)
    allocate = torch._C._dynamo.guards._empty_strided_cpu
    monkeypatch.setattr(cuda_backend, "_empty_strided", allocate)
    return native


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("leading", [(3,), (), (1,), (5, 40), (2, 3, 4)], ids=str)
def test_linear_passes_what_the_module_takes(on_cpu, leading, dtype):
    w24 = pack(compress(random_weight(64, 128, dtype)))
    x, bias = torch.ones(*leading, 128, dtype=dtype), torch.ones(64, dtype=dtype)
    tokens, name = x.numel() // 128, str(dtype).removeprefix("torch.")
    y = cuda_backend.linear(x, w24, bias, "gelu")
    assert (y.shape, y.dtype, y.is_contiguous()) == ((*leading, 64), dtype, True)
    (call,) = on_cpu.calls
    kernel, config = cuda_backend._plan(tokens, 64, 128, name, -1)
    assert kernel == ("prefill" if tokens > 64 else "decode")
    space = call.pop("workspace", 0)
    assert space == (cuda_backend._workspace(-1, 77)[1] if tokens > 64 else 0)
    assert call == dict(
        kernel=kernel,
        config=config,
        tokens=tokens,
        out_features=64,
        in_features=128,
        x_stride=128,
        y_stride=64,
        residual_stride=0,
        dtype=name,
        weight_dtype=name,
        x_dtype=name,
        activation="gelu",
        x=x.data_ptr(),
        values=w24.values.data_ptr(),
        metadata=w24.metadata.data_ptr(),
        y=y.data_ptr(),
        stream=77,
        bias=bias.data_ptr(),
    )


def test_rows_that_the_kernels_cannot_fetch_are_copied(on_cpu, monkeypatch):
    monkeypatch.setattr(cuda_backend, "in_halves", lambda *problem: False)
    dtype = torch.bfloat16
    w24 = pack(compress(random_weight(64, 132, dtype)))
    base = torch.ones(3, 2, 136, dtype=dtype)
    plain = torch.ones(2, 132, dtype=dtype)
    for x, copied, stride in (
        (base[..., :132], False, 136),
        (base[:, 0, :132], False, 272),
        (plain, True, 136),  # 264 bytes a row
        (base[..., 1:133], True, 136),
    ):
        cuda_backend.linear(x, w24)
        call = on_cpu.calls.pop()
        assert (call["x"] != x.data_ptr()) == copied and call["x_stride"] == stride
        assert call["tokens"] == x.numel() // 132
    residual = torch.ones(2, 128, dtype=dtype)[:, ::2]
    for given, stride in ((residual, 64), (torch.ones(2, 80, dtype=dtype)[:, :64], 80)):
        cuda_backend.linear(plain, w24, None, "relu", given)
        call = on_cpu.calls.pop()
        assert call["residual_stride"] == stride and call["residual"] % 2 == 0
        assert (call["residual"] == given.data_ptr()) == (stride == 80)


def fixed_plan(kernel, config):
    return lambda *problem: (kernel, config)


@pytest.mark.parametrize("kernel, config", [("decode", 1), ("split", ACROSS), ("prefill", 0)])
@pytest.mark.parametrize("tokens", [2, 3, 64])
@pytest.mark.parametrize("beyond", [0, 4], ids=["from 16 bytes on", "from 8 beyond"])
def test_half_the_rows_are_copied(on_cpu, monkeypatch, kernel, config, tokens, beyond):
    """The even or the odd tokens lie where they are; two launches, in order, of one workspace."""
    asked, copied = [], []
    monkeypatch.setattr(cuda_backend, "in_halves", lambda *problem: asked.append(problem) or True)
    copy = cuda_backend._copy_rows
    monkeypatch.setattr(
        cuda_backend, "_copy_rows", lambda *of: copied.append((*of, len(on_cpu.calls))) or copy(*of)
    )
    w24 = pack(compress(random_weight(70, 132, torch.bfloat16)))
    x = on_16_bytes(beyond + tokens * 132)[beyond:].view(tokens, 132)
    bias, residual = torch.ones(70).bfloat16(), torch.ones(tokens, 75).bfloat16()[:, 3:73]
    y = cuda_backend.linear(x, w24, bias, "relu", residual, plan=fixed_plan(kernel, config))
    assert asked == [(kernel, config, tokens, 70, 132, -1, configs.Types.of(BF16))]
    assert y.shape == (tokens, 70) and len(on_cpu.calls) == 2
    ((rows, source, launched),) = copied
    lies, copies = (0, 1) if beyond == 0 else (1, 0)
    assert launched == 0 and torch.equal(rows, x[copies::2])
    assert source.data_ptr() == x[copies].data_ptr()
    places = (x[lies].data_ptr(), 264), (rows.data_ptr(), 136)
    for call, first, place in zip(on_cpu.calls, (lies, copies), places, strict=True):
        assert (call["x"], call["x_stride"]) == place and call["x"] % 16 == 0
        assert call["tokens"] == (tokens + 1 - first) // 2
        assert (call["y"], call["y_stride"]) == (y.data_ptr() + first * 140, 140)
        assert call["residual"] == residual.data_ptr() + first * 150
        assert call["residual_stride"] == 150 and call["bias"] == bias.data_ptr()
    same = {"values", "metadata", "stream", "workspace", "kernel", "config", "activation"}
    one, other = ({name: call[name] for name in same} for call in on_cpu.calls)
    assert one == other and bool(one["workspace"]) == (kernel != "decode")


def test_a_launcher_does_what_bind_does(on_cpu, monkeypatch):
    """A copy of all rows or of half, by the same decision, and in every call."""
    copied = []
    copy = cuda_backend._copy_rows
    monkeypatch.setattr(
        cuda_backend, "_copy_rows", lambda rows, x: copied.append(len(x)) or copy(rows, x)
    )
    w24 = pack(compress(random_weight(64, 132, torch.bfloat16)))
    x, y = on_16_bytes(5 * 132).view(5, 132), torch.ones(5, 64).bfloat16()
    space = torch.zeros(64, dtype=torch.uint8)
    same = ("kernel", "config", "tokens", "x_stride", "y_stride")
    for halves in (False, True):
        monkeypatch.setattr(heuristics, "in_halves", lambda *problem, halves=halves: halves)
        configs.in_halves.cache_clear()
        for name in (f"prefill {TILES[1]}", "decode 128 rows, split 4"):
            launch = cuda_backend.launcher(name, x, w24, y, space)
            assert not copied and not on_cpu.calls
            done = []
            for run in (
                lambda name=name: cuda_backend.linear(
                    x, w24, plan=fixed_plan(*configs.variants()[name])
                ),
                launch,
                launch,
            ):
                run()
                calls = [[call.get(of) for of in same] for call in on_cpu.calls]
                offsets = [call["y"] - on_cpu.calls[0]["y"] for call in on_cpu.calls]
                done.append(([*copied], calls, offsets))
                copied.clear()
                on_cpu.calls.clear()
            bound, *launched = done
            assert [bound, bound] == launched and bound[0] == [2 if halves else 5]
            assert len(bound[1]) == (2 if halves else 1)


def test_a_launcher_copies_the_x_of_each_call(on_cpu, monkeypatch):
    monkeypatch.setattr(cuda_backend, "in_halves", lambda *problem: True)
    w24 = pack(compress(random_weight(64, 132, torch.bfloat16)))
    x, y = on_16_bytes(4 * 132).view(4, 132), torch.ones(4, 64).bfloat16()
    space, parts = torch.zeros(64, dtype=torch.uint8), []
    rows = cuda_backend._rows
    monkeypatch.setattr(cuda_backend, "_rows", lambda *of: parts.extend(rows(*of)) or parts)
    launch = cuda_backend.launcher(f"prefill {TILES[1]}", x, w24, y, space)
    for number in (3, 5):
        x.fill_(number)
        launch()
        assert all(part.rows.eq(number).all() for part in parts)


def test_of_which_variants_half_is_copied(native):
    """As the cost model says of the variant behind the config; of none that it does not know."""
    problem = 20000, 64, 4092
    for name, (kernel, config) in configs.variants().items():
        (variant,) = (v for v in configs.built() if variant_name(v) == name)
        expected = heuristics.in_halves(variant, *problem, 132)
        assert configs.in_halves(kernel, config, *problem, 0) == expected
    assert configs.in_halves("prefill", 0, *problem, 0)
    assert not configs.in_halves("mma", 0, *problem, 0)
    assert not configs.in_halves("naive", 0, *problem, 0)
    eight = configs.Types("int8", "int8", BF16)
    assert not configs.in_halves("prefill", 0, *problem, 0, eight)


def test_a_gated_pair_is_one_launch(on_cpu, monkeypatch):
    dtype = torch.bfloat16
    gate, up = (pack(compress(random_weight(512, 128, dtype, seed))) for seed in (0, 1))
    x = torch.ones(2, 3, 128, dtype=dtype)
    y = cuda_backend.gated_linear(x, gate, up)
    call = on_cpu.calls.pop()
    assert y.shape == (2, 3, 512) and call["kernel"] == "decode_gated" and call["tokens"] == 6
    assert (call["values"], call["metadata"]) == (gate.values.data_ptr(), gate.metadata.data_ptr())
    assert call["up_values"] == up.values.data_ptr() and call["activation"] is None
    assert call["up_metadata"] == up.metadata.data_ptr() and "bias" not in call
    chosen = on_cpu.rows["decode_gated"][call["config"] - 1]
    assert chosen["split"] == 1 and chosen["rows"] == 256, "2 stages are not split"


def test_a_call_on_another_gpu_than_the_current_one_switches(on_cpu, monkeypatch):
    current = [-1]

    class Switch:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(cuda_backend, "_current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Switch)
    w24 = pack(compress(random_weight(64, 128, torch.bfloat16)))
    for tokens in (3, 300):
        x = torch.ones(tokens, 128, dtype=torch.bfloat16)
        launch = cuda_backend.bind(problem(x, w24))
        launch(x, w24)
        current[0] = 1
        launch(x, w24)
        here, there = on_cpu.calls[-2:]
        assert here["x"] == there["x"] and current == [1]
        current[0] = -1


@pytest.fixture
def quick(on_cpu, monkeypatch):
    """ops.linear on tensors that count as those of a GPU; `forbid()`: no call may be checked."""

    def fail(*arguments):
        raise AssertionError("the detour")

    def forbid():
        monkeypatch.setattr(ops, "check_linear", fail)
        monkeypatch.setattr(ops, "_compute", fail)

    monkeypatch.setattr(cuda_backend, "why_not", lambda problem: None)
    monkeypatch.setitem(registry._PREFERENCE, "cpu", ["cuda"])
    on_cpu.forbid = forbid
    with torch.no_grad():
        yield on_cpu


@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_call_like_one_before_takes_one_look_up(quick, activation):
    dtype = torch.bfloat16
    w24 = pack(compress(random_weight(64, 128, dtype)))
    bias = torch.ones(64, dtype=dtype)
    shapes = (128,), (5, 128), (300, 128), (2, 3, 128), (2, 2, 2, 128)
    inputs = [torch.ones(shape, dtype=dtype) for shape in shapes]
    first = [ops.linear(x, w24, bias, activation) for x in inputs]
    before, quick.calls[:] = list(quick.calls), []
    ops.linear(inputs[0], w24, None, activation)
    quick.calls.clear()
    quick.forbid()
    other = pack(compress(random_weight(64, 128, dtype, seed=1)))
    for x, y in zip(inputs, first):
        again = ops.linear(x, other, bias, activation)
        assert (again.shape, again.stride(), again.dtype) == (y.shape, y.stride(), dtype)
        assert again.data_ptr() not in (x.data_ptr(), y.data_ptr())
        then, now = before.pop(0), quick.calls.pop()
        for name, tensor in (("values", other.values), ("metadata", other.metadata), ("y", again)):
            assert now[name] == tensor.data_ptr()
            then[name] = now[name]
        assert now == then
    ops.linear(inputs[0], w24, None, activation)
    assert quick.calls[-1]["bias"] == 0
    misaligned = torch.ones(5 * 128 + 1, dtype=dtype)[1:].view(5, 128)
    ops.linear(misaligned, w24, bias, activation)
    assert quick.calls[-1]["x"] not in (misaligned.data_ptr(), 0), "a copy"
    cuda_backend.forget_plans()
    with pytest.raises(AssertionError, match="the detour"):
        ops.linear(inputs[0], w24, bias, activation)


def test_a_known_call_with_other_arguments_is_checked(quick):
    """Each differs from a known call in one thing."""
    dtype = torch.bfloat16
    w24 = pack(compress(random_weight(64, 128, dtype)))
    x, bias = torch.ones(8, 128, dtype=dtype), torch.ones(65, dtype=dtype)
    ops.linear(x, w24, bias[:64])
    half = pack(compress(random_weight(64, 128, torch.float16)))
    wanting = pack(compress(random_weight(64, 128, dtype)))
    wanting.values.requires_grad_()
    quick.forbid()
    assert ops.linear(x, w24, bias[:64]).shape == (8, 64)
    cases = (
        (x.t().contiguous().t(), w24, bias[:64]),
        (x.half(), half, None),
        (x, half, bias[:64]),
        (x, wanting, bias[:64]),
        (x, w24, bias),
        (x, w24, bias[:64].half()),
        (x, w24, torch.ones(128, dtype=dtype)[::2]),
        (x, w24, bias[:64], "relu"),
        (x[:7], w24, bias[:64]),
        (x, w24),
        (x, w24.to("meta"), bias[:64]),
    )
    for case in cases[:-1]:
        with pytest.raises(AssertionError, match="the detour"):
            ops.linear(*case)
    with torch.enable_grad(), pytest.raises(AssertionError, match="the detour"):
        ops.linear(x, w24, bias[:64].clone().requires_grad_())


def test_a_row_major_weight_is_packed_once_and_remembered(quick, monkeypatch):
    """On a GPU whose kernels read tile64: the CPU passes for one."""
    monkeypatch.setattr(cuda_backend, "packs", lambda device, dtype: dtype is torch.bfloat16)
    rows = compress(random_weight(64, 128, torch.bfloat16))
    x, bias = torch.ones(8, 128, dtype=torch.bfloat16), torch.ones(64, dtype=torch.bfloat16)
    assert rows.layout == "rowmajor" and rows.fresh_twin() is None
    told = ops.explain(x, rows)
    assert (told.backend, told.layout) == ("cuda", "tile64") and "packed once" in told.reason
    assert rows.fresh_twin() is None, "explain computes nothing"
    for _ in range(3):
        ops.linear(x, rows, bias)
    twin = rows.fresh_twin()
    packed = pack(rows)
    assert twin.layout == "tile64" and torch.equal(twin.values, packed.values)
    assert [call["values"] for call in quick.calls] == [twin.values.data_ptr()] * 3
    assert rows.layout == "rowmajor" and rows.nbytes == 64 * 128 * 9 // 8
    rows.values.mul_(2)  # in place: the twin is made anew
    ops.linear(x, rows, bias)
    assert rows.fresh_twin() is not twin
    assert quick.calls[-1]["values"] == rows.fresh_twin().values.data_ptr()
    other = compress(random_weight(64, 128, torch.bfloat16, seed=1))
    ops.linear(x, other, bias)
    assert quick.calls[-1]["values"] == other.fresh_twin().values.data_ptr()
    rowmajor_calls = []
    monkeypatch.setattr(TritonBackend, "supports", lambda self, problem: None)
    monkeypatch.setattr(
        TritonBackend,
        "bind",
        lambda *_: lambda x, w24, bias: rowmajor_calls.append(w24) or x.new_zeros(len(x), 64),
    )
    monkeypatch.setitem(registry._PREFERENCE, "cpu", ["cuda", "triton"])
    monkeypatch.setattr(
        cuda_backend, "why_not", lambda p: None if p.spec.layout == "tile64" else "rows"
    )
    module = sparsekern.SparseLinear.from_sparse24(rows, layout="rowmajor")
    for _ in range(2):  # whichever comes first
        module(x)
        assert rowmajor_calls.pop() is module.weight and module.weight.fresh_twin() is None
        assert ops.explain(x, module.weight).layout == "rowmajor"
        ops.linear(x, rows, bias)
        assert quick.calls[-1]["values"] == rows.fresh_twin().values.data_ptr()
        ops.linear(x, rows)
        assert quick.calls[-1]["values"] == rows.fresh_twin().values.data_ptr()
        ops._calls.clear()
    with torch.inference_mode():
        frozen = rows.clone()
        with pytest.warns(UserWarning, match="row-major.*weight.to_layout\\('tile64'\\)"):
            ops.linear(x[:3], frozen)
        assert rowmajor_calls.pop() is frozen
    calls = len(quick.calls)
    with torch.enable_grad():
        monkeypatch.setattr(cuda_backend, "why_not", lambda problem: None)
        ops.linear(x.clone().requires_grad_(), rows)
    assert len(quick.calls) == calls + 1, "the twin's tensors go through the registered op"
    assert quick.calls[-1]["values"] == rows.fresh_twin().values.data_ptr()


def test_compress_returns_what_the_kernels_read(monkeypatch):
    monkeypatch.setattr(cuda_backend, "packs", lambda device, dtype: dtype is torch.bfloat16)
    w = random_weight(64, 128, torch.bfloat16)
    for make in (sparsekern.compress, sparsekern.prune_compress):
        w24 = make(w)
        assert w24.layout == "tile64" and make(w, layout="rowmajor").layout == "rowmajor"
        assert torch.equal(sparsekern.decompress(w24), w) and torch.equal(w24.to_dense(), w)
        rows = w24.rowmajor()
        assert torch.equal(w24.bitmask(), rows.bitmask()) and torch.equal(w24.mask(), rows.mask())
        sparsekern.verify(w24)
        assert make(w.float()).layout == "rowmajor", "no kernels"
        assert make(w[:0]).layout == "rowmajor", "nothing to compute"
        with pytest.raises(ValueError, match="layout in .*'cusparselt'.*, got 'tile63'"):
            make(w, layout="tile63")


@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 1, 2)], ids=str)
def test_zero_tokens_launch_nothing(on_cpu, leading):
    w24 = pack(compress(random_weight(64, 128, torch.bfloat16)))
    y = cuda_backend.linear(torch.ones(*leading, 128, dtype=torch.bfloat16), w24, None, None)
    assert (y.shape, y.dtype, on_cpu.calls) == ((*leading, 64), torch.bfloat16, [])


def test_outputs_are_those_of_the_mode(on_cpu):
    """Memory taken past the dispatcher is an inference tensor where torch's own would be one."""
    w24 = pack(compress(random_weight(64, 128, torch.bfloat16)))
    for leading in ((2,), (2, 3)):
        x = torch.ones(*leading, 128, dtype=torch.bfloat16)
        for mode, inference in ((torch.inference_mode, True), (torch.no_grad, False)):
            with mode():
                y = cuda_backend.linear(x, w24, None, None)
            assert y.is_inference() == inference and not y.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(3, 64), (2, 3, 64), (0, 64)], ids=str)
def test_memory_past_the_dispatcher_is_as_torch_gives_it(size):
    strides = torch.empty(size, device="meta").stride()
    for allocate in (torch_raw.empty_strided, torch_raw.empty_strided_dispatched):
        tensor = allocate(size, strides, torch.bfloat16)
        assert (tensor.shape, tensor.stride(), tensor.dtype) == (size, strides, torch.bfloat16)
        assert tensor.get_device() == torch.cuda.current_device() and type(tensor) is torch.Tensor


def test_a_workspace_begins_with_cleared_counters(native):
    cuda_backend._workspace(0, 7)
    ((_, _, space),) = cuda_backend._workspaces.values()
    assert space.tolist() == [0] * 16 + [7] * 48


def test_workspaces_belong_to_a_stream_or_to_a_capture(native):
    def address(index, stream):
        return cuda_backend._workspace(index, stream)[1]

    first = address(0, 7)
    assert address(0, 7) == first
    others = [address(0, 8), address(1, 7)]
    native.capture = 1
    others.append(address(0, 7))
    assert address(0, 7) == others[-1], "one for the whole capture"
    held = list(cuda_backend._workspaces.values())  # so that no address comes back
    native.capture = 2
    others.append(address(0, 7))
    assert len({first, *others}) == 5 and len(held) == 4
    native.capture = 0
    assert address(0, 7) == first


@pytest.mark.parametrize("capture", [0, 3])
def test_within_an_op_every_call_has_a_workspace_of_its_own(native, capture):
    native.capture = capture
    with memory.nothing_kept():
        spaces = [cuda_backend._workspace(0, 7) for _ in range(3)]
    assert len({space[1] for space in spaces}) == 3 and not cuda_backend._workspaces
    assert all(space[2].tolist() == [0] * 16 + [7] * 48 for space in spaces)
    cuda_backend._workspace(0, 7)
    assert len(cuda_backend._workspaces) == 1, "outside it is kept"


def test_rows_that_need_no_copy():
    x = torch.arange(64.0).to(torch.bfloat16).view(4, 16)
    for rows in (x, x[:, :8], x[::2], x[1:2, :4], x.view(2, 2, 16)):
        tokens, columns = rows.numel() // rows.shape[-1], rows.shape[-1]
        same, stride = cuda_backend._aligned_rows(rows, tokens, columns)
        assert same.data_ptr() == rows.data_ptr() and stride % 8 == 0 and stride >= columns


def test_rows_of_8_bytes_that_the_mma_kernel_takes(on_cpu, monkeypatch):
    """in_features % 8 == 4: no copy for it, one for the others where it is faster."""
    monkeypatch.setattr(cuda_backend, "in_halves", lambda *problem: False)
    assert [cuda_backend._row(kernel) for kernel in ("mma", "split")] == [8, 16]
    assert cuda_backend._row("mma", 1) == 16
    x = torch.arange(64.0).to(torch.bfloat16).view(16, 4)
    for rows in (x, x[:, :], x.view(-1)[4:].view(15, 4)):
        (part,) = cuda_backend._rows(rows, len(rows), 4, 8)
        assert part.rows.data_ptr() == rows.data_ptr() and (part.stride, part.source) == (4, None)
    at_4 = x.view(-1)[2:62].view(15, 4)
    (part,) = cuda_backend._rows(at_4, 15, 4, 8)
    assert part.stride == 8 and part.source.data_ptr() == at_4.data_ptr()
    w24, x = pack(compress(random_weight(64, 132, torch.bfloat16))), torch.ones(2, 132).bfloat16()
    for kernel, stride in (("mma", 132), ("prefill", 136)):
        cuda_backend.linear(x, w24, plan=lambda *problem, kernel=kernel: (kernel, 0))
        call = on_cpu.calls.pop()
        assert call["x_stride"] == stride and (call["x"] == x.data_ptr()) == (kernel == "mma")


def on_16_bytes(elements):
    """Numbers in bfloat16 from a multiple of 16 bytes on."""
    data = torch.arange(elements + 8.0).to(torch.bfloat16)
    return data[-data.data_ptr() % 16 // 2 :][:elements]


def copied_tokens(x, halves=True):
    """Which tokens of x are copied; every one is in one part, where the kernels can fetch it."""
    parts = cuda_backend._rows(x, *x.shape, halves=halves)
    cuda_backend._copy(parts)
    seen, copied = {}, []
    for part in parts:
        tokens = range(len(x))[part.first :: part.step]
        assert len(tokens) == part.tokens == len(part.rows) > 0
        assert part.rows.data_ptr() % 16 == 0 == part.stride * x.itemsize % 16
        assert part.stride >= x.shape[1]
        assert part.tokens == 1 or part.stride == part.rows.stride(0)
        assert part.rows.stride(1) == 1 and torch.equal(part.rows, x[tokens])
        lies = part.rows.data_ptr() == x[part.first].data_ptr()
        assert lies == (part.source is None)
        copied += [] if lies else tokens
        seen |= dict.fromkeys(tokens)
    assert sum(part.tokens for part in parts) == len(seen) == len(x)
    return copied


def test_rows_of_which_every_other_one_lies_on_16_bytes():
    data = on_16_bytes(600)
    for tokens in (1, 2, 3, 4, 7):
        even, odd = [*range(0, tokens, 2)], [*range(1, tokens, 2)]
        wide, beyond = (data[at : at + tokens * 20].view(tokens, 20) for at in (0, 4))
        for x, copied in (
            (wide, odd),
            (beyond, even),
            (wide[:, :12], odd),
            (wide[:, 4:16], even),
            (data[: tokens * 24].view(tokens, 24), []),
            (data[: tokens * 24].view(tokens, 24)[:, :20], []),
            (data[: tokens * 40].view(2 * tokens, 20)[::2], []),
        ):
            assert copied_tokens(x) == copied
            assert copied_tokens(x, halves=False) == ([*range(tokens)] if copied else [])


def test_rows_that_are_all_copied():
    """All 8 bytes beyond 16, elements at 4 bytes, rows that overlap or turn back."""
    data = on_16_bytes(600)
    for x in (
        data[4:76].view(3, 24),
        data[:72].view(3, 24)[:, 4:],
        data[:120].view(6, 20)[1::2],
        data[2:62].view(3, 20),
        data[:66].view(3, 22),
        data[:40].view(20, 2).t(),
        data[:20].expand(3, 20),
        data.as_strided((3, 20), (12, 1)),
    ):
        assert copied_tokens(x) == [*range(len(x))]
    x = data[:240].view(3, 4, 20)  # of several dimensions
    parts = cuda_backend._rows(x, 12, 20, halves=True)
    assert [part.rows.shape for part in parts] == [(6, 20)] * 2


def test_rows_are_copied_by_8_bytes_where_they_begin_there(monkeypatch):
    copied = []
    copy = torch.Tensor.copy_
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda to, x: (copied.append(x.dtype), copy(to, x))[1]
    )
    data = torch.arange(80.0, dtype=torch.bfloat16)
    wide, narrow = torch.int64, torch.bfloat16
    for x, dtype in (
        (data[:64].view(16, 4), wide),
        (data[:64].view(4, 16)[:, 4:8], wide),
        (data[2:62].view(15, 4), narrow),  # begins at 4 bytes
        (data[:60].view(10, 6)[:, :4], narrow),  # rows begin at 12
        (data[:66].view(11, 6), narrow),
        (data[:64].view(4, 16).t(), narrow),
    ):
        rows = torch.empty(x.shape[0], 24, dtype=narrow)[:, : x.shape[1]]
        cuda_backend._copy_rows(rows, x)
        assert torch.equal(rows, x) and copied.pop() == dtype


def test_rows_that_are_copied():
    x = torch.arange(64.0).to(torch.bfloat16).view(4, 16)
    cases = (x[:, 1:9], x.t(), x[:, :8:2], x[:1].expand(4, 16), x.view(16, 4), x[:1, 1:5])
    for rows in cases:
        copy, stride = cuda_backend._aligned_rows(rows, *rows.shape)
        assert copy.data_ptr() != rows.data_ptr() and copy.data_ptr() % 16 == 0
        assert stride == copy.stride(0) and stride % 8 == 0
        assert torch.equal(copy, rows)


# ---- weights of 8 bits ---------------------------------------------------------------------------

E4M3, INT8 = "float8_e4m3fn", "int8"


@pytest.fixture
def scaled_on_cpu(on_cpu, monkeypatch):
    """`on_cpu` for weights of 8 bits, whose refusals of the CPU are left out."""
    for name in ("_current_device", "_current_stream", "_empty_strided"):
        monkeypatch.setattr(scaled_linear, name, getattr(cuda_backend, name))
    return on_cpu


def quantized(storage, dtype=torch.bfloat16, out_features=64, in_features=256):
    w24 = compress(random_weight(out_features, in_features, dtype))
    return pack(sparsekern.quantize(w24, storage))


def test_types_have_keys_for_tables():
    assert configs.Types.of(BF16).key == BF16
    assert configs.Types(INT8, INT8, F16).key == INT8
    assert configs.Types(INT8, F16, F16).key == "int8 weight, float16"
    assert configs.Types(E4M3, BF16, BF16).bits == Bits(8, 16)


@pytest.mark.parametrize("storage", [E4M3, INT8])
def test_few_tokens_take_the_weights_as_they_are(scaled_on_cpu, monkeypatch, storage):
    expect(monkeypatch, 1.0, 10.0)
    w24 = quantized(storage)
    x, bias = torch.ones(2, 4, 256, dtype=torch.bfloat16), torch.ones(64, dtype=torch.bfloat16)
    launch = scaled_linear.bind(problem(x, w24, activation="silu", bias=True))
    y = launch(x, w24, bias)
    assert (y.shape, y.dtype) == ((2, 4, 64), torch.bfloat16)
    (call,) = scaled_on_cpu.calls
    wanted = dict(
        kernel="decode",
        tokens=8,
        weight_dtype=storage,
        x_dtype=BF16,
        dtype=BF16,
        x_stride=256,
        activation="silu",
        x=x.data_ptr(),
        channel_scale=w24.tensors["weight_scale"].data_ptr(),
        bias=bias.data_ptr(),
        y=y.data_ptr(),
    )
    assert {name: call[name] for name in wanted} == wanted and "token_scale" not in call
    scaled_on_cpu.calls.clear()
    odd = torch.ones(8, 512, dtype=torch.bfloat16)[:, ::2]
    assert scaled_linear.bind(problem(odd, w24))(odd, w24).shape == (8, 64)
    assert scaled_on_cpu.calls[0]["x_stride"] == 256


def expect(monkeypatch, of_16, of_8):
    """Have W8A16, and W8A8 without the quantisation of x, expected to take so long."""
    monkeypatch.setattr(configs, "expected_us", lambda *problem: [of_16, of_8])
    registry.changed()


@pytest.mark.parametrize("storage", [E4M3, INT8])
def test_few_tokens_are_quantised_where_that_is_faster(scaled_on_cpu, monkeypatch, storage):
    w24 = quantized(storage)
    x, bias = torch.ones(8, 256, dtype=torch.bfloat16), torch.ones(64, dtype=torch.bfloat16)
    asked, extra = problem(x, w24, bias=True), heuristics.quantize_us(8, 256)
    for of_16, of_8, kind in (
        (10.0, 10.0 - extra, "W8A16"),
        (10.0, 9.6 - extra, "W8A16"),
        (10.0, 9.5 - extra, "W8A8"),
        (10.0, 3.0, "W8A8"),
    ):
        expect(monkeypatch, of_16, of_8)
        told = scaled_linear.explain(asked)
        assert told.why.startswith(kind)
        text = f"{of_16:.1f} us are expected with x as it is, {of_8 + extra:.1f} with x of 8 bits"
        assert text in told.why
        scaled_on_cpu.calls.clear()
        scaled_linear.bind(asked)(x, w24, bias)
        (call,) = scaled_on_cpu.calls
        assert (call["kernel"] == "decode") == (kind == "W8A16")
        assert call["x_dtype"] == (BF16 if kind == "W8A16" else storage)
    more = problem(x[:1].expand(65, 256).contiguous(), w24)
    assert "expected" not in scaled_linear.explain(more).why, "there is nothing to compare"


@pytest.mark.parametrize("tokens", [8, 150])
def test_x_of_16_bits_is_asked_for_by_name(scaled_on_cpu, monkeypatch, tokens):
    expect(monkeypatch, 10.0, 1.0)
    x, w24 = torch.ones(tokens, 256, dtype=torch.bfloat16), quantized(INT8)
    asked = problem(x, w24)
    y = registry._BACKENDS["cuda-a16"].bind(asked)(x, w24)
    assert y.shape == (tokens, 64)
    (call,) = scaled_on_cpu.calls
    assert (call["tokens"], call["x_dtype"]) == (tokens, BF16)
    assert call["channel_scale"] == w24.tensors["weight_scale"].data_ptr()
    told = SixteenBitBackend().explain(asked)
    assert "W8A16" in told.why
    if tokens == 8:
        assert (call["kernel"], call["weight_dtype"]) == ("decode", INT8)
        assert "stored_dtype" not in call and "widened" not in call
        return
    of_16 = cuda_backend._plan(tokens, 64, 256, BF16, -1)
    assert (call["kernel"], call["config"]) == of_16, "as for a weight of 16 bits"
    assert (call["stored_dtype"], call["weight_dtype"], bool(call["widened"])) == (INT8, BF16, True)
    chosen = configs.choose(tokens, 64, 256, BF16, -1)
    assert told.config == f"widen + {chosen.variant}" and "to bfloat16 in memory" in told.why
    assert told.expected_us is None


def test_what_x_of_16_bits_cannot_be_asked_for(native):
    cuda = torch.device("cuda", 0)
    x, w24 = torch.ones(8, 256, dtype=torch.bfloat16), quantized(INT8)
    on_gpu = problem(x, w24)._replace(device=cuda, gpu=0)
    assert SixteenBitBackend().supports(on_gpu) is None
    quantized_x = on_gpu._replace(quantized=torch.int8)
    assert "int8 already" in SixteenBitBackend().supports(quantized_x)
    plain = problem(x, pack(compress(random_weight(64, 256, torch.bfloat16))))
    assert "for quantised weights" in SixteenBitBackend().supports(plain)


def test_expected_times_are_tables_where_they_know_all_else_the_cost_model(native):
    widened, eight = configs.Types(INT8, BF16, BF16), configs.Types(INT8, INT8, BF16)
    asked = 8, 4096, 4096, (widened, eight), 0
    modelled = configs.expected_us(*asked)
    for types, us in zip(asked[3], modelled, strict=True):
        name = configs.heuristic(8, 4096, 4096, 0, types)
        variant = next(v for v in coefficients.TIMES_8 if variant_name(v) == name)
        assert us == heuristics.predicted_us(variant, 8, 4096, 4096, 132, types.bits)
    blocks = variant_name(BLOCKS[2])
    tune(tuning.user_path(), {8: (blocks, 5.0)}, widened.key)
    assert configs.expected_us(*asked) == modelled, "measured and modelled do not compare"
    tune(tuning.user_path(), {16: (variant_name(TILES[0]), 4.0)}, eight.key)
    assert configs.expected_us(*asked) == [5.0, 4.0]


@pytest.mark.parametrize("storage", [E4M3, INT8])
@pytest.mark.parametrize("in_features", [256, 260])
def test_more_tokens_are_quantised(scaled_on_cpu, monkeypatch, storage, in_features):
    w24 = quantized(storage, in_features=in_features)
    x = torch.randn(5, 13, in_features).to(torch.bfloat16)
    seen = []
    quantize = scaled_linear.quantize_rows.quantize
    monkeypatch.setattr(
        scaled_linear.quantize_rows, "quantize", lambda *a: seen.append(quantize(*a)) or seen[-1]
    )
    y = scaled_linear.bind(problem(x, w24))(x, w24)
    assert (y.shape, y.dtype) == ((5, 13, 64), torch.bfloat16)
    ((q, scale),), (call,) = seen, scaled_on_cpu.calls
    assert q.dtype == w24.values.dtype and q.shape == (65, in_features)
    assert call["x_stride"] == q.stride(0) == -(-in_features // 16) * 16
    assert (call["x"], call["token_scale"]) == (q.data_ptr(), scale.data_ptr())
    assert call["kernel"] in ("prefill", "split") and call["workspace"]
    assert (call["weight_dtype"], call["x_dtype"], call["dtype"]) == (storage, storage, BF16)


@pytest.mark.parametrize("tokens", [1, 13])
@pytest.mark.parametrize("group", [64, 128, 256])
def test_int4_is_widened_in_registers_and_of_more_tokens_in_memory(scaled_on_cpu, group, tokens):
    plain = compress(random_weight(64, 256, torch.bfloat16))
    w24 = pack(sparsekern.quantize(plain, "int4", group=group))
    x = torch.ones(5, tokens, 256, dtype=torch.bfloat16)
    bias = torch.ones(64, dtype=torch.bfloat16)
    asked = problem(x, w24, activation="relu", bias=True)
    y = scaled_linear.bind(asked)(x, w24, bias)
    assert (y.shape, y.dtype) == ((5, tokens, 64), torch.bfloat16)
    (call,) = scaled_on_cpu.calls
    scale = 0 if group < 256 else w24.tensors["weight_scale"].data_ptr()
    wanted = dict(
        tokens=5 * tokens,
        x=x.data_ptr(),
        y=y.data_ptr(),
        values=w24.values.data_ptr(),
        metadata=w24.metadata.data_ptr(),
        x_dtype=BF16,
        dtype=BF16,
        channel_scale=scale,
        bias=bias.data_ptr(),
        activation="relu",
    )
    assert {name: call[name] for name in wanted} == wanted
    assert call.get("scale_group", 0) == group % 256
    told = scaled_linear.explain(asked)
    if tokens == 1:
        assert (call["kernel"], call["weight_dtype"]) == ("decode", "int4")
        assert told.config.startswith("decode ") and "in memory" not in told.why
    else:
        assert (call["kernel"], call["config"]) == cuda_backend._plan(65, 64, 256, BF16, -1)
        assert (call["stored_dtype"], call["weight_dtype"]) == ("int4", BF16)
        assert told.config.startswith("widen + ") and "to bfloat16 in memory" in told.why
    assert told.why.startswith("W4A16")


@pytest.mark.parametrize("tokens, kernel", [(16, "decode"), (17, "narrow"), (512, "narrow")])
def test_int4_between_few_and_many_tokens_has_a_kernel(scaled_on_cpu, tokens, kernel):
    tiles = [NarrowTile(256, 64, 1, 2), NarrowTile(256, 128, 2, 1)]
    scaled_on_cpu.rows["narrow"] = rows(tiles, 3, WIDENED[-2:])
    forget()
    w24 = pack(sparsekern.quantize(compress(random_weight(64, 256, torch.bfloat16)), "int4"))
    x = torch.ones(tokens, 256, dtype=torch.bfloat16)
    scaled_linear.bind(problem(x, w24))(x, w24)
    (call,) = scaled_on_cpu.calls
    assert (call["kernel"], call["weight_dtype"], call["x_dtype"]) == (kernel, "int4", BF16)
    assert "stored_dtype" not in call and "widened" not in call
    told = scaled_linear.explain(problem(x, w24))
    assert told.config.startswith(f"{kernel} ") and "in memory" not in told.why
    if kernel == "narrow":
        assert call["config"] in (3, 4)
    more = torch.ones(513, 256, dtype=torch.bfloat16)
    assert "more than 512 tokens" in scaled_linear.explain(problem(more, w24)).why
    large = WeightSpec.of((4096, 4096), "int4", dtype=torch.bfloat16, layout="tile64", group=128)
    more = more.new_empty(1025, 4096)
    for count, start in ((1024, "narrow 256x128 "), (1025, "widen + ")):  # a wave of 128 tiles
        assert scaled_linear.explain(problem_of(more[:count], large)).config.startswith(start)


def test_which_int4_the_kernels_take(native):
    cuda = torch.device("cuda", 0)
    x, w24 = torch.ones(300, 256, dtype=torch.bfloat16), quantized("int4")
    on_gpu = problem(x, w24)._replace(device=cuda, gpu=0)
    assert CudaBackend().supports(on_gpu) is None
    quantized_x = on_gpu._replace(quantized=torch.int8)
    assert "no kernel for weights of int4" in CudaBackend().supports(quantized_x)
    assert "exact" in PreciseBackend().supports(on_gpu)
    assert CudaBackend().prefers(w24.spec, cuda) == "tile64"
    other = WeightSpec.of((64, 256), "int4", "tile64", torch.bfloat16, group=32)
    assert CudaBackend().prefers(other, cuda) is None
    native.rows["decode"] = rows(BLOCKS, 1, PLAIN)
    forget()
    assert "no kernel for weights of int4" in CudaBackend().supports(on_gpu)
    assert CudaBackend().prefers(w24.spec, cuda) is None


@pytest.mark.parametrize("capability", [(8, 9), (9, 0)])
def test_a_gpu_without_the_module(native, monkeypatch, capability):
    """Every weight is kept as "rowmajor", and every backend says why it does not run."""
    native.capability = capability

    def absent():
        raise RuntimeError("sparsekern: no CUDA module.")

    monkeypatch.setattr(cuda_backend._native, "module", absent)
    monkeypatch.setattr(cuda_backend._native, "available", lambda: False)
    monkeypatch.setattr(cuda_backend._native, "reason", lambda: "no CUDA module")
    forget()
    x = torch.ones(3, 256, dtype=torch.bfloat16)
    for storage in ("int8", "float8_e4m3fn", "int4"):
        w24 = quantized(storage)
        assert registry.best_layout(w24.spec, torch.device("cuda", 0)) == "rowmajor"
        on_gpu = problem(x, w24)._replace(device=torch.device("cuda", 0), gpu=0)
        for backend in (CudaBackend(), PreciseBackend(), SixteenBitBackend()):
            assert backend.supports(on_gpu), f"{backend.name} {storage}"
        rows = on_gpu._replace(spec=w24.rowmajor().spec)
        assert CudaBackend().supports(rows) == "no CUDA module", "not that nobody packed it"
    plain = compress(random_weight(8, 16, torch.bfloat16))
    assert registry.best_layout(plain.spec, torch.device("cuda", 0)) == "rowmajor"


@pytest.mark.parametrize("across", [False, True])
def test_a_split_tile_across_clusters_gets_a_workspace(scaled_on_cpu, monkeypatch, across):
    """By every way: aligned rows and others, a launcher, and int4 that is widened in memory."""
    tile = SplitTile(128, 64, 4, across)
    monkeypatch.setitem(scaled_on_cpu.rows, "split", rows([tile], ACROSS if across else 0))
    forget()
    w24 = pack(compress(random_weight(64, 4096, torch.bfloat16)))
    x, y = torch.ones(65, 4096, dtype=torch.bfloat16), torch.ones(65, 64, dtype=torch.bfloat16)
    tune(tuning.user_path(), {65: (variant_name(tile), 3.5)}, shape=(64, 4096))
    cuda_backend.bind(problem(x, w24))(x, w24)
    skewed = torch.ones(65, 4100, dtype=torch.bfloat16)[:, 4:]
    cuda_backend.bind(problem(skewed, w24))(skewed, w24)
    int4 = pack(sparsekern.quantize(w24, "int4"))
    scaled_linear.bind(problem(x, int4))(x, int4)
    space = torch.zeros(64, dtype=torch.uint8)
    cuda_backend.launcher(variant_name(tile), x, w24, y, space)()
    calls = scaled_on_cpu.calls
    assert {call["kernel"] for call in calls} == {"split"} and len(calls) == 4
    shared = cuda_backend._workspace(-1, 77)[1]
    wanted = [shared] * 3 + [space.data_ptr()] if across else [0] * 4
    assert [call.get("workspace", 0) for call in calls] == wanted


@pytest.mark.parametrize("multiprocessors, shares", [(132, True), (1, False)])
def test_a_launch_that_cuts_no_tile_clears_no_workspace(
    scaled_on_cpu, monkeypatch, multiprocessors, shares
):
    """One tile: most of what one multiprocessor runs at once, little of what 132 do."""
    properties = SimpleNamespace(name="Test GPU", multi_processor_count=multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setitem(scaled_on_cpu.rows, "prefill", rows([Tile(256, 128, 1, 1)]))
    monkeypatch.setitem(scaled_on_cpu.rows, "split", [])
    forget()
    w24 = quantized(INT8, torch.float16)
    x, scale = torch.ones(65, 256, dtype=torch.int8), torch.ones(65)
    with memory.nothing_kept():
        scaled_linear.bind(problem(x, w24))(x, w24, None, scale)
    (call,) = scaled_on_cpu.calls
    assert call["kernel"] == "prefill" and (call["workspace"] != 0) == shares


def test_x_that_is_quantised_already(scaled_on_cpu):
    w24 = quantized(INT8, torch.float16)
    for tokens in (3, 65):
        scaled_on_cpu.calls.clear()
        x, scale = torch.ones(tokens, 256, dtype=torch.int8), torch.ones(tokens)
        y = scaled_linear.bind(problem(x, w24))(x, w24, None, scale)
        (call,) = scaled_on_cpu.calls
        assert (y.shape, y.dtype) == ((tokens, 64), torch.float16)
        assert (call["x"], call["token_scale"]) == (x.data_ptr(), scale.data_ptr())
        assert (call["x_dtype"], call["dtype"]) == (INT8, F16) and call["kernel"] != "decode"
    none = torch.ones(0, 256, dtype=torch.int8)
    y = scaled_linear.bind(problem(none, w24))(none, w24, None, torch.ones(0))
    assert y.shape == (0, 64) and y.dtype == torch.float16


def test_precise_sums_are_asked_for_by_name(scaled_on_cpu, monkeypatch):
    x, w24 = torch.ones(200, 256, dtype=torch.bfloat16), quantized(E4M3)
    scaled_linear.bind(problem(x, w24), precise=True)(x, w24)
    tile = PROMOTED[scaled_on_cpu.calls[0]["config"] - len(TILES)]
    assert scaled_linear.explain(problem(x, w24), True).config == f"prefill {tile}"
    types = configs.Types(E4M3, E4M3, BF16)
    asked_for = {variant_name(tile) for tile in PROMOTED}
    assert asked_for <= set(configs.variants(types))
    assert not asked_for & set(configs.runnable(0, types))
    assert not asked_for & set(configs.variants(types._replace(weight=INT8, x=INT8)))
    cuda = torch.device("cuda", 0)
    of_int8 = problem(x, quantized(INT8))._replace(device=cuda)
    assert "exact" in PreciseBackend().supports(of_int8)
    assert PreciseBackend().supports(problem(x, w24)._replace(device=cuda)) is None
    plain = pack(compress(random_weight(64, 256, torch.bfloat16)))
    assert "for quantised weights" in PreciseBackend().supports(problem(x, plain))


def test_why_not_for_weights_of_8_bits(native):
    cuda = torch.device("cuda", 0)
    x, w24 = torch.ones(3, 256, dtype=torch.bfloat16), quantized(INT8)
    backend = CudaBackend()
    assert "needs x on a GPU" in backend.supports(problem(x, w24))
    on_gpu = problem(x, w24)._replace(device=cuda, gpu=0)
    assert backend.supports(on_gpu) is None
    assert "needs layout 'tile64'" in backend.supports(on_gpu._replace(spec=w24.rowmajor().spec))
    assert "got torch.float32" in backend.supports(on_gpu._replace(dtype=torch.float32))
    native.rows["prefill"] = rows(TILES, 0, PLAIN)
    native.rows["decode"] = rows(BLOCKS, 1, PLAIN)
    forget()
    assert "no kernel for weights of int8" in backend.supports(on_gpu)
    native.capability = (8, 9)
    forget()
    assert "mma.sp kernel was not built for weights of int8" in backend.supports(on_gpu)


def test_explain_says_how_weights_of_8_bits_are_computed(native, monkeypatch, tmp_path):
    expect(monkeypatch, 1.0, 10.0)
    w24, backend = quantized(INT8), CudaBackend()

    def told(tokens, dtype=torch.bfloat16):
        x = torch.ones(tokens, 256).to(dtype)
        return backend.explain(problem(x, w24)._replace(gpu=0))

    assert "W8A16" in told(64).why and told(64).config.startswith("decode")
    assert "x is quantised to int8, one scale a token" in told(65).why
    assert "W8A8: x is int8" in told(1, torch.int8).why
    tune(tmp_path / "shipped" / "a.json", {128: (f"prefill {TILES[0]}", 5.0)}, INT8, (64, 256))
    tune(
        tmp_path / "shipped" / "a.json",
        {8: ("decode 128 rows, split 4", 2.5)},
        "int8 weight, float16",
        (64, 256),
    )
    assert told(128, torch.int8).expected_us == 5.0
    assert (told(128).config, told(128).expected_us) == (f"prefill {TILES[0]}", None)
    assert (told(8).config, told(8).expected_us) == ("decode 128 rows, split 4", None)
    assert "measured in int8 weight, float16" in told(8).why

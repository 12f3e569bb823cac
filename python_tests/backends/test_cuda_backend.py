"""The host side of the CUDA backend that needs no GPU: refusals, choices, names, workspaces."""

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from python_tests.linear_cases import random_weight
from sparsekern.backends.cuda import cost_model as heuristics
from sparsekern.backends.cuda import linear as cuda_backend
from sparsekern.backends.cuda import tuned_tables as tuning
from sparsekern.backends.cuda.cost_model import TIMES, MmaTile, RowBlocks, Tile
from sparsekern.formats.sparse24 import compress
from sparsekern.formats.tile64 import pack
from sparsekern.ops import linear_op as ops
from sparsekern.utils import torch_raw

GPU = "Test GPU, 132 multiprocessors"
F16, BF16 = 0, 1  # DType in csrc/core/problem.h


CACHED = ("_tiles", "variants", "_plan", "_mma_tiles", "_mma_plan", "refusal")
TILES = [variant for variant in TIMES if isinstance(variant, Tile)]
# Two that tests name, then those that heuristics know.
BLOCKS = [RowBlocks(64, 2), RowBlocks(128, 4)]
BLOCKS += [v for v in TIMES if isinstance(v, RowBlocks) and v not in BLOCKS]
# Stages (and below, parts) that no tile of configs.h has: TIMES lacks them, so that Hopper chooses
# another kernel.
MMA_TILES = (MmaTile(128, 128, 2, 4, 1, 2), MmaTile(64, 8, 2, 1, 4, 3))


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
        prefill_configs=lambda: [tile._asdict() | {"index": i} for i, tile in enumerate(TILES)],
        decode_configs=lambda: [b._asdict() | {"index": i} for i, b in enumerate(BLOCKS, 1)],
        mma_configs=lambda: [
            dict(zip(MmaTile._fields, tile), index=i) for i, tile in enumerate(MMA_TILES)
        ],
        split_configs=lambda: [dict(index=0, rows=128, tokens=64, split=16)],
        decode=lambda *arguments: module.calls.append(("decode", arguments)),
        prefill=lambda *arguments: module.calls.append(("prefill", arguments)),
        mma=lambda *arguments: module.calls.append(("mma", arguments)),
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
    monkeypatch.setattr(cuda_backend, "_capability", lambda index: module.capability)
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
    cuda_backend._known.clear()
    tuning.forget()


def tune(path, cells, dtype="bfloat16", shape=(4096, 4096)):
    tuning.store(path, GPU, dtype, shape, cells)
    cuda_backend.forget_plans()


def explained(tokens, out_features, in_features, dtype=torch.bfloat16):
    w24 = SimpleNamespace(shape=(out_features, in_features))
    x = torch.empty(tokens, in_features, device="meta", dtype=dtype)
    return cuda_backend.config(x, w24), *cuda_backend.origin(x, w24)


def test_why_not():
    w24 = compress(random_weight(8, 16, torch.bfloat16))
    x = torch.ones(1, 16, dtype=torch.bfloat16)
    assert "needs layout 'tile64'" in cuda_backend.why_not(x, w24)
    assert "needs x on a GPU, got cpu" in cuda_backend.why_not(x, pack(w24))
    assert cuda_backend.supported(x, w24) == (False, cuda_backend.why_not(x, w24))
    assert not cuda_backend.gated_supported(x, w24, w24)


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
            assert cuda_backend._plan(tokens, 4096, 4096, BF16, 0) == (
                native.mma,
                index,
                False,
            )
            x = torch.empty(tokens, 4096, device="meta", dtype=torch.bfloat16)
            assert cuda_backend.config(x, w24) == f"mma {MMA_TILES[index]}"
    native.capability = (9, 0)
    cuda_backend._plan.cache_clear()
    assert cuda_backend._plan(1, 4096, 4096, BF16, 0)[0] is native.decode
    on_request = cuda_backend._mma_plan(1, 4096, 4096, BF16, 0)
    assert on_request == (native.mma, 1, False), "on Hopper, too"
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
        run, config, cuts_k = cuda_backend._plan(tokens, 28672, 4096, BF16, 0)
        known = [*BLOCKS, *TILES, *(tile for tile in MMA_TILES if tile in TIMES)]
        chosen = heuristics.fastest(tokens, 28672, 4096, 132, tuple(known))
        assert run is getattr(native, kernel) and cuts_k == (kernel == "prefill")
        name, why, us = explained(tokens, 28672, 4096)
        assert name == heuristics.name(chosen) and us is None
        assert cuda_backend.variants()[name] == (kernel, config)
        assert why == "variant by heuristics, no tuned table knows this problem"


def test_heuristics_may_choose_mma_on_hopper(native, monkeypatch):
    """32x16: the fastest at 64 tokens of a weight with few rows."""
    tile = MmaTile(32, 16, 1, 1, 4, 5)
    configs = [tile._asdict() | {"index": 7}]
    monkeypatch.setattr(native, "mma_configs", lambda: configs)
    assert cuda_backend._plan(64, 512, 2048, BF16, 0) == (native.mma, 7, False)
    assert explained(64, 512, 2048)[0] == "mma 32x16, 1x1x4 warps"


def test_a_tuned_table_decides_what_runs(native, tmp_path):
    last = TILES[-1]
    cells = {16: ("decode 128 rows, split 4", 3.25), 64: (f"prefill {last}", 7.0)}
    tune(tmp_path / "shipped" / "gpu.json", cells)
    assert cuda_backend._plan(16, 4096, 4096, BF16, 0) == (native.decode, 2, False)
    assert cuda_backend._plan(64, 4096, 4096, BF16, 0) == (native.prefill, len(TILES) - 1, True)
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
    native.decode_configs = lambda: [
        {"index": 1, "rows": 128, "split": 4},
        {"index": 2, "rows": 64, "split": 2},
    ]
    forget()
    assert cuda_backend._plan(8, 4096, 4096, BF16, 0) == (native.decode, 1, False)


def test_explain_tells_the_expected_time(native, tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_backend, "why_not", lambda x, w24: "")
    monkeypatch.setattr(ops, "_load", lambda name: ops._LOADERS["cuda"]())
    monkeypatch.setattr(ops._native, "available", lambda: True)
    monkeypatch.setitem(ops._PREFERENCE, "cpu", ("cuda",))
    w24 = pack(compress(random_weight(64, 64, torch.bfloat16)))
    x = torch.ones(8, 64, dtype=torch.bfloat16)
    before = ops.explain(x, w24)
    assert before.expected_us is None and "heuristics" in before.reason
    tune(tuning.user_path(), {8: ("decode 128 rows, split 4", 3.5)}, shape=(64, 64))
    told = ops.explain(x, w24)
    assert (told.config, told.expected_us) == ("decode 128 rows, split 4", 3.5)
    assert str(told).endswith("variant from your tuned table; expected 3.5 us")


def test_sizes_that_the_kernels_cannot_count_are_refused(native):
    cuda_backend._plan(2**31 - 1024, 8, 8, BF16, 0)
    with pytest.raises(ValueError, match=r"up to 2147482624, got 2147482625\. Split x"):
        cuda_backend._plan(2**31 - 1023, 8, 8, BF16, 0)


@pytest.fixture
def declared():
    """{kernel: Signature} by the stub file, which says how many arguments, and in which order."""
    stub = Path(cuda_backend.__file__).with_name("_C.pyi").read_text()
    functions = {}
    exec(stub.replace("from typing import TypedDict", "TypedDict = object"), functions)
    return {name: inspect.signature(functions[name]) for name in ("decode", "prefill", "mma")}


def test_a_launcher_passes_what_the_module_takes(native, declared, monkeypatch):
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
        kernel, arguments = native.calls.pop()
        bound = declared[kernel].bind(*arguments).arguments
        wanted = dict(
            x=x.data_ptr(),
            values=w24.values.data_ptr(),
            bias=0,
            residual=0,
            metadata=w24.metadata.data_ptr(),
            y=y.data_ptr(),
            tokens=3,
            out_features=64,
            in_features=128,
            x_stride=128,
            y_stride=64,
            residual_stride=0,
            dtype=1,
            activation=0,
            config=index,
            stream=77,
        )
        if kernel == "prefill":
            wanted["workspace"] = space.data_ptr()
        assert name.startswith(kernel) and bound == wanted


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
def test_linear_passes_what_the_module_takes(on_cpu, declared, leading, dtype):
    w24 = pack(compress(random_weight(64, 128, dtype)))
    x, bias = torch.ones(*leading, 128, dtype=dtype), torch.ones(64, dtype=dtype)
    tokens = x.numel() // 128
    y = cuda_backend.linear(x, w24, bias, "gelu")
    assert (y.shape, y.dtype, y.is_contiguous()) == ((*leading, 64), dtype, True)
    ((kernel, arguments),) = on_cpu.calls
    bound, bfloat16 = declared[kernel].bind(*arguments).arguments, dtype is torch.bfloat16
    assert kernel == ("prefill" if tokens > 64 else "decode")
    assert bound.pop("workspace", 0) == (cuda_backend._workspace(-1, 77)[1] if tokens > 64 else 0)
    assert bound.pop("config") == cuda_backend._plan(tokens, 64, 128, bfloat16, -1)[1]
    assert bound == dict(
        x=x.data_ptr(),
        values=w24.values.data_ptr(),
        metadata=w24.metadata.data_ptr(),
        bias=bias.data_ptr(),
        residual=0,
        y=y.data_ptr(),
        tokens=tokens,
        out_features=64,
        in_features=128,
        x_stride=128,
        y_stride=64,
        residual_stride=0,
        dtype=int(bfloat16),
        activation=2,
        stream=77,
    )


@pytest.fixture
def quick(on_cpu, monkeypatch):
    """ops.linear on tensors that count as those of a GPU; `forbid()`: no call may be checked."""

    def fail(*arguments):
        raise AssertionError("the detour")

    def forbid():
        monkeypatch.setattr(ops, "check_linear", fail)
        monkeypatch.setattr(ops, "_compute", fail)

    monkeypatch.setattr(cuda_backend, "why_not", lambda x, w24: "")
    on_cpu.forbid = forbid
    with torch.no_grad():
        yield on_cpu


@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_call_like_one_before_takes_one_look_up(quick, declared, activation):
    dtype = torch.bfloat16
    w24 = pack(compress(random_weight(64, 128, dtype)))
    bias = torch.ones(64, dtype=dtype)
    shapes = (128,), (5, 128), (300, 128), (2, 3, 128), (2, 2, 2, 128)
    inputs = [torch.ones(shape, dtype=dtype) for shape in shapes]
    first = [ops.linear(x, w24, bias, activation) for x in inputs]
    before, quick.calls[:] = list(quick.calls), []
    quick.forbid()
    other = pack(compress(random_weight(64, 128, dtype, seed=1)))
    for x, y in zip(inputs, first):
        again = ops.linear(x, other, bias, activation)
        assert (again.shape, again.stride(), again.dtype) == (y.shape, y.stride(), dtype)
        assert again.data_ptr() not in (x.data_ptr(), y.data_ptr())
        ((kernel, then), (same, now)) = before.pop(0), quick.calls.pop()
        bound, changed = (declared[kernel].bind(*a).arguments for a in (then, now))
        assert kernel == same
        for name, tensor in (("values", other.values), ("metadata", other.metadata), ("y", again)):
            assert changed[name] == tensor.data_ptr()
            bound[name] = changed[name]
        assert changed == bound
    ops.linear(inputs[0], w24, None, activation)
    assert declared[kernel].bind(*quick.calls[-1][1]).arguments["bias"] == 0
    cuda_backend.forget_plans()
    with pytest.raises(AssertionError, match="the detour"):
        ops.linear(inputs[0], w24, bias, activation)


def test_within_registered_ops_no_call_is_remembered(quick):
    w24 = pack(compress(random_weight(64, 128, torch.bfloat16)))
    x = torch.ones(8, 128, dtype=torch.bfloat16)
    with cuda_backend.nothing_kept():
        cuda_backend.linear(x, w24, None, None)
    assert cuda_backend._known == {}
    cuda_backend.linear(x, w24, None, None)
    assert len(cuda_backend._known) == 1


def test_a_known_call_with_other_arguments_is_checked(quick):
    """Each differs from a known call in one thing that no shape tells."""
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
        (torch.ones(8 * 128 + 1, dtype=dtype)[1:].view(8, 128), w24, bias[:64]),
        (x.half(), half, None),
        (x, half, bias[:64]),
        (x, wanting, bias[:64]),
        (x, w24, bias),
        (x, w24, bias[:64].half()),
        (x, w24, torch.ones(128, dtype=dtype)[::2]),
        (x, w24, bias[:64], "relu"),
        (x[:7], w24, bias[:64]),
    )
    for case in cases:
        with pytest.raises(AssertionError, match="the detour"):
            ops.linear(*case)
    with torch.enable_grad(), pytest.raises(AssertionError, match="the detour"):
        ops.linear(x, w24, bias[:64])


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
    with cuda_backend.nothing_kept():
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


def test_rows_that_are_copied():
    x = torch.arange(64.0).to(torch.bfloat16).view(4, 16)
    cases = (x[:, 1:9], x.t(), x[:, :8:2], x[:1].expand(4, 16), x.view(16, 4), x[:1, 1:5])
    for rows in cases:
        copy, stride = cuda_backend._aligned_rows(rows, *rows.shape)
        assert copy.data_ptr() != rows.data_ptr() and copy.data_ptr() % 16 == 0
        assert stride == copy.stride(0) and stride % 8 == 0
        assert torch.equal(copy, rows)

"""The host side of the CUDA backend that needs no GPU: refusals, names, plans, workspaces."""

from types import SimpleNamespace

import pytest
import torch
from linear_cases import random_weight

from sparsekern import cuda_backend
from sparsekern.heuristics import TIMES, MmaTile, Tile
from sparsekern.pack import pack
from sparsekern.sparse24 import compress


CACHED = ("_tiles", "_plan", "_mma_tiles", "_mma_plan", "refusal")
MMA_TILES = (MmaTile(128, 128, 2, 4, 1, 3), MmaTile(64, 8, 2, 1, 4, 4))


@pytest.fixture
def native(monkeypatch):
    """A native module of which only the questions are answered, tensors on the CPU, and GPUs that
    are Hopper until the test changes `capability`."""
    module = SimpleNamespace(
        capability=(9, 0),
        build_info=lambda: {"archs": module.archs},
        archs=["80", "89", "90a"],
        capture=0,
        capture_id=lambda stream: module.capture,
        prefill_workspace_bytes=lambda: 64,
        PREFILL_COUNTER_BYTES=16,
        prefill_configs=lambda: [
            dict(zip(("rows", "tokens", "cluster_rows", "cluster_tokens"), tile), index=i)
            for i, tile in enumerate(TIMES)
        ],
        decode_configs=lambda: [{"index": i, "rows": 64 * i, "split": 2 * i} for i in (1, 2)],
        decode_config=lambda out_features, in_features: 2 if in_features > 4096 else 1,
        mma_configs=lambda: [
            dict(zip(MmaTile._fields, tile), index=i) for i, tile in enumerate(MMA_TILES)
        ],
        decode="decode",
        prefill="prefill",
        mma="mma",
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
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(multi_processor_count=132)
    )
    for name in CACHED:
        getattr(cuda_backend, name).cache_clear()
    yield module
    for name in CACHED:
        getattr(cuda_backend, name).cache_clear()


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
            assert cuda_backend._plan(tokens, 4096, 4096, 0) == ("mma", index)
            x = torch.empty(tokens, 4096, device="meta")
            assert cuda_backend.config(x, w24) == f"mma {MMA_TILES[index]}"
    native.capability = (9, 0)
    cuda_backend._plan.cache_clear()
    assert cuda_backend._plan(1, 4096, 4096, 0) == ("decode", 0)
    assert cuda_backend._mma_plan(1, 4096, 4096, 0) == ("mma", 1), "on request, on Hopper, too"
    assert cuda_backend.mma_config(x, w24) == f"mma {MMA_TILES[0]}"


def test_the_hand_over_from_decode_to_prefill(native):
    assert cuda_backend._plan(64, 28672, 4096, 0) == ("decode", 0)
    kernel, index = cuda_backend._plan(65, 28672, 4096, 0)
    assert kernel == "prefill" and 0 <= index < len(TIMES)


def test_explain_names_the_rows_and_the_split_or_the_tile(native):
    def name(tokens, out_features, in_features):
        w24 = SimpleNamespace(shape=(out_features, in_features))
        return cuda_backend.config(torch.empty(tokens, in_features, device="meta"), w24)

    assert name(1, 28672, 4096) == "decode 64 rows, split 2"
    assert name(64, 28672, 8192) == "decode 128 rows, split 4"
    tile = list(TIMES)[cuda_backend._plan(8192, 4096, 14336, 0)[1]]
    assert name(8192, 4096, 14336) == f"prefill {tile}" and isinstance(tile, Tile)


def test_a_workspace_begins_with_cleared_counters(native):
    cuda_backend._workspace(0, 7)
    ((_, space),) = cuda_backend._workspaces.values()
    assert space.tolist() == [0] * 16 + [7] * 48


def test_workspaces_belong_to_a_stream_or_to_a_capture(native):
    first = cuda_backend._workspace(0, 7)
    assert cuda_backend._workspace(0, 7) == first
    others = [cuda_backend._workspace(0, 8), cuda_backend._workspace(1, 7)]
    native.capture = 1
    others.append(cuda_backend._workspace(0, 7))
    assert cuda_backend._workspace(0, 7) == others[-1], "one for the whole capture"
    held = list(cuda_backend._workspaces.values())  # so that no address comes back
    native.capture = 2
    others.append(cuda_backend._workspace(0, 7))
    assert len({first, *others}) == 5 and len(held) == 4
    native.capture = 0
    assert cuda_backend._workspace(0, 7) == first


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

"""The decode kernel without a GPU: its source, run by decode_emulator.cpp, against float64.

Addresses, fragments, metadata, the widening of 8-bit and 4-bit values, edges, the ring of stages,
clusters and who waits for whom; not that the hardware does what the PTX ISA says.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from python_tests.csrc.building import ROOT, cuda_include
from python_tests.linear_cases import PAIRS, random_input, random_weight
from python_tests.tile64_by_formula import tiles

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
E4M3, INT8 = torch.float8_e4m3fn, torch.int8
GUARD = 8  # elements around y that must stay NaN
CONFIGS = [
    tuple(map(int, entry))
    for entry in re.findall(
        r"X\((\d+), (\d+), (\d+)\)",
        re.search(
            r"SK_DECODE_CONFIGS\(X\)(.*?)\n\n", (ROOT / "csrc/linear/configs.h").read_text(), re.S
        ).group(1),
    )
]  # (index, panels, split)
assert len(CONFIGS) >= 8
CONFIGS = [config for config in CONFIGS if config[2] != 4]
NARROW = [(w, x) for w in (E4M3, INT8) for x in (F16, BF16)]
# (weight, x, columns that share a scale of the metadata)
TYPES = [
    (BF16, BF16, 0),
    *((*types, 0) for types in NARROW),
    ("int4", F16, 0),
    ("int4", BF16, 64),
    ("int4", F16, 128),
    ("int4", BF16, 128),
]


class Emulated(ctypes.Structure):
    """Of decode_emulator.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "values", "metadata", "bias", "residual")),
        *((name, ctypes.c_void_p) for name in ("channel_scale", "y")),
        *((name, ctypes.c_int64) for name in ("x_stride", "y_stride", "residual_stride")),
        *((name, ctypes.c_int64) for name in ("values_bytes", "metadata_bytes")),
        *((name, ctypes.c_int) for name in ("tokens", "out_features", "in_features", "weight")),
        *((name, ctypes.c_int) for name in ("bf16", "activation", "config", "clusters")),
        *((name, ctypes.c_int) for name in ("late", "falling")),
    ]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Compiles the emulator with the kernel's source; edited by (file, old, new), a part of it."""
    include, compiler = cuda_include(), shutil.which("g++")
    if include is None or compiler is None:
        pytest.skip("needs g++ and the headers of an nvcc on PATH")
    built = {}

    def make(*edit):
        if edit not in built:
            folder = tmp_path_factory.mktemp("emulator")
            shutil.copytree(ROOT / "csrc", folder / "csrc")
            for header in (folder / "csrc" / "ptx").iterdir():
                header.write_text("")  # the emulator has its own
            if edit:
                file, old, new = edit
                source = folder / "csrc/linear" / file
                assert old in source.read_text()
                source.write_text(source.read_text().replace(old, new))
            library = folder / "emulator.so"
            command = [
                compiler,
                "-std=c++17",
                "-O1",
                "-w",
                "-Wno-psabi",
                "-shared",
                "-fPIC",
                f"-I{include}",
            ]
            command += [f"-I{folder / 'csrc'}", *(["-DEMULATE_FEW"] if edit else [])]
            emulator = Path(__file__).with_name("decode_emulator.cpp")
            subprocess.run([*command, str(emulator), "-o", str(library)], check=True)
            built[edit] = ctypes.CDLL(str(library)).emulate
            built[edit].restype = ctypes.c_char_p
            built[edit].argtypes = [ctypes.POINTER(Emulated)]
        return built[edit]

    return make


def aligned_rows(x):
    """x with a row stride that is a multiple of 8, on a 16-byte address, its padding NaN."""
    tokens, in_features = x.shape
    stride = -(-in_features // 8) * 8 + 8
    memory = torch.full((tokens * stride + 8,), float("nan"), dtype=x.dtype)
    start = -memory.data_ptr() % 16 // 2
    rows = memory[start : start + tokens * stride].view(tokens, stride)[:, :in_features]
    return rows.copy_(x)


def on_16_bytes(tensor):
    memory = torch.empty(tensor.nbytes + 16, dtype=torch.uint8)
    start = -memory.data_ptr() % 16
    aligned = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return aligned.copy_(tensor)


def wrong(
    emulate,
    config,
    w,
    x,
    weight=E4M3,
    group=0,
    scale=None,
    bias=None,
    residual=None,
    relu=False,
    late=True,
    falling=False,
    clusters=0,
):
    """What is wrong with y = relu(x · wᵀ * scale + bias) + residual, in words; empty when exact.

    w: the stored numbers, float32. Groups of columns have scales 0.5, 1 and 2.
    """
    (tokens, in_features), out_features, dtype = x.shape, w.shape[0], x.dtype
    of_groups, numbers = None, w.double()
    if group:
        count = -(-in_features // group)
        of_groups = 2.0 ** (torch.arange(out_features * count).view(out_features, count) % 3 - 1)
        numbers = numbers * of_groups.repeat_interleave(group, 1)[:, :in_features]
    values, metadata = map(on_16_bytes, tiles(w, weight, group, of_groups))
    y64 = x.double() @ numbers.t()
    x = aligned_rows(x)
    y64 = y64 if scale is None else y64 * scale.double()
    y64 = y64 if bias is None else y64 + bias.double()
    y64 = y64.relu() if relu else y64
    y64 = y64 if residual is None else y64 + residual.double()
    shape = (tokens + 2 * GUARD, -(-out_features // 8) * 8 + 2 * GUARD)
    buffer = torch.full(shape, float("nan"), dtype=dtype)
    expected = buffer.clone()
    inside = slice(GUARD, GUARD + tokens), slice(GUARD, GUARD + out_features)
    expected[inside] = y64.to(dtype)
    tensors = dict(
        x=x,
        values=values,
        metadata=metadata,
        bias=bias,
        residual=residual,
        channel_scale=scale,
        y=buffer[inside],
    )
    broken = emulate(
        Emulated(
            **{name: 0 if t is None else t.data_ptr() for name, t in tensors.items()},
            x_stride=x.stride(0),
            y_stride=shape[1],
            residual_stride=0 if residual is None else residual.stride(0),
            values_bytes=values.nbytes,
            metadata_bytes=metadata.nbytes,
            tokens=tokens,
            out_features=out_features,
            in_features=in_features,
            weight=3 + group // 64 if weight == "int4" else {E4M3: 1, INT8: 2}.get(weight, 0),
            bf16=dtype == BF16,
            activation=int(relu),
            config=config,
            clusters=clusters,
            late=late,
            falling=falling,
        )
    )
    if broken:
        return f"config {config}: expected {broken.decode()}"
    differ = (buffer.view(torch.int16) != expected.view(torch.int16)).nonzero().tolist()
    return f"config {config}: {len(differ)} wrong, first {differ[0]}" if differ else ""


def problem(tokens, out_features, in_features, dtype=BF16):
    w = random_weight(out_features, in_features, F32, integers=True)
    return w, random_input((tokens, in_features), dtype, integers=True)


@pytest.mark.parametrize("config, panels, split", CONFIGS)
@pytest.mark.parametrize("weight, dtype, group", TYPES, ids=str)
def test_exact_at_the_edges(build, config, panels, split, weight, dtype, group):
    """Less and more than a tile, a row block and a cluster; both landing times and orders."""
    emulate, rows = build(), 64 * panels
    for case, freedoms in (
        ((1, 7, 4), dict(late=True)),
        ((9, rows + 1, 132), dict(late=False, falling=True)),
        ((16, 65, 264), dict(late=True, falling=True)),
        ((64, 70, 644), dict(late=False)),
    ):
        what = dict(weight=weight, group=group, **freedoms)
        assert not wrong(emulate, config, *problem(*case, dtype), **what)


@pytest.mark.parametrize("config", [0, 4])
@pytest.mark.parametrize("weight, group", [(E4M3, 0), ("int4", 128)], ids=str)
@pytest.mark.parametrize("late", [True, False])
def test_more_stages_than_the_ring(build, config, weight, group, late):
    """Every turn of the ring, and more row blocks than clusters where there is no split."""
    _, panels, split = next(entry for entry in CONFIGS if entry[0] == config)
    case = problem(5, 64 * panels + 3, (256 if group else 128) * split * 13 - 60)
    what = dict(weight=weight, group=group, late=late, clusters=1)
    assert not wrong(build(), config, *case, **what)


def codes_of(weight):
    """All numbers of a storage type."""
    if weight == "int4":
        return torch.arange(-8.0, 8.0)
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(weight).float()
    return codes[codes.isfinite() & ((codes > -128) | (weight != INT8))]


@pytest.mark.parametrize("weight, dtype, group", TYPES[1:], ids=str)
def test_every_value_in_every_place(build, weight, dtype, group):
    """All codes of the storage type, in every column of a tile and every row of an m16 tile."""
    codes = codes_of(weight)
    w = torch.zeros(64, 256)
    for row in range(64):
        for column in range(64):
            first, second = PAIRS[(row + column) % 6].tolist()
            w[row, 4 * column + first] = codes[(row * 7 + column * 2) % len(codes)]
            w[row, 4 * column + second] = codes[(row * 7 + column * 2 + 1) % len(codes)]
    for first in range(0, 256, 64):
        x = torch.eye(256, dtype=dtype)[first : first + 64]
        assert not wrong(build(), 0, w, x, weight=weight, group=group)


@pytest.mark.parametrize("weight, dtype, group", TYPES[1:], ids=str)
def test_epilogue(build, weight, dtype, group):
    """The scale comes before the bias; aligned rows and others."""
    for out_features in (264, 197):
        w, x = problem(35, out_features, 132, dtype)
        bias = random_input((out_features,), dtype, seed=2, integers=True)
        residual = random_input((35, out_features), dtype, seed=3, integers=True)
        scale = 2.0 ** (torch.arange(out_features) % 3 - 1)
        what = dict(weight=weight, group=group, scale=scale, bias=bias, residual=residual)
        for config in (0, 4):
            assert not wrong(build(), config, w, x, relu=True, **what)


@pytest.mark.parametrize(
    "file, old, new",
    [
        ("decode_sm90.cuh", "ptx::mbarrier_wait(smem.full(ring.stage), ring.parity);", ""),
        ("decode_sm90.cuh", "ptx::mbarrier_wait(smem.empty(ring.stage), ring.parity ^ 1);", ""),
        ("decode_sm90.cuh", "sync();  // all sums are there", ""),
        ("decode_sm90.cuh", "ptx::wait_for_predecessor();\n    store", "store"),
        ("decode_widen.cuh", "lane_idx % 2 != 0", "false"),
        ("decode_widen.cuh", "r % 2 * 32 + r / 2 * 8", "r / 2 * 32 + r % 2 * 8"),
        ("decode_widen.cuh", "lane_idx % 2 * 4", "0"),
        ("decode_widen.cuh", "0x7531", "0x7513"),
        ("decode_widen.cuh", "0x87F087F0", "0x07F007F0"),
        ("decode_widen.cuh", "(t / 2) ^ g", "(t / 2)"),
    ],
)
def test_the_emulator_sees_mistakes(build, file, old, new):
    cases = [(0, problem(9, 65, 128 * 11)), (4, problem(16, 65, 260))]

    def found(emulate):
        return any(
            wrong(emulate, config, *case, late=late)
            for config, case in cases
            for late in (True, False)
        )

    assert found(build(file, old, new))
    assert not found(build(file, "#pragma once", "#pragma once")), "without the edit all is right"

"""The mma.sp kernel without a GPU: its source, run by mma_emulator.cpp, against float64 and, of
int8, int64. Values of 16 bits, and of 8 with scales.

For the machines that compile the kernel for Ampere and Ada and have neither. What this proves is
the arithmetic of addresses, fragments, metadata, edges and the order of copies and barriers, for
every config; what it cannot prove is that the hardware does what the PTX ISA says.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import sparsekern as sk
from python_tests.csrc.building import ROOT, cuda_include
from python_tests.csrc.emulated_linear import spoil
from python_tests.linear_cases import PAIRS, random_input, random_weight
from sparsekern.formats.sparse24 import compress
from sparsekern.formats.tile64 import pack

F16, BF16 = torch.float16, torch.bfloat16
E4M3, INT8 = torch.float8_e4m3fn, torch.int8
NUMBER = {F16: 0, BF16: 1, E4M3: 2, INT8: 3}  # csrc/core/dtype.h
GUARD = 8  # elements around y that must stay NaN
TABLE = re.compile(r"#define SK_MMA_CONFIGS\(X\).*?SK_MMA_BOTH (\d+)[^\n]*\n\n", re.S)
CONFIGS = [
    tuple(map(int, entry))
    for entry in re.findall(
        r"X\((\d+), (\d+), (\d+), \d+, \d+, (\d+), (\d+)\)",
        TABLE.search((ROOT / "csrc/linear/configs.h").read_text()).group(),
    )
]  # (index, rows, tokens, split, stages)
assert len(CONFIGS) >= 14
FEW = CONFIGS[-1::-6]
BOTH = CONFIGS[: int(TABLE.search((ROOT / "csrc/linear/configs.h").read_text()).group(1))]


class Emulated(ctypes.Structure):
    """Of mma_emulator.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "values", "metadata", "bias", "residual")),
        *((name, ctypes.c_void_p) for name in ("channel_scale", "token_scale", "y")),
        *((name, ctypes.c_int64) for name in ("x_stride", "y_stride", "residual_stride")),
        *((name, ctypes.c_int) for name in ("tokens", "out_features", "in_features", "dtype")),
        *((name, ctypes.c_int) for name in ("storage", "activation", "config", "late", "falling")),
    ]


# What goes wrong in the kernel's source when the emulator's `mistake` is the place in this list.
MISTAKES = [
    ("ptx::cp_async_wait<Cfg::kStages - 2>();", "ptx::cp_async_wait<Cfg::kStages - 1>();"),
    ("filled = stage;", "filled = smem;"),
    ("j * kTokenStep < tokens_left", "true"),
    ("ptx::wait_for_predecessor();", ";"),
    ("matrix % 2 * 8", "matrix / 2 * 8"),
    ("max(columns_left, 0) * kBytes<typename Cfg::T>", "max(columns_left, 0) * 2"),
    ("in_row * Cfg::Tile::kChunkValues", "in_row * 8"),
    ("word * Cfg::kWordsBytes", "0"),
    ("metadata[Tile::word(1)]", "metadata[0]"),
    ("row / Cfg::kPanelRows * (Cfg::kPanelMetadataBytes - Cfg::kWordsBytes)", "0"),
    ("bytes > 8 ? from + 8 : from", "from"),
    ("(smem + 8)", "smem"),
]
AT_8_BITS, OF_HALVES = 5, 10  # the first that 16 bits do not notice; that whole rows do not


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Compiles the emulator with the kernel's source; spoiled: with MISTAKES, FEW configs and types
    alone."""
    include, compiler = cuda_include(), shutil.which("g++")
    if include is None or compiler is None:
        pytest.skip("needs g++ and the headers of an nvcc on PATH")
    built = {}

    def make(spoiled=False):
        if spoiled not in built:
            folder = tmp_path_factory.mktemp("emulator")
            shutil.copytree(ROOT / "csrc", folder / "csrc")
            for header in (folder / "csrc" / "ptx").iterdir():
                header.write_text("")  # the emulator has its own
            kernel = folder / "csrc/linear/mma_sm80.cuh"
            if spoiled:
                numbered = [(number, *entry) for number, entry in enumerate(MISTAKES)]
                kernel.write_text(spoil(kernel.read_text(), numbered))
                configs = folder / "csrc" / "linear/configs.h"
                other = r"X\((?!" + "|".join(f"{entry[0]}," for entry in FEW) + r")\d+(, \d+){6}\)"
                configs.write_text(
                    TABLE.sub(lambda table: re.sub(other, "", table.group()), configs.read_text())
                )
            library = folder / "emulator.so"
            subprocess.run(
                [
                    compiler,
                    "-std=c++17",
                    "-O1",
                    "-w",
                    "-shared",
                    "-fPIC",
                    *(["-DEMULATE_FEW"] if spoiled else []),
                    f"-I{include}",
                    f"-I{folder / 'csrc'}",
                    str(Path(__file__).with_name("mma_emulator.cpp")),
                    "-o",
                    str(library),
                ],
                check=True,
            )
            built[spoiled] = ctypes.CDLL(str(library))
            built[spoiled].emulate.restype = ctypes.c_char_p
            built[spoiled].emulate.argtypes = [ctypes.POINTER(Emulated)]
        return built[spoiled].emulate

    def with_mistake(number):
        emulate = make(spoiled=True)
        ctypes.c_int.in_dll(built[True], "mistake").value = number
        return emulate

    make.with_mistake = with_mistake
    return make


def aligned_rows(x, storage, halves=False):
    """x with a row stride that 16 bytes divide, on a 16-byte address, its padding NaN, or 127;
    halves: that 8 bytes divide."""
    tokens, in_features = x.shape
    chunk = 16 // storage.itemsize
    stride = (-(-in_features // chunk) + 1) * chunk - halves * chunk // 2
    memory = torch.full((tokens * stride * storage.itemsize + 24,), 0x7F, dtype=torch.uint8)
    start = -memory.data_ptr() % 16 + halves * 8
    rows = memory[start : start + tokens * stride * storage.itemsize].view(storage)
    return rows.view(tokens, stride)[:, :in_features].copy_(x)


def packed(w, storage):
    """The whole numbers of w in layout "tile64", in 16 bits or as levels of 8."""
    w24 = compress(w)
    if storage.itemsize == 1:
        kind = "fp8" if storage == E4M3 else "int8"
        w24 = sk.quantize(w24, kind, scale=torch.ones(w.shape[0], 1))
    return pack(w24)


def wrong(
    emulate,
    config,
    w,
    x,
    bias=None,
    residual=None,
    activation=None,
    late=True,
    falling=False,
    scales=(None, None),
    storage=None,
    halves=False,
):
    """What is wrong with y = activation(x · wᵀ * scales + bias) + residual, in words; empty when
    exact.

    storage: dtype of w and x in memory, if not that of w, which is that of y.
    scales: of the channels and of the tokens, float32.
    halves: x begins 8 bytes after an address that 16 divides, and every second row does.
    """
    (tokens, in_features), out_features = x.shape, w.shape[0]
    storage = storage or w.dtype
    w24, x = packed(w, storage), aligned_rows(x.to(storage), storage, halves)
    if storage == INT8:
        y64 = (x.long() @ w.long().t()).double()
    else:
        y64 = x.double() @ w.double().t()
    channel_scale, token_scale = scales
    y64 = y64 if channel_scale is None else y64 * channel_scale.double()
    y64 = y64 if token_scale is None else y64 * token_scale.double()[:, None]
    y64 = y64 if bias is None else y64 + bias.double()
    y64 = y64 if activation is None else getattr(torch.nn.functional, activation)(y64)
    y64 = y64 if residual is None else y64 + residual.double()
    shape = (tokens + 2 * GUARD, -(-out_features // 8) * 8 + 2 * GUARD)
    buffer = torch.full(shape, float("nan"), dtype=w.dtype)
    expected = buffer.clone()
    inside = slice(GUARD, GUARD + tokens), slice(GUARD, GUARD + out_features)
    expected[inside] = y64.to(w.dtype)
    tensors = dict(
        x=x,
        values=w24.values,
        metadata=w24.metadata,
        bias=bias,
        residual=residual,
        y=buffer[inside],
    )
    tensors |= dict(channel_scale=channel_scale, token_scale=token_scale)
    broken = emulate(
        Emulated(
            **{name: 0 if t is None else t.data_ptr() for name, t in tensors.items()},
            x_stride=x.stride(0),
            y_stride=shape[1],
            residual_stride=0 if residual is None else residual.stride(0),
            tokens=tokens,
            out_features=out_features,
            in_features=in_features,
            dtype=NUMBER[w.dtype],
            storage=NUMBER[storage],
            activation=(None, "relu", "gelu", "silu").index(activation),
            config=config,
            late=late,
            falling=falling,
        )
    )
    if broken:
        return f"config {config}: expected {broken.decode()}"
    differ = buffer.view(torch.int16) != expected.view(torch.int16)
    if activation not in (None, "relu"):  # expf and erff, not their like on a GPU
        differ &= ~torch.isclose(buffer.double(), expected.double(), rtol=2.0**-7, atol=2.0**-9)
    differ = differ.nonzero().tolist()
    return f"config {config}: {len(differ)} wrong, first {differ[0]}" if differ else ""


def problem(tokens, out_features, in_features, dtype=BF16):
    w = random_weight(out_features, in_features, dtype, integers=True)
    return w, random_input((tokens, in_features), dtype, integers=True)


@pytest.mark.parametrize("config, rows, tokens, split, stages", CONFIGS)
def test_exact_at_the_edges(build, config, rows, tokens, split, stages):
    """Less and more than a tile, a stage and a ring; both landing times and thread orders."""
    emulate, stage = build(), 64 * split
    few = min(tokens, 40)
    for case, freedoms in (
        ((1, 7, 4), dict(late=True)),
        ((few + 1, 65, stage + 68), dict(late=True, falling=True)),
        ((min(tokens + 1, 70), rows + 1, stage - 4), dict(late=False)),
        ((few - 1, 33, stage * (stages + 2) - 60), dict(late=True)),
        ((few - 1, 33, stage * (stages + 2) - 60), dict(late=False, falling=True)),
    ):
        assert not wrong(emulate, config, *problem(*case), **freedoms)


@pytest.mark.parametrize("config, rows, tokens, split, stages", CONFIGS)
def test_rows_of_x_on_8_bytes(build, config, rows, tokens, split, stages):
    """A last piece of 16 bytes, of 8, and none; whole stages, and a row within one piece."""
    few = min(tokens, 40)
    for case, late in (
        ((few + 1, 65, 64 * split * (stages + 1) - 4), True),
        ((few - 1, 33, 64 * split + 72), False),
        ((3, rows + 1, 4), True),
    ):
        assert not wrong(build(), config, *problem(*case), late=late, halves=True)


@pytest.mark.parametrize("config", [entry[0] for entry in CONFIGS])
def test_epilogue(build, config):
    """Aligned rows and others; the float16 instruction; more than one tile row group."""
    for out_features in (264, 197):
        w, x = problem(35, out_features, 132, F16)
        bias = random_input((out_features,), F16, seed=2, integers=True)
        residual = random_input((35, out_features), F16, seed=3, integers=True)
        assert not wrong(build(), config, w, x, bias, residual, activation="relu")


@pytest.mark.parametrize("config", [entry[0] for entry in CONFIGS])
def test_every_pattern_alone(build, config):
    w = torch.zeros(66, 132, dtype=BF16)
    for row in range(66):
        first, second = PAIRS[row % 6].tolist()
        w[row, first::4], w[row, second::4] = 1 + row % 5, -2 - row % 3
    assert not wrong(build(), config, w, torch.eye(132, dtype=BF16))


# ---- 8 bits --------------------------------------------------------------------------------------

EIGHT = [(storage, *entry) for storage in (INT8, E4M3) for entry in BOTH]
every_8_bit_config = pytest.mark.parametrize("storage, config, rows, tokens, split, stages", EIGHT)


@every_8_bit_config
def test_8_bits_are_exact_at_the_edges(build, storage, config, rows, tokens, split, stages):
    emulate, stage = build(), 128 * split
    few = min(tokens, 24)
    for case, freedoms in (
        ((1, 7, 4), dict(late=True)),
        ((few + 1, 65, stage + 68), dict(late=True, falling=True)),
        ((min(tokens + 1, 70), rows + 1, stage - 4), dict(late=False)),
        ((few - 1, 33, stage * (stages + 1) - 60), dict(late=True)),
        ((few - 1, 33, stage * (stages + 1) - 124), dict(late=False, falling=True)),
    ):
        assert not wrong(emulate, config, *problem(*case), storage=storage, **freedoms)


@every_8_bit_config
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_8_bit_epilogue(build, storage, config, rows, tokens, split, stages, dtype):
    """Each scale alone and both, before the bias; powers of two are exact. y of both types,
    aligned rows and others, more than one tile row group."""
    for out_features, activation in ((264, "relu"), (197, "gelu"), (72, "silu"), (30, None)):
        w, x = problem(11, out_features, 132, dtype)
        bias = random_input((out_features,), dtype, seed=2, integers=True)
        residual = random_input((11, out_features), dtype, seed=3, integers=True)
        channels = 2.0 ** (torch.arange(out_features) % 3 - 1)
        of_tokens = 2.0 ** (torch.arange(11) % 2 - 2)
        for scales in ((channels, None), (None, of_tokens), (channels, of_tokens)):
            options = dict(scales=scales, storage=storage)
            assert not wrong(build(), config, w, x, bias, residual, activation, **options)


@every_8_bit_config
def test_every_pattern_of_8_bits_alone(build, storage, config, rows, tokens, split, stages):
    w = torch.zeros(66, 132, dtype=BF16)
    for row in range(66):
        first, second = PAIRS[row % 6].tolist()
        w[row, first::4], w[row, second::4] = 1 + row % 5, -2 - row % 3
    assert not wrong(build(), config, w, torch.eye(132, dtype=BF16), storage=storage)


@pytest.mark.parametrize("config", [entry[0] for entry in BOTH])
def test_int8_sums_are_those_of_int64(build, config):
    """All levels, sums beyond 2^23: their upper bits, and those that are left without these."""
    generator = torch.Generator().manual_seed(3)
    pattern = random_weight(70, 1300, F16, integers=True).sign()
    levels = torch.randint(1, 128, pattern.shape, generator=generator)
    w = pattern.abs() * levels.to(F16)
    w[1::2] *= pattern[1::2]
    x = torch.randint(-127, 128, (9, 1300), generator=generator)
    x[::2] = x[::2].abs()
    scales = torch.full((70,), 2.0**-9), None
    sums = (x @ w.long().t()).double()
    assert sums.abs().max() > 2**21
    assert not wrong(build(), config, w, x, scales=scales, storage=INT8)
    upper = -(sums * 2.0**-9).to(F16)
    assert not wrong(build(), config, w, x, residual=upper, scales=scales, storage=INT8)


def test_every_e4m3_level(build):
    """Subnormal ones and the largest, each alone in its row, times 1."""
    bits = torch.arange(256).to(torch.uint8)
    levels = bits.view(E4M3).float()
    levels = levels[levels.isfinite()]
    w = torch.zeros(len(levels), 128, dtype=BF16)
    w[torch.arange(len(levels)), torch.arange(len(levels)) % 128] = levels.to(BF16)
    for config, *_ in BOTH:
        assert not wrong(build(), config, w, torch.ones(3, 128, dtype=BF16), storage=E4M3)


# ---- the emulator itself -------------------------------------------------------------------------


def found(emulate, storage=None, halves=False):
    """Whether any of FEW goes wrong."""
    return any(
        wrong(
            emulate,
            config,
            *problem(tokens - 3, 65 if storage is None else 129, 64 * split * (stages + 2) - 4),
            late=late,
            storage=storage,
            halves=halves,
        )
        for config, _, tokens, split, stages in FEW
        for late in (True, False)
        if storage is None or config < len(BOTH)
    )


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_the_emulator_sees_mistakes(build, number):
    at_8_bits = number in range(AT_8_BITS, OF_HALVES)
    storage, halves = INT8 if at_8_bits else None, number >= OF_HALVES
    assert found(build.with_mistake(number), storage, halves)


def test_without_mistakes_all_is_right(build):
    assert not found(build.with_mistake(-1)) and not found(build.with_mistake(-1), INT8)
    assert not found(build.with_mistake(-1), halves=True)

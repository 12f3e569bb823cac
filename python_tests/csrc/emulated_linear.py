"""Emulators of the Hopper kernels, called and compared: for test_decode_emulated.py and
test_narrow_emulated.py."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from python_tests.csrc.building import ROOT, cuda_include
from python_tests.linear_cases import random_input, random_weight
from python_tests.tile64_by_formula import tiles

BF16, F32 = torch.bfloat16, torch.float32
E4M3, INT8 = torch.float8_e4m3fn, torch.int8
GUARD = 8  # elements around y that must stay NaN


class Emulated(ctypes.Structure):
    """Of emulator_sm90.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "values", "metadata", "bias", "residual")),
        *((name, ctypes.c_void_p) for name in ("channel_scale", "y")),
        *((name, ctypes.c_int64) for name in ("x_stride", "y_stride", "residual_stride")),
        *((name, ctypes.c_int64) for name in ("values_bytes", "metadata_bytes")),
        *((name, ctypes.c_int) for name in ("tokens", "out_features", "in_features", "weight")),
        *((name, ctypes.c_int) for name in ("bf16", "activation", "config", "clusters")),
        *((name, ctypes.c_int) for name in ("late", "falling")),
    ]


def builder(emulator, tmp_path_factory):
    """A function that compiles an emulator with the kernel's source; edited by (file, old, new) of
    csrc/linear, a part of it. Skips without the tools."""
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
            source = Path(__file__).with_name(emulator)
            subprocess.run([*command, str(source), "-o", str(library)], check=True)
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


def call(
    emulate,
    config,
    w,
    x,
    weight=E4M3,
    group=0,
    of_groups=None,
    scale=None,
    bias=None,
    residual=None,
    relu=False,
    late=True,
    falling=False,
    clusters=0,
):
    """(what rule was broken, y amid NaN): the kernel's relu(x · wᵀ * scale + bias) + residual.

    w: the stored numbers, float32; of_groups: scales [out, groups] of `group` columns.
    """
    (tokens, in_features), out_features, dtype = x.shape, w.shape[0], x.dtype
    values, metadata = map(on_16_bytes, tiles(w, weight, group, of_groups))
    x = aligned_rows(x)
    shape = (tokens + 2 * GUARD, -(-out_features // 8) * 8 + 2 * GUARD)
    buffer = torch.full(shape, float("nan"), dtype=dtype)
    tensors = dict(
        x=x,
        values=values,
        metadata=metadata,
        bias=bias,
        residual=residual,
        channel_scale=scale,
        y=buffer[GUARD:, GUARD:],
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
    return broken.decode(), buffer


def wrong(emulate, config, w, x, group=0, scale=None, bias=None, residual=None, relu=False, **more):
    """What is wrong with y = relu(x · wᵀ * scale + bias) + residual, in words; empty when exact.

    w: the stored numbers, float32. Groups of columns have scales 0.5, 1 and 2.
    """
    (tokens, in_features), out_features = x.shape, w.shape[0]
    of_groups, y64 = None, w.double()
    if group:
        count = -(-in_features // group)
        of_groups = 2.0 ** (torch.arange(out_features * count).view(out_features, count) % 3 - 1)
        y64 = y64 * of_groups.repeat_interleave(group, 1)[:, :in_features]
    y64 = x.double() @ y64.t()
    y64 = y64 if scale is None else y64 * scale.double()
    y64 = y64 if bias is None else y64 + bias.double()
    y64 = y64.relu() if relu else y64
    y64 = y64 if residual is None else y64 + residual.double()
    epilogue = dict(scale=scale, bias=bias, residual=residual, relu=relu)
    broken, buffer = call(
        emulate, config, w, x, group=group, of_groups=of_groups, **epilogue, **more
    )
    if broken:
        return f"config {config}: expected {broken}"
    expected = torch.full_like(buffer, float("nan"))
    expected[GUARD : GUARD + tokens, GUARD : GUARD + out_features] = y64.to(x.dtype)
    differ = (buffer.view(torch.int16) != expected.view(torch.int16)).nonzero().tolist()
    return f"config {config}: {len(differ)} wrong, first {differ[0]}" if differ else ""


def problem(tokens, out_features, in_features, dtype=BF16):
    w = random_weight(out_features, in_features, F32, integers=True)
    return w, random_input((tokens, in_features), dtype, integers=True)

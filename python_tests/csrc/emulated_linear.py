"""Emulators of the Hopper kernels, called and compared: for test_*_emulated.py."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from python_tests.csrc.building import ROOT, cuda_include
from python_tests.linear_cases import ACTIVATIONS, random_input, random_weight
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
        ("token_scale", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("lag_first", "lag_count", "beside", "again")),
    ]


def configs(name):
    """The rows of a list of csrc/linear/configs.h, the index first."""
    text = (ROOT / "csrc/linear/configs.h").read_text()
    rows = re.search(rf"#define {name}\(X\)((?:.*\\\n)*.*)\n", text).group(1)
    return [tuple(map(int, row.split(","))) for row in re.findall(r"X\(([\d, ]+)\)", rows)]


def spoil(source, mistakes):
    """A kernel's source with all mistakes (number, old, new), each in reserve: made while the
    emulator's `mistake` is its number. Of "before@old@after" what is between."""
    for number, old, new in mistakes:
        before, old, after = old.split("@") if "@" in old else ("", old, "")
        assert before + old + after in source, old
        if old.endswith(";"):
            both = f"if (mistake == {number}) {{ {new} }} else {{ {old} }}"
        else:
            both = f"(mistake == {number} ? {new} : {old})"
        source = source.replace(before + old + after, before + both + after)
    return source


def builder(emulator, tmp_path_factory, mistakes=(), own=()):
    """A function that compiles an emulator with the kernel's source; edited by (file, old, new) of
    csrc/linear, a part of it. Skips without the tools.

    own: headers of csrc, besides csrc/ptx, that the emulator has itself. The function's
    with_mistake(number) compiles that part with all `mistakes`, (file, old, new, ...), once, and
    makes one.
    """
    include, compiler = cuda_include(), shutil.which("g++")
    if include is None or compiler is None:
        pytest.skip("needs g++ and the headers of an nvcc on PATH")
    built = {}

    def compiled(edits, few):
        folder = tmp_path_factory.mktemp("emulator")
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        for header in (*(folder / "csrc/ptx").iterdir(), *(folder / "csrc" / name for name in own)):
            header.write_text("")  # the emulator has its own
        for file, edit in edits:
            source = folder / "csrc/linear" / file
            source.write_text(edit(source.read_text()))
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
        command += [f"-I{folder / 'csrc'}", *(["-DEMULATE_FEW"] if few else [])]
        source = Path(__file__).with_name(emulator)
        subprocess.run([*command, str(source), "-o", str(library)], check=True)
        library = ctypes.CDLL(str(library))
        emulate = library.emulate
        emulate.restype = ctypes.c_char_p
        emulate.argtypes = [ctypes.POINTER(Emulated)]
        emulate.library = library  # with what else it has
        return emulate

    def make(*edit):
        if edit not in built:
            edits = []
            if edit:
                file, old, new = edit
                assert old in (ROOT / "csrc/linear" / file).read_text()
                edits = [(file, lambda source: source.replace(old, new))]
            built[edit] = compiled(edits, few=bool(edit))
        return built[edit]

    def with_mistake(number):
        if "mistakes" not in built:
            of_file = {}
            for count, (file, old, new, *_) in enumerate(mistakes):
                of_file.setdefault(file, []).append((count, old, new))
            edits = [
                (file, lambda source, of=of: spoil(source, of)) for file, of in of_file.items()
            ]
            built["mistakes"] = compiled(edits, few=True)
        ctypes.c_int.in_dll(built["mistakes"].library, "mistake").value = number
        return built["mistakes"]

    make.with_mistake = with_mistake
    return make


def aligned_rows(x):
    """x on a 16-byte address, as is each of its rows; between them NaN."""
    tokens, in_features = x.shape
    chunk = 16 // x.itemsize
    stride = (-(-in_features // chunk) + 1) * chunk
    memory = torch.full((tokens * stride * x.itemsize + 16,), 0xFF, dtype=torch.uint8)
    start = -memory.data_ptr() % 16
    rows = memory[start : start + tokens * stride * x.itemsize].view(x.dtype)
    return rows.view(tokens, stride)[:, :in_features].copy_(x)


def on_16_bytes(tensor):
    memory = torch.empty(tensor.nbytes + 16, dtype=torch.uint8)
    start = -memory.data_ptr() % 16
    aligned = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return aligned.copy_(tensor)


def ends_on_16_bytes(bias):
    """The same where what lies behind it is at once outside its memory (emulator_launch.h)."""
    memory = torch.zeros(-(-len(bias) // 8) * 8, dtype=bias.dtype)
    return memory[-len(bias) :].copy_(bias)


def row_stride(out_features):
    return -(-out_features // 8) * 8 + 2 * GUARD


class Output:
    """y amid NaN: `shift` elements after a 16-byte address, its rows `stride` apart, by default
    on 16 bytes and with a gap."""

    def __init__(self, tokens, out_features, dtype, stride=None, shift=0):
        self.stride = stride or row_stride(out_features)
        self.shape = tokens, out_features
        self.memory = torch.full(
            ((tokens + 2 * GUARD) * self.stride + 4 * GUARD,), float("nan"), dtype=dtype
        )
        self.first = GUARD * self.stride + GUARD
        self.first += (shift - self.memory.data_ptr() // 2 - self.first) % 8
        self.y = self.of(self.memory)

    def of(self, memory):
        return memory.as_strided(self.shape, (self.stride, 1), self.first)

    def differ(self, expected):
        """What is not as it should be: (token, out_feature) of each."""
        memory = torch.full_like(self.memory, float("nan"))
        self.of(memory).copy_(expected)
        places = (memory.view(torch.int16) != self.memory.view(torch.int16)).nonzero()[:, 0]
        return [divmod(place - self.first, self.stride) for place in places.tolist()]


def call(
    emulate,
    config,
    w,
    x,
    weight=E4M3,
    group=0,
    of_groups=None,
    scale=None,
    token_scale=None,
    bias=None,
    residual=None,
    activation=None,
    dtype=None,
    stride=None,
    shift=0,
    **freedoms,
):
    """(what rule was broken, an Output): the kernel's
    activation(x · wᵀ * scale * token_scale + bias) + residual.

    w: the stored numbers, float32; of_groups: scales [out, groups] of `group` columns; dtype: of y,
    if not that of x. freedoms: late, falling, clusters, lag_first, lag_count, beside, again.
    """
    (tokens, in_features), out_features = x.shape, w.shape[0]
    output = Output(tokens, out_features, dtype or x.dtype, stride, shift)
    values, metadata = map(on_16_bytes, tiles(w, weight, group, of_groups))
    x = aligned_rows(x)
    tensors = dict(
        x=x,
        values=values,
        metadata=metadata,
        bias=bias,
        residual=residual,
        channel_scale=scale,
        token_scale=token_scale,
        y=output.y,
    )
    broken = emulate(
        Emulated(
            **{name: 0 if t is None else t.data_ptr() for name, t in tensors.items()},
            x_stride=x.stride(0),
            y_stride=output.stride,
            residual_stride=0 if residual is None else residual.stride(0),
            values_bytes=values.nbytes,
            metadata_bytes=metadata.nbytes,
            tokens=tokens,
            out_features=out_features,
            in_features=in_features,
            weight=3 + group // 64 if weight == "int4" else {E4M3: 1, INT8: 2}.get(weight, 0),
            bf16=output.y.dtype == BF16,
            activation=ACTIVATIONS.index(activation),
            config=config,
            **{"late": True, **freedoms},
        )
    )
    return broken.decode(), output


def wrong(
    emulate,
    config,
    w,
    x,
    group=0,
    scale=None,
    token_scale=None,
    bias=None,
    residual=None,
    activation=None,
    **more,
):
    """What is wrong with y = activation(x · wᵀ * scale * token_scale + bias) + residual, in words;
    empty when exact.

    w: the stored numbers, float32. Groups of columns have scales 0.5, 1 and 2.
    """
    in_features, out_features = x.shape[1], w.shape[0]
    of_groups, y64 = None, w.double()
    if group:
        count = -(-in_features // group)
        of_groups = 2.0 ** (torch.arange(out_features * count).view(out_features, count) % 3 - 1)
        y64 = y64 * of_groups.repeat_interleave(group, 1)[:, :in_features]
    y64 = x.double() @ y64.t()
    y64 = y64 if scale is None else y64 * scale.double()
    y64 = y64 if token_scale is None else y64 * token_scale.double()[:, None]
    y64 = y64 if bias is None else y64 + bias.double()
    y64 = y64 if activation is None else getattr(torch.nn.functional, activation)(y64)
    y64 = y64 if residual is None else y64 + residual.double()
    epilogue = dict(scale=scale, token_scale=token_scale, bias=bias, residual=residual)
    broken, output = call(
        emulate,
        config,
        w,
        x,
        group=group,
        of_groups=of_groups,
        activation=activation,
        **epilogue,
        **more,
    )
    if broken:
        return f"config {config}: expected {broken}"
    differ = output.differ(y64.to(output.y.dtype))
    return f"config {config}: {len(differ)} wrong, first {differ[0]}" if differ else ""


def problem(tokens, out_features, in_features, dtype=BF16):
    w = random_weight(out_features, in_features, F32, integers=True)
    return w, random_input((tokens, in_features), dtype, integers=True)


def reaches_y(out_features, stride=None, shift=0, bias=None, residual=None, activation=None, **_):
    """(whether y is only rounded, whether rows and what is added begin at 16 bytes)."""
    aligned = (stride or row_stride(out_features)) % 8 == 0 and shift % 8 == 0
    aligned &= all(each is None or each.data_ptr() % 16 == 0 for each in (bias, residual))
    aligned &= residual is None or residual.stride(0) % 8 == 0
    return activation is None and residual is None, aligned


def wide_stores(tokens, out_features, rows, stride=None, shift=0, elements=8):
    """Into how many stores of so many elements an Output can be divided, when a warpgroup stores
    `rows` of out_features of a token and no store crosses a multiple of its size."""
    stride, count = stride or row_stride(out_features), 0
    for first in (shift + token * stride for token in range(tokens)):
        for row in range(0, out_features, rows):
            begin, end = first + row, first + min(row + rows, out_features)
            count += max(0, end // elements - -(-begin // elements))
    return count

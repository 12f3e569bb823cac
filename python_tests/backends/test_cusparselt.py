"""The cuSPARSELt backend: loading, refusals, plans, weights and search, with a fake library.

The fake (fake_cusparselt.c) has the C functions of the real one and computes on host memory, so
everything but the vendor's kernels is tested here without a GPU: the CPU is taken for a GPU. The
real library is tested in a child process (cusparselt_child.py), because its faults poison a
process.
"""

import copy
import ctypes
import functools
import gc
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from python_tests.linear_cases import assert_within, error_bound, random_input, random_weight
from sparsekern import (
    SparseLinear,
    _native,
    explain,
    linear,
    linear_quantized,
    quantize,
    quantize_rows,
    reference,
)
from sparsekern.backends import memory, registry
from sparsekern.backends.cusparselt import layout
from sparsekern.backends.cusparselt import library as vendor
from sparsekern.backends.cusparselt import linear as backend
from sparsekern.backends.cusparselt.linear import Algorithm
from sparsekern.backends.cusparselt.search import search
from sparsekern.backends.protocol import problem_of
from sparsekern.formats.sparse24 import Sparse24, compress, decompress
from sparsekern.formats.tile64 import pack as pack_tile64
from sparsekern.ops import linear_op as ops
from sparsekern.utils import json_store

HERE = Path(__file__).resolve().parent
COMPILER = shutil.which("cc") or shutil.which("gcc")
FOLDER = tempfile.TemporaryDirectory(prefix="fake_cusparselt")  # as long as the process
OBJECT_BYTES = {6: 13072, 7: 1024}  # of the opaque structures, by minor version; later ones 512
BF16 = torch.bfloat16

needs_module = pytest.mark.skipif(not _native.available(), reason=_native.reason() or "present")
needs_fake = pytest.mark.skipif(
    not _native.available() or not COMPILER,
    reason=_native.reason() or "no C compiler (cc, gcc) for the fake library",
)


@functools.cache
def build_fake(minor, patch):
    library = Path(FOLDER.name) / f"fake-0.{minor}.{patch}.so"
    size = OBJECT_BYTES.get(minor, 512)
    command = [COMPILER, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    command += [f"-DMINOR={minor}", f"-DPATCH={patch}", f"-DOBJECT_BYTES={size}"]
    command += [str(HERE / "fake_cusparselt.c"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


def forget():
    """Everything that the backend remembers about a library and its user."""
    for cached in (vendor.library, vendor.refusal, backend._stored, backend._gpu_name):
        cached.cache_clear()
    backend.forget_plans()
    registry.changed()
    backend._searched.clear()
    if _native.available():
        _native.module().cusparselt_unload()


class Fake:
    """Chooses a version of the fake library, and reads its counters."""

    def __init__(self, monkeypatch, folder):
        self.monkeypatch, self.folder, self.copies = monkeypatch, folder, 0

    def use(self, minor=8, patch=1):
        forget()
        self.copies += 1  # each with its own counters
        path = self.folder / f"libcusparseLt-0.{minor}.{patch}-{self.copies}.so"
        shutil.copy(build_fake(minor, patch), path)
        self.monkeypatch.setenv(vendor.VARIABLE, str(path))
        self.symbols = ctypes.CDLL(str(path))
        return self

    def __getattr__(self, name):
        return ctypes.c_int.in_dll(self.symbols, f"fake_{name}").value

    def fail_next_matmul(self, code):
        ctypes.c_int.in_dll(self.symbols, "fake_fail_next_matmul").value = code


@pytest.fixture
def cpu_as_gpu(monkeypatch, tmp_path):
    """The CPU passes for a GPU of compute capability 9.0; nobody's cache file is touched."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(vendor, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(backend, "current_device", lambda: -1)
    monkeypatch.setattr(backend, "current_stream", lambda index: 0)
    monkeypatch.setattr(backend, "empty_strided", torch._C._dynamo.guards._empty_strided_cpu)
    monkeypatch.setattr(backend, "_workspaces", {})
    if _native.available():
        monkeypatch.setattr(_native.module(), "capture_id", lambda stream: 0)
    monkeypatch.setattr(layout, "packs", lambda device: device.type == "cpu")
    monkeypatch.setitem(registry._PREFERENCE, "cpu", ["cpu", "cusparselt"])
    forget()
    yield
    forget()


@pytest.fixture
def fake(monkeypatch, tmp_path, cpu_as_gpu):
    return Fake(monkeypatch, tmp_path).use()


def weight(out_features=32, in_features=48, seed=0, integers=True):
    w = random_weight(out_features, in_features, BF16, seed, integers)
    return w, compress(w)


def plans():
    """(id, workspace bytes) of every plan that is known."""
    return [known for of_one in backend._plans.values() for known in of_one.values()]


def plan_arguments(*values):
    """The arguments of the native cusparselt_plan by name."""
    sizes = "device", "dtype", "out_features", "tokens", "in_features", "x_stride", "y_stride"
    names = *sizes, "bias", "relu", *Algorithm._fields
    plain = dict(zip(names, values, strict=True))
    return {**plain, "y_dtype": plain["dtype"], "channel_scale": False}


def expected(x, w, bias=None, activation=None):
    """The float64 result, rounded once."""
    y = reference.linear(x.double(), w.double(), None if bias is None else bias.double())
    return backend.activate(y, activation).to(x.dtype)


# ---- weights of 8 bits ---------------------------------------------------------------------------


def levels(out_features=32, in_features=64, seed=0):
    """An int8 weight, row-major, and its dense levels."""
    w24 = quantize(compress(random_weight(out_features, in_features, BF16, seed)), "int8")
    plain = Sparse24(w24.values.float(), w24.metadata, w24.shape)
    return w24, decompress(plain)


def rounded_product(x8, w24, dense):
    """What the library computes: exact sums times the channel's scale, rounded once."""
    return ((x8.float() @ dense.t()) * w24.tensors["weight_scale"].view(-1)).to(BF16)


@needs_fake
def test_int8_weights_pack_compute_and_unpack(fake):
    w24, dense = levels()
    packed = w24.to_layout("cusparselt")
    assert packed.values.dtype == torch.int8 and packed.nbytes <= 0.64 * dense.numel() + 4 * 32
    back = packed.rowmajor()
    assert all(torch.equal(back.tensors[name], w24.tensors[name]) for name in w24.tensors)
    bias = random_input((32,), BF16, seed=2)
    for tokens in (16, 3):  # as they are, and padded
        x8, scale = quantize_rows(random_input((tokens, 64), BF16), "int8")
        y = linear_quantized(x8, scale, packed, bias, "silu", backend="cusparselt")
        z = rounded_product(x8, w24, dense).float() * scale[:, None] + bias.float()
        assert torch.equal(y, torch.nn.functional.silu(z).to(BF16))
    wide = torch.randint(-127, 128, (16, 80), dtype=torch.int8)
    for x8 in (wide[:, :64], wide[:, 1:65]):  # a stride, and an address that is not aligned
        y = linear_quantized(x8, torch.ones(16), packed, backend="cusparselt")
        assert torch.equal(y, rounded_product(x8, w24, dense))
    empty = linear_quantized(x8[:0], torch.ones(0), packed, backend="cusparselt")
    assert empty.shape == (0, 32) and empty.dtype == BF16


@needs_fake
def test_a_16_bit_x_is_quantised_for_int8_weights(fake):
    w24, dense = levels()
    packed, x = w24.to_layout("cusparselt"), random_input((2, 5, 64), BF16)
    x8, scale = quantize_rows(x, "int8")
    wanted = linear_quantized(x8, scale, packed, backend="cusparselt")
    assert torch.equal(linear(x, packed, backend="cusparselt"), wanted)
    assert "x quantised by token" in explain(x, packed, backend="cusparselt").config


@needs_fake
def test_int8_weights_that_the_library_does_not_take(fake):
    for shape in ((48, 64), (64, 48)):
        w24, _ = levels(*shape)
        with pytest.raises(ValueError, match="multiples of 32, got"):
            w24.to_layout("cusparselt")
    single = quantize(compress(random_weight(32, 64, torch.float32)), "int8")
    with pytest.raises(TypeError, match="8-bit levels, .*got int8 of torch.float32"):
        single.to_layout("cusparselt")
    int4 = quantize(compress(random_weight(32, 64, BF16)), "int4")
    with pytest.raises(TypeError, match="got int4"):
        int4.to_layout("cusparselt")


@needs_fake
def test_channel_scales_belong_to_the_plan(fake):
    backend.pack(weight()[1])  # loads the library
    native = _native.module()
    plain = plan_arguments(-1, 3, 32, 16, 64, 64, 32, 0, False, -1, 1, 0) | {"y_dtype": 1}
    scaled = native.cusparselt_plan(**(plain | {"channel_scale": True}))[0]
    unscaled = native.cusparselt_plan(**plain)[0]
    assert scaled != unscaled
    addresses = dict(blob=0, x=0, y=0, workspace=0, stream=0)
    with pytest.raises(ValueError, match="channel_scale for a plan that has it, got none"):
        native.cusparselt_matmul_scaled(plan=scaled, channel_scale=0, **addresses)
    with pytest.raises(ValueError, match="channel_scale only for a plan that has it, got one"):
        native.cusparselt_matmul_scaled(plan=unscaled, channel_scale=16, **addresses)
    with pytest.raises(ValueError, match="n to be a multiple of 16, got 8"):
        native.cusparselt_plan(**(plain | {"tokens": 8}))


@needs_fake
def test_search_of_an_int8_weight(fake):
    packed = levels()[0].to_layout("cusparselt")
    result = search(packed, 6, store=False)
    assert result.key == "cpu|0.8.1|int8-bfloat16|32x64|16"
    assert {a.algorithm for a in result.wrong} >= {2, 5}
    assert str(result.algorithm) in explain(random_input((6, 64), BF16), packed).config


# ---- the library and its refusals ----------------------------------------------------------------


@needs_fake
@pytest.mark.parametrize("minor, patch", [(6, 0), (6, 3), (7, 1), (8, 1), (9, 0), (10, 0)])
def test_versions_0_6_to_0_10_compute(fake, minor, patch):
    fake.use(minor, patch)
    w, w24 = weight()
    x = random_input((8, 48), BF16, integers=True)
    assert torch.equal(linear(x, backend.pack(w24)), expected(x, w))
    assert vendor.library()[0].version == (0, minor, patch)
    assert (fake.inits, fake.handles) == (1, 1) and fake.plans > 0 and fake.matrices > 0
    forget()
    assert (fake.handles, fake.plans, fake.matrices, fake.selections) == (0, 0, 0, 0)


@needs_fake
@pytest.mark.parametrize("minor", [5, 11])
def test_other_versions_are_refused(fake, minor):
    fake.use(minor, 2)
    why = vendor.refusal(-1, BF16)
    assert f"expected version 0.6 to 0.10, got 0.{minor}.2 in " in why
    with pytest.raises(NotImplementedError, match=rf"a usable cuSPARSELt, got .*0\.{minor}\.2"):
        backend.pack(weight()[1])
    assert fake.inits == 0


@needs_fake
@pytest.mark.parametrize("patch", [0, 1])
def test_float16_on_hopper_is_refused_where_it_dies(fake, monkeypatch, patch):
    fake.use(8, patch)
    assert vendor.refusal(-1, BF16) == ""
    why = vendor.refusal(-1, torch.float16)
    assert f"cuSPARSELt 0.8.{patch}" in why and "illegal instruction" in why and "bfloat16" in why
    with pytest.raises(NotImplementedError, match="illegal instruction.*layout=None"):
        backend.pack(compress(random_weight(32, 32, torch.float16)))
    assert fake.inits == 0, "refused before the library is asked for anything"
    monkeypatch.setattr(vendor, "_capability", lambda index: (8, 0))
    vendor.refusal.cache_clear()
    assert vendor.refusal(-1, torch.float16) == "", "the fault is one of Hopper"
    fake.use(10, 0)
    monkeypatch.setattr(vendor, "_capability", lambda index: (9, 0))
    assert vendor.refusal(-1, torch.float16) == "", "0.10 works"


@needs_fake
def test_refusals_in_words(fake, monkeypatch):
    w24 = backend.pack(weight()[1])
    assert backend.why_not(problem_of(torch.zeros(8, 48, dtype=BF16), w24.spec)) is None
    assert "float16 or bfloat16, got torch.float32" in vendor.refusal(-1, torch.float32)
    monkeypatch.setattr(vendor, "_capability", lambda index: (7, 5))
    vendor.refusal.cache_clear()
    assert "8.0 or newer, cuda:-1 has 7.5" in vendor.refusal(-1, BF16)
    monkeypatch.undo()
    vendor.refusal.cache_clear()
    assert "on a GPU, got the CPU" in vendor.refusal(-1, BF16)


@needs_module
def test_an_absent_or_strange_library_is_a_reason(cpu_as_gpu, monkeypatch, tmp_path):
    absent, text, other = tmp_path / "no.so", tmp_path / "text.so", None
    text.write_text("not a library")
    for path, why in ((absent, "No such file"), (text, "invalid ELF header|too short")):
        monkeypatch.setenv(vendor.VARIABLE, str(path))
        forget()
        assert vendor.candidates() == [str(path)]
        with pytest.raises(NotImplementedError, match=f"expected a library at {path}.*({why})"):
            backend.pack(weight()[1])
    other = next(iter(Path(torch.__file__).parent.glob("lib/libc10.so")), None)
    if other is not None:
        monkeypatch.setenv(vendor.VARIABLE, str(other))
        forget()
        assert "expected cusparseLtGetProperty in" in vendor.refusal(-1, BF16)


def test_without_the_native_module_its_absence_is_the_reason(cpu_as_gpu, monkeypatch):
    monkeypatch.setattr(_native, "available", lambda: False)
    monkeypatch.setattr(_native, "reason", lambda: "no module here")
    assert vendor.library() == (None, "no module here")
    assert "no module here" in vendor.refusal(-1, BF16)


def test_candidates_find_wheels_and_the_system(monkeypatch, tmp_path):
    monkeypatch.delenv(vendor.VARIABLE, raising=False)
    wheel = tmp_path / "nvidia" / "cusparselt" / "lib" / "libcusparseLt.so.0"
    old_wheel = tmp_path / "cusparselt" / "lib" / "libcusparseLt.so.0"
    for path in (wheel, old_wheel):
        path.parent.mkdir(parents=True)
        path.touch()
    folders = {"nvidia": tmp_path / "nvidia", "cusparselt": tmp_path / "cusparselt"}

    def find_spec(name):
        places = [str(folders[name])] if name in folders else []
        return type("Spec", (), {"submodule_search_locations": places})

    monkeypatch.setattr(vendor.importlib.util, "find_spec", find_spec)
    assert vendor.candidates() == [str(wheel), str(old_wheel), *vendor.SYSTEM_NAMES]


# ---- computing -----------------------------------------------------------------------------------


@needs_fake
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16, 40])
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
def test_linear(fake, tokens, activation):
    w, w24 = weight(48, 32)
    w24 = backend.pack(w24)
    x = random_input((tokens, 32), BF16, integers=True)
    bias = random_input((48,), BF16, seed=2, integers=True)
    y = linear(x, w24, bias, activation)
    assert y.is_contiguous() and y.dtype == BF16
    if activation in (None, "relu"):
        assert torch.equal(y, expected(x, w, bias, activation))
    else:  # the sums are whole numbers, so rounding them first changes few bits
        z = expected(x, w, bias).double()
        assert torch.equal(y, backend.activate(z.float(), activation).to(BF16))
    assert torch.equal(linear(x, w24), expected(x, w))
    assert explain(x, w24).backend == "cusparselt"
    assert "cuSPARSELt 0.8.1, default algorithm" in explain(x, w24).config


@needs_fake
def test_random_numbers_within_the_bound_of_one_rounding(fake):
    w, w24 = weight(64, 96, integers=False)
    x = random_input((24, 96), BF16)
    bias = random_input((64,), BF16, seed=2)
    y64 = reference.linear(x.double(), w.double(), bias.double())
    assert_within(linear(x, backend.pack(w24), bias), y64, error_bound(x, w, bias, y64, BF16))


@needs_fake
def test_shapes_and_strides_of_x(fake):
    w, w24 = weight(32, 48)
    w24 = backend.pack(w24)
    x = random_input((6, 4, 56), BF16, integers=True)
    strided = x[..., :48]  # rows 56 apart, aligned
    offset = x[..., 1:49]  # not aligned
    turned = random_input((48, 16), BF16, integers=True).t()
    for case in (strided, strided[:, 0], strided[0], offset, turned, strided[0, 0], x[:0, :, :48]):
        y = linear(case, w24)
        assert y.shape == (*case.shape[:-1], 32) and y.is_contiguous()
        assert torch.equal(y, expected(case, w)), case.shape
    guarded = torch.full((10, 48), float("nan"), dtype=BF16)
    guarded[:3] = strided[0, :3]
    assert torch.equal(linear(guarded[:3], w24), expected(strided[0, :3], w))


@needs_fake
def test_a_bias_that_is_not_contiguous_or_not_aligned(fake):
    w, w24 = weight(32, 48)
    w24 = backend.pack(w24)
    x = random_input((8, 48), BF16, integers=True)
    numbers = random_input((80,), BF16, seed=2, integers=True)
    aligned = numbers[:32]
    assert torch.equal(linear(x, w24, aligned), expected(x, w, aligned))
    for bias in (numbers[:64:2], numbers[1:33]):  # the first at the address of `aligned`
        assert torch.equal(linear(x, w24, bias), expected(x, w, bias))


@needs_fake
def test_gradients_flow_through_a_packed_weight(fake):
    w, w24 = weight(32, 48)
    x = random_input((8, 48), BF16, integers=True).requires_grad_()
    bias = torch.zeros(32, dtype=BF16, requires_grad=True)
    w24 = backend.pack(w24)
    linear(x, w24, bias).backward(torch.ones(8, 32, dtype=BF16))
    assert torch.equal(x.grad, w.sum(0).expand(8, 48).to(BF16))
    assert torch.equal(bias.grad, torch.full((32,), 8, dtype=BF16))


@needs_fake
def test_a_plan_is_built_once_per_problem(fake):
    w, w24 = weight(32, 48)
    w24 = backend.pack(w24)
    x, bias = random_input((8, 48), BF16), random_input((32,), BF16)
    linear(x, w24, bias)
    built, matmuls = fake.plans_built, fake.matmuls
    for _ in range(5):
        linear(x, w24, bias)
    other = backend.pack(weight(32, 48, seed=9)[1])
    after_pack = fake.matmuls
    linear(x, other, bias)  # another weight of that shape is no other plan
    linear(random_input((3, 48), BF16), other, bias)  # nor are fewer tokens, padded
    assert fake.plans_built == built and after_pack > matmuls + 5
    assert fake.matmuls == after_pack + 2
    distinct = (
        lambda: linear(x, w24),
        lambda: linear(x, w24, bias.clone()),
        lambda: linear(x, w24, bias, "relu"),
        lambda: linear(random_input((16, 48), BF16), w24, bias),
        lambda: linear(random_input((8, 64), BF16)[:, :48], w24, bias),
    )
    keep = []  # so that the clone of the bias keeps its address
    for number, call in enumerate(distinct, 1):
        keep.append(call())
        assert fake.plans_built == built + number


@needs_fake
def test_the_native_cache_is_keyed_by_everything(fake):
    backend.pack(weight()[1])  # loads the library
    native_plan = _native.module().cusparselt_plan

    def plan(*values):
        return native_plan(**plan_arguments(*values))

    problem = [-1, 1, 32, 8, 48, 48, 32, 0, False, 0, 1, 0]
    first = plan(*problem)
    built = fake.plans_built
    assert plan(*problem) == first and fake.plans_built == built
    changes = {0: 3, 2: 64, 3: 16, 4: 32, 5: 56, 6: 40, 7: 4096, 8: True, 9: 1, 10: 2, 11: 1}
    ids = {first[0]}
    for place, value in changes.items():
        changed = list(problem)
        changed[place] = value
        if place == 2:
            changed[6] = 64
        if place == 10:
            changed[11] = 1
        ids.add(plan(*changed)[0])
    assert len(ids) == len(changes) + 1
    assert fake.inits == 2, "one handle per device"


@needs_fake
def test_a_full_cache_is_emptied_and_stale_plans_are_noticed(fake):
    w, w24 = weight(16, 16)
    w24 = backend.pack(w24)
    x = random_input((8, 16), BF16, integers=True)
    linear(x, w24)
    native = _native.module()
    for stride in range(16, 16 + 8 * native.CUSPARSELT_MAX_PLANS, 8):
        native.cusparselt_plan(**plan_arguments(-1, 1, 16, 8, 16, stride, 16, 0, False, -1, 1, 0))
    assert 0 < fake.plans < native.CUSPARSELT_MAX_PLANS
    built = fake.plans_built
    assert torch.equal(linear(x, w24), expected(x, w))
    assert fake.plans_built <= built + 1
    stale = next(iter(plans()))[0]
    forget()
    assert native.cusparselt_matmul(stale, 0, 0, 0, 0, 0) == native.CUSPARSELT_UNKNOWN_PLAN


# ---- calls that are quick on the host ------------------------------------------------------------


@pytest.fixture
def unasked(monkeypatch):
    """While it is set, a call that is checked, or asks whether it can run, fails."""

    def fail(*arguments):
        raise AssertionError("the detour")

    def forbid():
        monkeypatch.setattr(ops, "check_linear", fail)
        monkeypatch.setattr(ops, "_compute", fail)

    return forbid


@needs_fake
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_a_call_like_one_before_takes_one_look_up(fake, unasked, activation):
    w, w24 = weight(32, 48)
    w24 = backend.pack(w24)
    base = random_input((6, 4, 56), BF16, integers=True)
    bias = random_input((32,), BF16, seed=2, integers=True)
    plain = base[..., :48].contiguous()
    misaligned = base.flatten()[1 : 1 + 8 * 48].view(8, 48)
    cases = (
        plain,
        plain[0],
        plain[0, 0],
        plain[:2],
        plain[None],
        base[:, 0, :48],
        base[..., :48],
        misaligned,
        plain[:0],
        base.view(24, 56)[:, :48],
    )
    with torch.no_grad():
        first = [linear(x, w24, bias, activation) for x in cases]
        for x in cases:
            linear(x, w24, bias, activation, backend="cusparselt")
        built = fake.plans_built
        unasked()
        for x, y in zip(cases, first):
            for backend_name in (None, "cusparselt"):
                again = linear(x, w24, bias, activation, backend=backend_name)
                assert torch.equal(again, y)
                assert not x.numel() or again.data_ptr() not in (x.data_ptr(), y.data_ptr())
                assert again.shape == (*x.shape[:-1], 32) and again.stride() == y.stride()
                assert again.is_contiguous() and again.dtype == BF16
            if activation != "silu":
                assert torch.equal(y, expected(x, w, bias, activation)), x.shape
        assert fake.plans_built == built
        with pytest.raises(AssertionError, match="the detour"):
            linear(torch.zeros(40, 48, dtype=BF16), w24)


@needs_fake
def test_a_known_call_with_other_arguments_is_checked(fake):
    """Each differs from a known call in one thing that no shape and no address tells."""
    w, w24 = weight(32, 48)
    w24 = backend.pack(w24)
    x, bias = torch.zeros(8, 48, dtype=BF16), torch.zeros(64, dtype=BF16)[:32]
    wanting = Sparse24(w24.values.clone().requires_grad_(), w24.metadata, w24.shape, "cusparselt")
    half = Sparse24(w24.values.view(torch.float16), w24.metadata, w24.shape, "cusparselt")
    cases = (
        ((x, wanting, bias), ValueError, "a frozen weight"),
        ((x, half, bias), TypeError, "x.dtype == weight.dtype"),
        ((x.half(), w24, bias), TypeError, "x.dtype == weight.dtype"),
        ((x[:, :32].contiguous(), w24, bias), ValueError, "x.shape\\[-1\\] == weight.in_features"),
        ((x, w24, bias.view(torch.float16)), TypeError, "bias.dtype == weight.dtype"),
        ((x, w24, bias[:16]), ValueError, "bias of shape"),
        ((x, w24, bias[None]), ValueError, "bias of shape"),
        ((x, w24, bias, "tanh"), ValueError, "activation in None"),
        ((x, w24, bias, ["relu"]), ValueError, "activation in None"),
        ((x.tolist(), w24, bias), TypeError, "x of type Tensor"),
    )
    with torch.no_grad():
        for _ in range(2):
            linear(x, w24, bias)
        for arguments, kind, words in cases:
            with pytest.raises(kind, match=words):
                linear(*arguments)
        with pytest.raises(ValueError, match="backend in 'cuda'"):
            linear(x, w24, bias, backend="tpu")
        assert linear(x, w24, bias).is_inference() is False
    strided = torch.arange(64, dtype=BF16)[::2]
    known = torch.zeros(64, dtype=BF16)
    known[::2] = strided
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(linear(x, w24, known[:32]), known[:32].expand(8, 32))
        assert torch.equal(linear(x, w24, known[::2]), strided.expand(8, 32)), "same address"
    with torch.inference_mode():
        assert linear(x, w24, bias).is_inference()


@needs_fake
def test_gradients_flow_where_the_call_is_known(fake):
    w, w24 = weight(32, 48)
    w24, x = backend.pack(w24), random_input((8, 48), BF16, integers=True)
    with torch.no_grad():
        for _ in range(2):
            linear(x, w24)
    x.requires_grad_()
    linear(x, w24).sum().backward()
    assert torch.equal(x.grad, w.sum(0).expand(8, 48).to(BF16))


@needs_fake
def test_a_known_call_whose_plan_is_gone_makes_a_new_one(fake):
    w, w24 = weight(16, 16)
    w24, x = backend.pack(w24), random_input((8, 16), BF16, integers=True)
    native = _native.module()
    with torch.no_grad():
        linear(x, w24)
        for stride in range(16, 16 + 8 * native.CUSPARSELT_MAX_PLANS, 8):
            native.cusparselt_plan(
                **plan_arguments(-1, 1, 16, 8, 16, stride, 16, 0, False, -1, 1, 0)
            )
        built = fake.plans_built
        for _ in range(2):
            assert torch.equal(linear(x, w24), expected(x, w))
        assert fake.plans_built == built + 1


@needs_fake
def test_a_call_on_another_gpu_than_the_current_one_switches(fake, monkeypatch):
    w, w24 = weight(32, 48)
    w24, x = backend.pack(w24), random_input((8, 48), BF16, integers=True)
    current, switched = [-1], []

    class Switch:
        def __init__(self, index):
            switched.append(index)

        def __enter__(self):
            current.append(switched[-1])

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(backend, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Switch)
    with torch.no_grad():
        linear(x, w24)
        assert switched == []
        current[0] = 1
        assert torch.equal(linear(x, w24), expected(x, w)) and switched == [-1]


@needs_module
def test_a_weight_that_is_on_no_gpu_is_refused_in_words():
    """With no stand-ins: the quick path must not ask torch for a GPU that it may not have."""
    w24 = Sparse24(
        torch.zeros(864, dtype=BF16), torch.empty(0, dtype=torch.uint8), (32, 48), "cusparselt"
    )
    with torch.no_grad(), pytest.raises(NotImplementedError, match="on a GPU, got the CPU"):
        linear(torch.zeros(8, 48, dtype=BF16), w24, backend="cusparselt")


PER_THREAD = 2  # cudaStreamPerThread: a handle that is valid wherever a GPU is, and is not 0


@pytest.fixture
def splitting(fake):
    """(x, w, w24) of a problem whose algorithm takes a workspace of 64 bytes."""
    w, w24 = weight(32, 48)
    packed, x = backend.pack(w24), random_input((8, 48), BF16, integers=True)
    key = backend.algorithm_key(-1, BF16, 32, 48, 8)
    backend.remember(key, Algorithm(0, 2, 1), 1.0, store=False)
    return x, w, packed


@needs_fake
def test_a_workspace_is_lent_per_stream_and_never_captured(fake, splitting, monkeypatch):
    x, w, w24 = splitting
    stream, capture = [0], [0]
    monkeypatch.setattr(backend, "current_stream", lambda index: stream[0])
    monkeypatch.setattr(_native.module(), "capture_id", lambda stream: capture[0])
    lent = backend._workspaces
    with torch.no_grad():
        with memory.nothing_kept():
            linear(x, w24)
        assert lent == {}, "within a registered op"
        capture[0] = 7
        assert torch.equal(linear(x, w24), expected(x, w))
        assert lent == {}, "while a graph is captured"
        capture[0] = 0
        linear(x, w24)
        first = lent[-1, 0]
        assert first.numel() == 64 and first.tolist() == [0x77] * 64
        first.zero_()
        assert torch.equal(linear(x, w24), expected(x, w))
        assert lent == {(-1, 0): first} and first.tolist() == [0x77] * 64, "used again"
        stream[0] = PER_THREAD
        linear(x, w24)
        assert lent.keys() == {(-1, 0), (-1, PER_THREAD)} and lent[-1, 0] is first
        assert lent[-1, PER_THREAD].data_ptr() != first.data_ptr()


@needs_fake
def test_workspaces_that_are_too_small_are_replaced_and_large_ones_not_kept(
    fake, splitting, monkeypatch
):
    x, w, w24 = splitting
    native, small = _native.module(), torch.zeros(63, dtype=torch.uint8)
    y = torch.empty(8, 32, dtype=BF16)
    with torch.no_grad():
        with memory.nothing_kept():
            linear(x, w24)
        plan = next(known[0] for known in plans() if known[1])
        addresses = plan, w24.values.data_ptr(), x.data_ptr(), y.data_ptr()
        assert native.cusparselt_matmul(*addresses, 0, PER_THREAD) == native.CUSPARSELT_NO_WORKSPACE
        native.cusparselt_lend_workspace(-1, PER_THREAD, small.data_ptr(), 63)
        assert native.cusparselt_matmul(*addresses, 0, PER_THREAD) == native.CUSPARSELT_NO_WORKSPACE
        native.cusparselt_lend_workspace(0, PER_THREAD, small.data_ptr(), 64)
        assert native.cusparselt_matmul(*addresses, 0, PER_THREAD) == native.CUSPARSELT_NO_WORKSPACE
        monkeypatch.setattr(backend, "current_stream", lambda index: PER_THREAD)
        monkeypatch.setattr(backend, "_KEPT_BYTES", 63)
        assert torch.equal(linear(x, w24), expected(x, w)) and backend._workspaces == {}
        monkeypatch.setattr(backend, "_KEPT_BYTES", 64)
        assert torch.equal(linear(x, w24), expected(x, w))
        assert list(backend._workspaces) == [(-1, PER_THREAD)]
        assert native.cusparselt_matmul(*addresses, 0, PER_THREAD) == 0
        assert small.tolist() == [0] * 63


@needs_fake
def test_errors_name_the_function_the_status_and_a_remedy(fake):
    w24 = backend.pack(weight()[1])
    x = torch.zeros(8, 48, dtype=BF16)
    linear(x, w24)
    cases = (
        (10, NotImplementedError, r"CUSPARSE_STATUS_NOT_SUPPORTED \(10\)"),
        (4, NotImplementedError, r"CUSPARSE_STATUS_ARCH_MISMATCH \(4\).*packed=None"),
        (7, RuntimeError, r"CUSPARSE_STATUS_INTERNAL_ERROR \(7\).*CUSPARSELT_LOG_LEVEL=5"),
        (3, ValueError, r"CUSPARSE_STATUS_INVALID_VALUE \(3\)"),
        (77, RuntimeError, r"status 77\."),
    )
    for code, kind, words in cases:
        fake.fail_next_matmul(code)
        form = rf"^sparsekern\.cusparselt: cusparseLtMatmul failed: {words}"
        with pytest.raises(kind, match=form):
            linear(x, w24)
    assert torch.equal(linear(x, w24), torch.zeros(8, 32, dtype=BF16))
    plan = _native.module().cusparselt_plan
    problem = dict(
        zip(
            "device dtype m n k x y bias relu alg split mode".split(),
            (-1, 1, 32, 8, 48, 48, 32, 0, False, -1, 1, 0),
        )
    )
    for change, kind, words in (
        (dict(m=40, y=40), ValueError, "m to be a multiple of 16, got 40"),
        (dict(k=40), ValueError, "k to be a multiple of 16, got 40"),
        (dict(n=7), ValueError, "n to be a multiple of 8, got 7"),
        (dict(n=0), ValueError, r"n > 0 \(0\), got 0"),
        (dict(x=40), ValueError, r"problem.x_stride >= k \(48\), got 40"),
        (dict(x=52), ValueError, "stride to be a multiple of 8, got 52"),
        (dict(y=16), ValueError, r"problem.y_stride >= m \(32\), got 16"),
        (dict(alg=6), ValueError, r"algorithm < plan.info.algorithms \(6\), got 6"),
        (dict(alg=-2), ValueError, r"algorithm >= 0 \(0\), got -2"),
        (dict(alg=3), NotImplementedError, "cusparseLtMatmulPlanInit failed: .*NOT_SUPPORTED"),
        (dict(dtype=0), RuntimeError, "StructuredDescriptorInit failed: .*TYPE_NOT_SUPPORTED"),
    ):
        alive = fake.plans, fake.matrices, fake.selections
        kind = (kind, NotImplementedError) if "TYPE" in words else kind
        with pytest.raises(kind, match=words):
            plan(**plan_arguments(*(problem | change).values()))
        assert (fake.plans, fake.matrices, fake.selections) == alive, "nothing is left behind"


@needs_module
def test_calls_without_a_library():
    forget()
    native = _native.module()
    for call in (
        lambda: native.cusparselt_plan(
            **plan_arguments(-1, 1, 32, 8, 48, 48, 32, 0, False, -1, 1, 0)
        ),
        lambda: native.cusparselt_compressed_bytes(-1, 1, 32, 32),
    ):
        with pytest.raises(RuntimeError, match="expected a loaded library, got none. Call load"):
            call()
    assert native.cusparselt_matmul(1, 0, 0, 0, 0, 0) == native.CUSPARSELT_UNKNOWN_PLAN


@needs_fake
def test_everything_is_destroyed_when_python_ends(tmp_path):
    """A child reports the counters of its own end, from an atexit hook that runs after ours."""
    library = tmp_path / "libcusparseLt.so.0"
    shutil.copy(build_fake(8, 1), library)
    program = (
        "import atexit, ctypes, torch\n"
        f"fake = ctypes.CDLL({str(library)!r})\n"
        "count = lambda name: ctypes.c_int.in_dll(fake, 'fake_' + name).value\n"
        "names = 'handles', 'plans', 'matrices', 'selections'\n"
        "atexit.register(lambda: print('end', *map(count, names)))\n"
        "from sparsekern import compress\n"
        "from sparsekern.backends.cusparselt import library, linear as backend\n"
        "library._capability = lambda index: (9, 0)\n"
        "backend.current_device, backend.current_stream = (lambda: -1), (lambda index: 0)\n"
        "backend.empty_strided = torch._C._dynamo.guards._empty_strided_cpu\n"
        "w24 = backend.pack(compress(torch.zeros(32, 32, dtype=torch.bfloat16)))\n"
        "print('alive', *map(count, names))\n"
    )
    environment = {**os.environ, vendor.VARIABLE: str(library)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["alive 1 1 3 1", "end 0 0 0 0"]


# ---- weights -------------------------------------------------------------------------------------


@needs_fake
@pytest.mark.parametrize("shape", [(16, 16), (32, 48), (48, 272)])
def test_pack_and_back(fake, monkeypatch, shape):
    _, w24 = weight(*shape, integers=False)
    packed = backend.pack(w24)
    dense_bytes = 2 * shape[0] * shape[1]
    assert packed.layout == "cusparselt" and packed.dtype == BF16
    assert packed.nbytes <= 0.60 * dense_bytes
    assert backend.pack(packed) is packed
    monkeypatch.setattr(layout, "_UNPACK_ELEMENTS", 32 * sum(shape))  # several slices
    for back in (packed.rowmajor(), backend.pack(pack_tile64(w24)).rowmajor()):
        assert back.layout == "rowmajor"
        assert torch.equal(back.values, w24.values) and torch.equal(back.metadata, w24.metadata)
    assert torch.equal(decompress(packed), decompress(w24))
    assert torch.equal(packed.bitmask(), w24.bitmask())
    tile64 = pack_tile64(packed)
    assert torch.equal(tile64.values, pack_tile64(w24).values)


@needs_fake
def test_pack_refuses_shapes_and_dtypes(fake):
    for shape in ((40, 32), (32, 40), (0, 16), (16, 0), (8, 16)):
        with pytest.raises(ValueError, match=rf"multiples of 16, got {shape[0]} and {shape[1]}"):
            backend.pack(compress(torch.zeros(shape, dtype=BF16)))
    with pytest.raises(TypeError, match="float16 or bfloat16, got torch.float32"):
        backend.pack(compress(torch.zeros(16, 16)))


@needs_fake
def test_pack_notices_a_blob_that_gives_back_another_weight(fake, monkeypatch):
    backend.remember(
        backend.algorithm_key(-1, BF16, 32, 48, 48), Algorithm(2), 1.0, store=False
    )  # the fake's algorithm that computes a wrong row
    with pytest.raises(RuntimeError, match="the weight back from its blob, got another one"):
        backend.pack(weight(32, 48)[1])


@needs_fake
def test_another_backend_says_how_to_get_the_layout(fake):
    w24 = weight()[1]
    x = torch.zeros(8, 48, dtype=BF16)
    with pytest.raises(NotImplementedError, match=r"SparseLinear\(layout='cusparselt'\)"):
        linear(x, w24, backend="cusparselt")
    assert linear(x, backend.pack(w24), backend="cusparselt").shape == (8, 32)
    with pytest.raises(NotImplementedError, match="backend 'cuda' needs layout 'tile64'"):
        linear(x, backend.pack(w24), backend="cuda")
    assert explain(x, w24).backend == "cpu", "nothing prefers it by default"


@needs_fake
def test_sparse24_in_this_layout_is_never_copied_as_a_blob(fake):
    _, w24 = weight(integers=False)
    packed = backend.pack(w24)
    for copied in (copy.deepcopy(packed), copy.copy(packed), pickle.loads(pickle.dumps(packed))):
        assert copied.layout == "rowmajor"
        assert torch.equal(copied.values, w24.values)
        assert torch.equal(copied.metadata, w24.metadata)
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True).layout == "rowmajor"
    assert packed.to("cpu") is packed and packed.to(BF16) is packed
    assert packed.to(BF16, copy=True).layout == "cusparselt"
    as_float = packed.to(torch.float32)
    assert as_float.layout == "rowmajor"
    assert torch.equal(decompress(as_float), decompress(w24).float())
    assert packed.clone().layout == packed.detach().layout == "cusparselt"
    with pytest.raises(ValueError, match=r"metadata of shape \[0\]"):
        Sparse24(packed.values, w24.metadata, w24.shape, "cusparselt")


@needs_fake
def test_sparse_linear(fake):
    w, w24 = weight(32, 48, integers=False)
    bias = random_input((32,), BF16, seed=3)
    plain = SparseLinear.from_sparse24(w24, bias, packed=False)
    module = SparseLinear.from_sparse24(w24, bias.clone(), packed="cusparselt")
    assert module.weight.layout == "cusparselt" and module.packed == "cusparselt"
    assert "layout=cusparselt" in repr(module)
    assert sum(b.nbytes for b in module.buffers()) <= 0.60 * w.nbytes
    x = random_input((5, 48), BF16)
    y64 = reference.linear(x.double(), w.double(), bias.double())
    assert_within(module(x).detach(), y64, error_bound(x, w, bias, y64, BF16))

    state = module.state_dict()
    for key, tensor in plain.state_dict().items():
        assert torch.equal(state[key], tensor), key
    other = SparseLinear(48, 32, dtype=BF16, packed="cusparselt")
    other.load_state_dict(state)
    assert other.weight.layout == "cusparselt" and torch.equal(other(x), module(x))

    for moved in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.to(BF16)):
        assert moved.weight.layout == "cusparselt" and torch.equal(moved(x), module(x))
    blob = bytes(module.values.view(torch.uint8))
    assert blob not in pickle.dumps(module), "the blob is never saved"

    module.packed = None
    assert module.weight.layout == "rowmajor" and torch.equal(module.values, plain.values)
    module.packed = "cusparselt"
    module.packed = True
    assert module.weight.layout == "tile64"
    with pytest.raises(ValueError, match="packed in None, True, False, 'cusparselt', got 'tile32'"):
        module.packed = "tile32"
    with pytest.raises(ValueError, match="multiples of 16"):
        SparseLinear(48, 40, dtype=BF16, packed="cusparselt")
    with pytest.raises(TypeError):
        SparseLinear(48, 32, dtype=torch.float32, packed="cusparselt")


@needs_fake
def test_a_module_leaves_and_enters_the_gpu(fake, monkeypatch):
    """Where the library is not, the weight is row-major, whichever way the module came there."""
    module = SparseLinear.from_sparse24(weight(integers=False)[1], packed="cusparselt")
    before = module.weight.rowmajor()
    monkeypatch.setattr(layout, "packs", lambda device: False)
    for there in (copy.deepcopy(module), module.cpu(), SparseLinear(16, 16, packed="cusparselt")):
        assert there.weight.layout == "rowmajor" and there.packed == "cusparselt"
    assert torch.equal(module.values, before.values)
    monkeypatch.setattr(layout, "packs", lambda device: True)
    assert module.to(BF16).weight.layout == "cusparselt"
    fake.use(11, 0)
    with pytest.raises(NotImplementedError, match="expected version 0.6 to 0.10"):
        SparseLinear(16, 16, dtype=BF16, packed="cusparselt")


# ---- search --------------------------------------------------------------------------------------


@needs_fake
def test_search_takes_the_fastest_that_is_right(fake):
    w, w24 = weight(32, 48)
    packed = backend.pack(w24)
    result = search(packed, 6)
    assert result.algorithm == Algorithm(1), str(result)
    assert result.us < result.default_us
    assert {a.algorithm for a in result.wrong} == {2, 4, 5}
    assert {a.algorithm for a in result.refused} == {0, 1, 2, 3, 4, 5}
    assert Algorithm(3) in result.refused and Algorithm(0, 2, 2) in result.refused
    assert result.tried == 49 and "1 tried" not in str(result) and "algorithm 1" in str(result)

    x = random_input((6, 48), BF16, integers=True)
    assert "algorithm 1" in explain(x, packed).config, "used from now on"
    assert torch.equal(linear(x, packed), expected(x, w))
    assert "default" in explain(random_input((9, 48), BF16), packed).config, "another problem"

    forget()  # a new process finds it in the user's file
    assert "algorithm 1" in explain(x, packed).config
    ((key, entry),) = json_store.load(backend.store_path()).items()
    assert key == result.key == "cpu|0.8.1|bfloat16|32x48|8"
    assert entry == {"algorithm": 1, "split_k": 1, "split_k_mode": 0, "us": round(result.us, 2)}
    fake.use(9, 0)
    assert "default" in explain(x, backend.pack(w24)).config, "of another version"


@needs_fake
def test_search_without_storing(fake):
    packed = backend.pack(weight()[1])
    assert search(packed, 8, store=False).algorithm == Algorithm(1)
    assert not backend.store_path().exists()
    x = torch.zeros(8, 48, dtype=BF16)
    assert "algorithm 1" in explain(x, packed).config
    for bad, kind in ((weight()[1], "layout 'cusparselt', got 'rowmajor'"),):
        with pytest.raises(ValueError, match=kind):
            search(bad, 8)
    with pytest.raises(ValueError, match="tokens >= 1, got 0"):
        search(packed, 0)


@needs_fake
def test_split_k_gets_a_workspace_and_can_win(fake, monkeypatch):
    """Of the fake's algorithm 0 alone: splitting K in one kernel is faster there."""
    from sparsekern.backends.cusparselt import search as cusparselt_search

    monkeypatch.setattr(
        cusparselt_search._Problem,
        "candidates",
        lambda problem: [
            Algorithm(),
            *(Algorithm(0, *parts) for parts in cusparselt_search.SPLITS),
        ],
    )
    w, w24 = weight()
    packed = backend.pack(w24)
    result = search(packed, 8)
    assert result.algorithm.algorithm == 0 and result.algorithm.split_k_mode == 1, str(result)
    x = random_input((8, 48), BF16, integers=True)
    assert torch.equal(linear(x, packed), expected(x, w))
    assert next(iter(plans()))[1] == 64
    assert f"split_k {result.algorithm.split_k} mode 1" in explain(x, packed).config


@needs_fake
def test_nothing_right_is_an_error(fake, monkeypatch):
    from sparsekern.backends.cusparselt import search as cusparselt_search

    monkeypatch.setattr(
        cusparselt_search._Problem,
        "candidates",
        lambda problem: [Algorithm(2), Algorithm(3), Algorithm(4)],
    )
    packed = backend.pack(weight()[1])
    with pytest.raises(RuntimeError, match="got 1 refused and 2 wrong ones"):
        search(packed, 8)
    assert not backend.store_path().exists()


@needs_fake
def test_nonsense_in_the_file_is_not_used(fake):
    packed = backend.pack(weight()[1])
    x = torch.zeros(8, 48, dtype=BF16)
    key = backend.algorithm_key(-1, BF16, 32, 48, 8)
    for entry in (7, {}, {"algorithm": "1", "split_k": 1, "split_k_mode": 0}, {"algorithm": True}):
        json_store.update(backend.store_path(), functools.partial(dict.update, **{key: entry}))
        backend._stored.cache_clear()
        assert "default algorithm" in explain(x, packed).config
    backend.store_path().write_text(json.dumps({"version": 99}))
    backend._stored.cache_clear()
    with pytest.warns(UserWarning, match="cusparselt.json is ignored"):
        linear(x, packed, torch.zeros(32, dtype=BF16))


# ---- the real library ----------------------------------------------------------------------------


def run_child(*arguments):
    done = subprocess.run(
        [sys.executable, str(HERE / "cusparselt_child.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
    )
    if done.stdout.startswith("skip: "):
        pytest.skip(done.stdout.strip())
    lines = done.stderr.strip().splitlines() or ["no message"]
    told = f"{' '.join(arguments)}: {lines[-1]}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    assert done.returncode == 0, told
    return done.stdout


@pytest.mark.gpu
@needs_module
@pytest.mark.parametrize(
    "case",
    ["linear", "again", "module", "graph", "search", "float16", "float8_e4m3fn", "int8"],
)
def test_the_real_library(case, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gc.collect()
    assert f"{case}: right" in run_child(case)

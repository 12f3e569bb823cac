"""csrc/core/fastcall.h: what C++ is given, what Python gets back, and what is refused.

On a probe module (fastcall_probe.cpp), where every value can be seen, then on the module itself.
"""

import importlib.util
import inspect
import shutil
import subprocess
import sysconfig
from pathlib import Path

import numpy
import pytest

from sparsekern import _native

ROOT = Path(__file__).resolve().parents[2]
BOUND = (
    "prune_compress",
    "pack",
    "decode",
    "decode_gated",
    "prefill",
    "mma",
    "naive",
    "capture_id",
    "cusparselt_matmul",
    "cusparselt_lend_workspace",
)
LINEAR = ("decode", "prefill", "mma")


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is needed to compile the probe")
    compiler = shutil.which("c++") or shutil.which("g++")
    python_header = Path(sysconfig.get_path("include")) / "Python.h"
    if compiler is None or not python_header.is_file():
        pytest.skip("needs a C++ compiler and the headers of Python")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    built = tmp_path_factory.mktemp("probe") / f"fastcall_probe{suffix}"
    includes = (ROOT / "csrc", pybind11.get_include(), python_header.parent)
    subprocess.run(
        [
            compiler,
            "-std=c++17",
            "-O1",
            "-shared",
            "-fPIC",
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
            "-Werror",
            f"-I{includes[0]}",
            f"-isystem{includes[1]}",
            f"-isystem{includes[2]}",
            str(Path(__file__).with_name("fastcall_probe.cpp")),
            "-o",
            str(built),
        ],
        check=True,
    )
    spec = importlib.util.spec_from_file_location("fastcall_probe", built)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Seven:
    def __index__(self):
        return 7


class Broken:
    def __index__(self):
        raise RuntimeError("no index")


# ---- the probe -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        (0, 0, 0),
        (1, 2, 3),
        (2**64 - 1, 2**31 - 1, 2**63 - 1),
        (2**63, -(2**31), -(2**63)),
        (140_000_000_000_000, -1, -1),
    ],
)
def test_cpp_is_given_the_integers_of_the_call(probe, arguments):
    assert probe.see(*arguments) is None
    assert probe.last_seen() == arguments


def test_whatever_has_an_index_is_an_integer(probe):
    probe.see(Seven(), True, numpy.int64(-5))
    assert probe.last_seen() == (7, 1, -5)
    probe.see(numpy.uint64(2**64 - 1), Seven(), False)
    assert probe.last_seen() == (2**64 - 1, 7, 0)


def test_results(probe):
    assert probe.nothing() == 7
    assert probe.is_even(2) is True and probe.is_even(3) is False
    assert probe.same(2**64 - 1) == 2**64 - 1


@pytest.mark.parametrize(
    "position, kind, values",
    [
        (0, "an unsigned integer of 64 bits", (-1, 2**64, 10**30)),
        (1, "a signed integer of 32 bits", (2**31, -(2**31) - 1, 2**32, 10**30)),
        (2, "a signed integer of 64 bits", (2**63, -(2**63) - 1, -(10**30))),
    ],
)
def test_what_does_not_fit_is_refused(probe, position, kind, values):
    for value in (*values, 1.0, "1", None, [1], Broken()):
        arguments = [1, 2, 3]
        arguments[position] = value
        with pytest.raises(TypeError) as caught:
            probe.see(*arguments)
        expected = f"sparsekern._C.see: expected argument {position + 1} as {kind}, got {value!r}"
        assert str(caught.value) == f"{expected}. See sparsekern/_C.pyi."
        assert caught.value.__cause__ is None and caught.value.__context__ is None


@pytest.mark.parametrize("arguments", [(), (1,), (1, 2), (1, 2, 3, 4)])
def test_a_wrong_number_of_arguments_is_refused(probe, arguments):
    with pytest.raises(TypeError, match=f"see: expected 3 arguments, got {len(arguments)}"):
        probe.see(*arguments)


def test_keywords_are_refused(probe):
    with pytest.raises(TypeError, match="keyword"):
        probe.see(1, 2, stride=3)


def test_exceptions_of_cpp_arrive(probe):
    with pytest.raises(KeyError, match="5"):
        probe.key_error(5)
    with pytest.raises(RuntimeError, match="from C..$"):
        probe.failure(5)


def test_functions_know_their_names(probe):
    assert (probe.see.__name__, probe.see.__module__) == ("see", "fastcall_probe")
    assert probe.see.__doc__ == "For last_seen."


# ---- the module ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def declared():
    """{name: Signature} of the ops, by the stub file."""
    stub = (ROOT / "sparsekern" / "_C.pyi").read_text()
    functions = {}
    exec(stub.replace("from typing import TypedDict", "TypedDict = object"), functions)
    return {name: inspect.signature(functions[name]) for name in BOUND}


@pytest.fixture
def native():
    if not _native.available():
        pytest.skip(_native.reason())
    return _native.module()


@pytest.mark.parametrize("name", BOUND)
def test_ops_take_as_many_integers_as_the_stub_file_says(native, declared, name):
    op, count = getattr(native, name), len(declared[name].parameters)
    for wrong in (count - 1, count + 1):
        with pytest.raises(TypeError, match=f"{name}: expected {count} arguments, got {wrong}"):
            op(*range(wrong))
    for position, parameter in enumerate(declared[name].parameters):
        arguments = [0] * count
        arguments[position] = 0.5
        with pytest.raises(TypeError, match=f"{name}: expected argument {position + 1} as .*0.5"):
            op(*arguments)
        sizes = ("tokens", "out_features", "in_features", "dtype", "activation", "config", "device")
        bits = 32 if parameter in sizes else 64
        arguments[position] = 2**bits
        with pytest.raises(TypeError, match=f"argument {position + 1} as .* of {bits} bits"):
            op(*arguments)


@pytest.mark.parametrize("name", LINEAR)
def test_a_status_becomes_an_exception(native, declared, name):
    """No GPU is needed: without one the runtime refuses, with one the config -1."""
    known = dict(
        tokens=1, out_features=64, in_features=64, x_stride=64, y_stride=64, dtype=1, config=-1
    )
    arguments = [known.get(parameter, 0) for parameter in declared[name].parameters]
    with pytest.raises((ValueError, RuntimeError), match=r"^sparsekern\.linear.*(got -1|cuda)"):
        getattr(native, name)(*arguments)


def test_an_unknown_plan_of_cusparselt_is_told(native):
    missing = native.cusparselt_matmul(2**64 - 1, 0, 0, 0, 0, 0)
    assert missing == native.CUSPARSELT_UNKNOWN_PLAN

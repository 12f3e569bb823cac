"""Compiles Python modules around parts of csrc, without a GPU: probes for tests."""

import importlib.util
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def cuda_include():
    """The folder of cuda_runtime.h that belongs to nvcc; None without one."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    done = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
    top = re.search(r"TOP=(\S+)", done.stderr)
    include = Path(top.group(1)) / "include" if top else None
    return include if include and (include / "cuda_runtime.h").exists() else None


def build_probe(folder, name, *sources, cuda=False, optimize="-O1"):
    """The module of python_tests/csrc/<name>.cpp and sources of csrc; skips without tools."""
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is needed to compile the probe")
    compiler = shutil.which("c++") or shutil.which("g++")
    python_header = Path(sysconfig.get_path("include")) / "Python.h"
    if compiler is None or not python_header.is_file():
        pytest.skip("needs a C++ compiler and the headers of Python")
    includes = [pybind11.get_include(), python_header.parent]
    if cuda:
        if cuda_include() is None:
            pytest.skip("needs the headers of an nvcc on PATH")
        includes.append(cuda_include())
    built = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(
        [
            compiler,
            "-std=c++17",
            optimize,
            "-shared",
            "-fPIC",
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
            "-Werror",
            f"-I{ROOT / 'csrc'}",
            *(f"-isystem{include}" for include in includes),
            str(ROOT / "python_tests" / "csrc" / f"{name}.cpp"),
            *(str(ROOT / "csrc" / source) for source in sources),
            "-o",
            str(built),
        ],
        check=True,
    )
    spec = importlib.util.spec_from_file_location(name, built)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

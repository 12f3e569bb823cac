"""Builds the CUDA module by CMake where there is an nvcc; installs without it elsewhere.

Everything else about the package is in pyproject.toml. Needs neither torch, nor a GPU, nor git, nor
the network. Environment variables:

    SPARSEKERN_NO_CUDA=1         leave the module out even though there is an nvcc
    SPARSEKERN_CUDA_ARCHS        architectures, default "80;89;90a"
    SPARSEKERN_WERROR=0          do not treat warnings as errors (for compilers newer than ours)
    SPARSEKERN_RACECHECK=1       build what compute-sanitizer's racecheck can follow; slower
    CUDA_HOME, CUDA_PATH         where to look for nvcc first
    CMAKE_BUILD_PARALLEL_LEVEL   compile jobs; default: cores, but 2 GiB of free memory for each
"""

import glob
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
GIB = 2**30


def say(text):
    print(f"sparsekern: {text}", file=sys.stderr, flush=True)


def flag(name, default):
    return os.environ.get(name, default).lower() not in ("", "0", "off", "no", "false")


def find_nvcc():
    """Path of nvcc: from CUDA_HOME, CUDA_PATH, PATH, or the nvidia pip wheels; None without one.

    An isolated build hides the environment's packages from sys.path, hence the look into
    sysconfig's folders and into VIRTUAL_ENV.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            nvcc = Path(home) / "bin" / "nvcc"
            if os.access(nvcc, os.X_OK):
                return str(nvcc)
            say(f"{variable}={home} has no bin/nvcc; looking elsewhere")
    if nvcc := shutil.which("nvcc"):
        return nvcc
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    if venv := os.environ.get("VIRTUAL_ENV"):
        folders += glob.glob(f"{glob.escape(venv)}/lib/python*/site-packages")
    for folder in folders:
        for nvcc in sorted(glob.glob(f"{glob.escape(folder)}/nvidia/*/bin/nvcc"), reverse=True):
            if os.access(nvcc, os.X_OK):
                return nvcc
    return None


def find_tool(name):
    """Path of cmake or ninja: beside this Python (its environment may be inactive), or on PATH."""
    tool = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if tool is None:
        raise SystemExit(f"sparsekern: {name} not found. Run: pip install {name}")
    return tool


def free_memory():
    """Bytes of memory that can be used without swapping, or None where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text()
        return int(re.search(r"MemAvailable:\s+(\d+) kB", text).group(1)) * 1024
    except (OSError, AttributeError):
        return None


def compile_jobs():
    """Parallel compile jobs: one nvcc can take close to 2 GiB."""
    if chosen := os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL"):
        return int(chosen)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = free_memory()
    return max(1, cores if memory is None else min(cores, memory // (2 * GIB)))


class CMakeBuild(build_ext):
    """Compiles sparsekern._C to where setuptools expects it. Any failure is fatal."""

    def build_extension(self, ext):
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        cmake = find_tool("cmake")
        archs = os.environ.get("SPARSEKERN_CUDA_ARCHS") or "80;89;90a"
        definitions = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "SPARSEKERN_VERSION": self.distribution.get_version(),
            "SPARSEKERN_NVCC": find_nvcc(),
            "SPARSEKERN_CUDA_ARCHS": ";".join(re.split(r"[\s,;]+", archs.strip())),
            "SPARSEKERN_PTXAS_DIR": ROOT / "build" / "ptxas",
            "SPARSEKERN_WERROR": "ON" if flag("SPARSEKERN_WERROR", "1") else "OFF",
            "SPARSEKERN_RACECHECK": "ON" if flag("SPARSEKERN_RACECHECK", "0") else "OFF",
        }
        configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
        configure += [f"-D{name}={value}" for name, value in definitions.items()]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(
                [cmake, "--build", str(build), "--parallel", str(compile_jobs())], check=True
            )
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"sparsekern: compiling the CUDA module with {definitions['SPARSEKERN_NVCC']} "
                "failed, see above. With nvcc from pip, all nvidia-* packages must be of one "
                "release. SPARSEKERN_NO_CUDA=1 installs without the module."
            ) from error
        built = build / target.name
        if not built.is_file():
            raise SystemExit(f"sparsekern: the build left no {built}.")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built, target)


class BuildPy(build_py):
    """In an editable install without the module, removes one that an earlier install left."""

    def run(self):
        if getattr(self, "editable_mode", False) and not self.distribution.ext_modules:
            for stale in (ROOT / "sparsekern").glob("_C.*.so"):
                say(f"removing {stale.name}, built by an earlier install")
                stale.unlink()
        super().run()


def extensions():
    if flag("SPARSEKERN_NO_CUDA", "0"):
        say("SPARSEKERN_NO_CUDA is set: installing without the CUDA module")
        return []
    if find_nvcc() is None:
        say("no nvcc in CUDA_HOME, on PATH or in pip wheels: installing without the CUDA module")
        return []
    return [Extension("sparsekern._C", sources=[])]


setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild, "build_py": BuildPy})

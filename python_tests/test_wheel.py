"""The binary wheel (`make wheel`): built from the objects of this checkout, installed where there
is no compiler, and seen by the doctor."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILT = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
MODULE = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def run(*command, **options):
    """The command's stdout; the test fails with all that it said when it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    for module in ("setuptools", "pybind11", "auditwheel"):
        pytest.importorskip(module, reason=f"{module} is needed to build the wheel")
    scripts = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    for tool in ("nvcc", "patchelf"):
        if not shutil.which(tool, path=scripts):
            pytest.skip(f"{tool} is needed to build the wheel")
    settings = BUILT / "CMakeCache.txt"
    here = settings.is_file() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" in settings.read_text()
    if not (here and (BUILT / MODULE).is_file()):
        pytest.skip(f"no {MODULE} in build: this checkout's module was not built here")
    folder = tmp_path_factory.mktemp("wheel")
    print(run(sys.executable, ROOT / ".ci/wheel.py", folder))
    (found,) = folder.glob("*.whl")
    return found


def test_what_is_in_it(wheel):
    assert "manylinux" in wheel.name and wheel.stat().st_size < 100e6
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "sparsekern").rglob("*.py")}
    modules |= {str(path.relative_to(ROOT)) for path in (ROOT / "sparsekern").rglob("*.json")}
    assert names >= modules | {"sparsekern/py.typed", "sparsekern/_C.pyi", f"sparsekern/{MODULE}"}
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top == {"sparsekern"}  # no library was added, nothing of the checkout beside the package
    assert {f"sparsekern/{name}" for name in ("tests", "csrc")}.isdisjoint(names)
    for field in ("Project-URL: Homepage", "License-Expression: Apache-2.0", "Typing :: Typed"):
        assert field in text


def test_it_brings_the_kernels_to_a_machine_without_a_compiler(wheel, tmp_path):
    """A fresh environment: the wheel, this one's torch, and no nvcc."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env")
    python = tmp_path / "env/bin/python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    outside = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # of the checkout
    run(*pip, "install", "-q", "--no-deps", "--no-index", wheel, env=outside, cwd=tmp_path)
    places = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # Folders alone: an editable install of this checkout is found by a .pth file, and those in
    # added folders are not read.
    shared = [entry for entry in sys.path if entry.endswith("-packages")]
    (Path(places) / "torch_of_the_tests.pth").write_text("\n".join(shared) + "\n")
    path = os.pathsep.join([str(python.parent), str(tmp_path / "empty")])
    kept = {k: v for k, v in os.environ.items() if k in ("HOME", "LANG", "OMP_NUM_THREADS")}
    environment = {**kept, "PATH": path, "SPARSEKERN_CACHE": str(tmp_path / "cache")}
    assert shutil.which("nvcc", path=path) is None
    options = {"cwd": tmp_path, "env": environment}
    where = run(python, "-c", "import sparsekern; print(sparsekern.__file__)", **options)
    assert where.startswith(places)
    rows = json.loads(run(python.parent / "sparsekern", "doctor", "--json", **options))
    (found,) = (row for row in rows if row["name"] == "sparsekern._C")
    assert found["present"] and found["text"].startswith("built with nvcc")
    archs = found["text"].split(" for ")[1].split(":")[0].split(", ")
    assert {"80", "89", "90a"} <= set(archs)

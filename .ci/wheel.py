"""Builds the binary wheel: python .ci/wheel.py FOLDER (`make wheel`: dist).

The wheel holds the kernels for all architectures and links to nothing but glibc and libstdc++, so
it needs no compiler, no CUDA toolkit and no particular torch; auditwheel reads from the symbols
which manylinux tag that is. Objects of an earlier build in build/ are reused. Exit code 1, with the
reason, for anything that must not be published.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHS = {"80", "89", "90a"}
MEGABYTES = 100  # PyPI's limit of a file


def require(condition: object, text: str) -> None:
    if not condition:
        raise SystemExit(f"wheel: {text}")


def only(paths: list[Path], what: str) -> Path:
    require(len(paths) == 1, f"expected one {what}, got {[path.name for path in paths]}.")
    return paths[0]


def build(folder: Path) -> Path:
    """The wheel as setuptools builds it, tagged linux_*."""
    for stale in ("lib*", "bdist*"):  # modules that are no longer in the package
        for path in (ROOT / "build").glob(stale):
            shutil.rmtree(path)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q"]
    command += ["--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    require(subprocess.run(command).returncode == 0, "pip wheel failed, see above.")
    wheel = only(list(folder.glob("*.whl")), "wheel")
    remedy = "Is there an nvcc? See the README, Install."
    require("none-any" not in wheel.name, f"{wheel.name} has no CUDA module. {remedy}")
    return wheel


def check_module(wheel: Path, folder: Path) -> dict[str, object]:
    """build_info() of the module in the wheel, which must have every architecture."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("sparsekern/_C.c")]
        module_file = Path(archive.extract(names[0], folder))
        vendored = sorted({n.split("/")[0] for n in archive.namelist() if ".libs/" in n})
    require(not vendored, f"the module links to libraries that auditwheel had to add: {vendored}.")
    spec = importlib.util.spec_from_file_location("sparsekern._C", module_file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    info: dict[str, object] = module.build_info()
    archs = set(info["archs"])  # type: ignore[call-overload]
    expected = f"kernels for {', '.join(sorted(ARCHS))}"
    require(archs >= ARCHS, f"expected {expected}, got {sorted(archs)}.")
    return info


def main(target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sparsekern-wheel-") as temporary:
        folder = Path(temporary)
        wheel = build(folder / "plain")
        command = [sys.executable, "-m", "auditwheel", "repair", "-w", str(folder), str(wheel)]
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        repaired = subprocess.run(
            command,
            env={**os.environ, "PATH": path},  # auditwheel looks for patchelf there
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        require(repaired.returncode == 0, repaired.stdout.decode())
        wheel = only(list(folder.glob("*.whl")), "repaired wheel")
        require("manylinux" in wheel.name, f"expected a manylinux tag, got {wheel.name}.")
        info = check_module(wheel, folder)
        size = wheel.stat().st_size / 1e6
        require(size < MEGABYTES, f"expected less than {MEGABYTES} MB, got {size:.1f} MB.")
        shutil.move(wheel, target / wheel.name)
    print(f"{target / wheel.name}: {size:.1f} MB, kernels for {', '.join(sorted(ARCHS))}")
    print(f"built with nvcc {info['nvcc']}, CUDA runtime {info['cudart']} linked in")


if __name__ == "__main__":
    require(len(sys.argv) == 2, "usage: python .ci/wheel.py FOLDER")
    main(Path(sys.argv[1]))

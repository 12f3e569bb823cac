"""compute-sanitizer over all kernels: stray accesses, races in shared memory, wrong barriers.

For races build with SPARSEKERN_RACECHECK=1: see kArrivalsPerWarp in csrc/ptx/mbarrier.cuh. They are
looked for in parts, which several processes (pytest -n) take at the same time.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsekern import _native
from sparsekern.backends.cuda import linear as cuda_backend

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

HERE = Path(__file__).resolve().parent
FOUND = 99  # exit code of the tool when it has something to report


def find_sanitizer():
    """Path of compute-sanitizer: from CUDA_HOME, PATH or the nvidia wheels; None without one."""
    places = [Path(home) / "bin" for home in [os.environ.get("CUDA_HOME")] if home]
    places += [Path("/usr/local/cuda/bin")]
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        places += sorted(Path(folder).glob("*/bin"), reverse=True)
    path = os.pathsep.join([*map(str, places), os.environ.get("PATH", "")])
    return shutil.which("compute-sanitizer", path=path)


PARTS = 6  # of racecheck
RUNS = [("memcheck", 0), ("synccheck", 0), *(("racecheck", part) for part in range(PARTS))]


@pytest.mark.parametrize("tool, part", RUNS)
def test_sanitizer_is_silent(tool, part):
    if reason := cuda_backend.refusal(torch.cuda.current_device()):
        pytest.skip(reason)
    sanitizer = find_sanitizer()
    if sanitizer is None:
        pytest.skip("no compute-sanitizer in CUDA_HOME, on PATH or in the nvidia wheels")
    if (
        tool == "racecheck"
        and "-DSPARSEKERN_RACECHECK" not in _native.module().build_info()["flags"]
    ):
        pytest.skip("racecheck cannot follow this build; build with SPARSEKERN_RACECHECK=1")
    few = ["few", str(part), str(PARTS)] if tool == "racecheck" else []
    done = subprocess.run(
        [
            sanitizer,
            "--tool",
            tool,
            "--error-exitcode",
            str(FOUND),
            "--print-limit",
            "5",
            sys.executable,
            str(HERE / "sanitizer_child.py"),
            *few,
        ],
        env={
            **os.environ,
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
            "PYTHONPATH": str(HERE.parents[1]),
        },
        capture_output=True,
        text=True,
    )
    report = f"{tool}, exit code {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    assert done.returncode == 0, report
    assert "0 wrong results" in done.stdout, report
    assert "ERROR SUMMARY: 0 errors" in done.stdout or "0 hazards" in done.stdout, report

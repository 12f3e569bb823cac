"""The pytest-benchmark suite in bench/: each of its cases runs once, untimed, on a small layer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")
ROOT = Path(__file__).resolve().parents[2]


def test_every_case_runs_once():
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-disable", "-q", "-rs"]
    env = {**os.environ, "SPARSEKERN_BENCH_SIZE": "64"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "failed" not in done.stdout

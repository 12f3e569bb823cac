"""How the prefill kernel streams its last wave, walked on the host: every column tile once, one
cluster finishes a tile, and nobody waits before it has given its own sums away."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLAN = "csrc/linear/tile_scheduler_sm90.cuh"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Compiles prefill_plan.cpp with the plan, perhaps edited by (old, new), and runs it."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs an nvcc on PATH")

    def make(*edit):
        folder = tmp_path_factory.mktemp("plan")
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        if edit:
            text = (folder / PLAN).read_text()
            assert text.count(edit[0]) == 1
            (folder / PLAN).write_text(text.replace(*edit))
        program = folder / "plan"
        source = Path(__file__).with_name("prefill_plan.cpp")
        subprocess.run(
            [
                nvcc,
                "-x",
                "cu",
                "-std=c++17",
                "-w",
                "--expt-relaxed-constexpr",
                "--generate-code=arch=compute_90a,code=sm_90a",
                f"-I{folder / 'csrc'}",
                str(source),
                "-o",
                str(program),
            ],
            check=True,
        )
        return subprocess.run([str(program)], capture_output=True, text=True, timeout=900)

    return make


def test_a_streamed_wave_is_complete_and_nobody_waits_in_a_circle(run):
    done = run()
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.split()[0]) > 3000


@pytest.mark.parametrize(
    "edit, what",
    [
        (("((unit + 1) * p.clusters - 1)", "(unit * p.clusters)"), "wrong first cluster"),
        (("if (which) return", "if (!which) return"), "waits before it gives"),
    ],
)
def test_mistakes_are_seen(run, edit, what):
    done = run(*edit)
    assert done.returncode == 1 and what in done.stdout

"""csrc/ptx/wgmma_sp.cuh is what its generator writes."""

import importlib.util
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "csrc" / "ptx"


def test_the_wrappers_are_the_generated_ones():
    spec = importlib.util.spec_from_file_location("gen_wgmma_sp", FOLDER / "gen_wgmma_sp.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    written = (FOLDER / "wgmma_sp.cuh").read_bytes()
    assert written == generator.generate().encode(), "run: python csrc/tools/gen_wgmma_sp.py"

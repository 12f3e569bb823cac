"""csrc/ptx/wgmma_sp.cuh is what its generator writes."""

import importlib.util
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc"


def test_the_wrappers_are_the_generated_ones():
    spec = importlib.util.spec_from_file_location("gen_wgmma_sp", CSRC / "tools/gen_wgmma_sp.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    written = (CSRC / "ptx/wgmma_sp.cuh").read_bytes()
    assert written == generator.generate().encode(), "run: python csrc/tools/gen_wgmma_sp.py"

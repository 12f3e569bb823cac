"""The scripts of examples/ run on a CPU, and print what they promise."""

import runpy

import pytest

from python_tests.docs.pages import ROOT

PROMISES = {
    "prune_a_model": ["dense", "sparsegpt", "left dense: lm_head"],
    "plain_torch_module": ["dense accuracy", "skip rule 'head'", "SparseLinear(in_features=32"],
    "save_and_load": ["same bits: True", "exported"],
    "quantize_and_serve": ["int4     perplexity", "14 layers", "vllm serve"],
    "reconstruct": ["left dense: ", "reconstructed: error on held-out rows", "2:4   perplexity"],
    "own_scores": ["weight_times_deviation", "sparsegpt"],
    "inspect_and_explain": ["of dense", "0x", "1024 tokens: "],
}


def test_every_example_is_here():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(PROMISES)


@pytest.mark.parametrize("name", PROMISES)
def test_example(name, capsys):
    pytest.importorskip("transformers", reason="needs transformers")
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert [text for text in PROMISES[name] if text not in printed] == []

"""prune_model that fails: which weights are as before. And models that are 2:4 already."""

import copy

import pytest
import torch

import sparsekern as sk
from python_tests.oneshot.driver_models import build, run_prune, tokens, transformers
from python_tests.oneshot.test_resume import assert_same_state
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.oneshot.layerwise import prune_group

PLACE = "sparsekern.oneshot.run.prune_group"


def failing(block, name):
    def prune(layers, hessian, options):
        if layers[0].block == block and any(name in layer.name for layer in layers):
            raise MemoryError("stop here")
        return prune_group(layers, hessian, options)

    return prune


@pytest.mark.parametrize("compress", [True, False])
def test_an_exception_leaves_every_weight_as_it_was(compress, monkeypatch):
    model, before = build(layers=3), build(layers=3)
    modules = dict(model.named_modules())
    monkeypatch.setattr(PLACE, failing(2, "down_proj"))
    with pytest.raises(MemoryError) as caught:
        run_prune(model, compress=compress, undo=True)
    assert_same_state(model, before)
    assert dict(model.named_modules()) == modules, "the modules themselves are back"
    if hasattr(caught.value, "__notes__"):
        assert "as it was before the call" in caught.value.__notes__[-1]
    monkeypatch.undo()
    run_prune(model, compress=compress)
    run_prune(before, compress=compress)
    assert_same_state(model, before)


def test_without_undo_finished_blocks_stay_and_the_failed_one_is_whole(monkeypatch):
    model, before = build(layers=3), build(layers=3)
    monkeypatch.setattr(PLACE, failing(1, "down_proj"))
    with pytest.raises(MemoryError) as caught:
        run_prune(model, undo=False)
    assert isinstance(model.model.layers[0].mlp.down_proj, SparseLinear)
    for i in (1, 2):
        assert_same_state(model.model.layers[i], before.model.layers[i])
    if hasattr(caught.value, "__notes__"):
        assert "up to and with stage block-00000" in caught.value.__notes__[-1]


def test_with_resume_the_next_call_continues(monkeypatch, tmp_path):
    model, straight = build(layers=3), build(layers=3)
    monkeypatch.setattr(PLACE, failing(1, "o_proj"))
    with pytest.raises(MemoryError):
        run_prune(model, resume=tmp_path)
    monkeypatch.undo()
    again = build(layers=3)
    assert run_prune(again, resume=tmp_path).resumed == 1
    run_prune(straight)
    assert_same_state(again, straight)


def test_t5_is_calibrated_as_a_whole_and_that_is_said():
    """Its blocks hand a position bias on: they cannot be walked one by one."""
    config = transformers.T5Config(
        d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8, vocab_size=64
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    ids = tokens(4, 10)
    data = [{"input_ids": ids, "decoder_input_ids": ids}]
    plain = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="no chain that can be walked; .* in one pass"):
        report = run_prune(model, "sparsegpt", data)
    assert report.share > 0.8 and model(**data[0]).logits.isfinite().all()
    with pytest.warns(UserWarning, match="in one pass"):
        run_prune(plain, "sparsegpt", ids)
    assert_same_state(model, plain)


def test_compress_model():
    model, masked = build("qwen2"), build("qwen2")
    run_prune(model, "wanda")
    run_prune(masked, "wanda", compress=False)
    ids = tokens(2)
    expected = masked(ids).logits
    report = sk.compress_model(masked)
    assert_same_state(masked, model)
    torch.testing.assert_close(masked(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert len(report.pruned) == 14 and report["lm_head"].reason == "not 2:4 (4 of 4 kept)"
    with pytest.warns(UserWarning, match="0.0% of the linear weights .*not 2:4"):
        assert sk.compress_model(build()).partial

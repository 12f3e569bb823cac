"""Saving models that are not, or no longer, what their config builds: wrapped, shared, changed."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn

from python_tests.checkpoint import checkpoint_cases as cases
from sparsekern.checkpoint import from_pretrained, load_into, save_pretrained, verify_checkpoint
from sparsekern.nn.sparse_linear import SparseLinear

transformers = pytest.importorskip("transformers")
TOKENS = torch.arange(24).view(2, 12)


def logits(model):
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def compiled(module):
    return torch.compile(module, backend="eager")


def all_of_it(model):
    return compiled(model)


def a_block_and_the_head(model):
    model.model.layers[0] = compiled(model.model.layers[0])
    model.lm_head = compiled(model.lm_head)
    return model


def one_layer(model):
    model.model.layers[1].mlp.up_proj = compiled(model.model.layers[1].mlp.up_proj)
    return model


def twice(model):
    return nn.DataParallel(compiled(model))


def averaged(model):
    return torch.optim.swa_utils.AveragedModel(model)


@pytest.mark.parametrize("wrap", [all_of_it, a_block_and_the_head, one_layer, twice, averaged])
def test_wrappers_leave_no_trace_in_the_files(wrap, tmp_path):
    model = cases.sparsify(cases.llama())
    plain = copy.deepcopy(model)
    save_pretrained(plain, tmp_path / "plain")
    wrapped = wrap(model)
    names = [name for name, _ in wrapped.named_modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        save_pretrained(wrapped, tmp_path / "wrapped")
    for name in ("model.safetensors", "config.json"):
        first, second = (tmp_path / place / name for place in ("plain", "wrapped"))
        assert first.read_bytes() == second.read_bytes()
    assert [name for name, _ in wrapped.named_modules()] == names  # the model is as it was
    assert torch.equal(logits(from_pretrained(tmp_path / "wrapped")), logits(plain))


def test_transformers_save_of_a_model_with_compiled_blocks(tmp_path):
    model = a_block_and_the_head(cases.sparsify(cases.llama()))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_a_compiled_module_is_filled(tmp_path):
    torch.manual_seed(0)
    model = cases.sparsify(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)))
    save_pretrained(model, tmp_path)
    other = compiled(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)))
    x = torch.randn(2, 8)
    other(x)  # compiled for the dense layers
    assert load_into(other, tmp_path) is other
    assert isinstance(other._orig_mod[0], SparseLinear) and torch.equal(other(x), model(x))


def test_blocks_that_are_one_module_are_stored_under_every_name(tmp_path):
    model = cases.llama()
    model.model.layers[1] = model.model.layers[0]
    save_pretrained(cases.sparsify(model), tmp_path)
    for loaded in (
        from_pretrained(tmp_path),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert torch.equal(logits(loaded), logits(model))
    assert verify_checkpoint(tmp_path).ok


def fewer_blocks(model):
    model.model.layers = model.model.layers[:1]


def another_head(model):
    model.lm_head = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 64))


def a_wider_head(model):
    model.lm_head = nn.Linear(32, 72, bias=False)


def weight_norm(model):
    nn.utils.parametrizations.weight_norm(model.lm_head)


@pytest.mark.parametrize(
    "change, text",
    [
        (fewer_blocks, "lacks model.layers.1.self_attn.q_proj.weight, .* and 5 more"),
        (another_head, "lacks lm_head.weight; it has besides lm_head.0.weight"),
        (a_wider_head, "in other shapes lm_head.weight"),
        (weight_norm, "besides lm_head.parametrizations.weight.original0"),
    ],
)
def test_a_model_that_its_config_does_not_build_is_said(change, text, tmp_path):
    model = cases.sparsify(cases.llama(tied=False))
    change(model)
    with pytest.warns(UserWarning, match=f"not the one that its config builds: it .*{text}"):
        save_pretrained(model, tmp_path)
    other = cases.llama(tied=False)
    change(other)
    load_into(other, tmp_path)
    assert torch.equal(logits(other), logits(model))


class Scales(nn.Module):
    """A module with a state that is no tensor."""

    def get_extra_state(self):
        return {"amax": [1.0]}

    def set_extra_state(self, state):
        pass


def test_what_a_model_has_besides_its_config_is_said_to_be_left_out(tmp_path):
    model = cases.sparsify(cases.llama())
    model.model.extra = nn.Parameter(torch.ones(3))
    model.model.scales = Scales()
    with pytest.warns(UserWarning) as said:
        model.save_pretrained(tmp_path, state_dict=model.state_dict())
    texts = [str(warning.message) for warning in said]
    assert any("has besides model.extra. from_pretrained leaves that out" in t for t in texts)
    assert any("not what get_extra_state returns: of model.scales" in t for t in texts)
    with pytest.warns(UserWarning, match="left out: model.extra"):
        loaded = from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_a_class_of_ones_own_with_a_config_is_said(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = cases.llama().config
            self.body = nn.Linear(8, 8)

    model = cases.sparsify(Own())
    with pytest.warns(UserWarning, match="Own of its own with the config of 'llama'"):
        save_pretrained(model, tmp_path)
    other = load_into(Own(), tmp_path)
    assert torch.equal(other.body.weight.to_dense(), model.body.weight.to_dense())


def test_blocks_taken_out_of_model_and_config(tmp_path):
    model = cases.sparsify(cases.llama())
    fewer_blocks(model)
    model.config.num_hidden_layers = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        save_pretrained(model, tmp_path)
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(model))


# ---- what lies beside the weights ----------------------------------------------------------------


def test_a_published_generation_config_is_kept(tmp_path):
    """Transformers refuses to save one that it finds contradictory, unless it was loaded so."""
    cases.llama().save_pretrained(tmp_path / "dense")
    given = {"temperature": 0.6, "do_sample": False, "eos_token_id": 2, "chat_format": "chatml"}
    (tmp_path / "dense" / "generation_config.json").write_text(json.dumps(given))
    model = from_pretrained(tmp_path / "dense")
    save_pretrained(cases.sparsify(model), tmp_path / "pruned")
    save_pretrained(from_pretrained(tmp_path / "pruned"), tmp_path / "again")
    kept = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert {key: kept[key] for key in given} == given


def test_what_others_write_fails_before_the_weights_are_made(tmp_path, monkeypatch):
    from sparsekern.checkpoint import save

    model = cases.sparsify(cases.llama())
    model.generation_config.update(temperature=0.3, do_sample=False)
    monkeypatch.setattr(save, "write_shards", lambda *args: pytest.fail("written"))
    with pytest.raises(ValueError, match="temperature"):
        save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())

"""peft on a model with 2:4 layers: what it would do in silence is refused, and what a PeftModel
trains is left as it is."""

import subprocess
import sys

import pytest
import torch

import sparsekern as sk
from python_tests.oneshot.driver_models import build, tokens

peft = pytest.importorskip("peft", reason="needs peft, which is no dependency")
from sparsekern.integrations.peft import accept  # noqa: E402

IDS = tokens(4, 12)


def pruned():
    model = build()
    sk.prune_model(model, "magnitude", progress=False)
    return model


def config(**options):
    return peft.LoraConfig(r=4, **{"target_modules": ["q_proj"], **options})


def train(model):
    """The names of the parameters that one step has changed."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    return [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("wanted, got", [("o_proj", "a SparseLinear"), ("mlp", "a LlamaMLP with ")])
@pytest.mark.parametrize("accepted", [True, False])
def test_modules_to_save_that_would_not_train(wanted, got, accepted):
    options = config(modules_to_save=[wanted])
    options = (
        accept(options)
        if accepted
        else config(target_modules=["lm_head"], modules_to_save=[wanted])
    )
    text = f"^sparsekern.integrations.peft: expected modules_to_save without .*, got {got}.* accept"
    with pytest.raises(ValueError, match=text):
        peft.get_peft_model(pruned(), options)


@pytest.mark.parametrize(
    "other",
    [
        lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9),
        lambda: peft.LoHaConfig(target_modules=["q_proj"]),
        lambda: peft.LoKrConfig(target_modules=["q_proj"]),
    ],
)
def test_adapters_of_other_kinds_name_the_remedy(other):
    text = "expected a config that knows SparseLinear.*Take LoRA, or sparsekern.decompress_model"
    with pytest.raises(ValueError, match=text):
        peft.get_peft_model(pruned(), other())
    dense = sk.decompress_model(pruned())
    assert train(peft.get_peft_model(dense, other()))


def test_modules_to_save_that_are_dense_train_and_come_back(tmp_path):
    model = peft.get_peft_model(pruned(), accept(config(modules_to_save=["lm_head"])))
    changed = train(model)
    assert any("lm_head.modules_to_save" in name for name in changed)
    model.save_pretrained(tmp_path)
    again = accept(peft.LoraConfig.from_pretrained(tmp_path))
    loaded = peft.PeftModel.from_pretrained(pruned(), tmp_path, config=again)
    assert torch.equal(logits(loaded), logits(model))


def test_after_the_layer_is_made_dense_it_trains():
    model = pruned()
    for block in model.model.layers:
        block.self_attn.o_proj = block.self_attn.o_proj.to_linear()
    model = peft.get_peft_model(model, accept(config(modules_to_save=["o_proj"])))
    assert sum("o_proj.modules_to_save" in name for name in train(model)) == 2


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_pruning_a_peft_model_leaves_what_is_trained(method, tmp_path):
    names = ["o_proj", "lm_head"]
    model = peft.get_peft_model(build(), config(modules_to_save=names))
    report = sk.prune_model(model, method, IDS, progress=False)
    rows = [row for row in report.layers if "modules_to_save" in row.name]
    rows += [row for row in report.layers if "original_module" in row.name]
    assert len(rows) == 6 and all(row.skipped for row in rows)
    reasons = {row.reason for row in rows}
    assert "skip rule 'lm_head'" in reasons and any(r.startswith("adapter of ") for r in reasons)
    assert sum("modules_to_save" in name for name in train(model)) == 3
    model.save_pretrained(tmp_path)
    base = model.unload()
    again = accept(peft.LoraConfig.from_pretrained(tmp_path))
    loaded = peft.PeftModel.from_pretrained(base, tmp_path, config=again)
    assert sum("modules_to_save" in name for name, _ in loaded.named_parameters()) == 3


def test_target_modules_without_accept():
    text = (
        "^sparsekern.integrations.peft: expected a config that knows SparseLinear, .* Call accept"
    )
    with pytest.raises(ValueError, match=text):
        peft.get_peft_model(pruned(), config())
    with pytest.raises(ValueError, match="^Target module .*Embedding|not supported"):
        peft.get_peft_model(build(), config(target_modules=["input_layernorm"]))


def test_peft_may_come_later_and_is_not_imported():
    code = """
import sys, sparsekern
assert "peft" not in sys.modules
from peft.utils.other import ModulesToSaveWrapper
ModulesToSaveWrapper(sparsekern.SparseLinear(8, 8), "default")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "expected modules_to_save without compressed layers" in done.stderr

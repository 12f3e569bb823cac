"""peft on a model with 2:4 layers: what it would do in silence is refused, and what a PeftModel
trains is left as it is."""

import dataclasses
import shutil
import subprocess
import sys

import pytest
import torch

import sparsekern as sk
from python_tests.oneshot.driver_models import build, tokens

peft = pytest.importorskip("peft", reason="needs peft, which is no dependency")
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # noqa: E402

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


# Kinds of peft that put nothing around a linear layer: prompts, and what is around blocks.
NO_LAYERS = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT"}
NO_LAYERS |= {"CARTRIDGE", "SHADOW"}
KINDS = {str(k.value): kind for k, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
SIZES = {"block_size": 16, "n_frequency": 50, "group_size": 8, "vector_length": 16, "total_step": 9}
SMALL_RANK = {"MISS", "SHIRA", "PSOFT"}


def other(kind, **given):
    """A config of another method that fits the tiny model."""
    given = {"feedforward_modules": [], "task_type": "CAUSAL_LM", **SIZES, **given}
    given |= {"r": 4} if kind in SMALL_RANK else {}
    known = {field.name for field in dataclasses.fields(KINDS[kind])}
    return KINDS[kind](**{name: value for name, value in given.items() if name in known})


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - NO_LAYERS))
@pytest.mark.parametrize("wanted", [["q_proj", "lm_head"], r".*v_proj", "all-linear"])
def test_adapters_of_every_kind_name_the_remedy_before_they_change_the_model(kind, wanted):
    if kind in ("XLORA", "ADAMSS"):  # of adapters on disk; without scikit-learn
        pytest.skip("needs more than a config")
    special = {"adapter_len": 2, "adapter_layers": 1, "target_modules": "self_attn"}
    config = other(kind, **special if kind == "ADAPTION_PROMPT" else {"target_modules": wanted})
    model = pruned()
    names = [name for name, _ in model.named_modules()]
    text = f"expected a config that knows SparseLinear, .*, got {type(config).__name__} for model"
    text += ".layers.0.self_attn.*" + (
        "Call accept.config, model=model. first"
        if kind == "LORA"
        else "Take LoRA, or sparsekern.de"
    )
    with pytest.raises(ValueError, match=text):
        peft.get_peft_model(model, config)
    assert [name for name, _ in model.named_modules()] == names
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("kind", ["IA3", "ADALORA", "LOHA", "LOKR", "VERA", "LN_TUNING"])
def test_adapters_of_other_kinds_on_dense_layers(kind):
    dense = sk.decompress_model(pruned())
    assert train(peft.get_peft_model(dense, other(kind, target_modules=["q_proj"])))
    partly = build()
    sk.prune_model(partly, "magnitude", skip=("*q_proj", "lm_head"), progress=False)
    model = peft.get_peft_model(partly, other(kind, target_modules=["q_proj"]))
    assert train(model) and any(isinstance(m, sk.SparseLinear) for m in model.modules())


def test_a_further_adapter_and_those_from_disk(tmp_path):
    again = "expected a config that knows SparseLinear, .*, got LoraConfig for .*v_proj"
    model = peft.get_peft_model(pruned(), accept(config()))
    model.add_adapter("same", config())  # on layers that have one
    with pytest.raises(ValueError, match=f"{again}.* Call accept"):
        model.add_adapter("other", config(target_modules=["q_proj", "v_proj"]))
    peft.get_peft_model(build(), config(target_modules=["v_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{again}.* Call accept"):
        peft.PeftModel.from_pretrained(pruned(), tmp_path)
    # Beside the model's own files, where Transformers looks for them, too: as the message says.
    base = pruned()
    sk.save_pretrained(base, tmp_path / "both")
    for path in tmp_path.glob("adapter_*"):
        shutil.copy(path, tmp_path / "both")
    with pytest.raises(ValueError, match=f"{again}.* saved adapters: .*config=accept"):
        type(base).from_pretrained(tmp_path / "both")
    accepted = accept(peft.PeftConfig.from_pretrained(tmp_path / "both"))
    base = sk.from_pretrained(tmp_path / "both")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "both", config=accepted)
    assert type(model.get_base_model().model.layers[0].self_attn.v_proj).__name__ == "SparseLora"
    base = pruned()
    base.config.use_cache = False
    mixed = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters={"a": str(tmp_path)})
    with pytest.raises(ValueError, match=f"{again}.* Take LoRA, or"):
        peft.get_peft_model(base, mixed)


def test_mistakes_in_a_config_are_said_by_peft():
    for wrong in (config(target_modules=["qproj"]), accept(config(target_modules=["qproj"]))):
        with pytest.raises(ValueError, match="qproj.* not found in the base model"):
            peft.get_peft_model(pruned(), wrong)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - NO_LAYERS - {"LORA", "LN_TUNING"}))
def test_a_model_with_adapters_of_every_kind_is_pruned_and_runs(kind):
    """The layers that an adapter reads stay dense; those around which it does, do not."""
    if kind in ("ADAPTION_PROMPT", "XLORA", "ADAMSS", "POLY", "TRAINABLE_TOKENS"):
        pytest.skip("needs more than a config, or has no base layer")
    model = peft.get_peft_model(build(), other(kind, target_modules=["q_proj", "v_proj"])).eval()
    before = sum(parameter.requires_grad for parameter in model.parameters())
    report = sk.prune_model(model, "magnitude", progress=False)
    assert sum(parameter.requires_grad for parameter in model.parameters()) == before
    bases = {row.name: row for row in report.layers if row.name.endswith("base_layer")}
    assert len(bases) == 4 and len(report.pruned) == 14 - sum(r.skipped for r in bases.values())
    reads = kind in ("FROD", "GLORA", "HIRA", "HRA", "PEANUT", "SHIRA", "SUPERTUNING")
    for row in bases.values():
        assert row.skipped == reads and (not reads or "reads the weight itself" in row.reason)
    after = logits(model)
    if reads or kind in ("LILY", "BEFT"):  # these two never merge
        return
    with pytest.raises(ValueError, match="adapters of LoRA, to merge .*decompress_model"):
        model.merge_and_unload()
    sk.decompress_model(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), after, atol=1e-4, rtol=1e-4)


def test_a_merge_after_the_layers_were_made_dense():
    for masked in (False, True):
        model = peft.get_peft_model(pruned(), accept(config(), masked_product=masked)).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter.data)
        before = logits(model)
        sk.decompress_model(model)
        torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)
        if masked:  # whose adapter is no B·A
            with pytest.raises(ValueError, match="made dense. Merge before sparsekern.decomp"):
                model.merge_and_unload()
        else:
            merged = model.merge_and_unload()
            torch.testing.assert_close(logits(merged), before, atol=1e-4, rtol=1e-4)
    model = peft.get_peft_model(pruned(), accept(config(), masked_product=True))
    model.merge_adapter()
    sk.decompress_model(model)
    with pytest.raises(ValueError, match="made dense after the merge. Keep it merged"):
        model.unmerge_adapter()


def test_what_makes_prompts_is_no_layer_to_prune():
    model = peft.get_peft_model(build(), other("P_TUNING", num_virtual_tokens=3))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    report = sk.prune_model(model, "magnitude", progress=False)
    assert len(report.pruned) == 14 and report["prompt_encoder.default.mlp_head.0"].skipped
    assert sorted(train(model)) == sorted(trained) != []


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

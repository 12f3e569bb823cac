"""Transformers' own from_pretrained and save_pretrained on pruned models, with and without us."""

import copy
import functools
import io
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch

import sparsekern as sk
from python_tests.checkpoint import checkpoint_cases as cases
from sparsekern.checkpoint import from_pretrained, save_pretrained
from sparsekern.errors import FormatError
from sparsekern.nn.sparse_linear import SparseLinear

transformers = pytest.importorskip("transformers")
TOKENS = torch.arange(24).view(2, 12)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [cases.llama, cases.gpt2, cases.opt, cases.gemma2])
def test_a_plain_load_gives_the_sparse_model(tmp_path, build, dtype):
    model = cases.sparsify(build(dtype))
    save_pretrained(model, tmp_path / "first", max_shard_size="9kB")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert {name: type(module) for name, module in loaded.named_modules()} == kinds
    assert torch.equal(logits(loaded), logits(model)) and not loaded.training
    loaded.save_pretrained(tmp_path / "again", max_shard_size="9kB")
    assert files(tmp_path / "again") == files(tmp_path / "first")


def test_a_plain_load_of_another_class_and_dtype(tmp_path):
    model = cases.sparsify(cases.llama())
    save_pretrained(model, tmp_path)
    base = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert base.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert isinstance(base.layers[1].self_attn.q_proj, SparseLinear)
    head = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert isinstance(head.score, torch.nn.Linear)
    assert isinstance(head.model.layers[0].mlp.up_proj, SparseLinear)
    with pytest.raises(FormatError, match=r"got torch.float64. Pass one of these as dtype="):
        transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float64)


def test_the_folder_says_whether_it_is_compressed_not_a_config_of_the_caller(tmp_path):
    """config=, an own one, a path or that of a loaded model; quantization_config=None."""
    model, dense = cases.sparsify(cases.llama()), cases.llama()
    save_pretrained(model, tmp_path / "pruned")
    dense.save_pretrained(tmp_path / "dense")
    auto, cls = transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM
    loaded = auto.from_pretrained(tmp_path / "pruned", quantization_config=None)
    assert torch.equal(logits(loaded), logits(model))
    own = transformers.AutoConfig.from_pretrained(tmp_path / "dense")
    for config in (own, loaded.config, os.fspath(tmp_path / "dense")):
        again = cls.from_pretrained(tmp_path / "pruned", config=config)
        assert torch.equal(logits(again), logits(model))
        again = cls.from_pretrained(tmp_path / "dense", config=config)
        assert torch.equal(logits(again), logits(dense))
        assert getattr(again.config, "quantization_config", None) is None
    assert not hasattr(own, "quantization_config")  # the caller's stays as it was


def test_a_dense_folder_is_not_pruned_by_a_config(tmp_path):
    cases.llama().save_pretrained(tmp_path)
    text = r"expected quantization_config of a folder with 2:4 .* call sparsekern.prune_model"
    with pytest.raises(ValueError, match=text):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config={"quant_method": "sparsekern"}
        )


def test_a_loaded_model_can_be_copied_and_pickled(tmp_path):
    model = cases.sparsify(cases.llama())
    save_pretrained(model, tmp_path / "a")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    buffer = io.BytesIO()
    torch.save(loaded, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(loaded), torch.load(buffer, weights_only=False)):
        assert torch.equal(logits(other), logits(model))
        other.save_pretrained(tmp_path / "b")
        assert files(tmp_path / "b") == files(tmp_path / "a")


@pytest.mark.parametrize("part", ["text", "vision"])
def test_a_class_whose_config_is_a_part_of_the_folders(tmp_path, part):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=sizes | {"vocab_size": 64, "max_position_embeddings": 16},
        vision_config=sizes | {"image_size": 8, "patch_size": 4},
    )
    model = cases.sparsify(transformers.CLIPModel(config).eval())
    model.save_pretrained(tmp_path)
    kind = {"text": transformers.CLIPTextModel, "vision": transformers.CLIPVisionModel}[part]
    with pytest.warns(UserWarning, match="have no place"):  # those of the other part
        loaded = kind.from_pretrained(tmp_path)
    assert any(isinstance(module, SparseLinear) for module in loaded.modules())
    x = TOKENS if part == "text" else torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        wanted, got = (m(x).last_hidden_state for m in (getattr(model, f"{part}_model"), loaded))
    assert torch.equal(got, wanted)


def test_compressed_layers_that_a_class_lacks_are_said(tmp_path):
    model = cases.sparsify(cases.llama(tied=False), keep=("no layer",))
    save_pretrained(model, tmp_path)
    with pytest.warns(UserWarning, match="1 compressed layers .* in LlamaModel .*out: lm_head"):
        base = transformers.AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        states = base(TOKENS).last_hidden_state
        assert torch.equal(states, model.model(TOKENS).last_hidden_state)
    with pytest.warns(UserWarning, match="7 compressed layers .*out: model.layers.1.mlp.down_proj"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=1)


def test_compressed_layers_without_any_place_are_an_error(tmp_path):
    """They would be random weights and a line in a log."""
    from safetensors.torch import load_file, save_file

    model = cases.sparsify(cases.llama())
    save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {f"net.{name}": tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    mapping = {r"^net\.": ""}
    auto = transformers.AutoModelForCausalLM
    with pytest.raises(
        FormatError, match=r"names of LlamaForCausalLM, got net\.model.*and 10 more"
    ):
        auto.from_pretrained(tmp_path, key_mapping=mapping)
    assert torch.equal(logits(from_pretrained(tmp_path, key_mapping=mapping)), logits(model))


def test_generate_gives_the_same_tokens(tmp_path):
    model = cases.sparsify(cases.llama())
    save_pretrained(model, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    words = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(loaded.generate(TOKENS, **words), model.generate(TOKENS, **words))


@pytest.mark.parametrize("kind", [None, "fp8", "int4"])
def test_save_pretrained_of_a_pruned_model_is_ours(tmp_path, kind):
    model = cases.sparsify(cases.llama())
    for module in model.modules():
        if kind and isinstance(module, SparseLinear):
            module.weight = sk.quantize(module.weight, kind)
    save_pretrained(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    copies = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "state", state_dict=copies)
    assert files(tmp_path / "theirs") == files(tmp_path / "ours") == files(tmp_path / "state")
    model.save_pretrained(tmp_path / "worker", is_main_process=False)
    assert not (tmp_path / "worker").exists()
    values = "model.layers.0.mlp.up_proj.compressed"
    norm, kept = "model.norm.weight", copies["model.norm.weight"]
    changes = ((values, -copies[values].float()), (norm, 2 * kept), (norm, kept.numpy()))
    changes += ((norm, kept.to_sparse()), (norm, kept.to("meta")), ("more", kept))
    for name, other in changes:
        with pytest.raises(ValueError, match=f"own state_dict, got one that differs in {name}"):
            model.save_pretrained(tmp_path / "refused", state_dict={**copies, name: other})
    for words in ({"push_to_hub": True}, {"variant": "x"}):
        with pytest.raises(ValueError, match="sparsekern.save_pretrained"):
            model.save_pretrained(tmp_path / "refused", **words)
    assert not (tmp_path / "refused").exists()


def test_save_pretrained_of_other_models_is_untouched(tmp_path):
    model = cases.llama()
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "SHA256SUMS").exists()
    assert "sparsekern" not in (tmp_path / "config.json").read_text()
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))


def test_a_trainer_checkpoint_is_a_pruned_folder(tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs the package accelerate")
    model = cases.sparsify(cases.llama())
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, save_steps=1, report_to=[], use_cpu=True
    )
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    assert torch.equal(logits(from_pretrained(tmp_path / "checkpoint-1")), logits(model.eval()))


ORDERS = {
    "ours first": "import sparsekern, transformers",
    "theirs first": "from transformers import LlamaForCausalLM; import transformers, sparsekern",
    "only ours": "import sparsekern; from transformers import AutoModelForCausalLM; "
    "import transformers",
}
LOAD = """
import sys, torch
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    print(torch.equal(model(torch.arange(24).view(2, 12)).logits, torch.load(sys.argv[2])))
"""


def run(code, *arguments, path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=900, cwd=path[0]
    )


@pytest.mark.parametrize("order", ORDERS)
def test_in_a_new_process_in_any_order_of_imports(tmp_path, order):
    model = cases.sparsify(cases.llama())
    save_pretrained(model, tmp_path / "folder")
    torch.save(logits(model), tmp_path / "logits.pt")
    done = run(
        ORDERS[order] + LOAD,
        tmp_path / "folder",
        tmp_path / "logits.pt",
        path=[p for p in sys.path if p],
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"]


def test_importing_sparsekern_does_not_import_transformers():
    code = "import sys, sparsekern; print('transformers' in sys.modules)"
    done = run(code, path=[p for p in sys.path if p])
    assert done.stdout.split() == ["False"], done.stderr


def test_without_the_package_a_plain_load_fails_and_names_it(tmp_path):
    """Transformers alone, without sparsekern on its path."""
    save_pretrained(cases.sparsify(cases.llama()), tmp_path / "folder")
    (tmp_path / "empty").mkdir()
    code = "import transformers\n" + LOAD
    code = "import sys; sys.modules['sparsekern'] = None\n" + code  # as if not installed
    done = run(code, tmp_path / "folder", tmp_path / "logits.pt", path=[str(tmp_path / "empty")])
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "pip install sparsekern" in last and "import sparsekern" in last


def test_folders_of_older_releases_are_read(tmp_path):
    """quant_method compressed-tensors, or compression_config; no SHA256SUMS."""
    model = cases.sparsify(cases.llama())
    save_pretrained(model, tmp_path)
    (tmp_path / "SHA256SUMS").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "compressed-tensors"
    del config["transformers_weights"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(model))
    auto, cls = transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM
    for load in (auto.from_pretrained, cls.from_pretrained):
        loaded = load(tmp_path, dtype=torch.float32, attn_implementation="eager", use_cache=False)
        assert torch.allclose(logits(loaded), logits(model), atol=1e-6)
        assert isinstance(loaded.model.layers[0].mlp.up_proj, SparseLinear)
        assert loaded.config._attn_implementation == "eager" and not loaded.config.use_cache
    config["compression_config"] = config.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (auto.from_pretrained, cls.from_pretrained):
        loaded = load(tmp_path, dtype=torch.float16)
        assert loaded.model.layers[0].mlp.up_proj.weight.dtype == torch.float16
        assert torch.allclose(logits(loaded).float(), logits(model), atol=1e-2)


def test_a_dense_model_saved_over_a_pruned_one_is_no_damage(tmp_path):
    model = cases.sparsify(cases.llama())
    save_pretrained(model, tmp_path)
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    sk.decompress_model(dense).save_pretrained(tmp_path, is_main_process=False)
    assert (tmp_path / "SHA256SUMS").is_file()
    dense.save_pretrained(tmp_path)
    assert sk.checkpoint.verify_checkpoint(tmp_path).ok
    assert torch.equal(logits(from_pretrained(tmp_path, verify=True)), logits(model))


def test_a_variant_is_read_whole(tmp_path):
    """Compressed layers, too, are those of the variant, beside other weights or not, in shards or
    not; Transformers alone knows the argument."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    first, second = (cases.sparsify(cases.llama(tied=tied)) for tied in (True, False))
    for size in ("9kB", "1GB"):
        for beside in (None, first, cases.llama()):
            home, other = (tmp_path / f"{size}{type(beside)}{n}" for n in ("", "variant"))
            save_pretrained(second, other, max_shard_size=size)
            if beside is not None:
                beside.save_pretrained(home)
            home.mkdir(exist_ok=True)
            for path in other.iterdir():
                start, *rest = path.name.split(".", 1)
                if path.suffix == ".safetensors":
                    path.rename(home / (f"{start}.x.{rest[0]}" if size == "1GB" else path.name))
                elif rest[-1:] == ["safetensors.index.json"]:
                    path.rename(home / "model.safetensors.index.x.json")
                elif path.name != "SHA256SUMS":
                    path.replace(home / path.name)
            loaded = load(home, variant="x")
            assert torch.equal(logits(loaded), logits(second))
            assert isinstance(loaded.model.layers[0].mlp.up_proj, SparseLinear)


def test_a_tie_of_the_callers_leaves_a_compressed_head_alone(tmp_path):
    model = cases.llama(tied=False)
    sk.prune_model(model, "magnitude", skip=(), progress=False)
    save_pretrained(model, tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    with pytest.warns(UserWarning, match="ties lm_head to other weights.*loaded untied"):
        loaded = load(tmp_path, tie_word_embeddings=True)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.tie_word_embeddings is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path)


def test_a_state_dict_with_compressed_layers_is_refused(tmp_path):
    model = cases.sparsify(cases.llama())
    with pytest.raises(FormatError, match=r"got a state_dict. Use load_state_dict"):
        type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())
    dense = cases.llama()
    made = type(dense).from_pretrained(None, config=dense.config, state_dict=dense.state_dict())
    assert torch.equal(logits(made), logits(dense))


def test_code_that_came_with_a_model_is_saved_with_it(tmp_path):
    config = cases.llama().config.to_dict() | {
        "model_type": "own_llama",
        "architectures": ["OwnLM"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnLM"},
    }
    model = cases.sparsify(cases.llama())
    save_pretrained(model, tmp_path / "first")
    (tmp_path / "first" / "SHA256SUMS").unlink()
    path = tmp_path / "first" / "config.json"
    entry = json.loads(path.read_text())["quantization_config"]
    path.write_text(json.dumps(config | {"quantization_config": entry}))
    (tmp_path / "first" / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
        "class OwnLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    load = functools.partial(
        transformers.AutoModelForCausalLM.from_pretrained, trust_remote_code=True
    )
    loaded = load(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert type(again).__name__ == "OwnLM" and torch.equal(logits(again), logits(model))
    assert "own.py" in (tmp_path / "again" / "SHA256SUMS").read_text()

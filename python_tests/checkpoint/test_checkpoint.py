"""Models survive a folder: same logits bit for bit, streamed, atomic, known to Transformers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

from python_tests.checkpoint import checkpoint_cases as cases
from sparsekern.checkpoint import (
    export_dense,
    from_pretrained,
    load_into,
    save_pretrained,
    verify_checkpoint,
)
from sparsekern.errors import FormatError
from sparsekern.nn.sparse_linear import SparseLinear

TOKENS = torch.arange(24).view(2, 12)
MODELS = [cases.llama, cases.gpt2, cases.opt, cases.gemma2]


def logits(model):
    with torch.no_grad():
        return model(TOKENS.to(next(model.parameters()).device)).logits


def stored(folder):
    """{name: (tensor, file)} of all tensors in a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as handle:
            names = list(handle.keys())
            found.update({name: (handle.get_tensor(name), path.name) for name in names})
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("build", MODELS)
def test_same_logits_after_save_and_load(tmp_path, build, dtype):
    model = cases.sparsify(build(dtype))
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not loaded.training
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert {name: type(module) for name, module in loaded.named_modules()} == kinds
    assert any(kind is SparseLinear for kind in kinds.values())
    assert verify_checkpoint(tmp_path).ok


# Prints whether the logits agree, and by how many KiB loading and then building a dense model raise
# the peak of resident memory (VmHWM, which unlike ru_maxrss does not count the parent process).
MEASURE_LOADING = """
import sys, torch, transformers
from sparsekern.checkpoint import from_pretrained
def kib(field):
    return int(open("/proc/self/status").read().split(field + ":")[1].split()[0])
folder = sys.argv[1]
from_pretrained(folder + "/small")
before = kib("VmRSS")
model = from_pretrained(folder + "/large")
sparse = kib("VmHWM") - before
with torch.no_grad():
    logits = model(torch.arange(24).view(2, 12)).logits
same = torch.equal(logits, torch.load(folder + "/logits.pt"))
before = kib("VmRSS")
dense = transformers.LlamaForCausalLM(model.config)
print(same, sparse, kib("VmHWM") - before)
"""


def test_same_logits_in_a_new_process_and_less_memory_than_dense(tmp_path):
    """The peak of loading stays below 0.82 of the dense weights; building them dense exceeds it."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs /proc to measure resident memory")
    model = cases.sparsify(cases.llama(hidden=1024, intermediate=2816, tied=False))
    save_pretrained(model, tmp_path / "large")
    save_pretrained(cases.sparsify(cases.llama()), tmp_path / "small")
    torch.save(logits(model), tmp_path / "logits.pt")
    command = [sys.executable, "-c", MEASURE_LOADING, str(tmp_path)]
    # One heap that gives back at once what is freed: its peak is then what the process holds.
    heap = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    heap |= {"MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **heap, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    same, sparse, dense = run.stdout.split()
    layers = [m for m in model.modules() if isinstance(m, SparseLinear)]
    bound = 0.82 * sum(2 * m.values.nbytes for m in layers) / 1024
    assert same == "True"
    assert int(sparse) < bound < int(dense), f"KiB: {sparse} sparse, {dense} dense, limit {bound}"


class _Shapes(TorchDispatchMode):
    """Records the shape of every floating-point tensor that any op makes outside meta."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                if tensor.is_floating_point():
                    self.seen.add(tuple(tensor.shape))
        return out


def test_no_dense_weight_is_ever_allocated(tmp_path):
    model = cases.sparsify(cases.llama())
    save_pretrained(model, tmp_path)
    shapes = {
        (m.out_features, m.in_features) for m in model.modules() if isinstance(m, SparseLinear)
    }
    with _Shapes() as loading:
        loaded = from_pretrained(tmp_path)
    assert not shapes & loading.seen
    with _Shapes() as control:
        next(m for m in loaded.modules() if isinstance(m, SparseLinear)).weight.to_dense()
    assert shapes & control.seen


@pytest.mark.gpu
def test_load_straight_to_the_gpu(tmp_path):
    model = cases.sparsify(cases.llama(torch.bfloat16))
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path, device="cuda")
    tensors = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    assert {tensor.device.type for tensor in tensors.values()} == {"cuda"}
    save_pretrained(loaded, tmp_path / "again")
    first, second = stored(tmp_path), stored(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name][0], second[name][0]) for name in first)
    reference = model.to("cuda")
    assert torch.equal(logits(loaded), logits(reference))


def test_dtype_casts_weights_but_not_rotary_buffers(tmp_path):
    save_pretrained(cases.sparsify(cases.llama()), tmp_path)
    loaded = from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    save_pretrained(cases.sparsify(cases.llama()), tmp_path)
    assert "model.embed_tokens.weight" in stored(tmp_path)
    assert "lm_head.weight" not in stored(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_compressed_head_of_a_tied_model_is_untied(tmp_path):
    model = cases.sparsify(cases.llama(), keep=())
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert isinstance(loaded.lm_head, SparseLinear)
    assert not json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    assert torch.equal(logits(loaded), logits(model))
    assert verify_checkpoint(tmp_path).ok


def test_partly_pruned_model_lists_dense_layers(tmp_path):
    model = cases.sparsify(cases.llama(), keep=("lm_head", "q_proj", "0.mlp.up_proj"))
    save_pretrained(model, tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert entry["sparsity_config"]["ignore"] == [
        "lm_head",
        "model.layers.0.mlp.up_proj",
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert entry["sparsity_config"]["targets"] == ["Linear"]
    assert entry["quant_method"] == "sparsekern"
    assert 0 < entry["sparsity_config"]["global_sparsity"] < 0.5
    loaded = from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.to_dict().get("quantization_config") is None
    assert verify_checkpoint(tmp_path).ok


def test_transformers_recognises_the_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), unk_token="[UNK]"
    )
    model = cases.sparsify(cases.llama(torch.bfloat16))
    model.generation_config.max_new_tokens = 17
    save_pretrained(model, tmp_path, tokenizer=tokenizer)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(config) is transformers.LlamaConfig
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.quantization_config["sparsity_config"]["format"] == "sparse-24-bitmask"
    assert "bfloat16" in (tmp_path / "config.json").read_text()
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert from_pretrained(tmp_path).generation_config.max_new_tokens == 17


def test_without_transformers_the_error_says_so(tmp_path, monkeypatch):
    save_pretrained(cases.sparsify(cases.llama()), tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"transformers.*pip install 'sparsekern\[hf\]'"):
        from_pretrained(tmp_path)


# ---- shards and atomic writes ------------------------------------------------------------------


def test_shards_hold_whole_layers_and_respect_the_limit(tmp_path):
    limit = 9000
    model = cases.sparsify(cases.llama())
    save_pretrained(model, tmp_path, max_shard_size=limit)
    tensors = stored(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for name, (_, file) in tensors.items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t, _ in tensors.values())
    files = set(index["weight_map"].values())
    assert len(files) > 3
    for file in files:
        assert sum(t.nbytes for t, f in tensors.values() if f == file) <= limit
    for name, (_, file) in tensors.items():
        if name.endswith(".compressed"):
            layer = name.removesuffix("compressed")
            assert tensors[layer + "bitmask"][1] == tensors[layer + "shape"][1] == file
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(model))


def test_files_have_the_permissions_of_new_files(tmp_path):
    save_pretrained(cases.sparsify(cases.llama()), tmp_path / "folder")
    (tmp_path / "new").write_text("")
    modes = {path.stat().st_mode for path in (tmp_path / "folder").iterdir()}
    assert modes == {(tmp_path / "new").stat().st_mode}


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path):
    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    old = cases.sparsify(cases.llama())
    save_pretrained(old, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(cases.sparsify(cases.llama()), tmp_path, tokenizer=Broken())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_a_folder_in_the_way_of_a_file_leaves_the_old_checkpoint(name, tmp_path):
    save_pretrained(cases.sparsify(cases.llama()), tmp_path, max_shard_size=9000)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name / "x").mkdir(parents=True)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(IsADirectoryError, match=f"a folder named {name} in .*Nothing was lost"):
        save_pretrained(cases.sparsify(cases.llama()), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


class Renames:
    """os.replace of which the one at `first`, and `others` after it, fail."""

    def __init__(self, monkeypatch, first, others=0, error=None):
        self.replace, self.count = os.replace, 0
        self.bad = range(first, first + 1 + others)
        self.error = error or PermissionError(13, "Permission denied")
        monkeypatch.setattr(os, "replace", self)

    def __call__(self, source, target):
        self.count += 1
        if self.count - 1 in self.bad:
            raise self.error
        self.replace(source, target)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def two_checkpoints(folder):
    """(the first, in the folder, the second): one in one file, one in shards."""
    torch.manual_seed(0)
    models = cases.sparsify(cases.llama()), cases.sparsify(cases.llama())
    save_pretrained(models[0], folder)
    (folder / "README.md").write_text("mine")
    return models


@pytest.mark.parametrize("error", [None, KeyboardInterrupt()])
def test_a_rename_that_fails_leaves_the_old_checkpoint(error, tmp_path, monkeypatch):
    _, new = two_checkpoints(tmp_path)
    before = contents(tmp_path)
    text = "" if error else f"Permission denied in {tmp_path}. Nothing was lost"
    for first in range(200):
        Renames(monkeypatch, first, error=error)
        try:
            save_pretrained(new, tmp_path, max_shard_size=9000)
            break
        except (OSError, KeyboardInterrupt) as caught:
            assert text in str(caught) and contents(tmp_path) == before
        finally:
            monkeypatch.undo()
    assert first > 8 and len(list(tmp_path.glob("model-*"))) > 3  # every rename has failed once
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(new))


def test_renames_that_cannot_be_taken_back_say_where_the_files_are(tmp_path, monkeypatch):
    told = set()
    for first in range(1, 12):
        for others in (1, 3, 50):
            folder = tmp_path / f"{first}-{others}"
            old, new = two_checkpoints(folder)
            Renames(monkeypatch, first, others)
            with pytest.raises(OSError, match="Nothing reads .* as a model now") as caught:
                save_pretrained(new, folder, max_shard_size=9000)
            monkeypatch.undo()
            with pytest.raises(FormatError):
                from_pretrained(folder)
            place, kind = re.search(
                r"move what (\S+) holds .*: the (\w+) model", str(caught.value)
            ).groups()
            found = [path for path in sorted(Path(place).iterdir()) if path.name[0] != "."]
            for path in sorted(found, key=lambda path: path.name == "config.json"):
                path.rename(folder / path.name)
            right = old if kind == "earlier" else new
            assert torch.equal(logits(from_pretrained(folder)), logits(right))
            told.add(kind)
    assert told == {"earlier", "new"}
    folder = tmp_path / "interrupted"
    two_checkpoints(folder)
    before = contents(folder)
    Renames(monkeypatch, 4, 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(new, folder, max_shard_size=9000)
    kept = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert all(kept[name] == content for name, content in before.items())


def test_saving_again_removes_shards_of_the_old_checkpoint_only(tmp_path):
    save_pretrained(cases.sparsify(cases.llama()), tmp_path, max_shard_size=9000)
    (tmp_path / "model_notes.safetensors").write_bytes(b"not ours")
    model = cases.sparsify(cases.llama())
    save_pretrained(model, tmp_path)
    names = sorted(path.name for path in tmp_path.glob("model*"))
    assert names == ["model.safetensors", "model_notes.safetensors"]
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(model))


def test_pruned_layers_take_9_of_16_of_the_bytes(tmp_path):
    model = cases.sparsify(cases.llama(torch.bfloat16, hidden=256, intermediate=512))
    save_pretrained(model, tmp_path)
    report = verify_checkpoint(tmp_path)
    assert len(report.layers) == 14
    dense = sum(2 * m.values.nbytes for m in model.modules() if isinstance(m, SparseLinear))
    assert report.dense_nbytes == dense
    parts = (".compressed", ".bitmask", ".shape")
    layers = [t.nbytes for name, (t, _) in stored(tmp_path).items() if name.endswith(parts)]
    assert sum(layers) == report.nbytes <= 0.5626 * dense


def test_buffers_that_no_file_holds_are_warned_about(tmp_path, recwarn):
    save_pretrained(cases.sparsify(cases.llama(torch.bfloat16)), tmp_path / "kept")
    assert not [w for w in recwarn if "rotary" in str(w.message)]
    with pytest.warns(UserWarning, match="model.rotary_emb.inv_freq"):
        save_pretrained(cases.sparsify(cases.llama()).to(torch.bfloat16), tmp_path / "cast")


# ---- plain modules -----------------------------------------------------------------------------


@pytest.mark.parametrize("on_meta", [False, True])
def test_load_into_a_plain_module(tmp_path, on_meta):
    model = cases.plain_folder(tmp_path)
    x = torch.randn(3, 12, dtype=torch.bfloat16)
    fresh = cases.Plain()
    if on_meta:
        for module in fresh.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(parameter.to("meta")))
        fresh.head.weight = fresh.table.weight
    fresh.steps.zero_()
    assert load_into(fresh, tmp_path) is fresh
    assert isinstance(fresh.first, SparseLinear) and fresh.again is fresh.first
    assert fresh.head.weight is fresh.table.weight
    assert fresh.steps.item() == 3
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))
    assert verify_checkpoint(tmp_path).ok
    with pytest.raises(FormatError, match="load_into"):
        from_pretrained(tmp_path)


def test_load_into_a_compressed_module_again(tmp_path):
    model = cases.plain_folder(tmp_path)
    target = cases.sparsify(cases.with_dtype(cases.Plain(), torch.bfloat16), keep=("head",))
    load_into(target, tmp_path)
    assert torch.equal(target.second.weight.values, model.second.weight.values)


def test_load_into_keeps_what_others_hold(tmp_path):
    """Parameters for an optimizer that was made before, also with a gradient and in another dtype,
    and of a layer that is compressed now its bias, its hooks and attributes."""
    model = cases.plain_folder(tmp_path)
    target, calls = cases.Plain(), []
    handle = target.first.register_forward_hook(lambda *_: calls.append(1))
    target.first.tag = "mine"
    optimizer = torch.optim.SGD(target.parameters(), lr=1.0)
    target(torch.ones(2, 12)).sum().backward()
    kept = {name: target.get_parameter(name) for name in ("first.bias", "table.weight")}
    load_into(target, tmp_path)
    assert target.first.tag == "mine" and target.again is target.first
    x = torch.ones(2, 12, dtype=torch.bfloat16)
    assert torch.equal(target(x), model(x)) and len(calls) == 2 + 2  # it stands in two places
    for name, parameter in kept.items():
        assert target.get_parameter(name) is parameter and parameter.grad is None
    target(x).sum().backward()
    optimizer.step()
    for name in kept:
        assert not torch.equal(target.get_parameter(name), model.get_parameter(name))
    handle.remove()
    assert not target.first._forward_hooks
    with torch.inference_mode():
        target = cases.Plain()
    load_into(target, tmp_path)
    with torch.no_grad():
        assert torch.equal(target(x), model(x))
    target = cases.Plain()
    with torch.inference_mode():
        load_into(target, tmp_path)
    target(x).sum().backward()
    assert all(parameter.grad is not None for parameter in target.parameters())


def test_parameters_that_are_views_of_one_storage(tmp_path):
    def build():
        both = torch.arange(12.0).view(2, 6)
        return torch.nn.ParameterDict({"a": both[0], "b": both[1], "all": both})

    model = build()
    save_pretrained(model, tmp_path)
    loaded = load_into(build().to("meta"), tmp_path)
    assert all(torch.equal(loaded[name], model[name]) for name in ("a", "b", "all"))


def test_buffers_of_every_type_that_safetensors_writes(tmp_path):
    names = "bool uint8 int8 int16 int32 int64 uint16 uint32 uint64 float16 bfloat16 float64"
    names += " float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu complex64"

    def build():
        model = cases.Plain()
        for position, name in enumerate(names.split()):
            value = torch.full((3,), position % 2).to(getattr(torch, name))
            model.register_buffer(f"of_{name}", value)
        return model

    model = cases.sparsify(build(), keep=("head",))
    save_pretrained(model, tmp_path)
    empty = build()
    for name in names.split():
        empty._buffers[f"of_{name}"] = empty._buffers[f"of_{name}"].to("meta")
    loaded = load_into(empty, tmp_path, dtype=torch.float32)
    for name in names.split():
        got, expected = (m.get_buffer(f"of_{name}") for m in (loaded, model))
        cast = name in ("float16", "bfloat16", "float64")
        assert got.dtype == (torch.float32 if cast else expected.dtype)
        assert got.tolist() == expected.tolist()


def test_tensors_that_are_views_of_a_conjugate(tmp_path):
    number = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    model = cases.Plain()
    for name, value in (("own", number), ("conj", number.conj()), ("neg", number.conj().imag)):
        model.register_buffer(name, value)
    save_pretrained(model, tmp_path)
    loaded = cases.Plain()
    for name in ("own", "conj", "neg"):
        loaded.register_buffer(name, torch.zeros_like(model.get_buffer(name)))
    load_into(loaded, tmp_path)
    assert loaded.own.tolist() == [1 + 2j, 3 - 4j]
    assert loaded.conj.tolist() == [1 - 2j, 3 + 4j] and loaded.neg.tolist() == [-2, 4]


@pytest.mark.parametrize(
    "name, make, text",
    [
        ("c", lambda: torch.ones(2, dtype=torch.complex128), "strided .*got torch.complex128"),
        ("c", lambda: torch.eye(2).to_sparse(), "strided .*torch.sparse_coo"),
        ("c", lambda: torch.nested.nested_tensor([torch.ones(2)]), "strided .*nested"),
        ("bitmask", lambda: torch.ones(2), "no compressed, bitmask, weight_packed"),
        ("__metadata__", lambda: torch.ones(2), "a tensor of this name. Rename it"),
    ],
)
def test_tensors_that_a_folder_cannot_hold(name, make, text, tmp_path):
    model = cases.Plain()
    model.register_buffer(name, make())
    with pytest.raises(ValueError, match=f"save_pretrained: {name}: expected .*{text}"):
        save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    del model._buffers[name]
    model.register_buffer(name, make(), persistent=False)
    save_pretrained(model, tmp_path / "out")


@pytest.mark.parametrize("build", [cases.Plain, cases.llama])
def test_saving_a_module_on_meta_is_an_error(build, tmp_path):
    with pytest.raises(ValueError, match="expected a tensor with data, got one on meta"):
        save_pretrained(build().to("meta"), tmp_path)
    assert not list(tmp_path.iterdir())


# ---- export ------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", MODELS)
def test_export_dense_is_exact_and_ordinary(tmp_path, build):
    transformers = pytest.importorskip("transformers")
    model = cases.sparsify(build(torch.bfloat16))
    save_pretrained(model, tmp_path / "sparse", max_shard_size=9000)
    (tmp_path / "sparse" / "tokenizer.json").write_text("{}")
    more = "additional_chat_templates/rag.jinja"
    (tmp_path / "sparse" / more).parent.mkdir()
    (tmp_path / "sparse" / more).write_text("{{x}}")
    export_dense(tmp_path / "sparse", tmp_path / "dense", max_shard_size=20000)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config and "sparsekern" not in config
    assert (tmp_path / "dense" / "tokenizer.json").is_file()
    assert (tmp_path / "dense" / more).read_text() == "{{x}}"
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 1
    cls = getattr(transformers, config["architectures"][0])
    dense = cls.from_pretrained(tmp_path / "dense", dtype="auto")
    weights = dict(dense.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            weight = weights[name + ".weight"]
            weight = weight.t() if build is cases.gpt2 else weight
            assert torch.equal(weight, module.weight.to_dense())
    assert torch.equal(logits(dense.eval()), logits(model))
    assert torch.equal(logits(from_pretrained(tmp_path / "dense")), logits(model))
    assert verify_checkpoint(tmp_path / "dense").ok


def test_export_dense_refuses_its_own_folder(tmp_path):
    save_pretrained(cases.sparsify(cases.llama()), tmp_path)
    with pytest.raises(ValueError, match="another folder"):
        export_dense(tmp_path, tmp_path / "x" / "..")

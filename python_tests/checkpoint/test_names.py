"""What Transformers loads, we load, with equal outputs; and our folders have its names."""

import json
import os
import re
from fnmatch import fnmatch

import pytest
import torch
from safetensors.torch import load_file, save_file

from python_tests.checkpoint import architectures, checkpoint_cases
from sparsekern.checkpoint import export_dense, from_pretrained, save_pretrained, verify_checkpoint
from sparsekern.checkpoint import names as names_module
from sparsekern.errors import FormatError
from sparsekern.nn.sparse_linear import SparseLinear

transformers = pytest.importorskip("transformers")
NAMES = list(architectures.MODELS)
# Heads that are tied, and layers whose weight their owner reads itself.
KEPT = ("lm_head", "decoder", "proj_out", "dt_proj", "router", "gate")
TOKENS = torch.arange(24).view(2, 12)


def stored(folder):
    """{name: tensor} of all tensors in a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def buffers_and_parameters(model):
    return dict([*model.named_parameters(), *model.named_buffers()])


@pytest.mark.parametrize("name", NAMES)
def test_a_dense_folder_of_transformers(tmp_path, name):
    """Same tensors and outputs as Transformers' own load, and the same names when saved."""
    model = architectures.build(transformers, name)
    model.save_pretrained(tmp_path / "dense", max_shard_size="50KB")
    reference = type(model).from_pretrained(tmp_path / "dense")
    loaded = from_pretrained(tmp_path / "dense")
    ours, theirs = buffers_and_parameters(loaded), buffers_and_parameters(reference)
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []
    assert torch.equal(architectures.output(loaded, name), architectures.output(reference, name))
    save_pretrained(loaded, tmp_path / "ours", max_shard_size="50KB")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    dense, again = stored(tmp_path / "dense"), stored(tmp_path / "ours")
    assert dense.keys() == again.keys()
    assert all(torch.equal(dense[key], again[key]) for key in dense)


@pytest.mark.parametrize("name", NAMES)
def test_a_pruned_model_and_its_dense_export(tmp_path, name):
    """Saved, loaded, verified; exported dense, it is what Transformers reads, by its names."""
    model = architectures.build(transformers, name)
    model.save_pretrained(tmp_path / "dense")
    checkpoint_cases.sparsify(model, keep=KEPT)
    save_pretrained(model, tmp_path / "sparse")
    loaded = from_pretrained(tmp_path / "sparse")
    assert any(isinstance(module, SparseLinear) for module in loaded.modules())
    expected = model.state_dict()
    assert expected.keys() == loaded.state_dict().keys()
    assert [k for k, t in loaded.state_dict().items() if not torch.equal(t, expected[k])] == []
    assert torch.equal(architectures.output(loaded, name), architectures.output(model, name))
    report = verify_checkpoint(tmp_path / "sparse")
    assert report.ok, report.table()
    export_dense(tmp_path / "sparse", tmp_path / "exported")
    assert stored(tmp_path / "exported").keys() == stored(tmp_path / "dense").keys()
    reference = type(model).from_pretrained(tmp_path / "exported")
    assert torch.equal(
        architectures.output(from_pretrained(tmp_path / "exported"), name),
        architectures.output(reference, name),
    )


@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3", "gemma2", "marian", "t5", "llava"])
def test_bfloat16_gives_the_same_outputs(tmp_path, name):
    model = architectures.build(transformers, name, torch.bfloat16)
    model.save_pretrained(tmp_path)
    reference = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    loaded = from_pretrained(tmp_path, dtype="auto")
    expected = architectures.output(reference, name, torch.bfloat16)
    assert torch.equal(architectures.output(loaded, name, torch.bfloat16), expected)
    for key, parameter in loaded.named_parameters():
        assert parameter.dtype == reference.get_parameter(key).dtype, key


def rewritten(folder, change):
    """Rename the tensors of a folder's only file."""
    path = folder / "model.safetensors"
    tensors = {change(name): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / "SHA256SUMS").unlink(missing_ok=True)


OLD = {
    "gpt2 without its prefix": ("gpt2", lambda n: n.removeprefix("transformer.")),
    "bloom without its prefix": ("bloom", lambda n: n.removeprefix("transformer.")),
    "bert with gamma and beta": (
        "bert",
        lambda n: re.sub(
            r"LayerNorm\.(weight|bias)",
            lambda m: "LayerNorm." + {"weight": "gamma", "bias": "beta"}[m[1]],
            n,
        ),
    ),
    "base model with the prefix of a head": ("vit-base", lambda n: f"vit.{n}"),
    "names as in memory": ("mixtral", lambda n: n.replace("block_sparse_moe.gate", "mlp.gate")),
}


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("kind", OLD)
def test_old_and_other_names(tmp_path, kind, pruned):
    name, change = OLD[kind]
    model = architectures.build(transformers, name)
    if pruned:
        checkpoint_cases.sparsify(model)
    save_pretrained(model, tmp_path)
    before = stored(tmp_path).keys()
    rewritten(tmp_path, change)
    assert stored(tmp_path).keys() != before
    loaded = from_pretrained(tmp_path)
    assert torch.equal(architectures.output(loaded, name), architectures.output(model, name))
    if not pruned:
        reference = type(model).from_pretrained(tmp_path)
        assert torch.equal(architectures.output(reference, name), architectures.output(model, name))


def test_key_mapping(tmp_path):
    model = checkpoint_cases.sparsify(checkpoint_cases.llama())
    save_pretrained(model, tmp_path)
    rewritten(tmp_path, lambda n: n.replace("model.layers", "blocks"))
    with pytest.raises(FormatError, match="another model"):
        from_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path, key_mapping={"^blocks": "model.layers"})
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_a_missing_expert_is_named(tmp_path):
    architectures.build(transformers, "mixtral").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    gone = "model.layers.1.block_sparse_moe.experts.7.w1.weight"
    del tensors[gone]
    save_file(tensors, path)
    with pytest.raises(FormatError, match=r"experts\.\d+\.w"):
        from_pretrained(tmp_path)


def test_tensors_without_a_place_are_said(tmp_path):
    checkpoint_cases.llama().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "extra.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="1 tensors.*extra.weight"):
        from_pretrained(tmp_path)
    assert "extra.weight" in verify_checkpoint(tmp_path).problems["tree"]


def test_files_that_do_not_tie_what_the_config_ties(tmp_path):
    """As Transformers: loaded untied, and said."""
    model = checkpoint_cases.llama(tied=False)
    model.config.tie_word_embeddings = True
    save_pretrained(model, tmp_path)
    path = tmp_path / "config.json"
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = model.lm_head.weight.detach().clone()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "SHA256SUMS").unlink()
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.warns(UserWarning, match="loaded untied"):
        loaded = from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    save_pretrained(loaded, tmp_path / "again")
    assert torch.equal(from_pretrained(tmp_path / "again").lm_head.weight, model.lm_head.weight)


def test_names_before_release_5(monkeypatch, tmp_path):
    """The mapping of the class is used where Transformers has no WeightRenaming."""
    monkeypatch.setattr(names_module, "_has_transforms", lambda: False)
    model = checkpoint_cases.gpt2()
    monkeypatch.setattr(
        type(model),
        "_checkpoint_conversion_mapping",
        {"^decoder": "transformer"},
        raising=False,
    )
    checkpoint_cases.sparsify(model)
    save_pretrained(model, tmp_path)
    assert all(n.startswith(("decoder.", "lm_head.")) for n in stored(tmp_path))
    loaded = from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


# ---- the words of Transformers' functions --------------------------------------------------------


def test_dtype_and_device_words(tmp_path):
    save_pretrained(checkpoint_cases.sparsify(checkpoint_cases.llama(torch.bfloat16)), tmp_path)
    for words in ({"dtype": "auto"}, {"dtype": "bfloat16"}, {"torch_dtype": "torch.bfloat16"}):
        assert {p.dtype for p in from_pretrained(tmp_path, **words).parameters()} == {
            torch.bfloat16
        }
    assert {p.dtype for p in from_pretrained(tmp_path, dtype="float32").parameters()} == {
        torch.float32
    }
    for places in ("cpu", {"": "cpu"}, torch.device("cpu"), "auto", {"model": 0, "lm_head": "cpu"}):
        if places in ("auto", {"model": 0, "lm_head": "cpu"}) and torch.cuda.is_available():
            continue
        if isinstance(places, dict) and "model" in places:
            with pytest.raises(ValueError, match="device"):
                from_pretrained(tmp_path, device_map=places)
        else:
            assert from_pretrained(tmp_path, device_map=places).device.type == "cpu"
    loaded = from_pretrained(tmp_path, use_cache=False, attn_implementation="eager")
    assert loaded.config.use_cache is False and loaded.config._attn_implementation == "eager"


@pytest.mark.gpu
def test_device_map_auto_is_the_gpu(tmp_path):
    save_pretrained(checkpoint_cases.sparsify(checkpoint_cases.llama(torch.bfloat16)), tmp_path)
    for places in ("auto", "cuda", 0, {"": "cuda:0"}):
        loaded = from_pretrained(tmp_path, device_map=places)
        assert {t.device.type for t in loaded.state_dict().values()} == {"cuda"}


@pytest.mark.parametrize(
    "words, error, match",
    [
        ({"dtype": "bfloat"}, ValueError, "dtype 'auto' or one of"),
        ({"dtype": 16}, TypeError, "expected dtype: a torch.dtype or text"),
        ({"dtype": torch.int8}, ValueError, "dtype"),
        ({"device": "gpu"}, ValueError, "device such as"),
        ({"device": 1.5}, TypeError, "device such as"),
        ({"device": "cuda:²"}, ValueError, "device"),
        ({"device_map": {"nowhere": "cpu"}}, ValueError, "nowhere"),
        ({"device_map": {"model": "cpu"}}, ValueError, "cover every module"),
        ({"device_map": {"": "disk"}}, ValueError, "disk"),
        ({"trust_remote_code": True}, ValueError, "trust_remote_code"),
        ({"use_safetensors": False}, ValueError, "use_safetensors"),
        ({"variant": "fp16"}, ValueError, "variant"),
        ({"no_such_word": 1}, TypeError, "no_such_word"),
        ({"subfolder": "../x"}, ValueError, "subfolder"),
    ],
)
def test_words_that_are_not_supported_are_named(tmp_path, words, error, match):
    save_pretrained(checkpoint_cases.sparsify(checkpoint_cases.llama()), tmp_path)
    with pytest.raises(error, match=match):
        from_pretrained(tmp_path, **words)


@pytest.mark.parametrize("name", [None, 3, b"x", "", ["a"], "a\0b"])
def test_no_path(name):
    with pytest.raises((TypeError, ValueError), match="a path, got"):
        from_pretrained(name)
    with pytest.raises((TypeError, ValueError), match="a path, got"):
        save_pretrained(torch.nn.Linear(4, 4), name)


@pytest.mark.parametrize("size", ["2GB", "500MiB", 9000, "9 kb", "1.5GB"])
def test_shard_sizes(tmp_path, size):
    save_pretrained(
        checkpoint_cases.sparsify(checkpoint_cases.llama()), tmp_path, max_shard_size=size
    )
    many = len(list(tmp_path.glob("*.safetensors"))) > 1
    assert many == (size in (9000, "9 kb"))


@pytest.mark.parametrize("size", ["2XB", "", "-1GB", None, 1.5, True, 0, "²GB"])
def test_sizes_that_are_none(tmp_path, size):
    with pytest.raises((TypeError, ValueError), match="max_shard_size"):
        save_pretrained(torch.nn.Linear(4, 4), tmp_path / "x", max_shard_size=size)
    assert not (tmp_path / "x").exists()


def hub_cache(folder, repo, source, commit="0" * 40):
    """A snapshot as huggingface_hub keeps it: links into blobs."""
    home = folder / ("models--" + repo.replace("/", "--"))
    (home / "refs").mkdir(parents=True)
    (home / "blobs").mkdir()
    (home / "snapshots" / commit).mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    for path in source.iterdir():
        (home / "blobs" / path.name).write_bytes(path.read_bytes())
        (home / "snapshots" / commit / path.name).symlink_to(f"../../blobs/{path.name}")
    return home / "snapshots" / commit


def test_an_id_of_the_hub_comes_from_the_local_cache(tmp_path):
    pytest.importorskip("huggingface_hub")
    model = checkpoint_cases.sparsify(checkpoint_cases.llama())
    save_pretrained(model, tmp_path / "folder")
    snapshot = hub_cache(tmp_path / "cache", "someone/small-llama", tmp_path / "folder")
    for revision in (None, "main", "0" * 40):
        loaded = from_pretrained(
            "someone/small-llama", cache_dir=tmp_path / "cache", revision=revision, verify=True
        )
        with torch.no_grad():
            assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    export_dense(snapshot, tmp_path / "dense")  # links into the cache are part of the snapshot


@pytest.mark.parametrize("limit", ["1GB", "9KB"])
@pytest.mark.parametrize("words", [{}, {"variant": "fp16"}, {"subfolder": "part"}], ids=str)
def test_one_form_of_the_weights_is_downloaded(words, limit, tmp_path, monkeypatch):
    """Repositories hold several: other variants, consolidated.safetensors, pickles, folders."""
    hub = pytest.importorskip("huggingface_hub")
    model, repository = checkpoint_cases.llama(), tmp_path / "repository"
    for place in (repository, repository / "part"):
        for variant in (None, "fp16"):
            model.save_pretrained(place, variant=variant, max_shard_size=limit)
        for name in ("consolidated.safetensors", "pytorch_model.bin"):
            (place / name).write_bytes(b"large")
    snapshot = tmp_path / "cache" / ("0" * 40)

    def download(name, *, allow_patterns, local_files_only, revision, **options):
        assert name == "someone/small-llama" and revision in (None, snapshot.name)
        if local_files_only:
            raise FileNotFoundError("nothing in the cache")
        for path in repository.rglob("*"):
            relative = path.relative_to(repository)
            if path.is_file() and any(fnmatch(str(relative), p) for p in allow_patterns):
                (snapshot / relative).parent.mkdir(parents=True, exist_ok=True)
                (snapshot / relative).write_bytes(path.read_bytes())
        return str(snapshot)

    monkeypatch.setattr(hub, "snapshot_download", download)
    with torch.no_grad():
        loaded = from_pretrained("someone/small-llama", **words)
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    got = {p.relative_to(snapshot) for p in snapshot.rglob("*") if p.suffix != ".json"}
    got -= {p for p in got if (snapshot / p).is_dir()}
    stem = "model.fp16" if "variant" in words else "model"
    assert got and all(re.fullmatch(rf"{stem}(-\d+-of-\d+)?.safetensors", p.name) for p in got)
    assert {str(p.parent) for p in got} == {words.get("subfolder", ".")}


def test_an_id_that_is_nowhere_is_one_clear_line(tmp_path):
    pytest.importorskip("huggingface_hub")
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    for name in ("someone/no-such-model", "gpt2-nowhere"):
        with pytest.raises(FileNotFoundError, match=f"{name}.*local cache") as caught:
            from_pretrained(name, cache_dir=tmp_path)
        assert isinstance(caught.value, FormatError) and "\n" not in str(caught.value)
    with pytest.raises(FormatError, match="a model folder or the id"):
        from_pretrained(tmp_path / "absent")

"""Pruning block by block from the files: the folder of the ordinary way, byte for byte, with one
block in memory at a time."""

import contextlib
import gc
import shutil

import pytest
import torch

import sparsekern as sk
from python_tests.oneshot.driver_models import build, tokens, transformers
from sparsekern.checkpoint.stream import Streamed, save_streamed
from sparsekern.integrations.loading import load_model
from sparsekern.oneshot import run as run_module
from sparsekern.utils import staging

LAYERS = 6
OPTIONS = {"device": "cpu", "batch_size": 2, "progress": False}
SHARD = 20_000


def dense_folder(path, family="llama", **more):
    model = build(family, layers=more.pop("layers", LAYERS), **more)
    model.to(torch.bfloat16).save_pretrained(path, max_shard_size="60KB")
    return path


def ordinary(folder, out, method="sparsegpt", data=None, **options):
    model, _ = load_model(folder)
    data = tokens() if data is None else data
    report = sk.prune_model(model, method, data, **{**OPTIONS, **options})
    sk.save_pretrained(model, out, max_shard_size=SHARD)
    return report


def streamed(folder, out, parts, method="sparsegpt", data=None, **options):
    source = Streamed(folder)
    data = tokens() if data is None else data
    knobs = {**OPTIONS, "resume": parts, "source": source, **options}
    report = sk.prune_model(source.model, method, data, **knobs)
    save_streamed(source, parts, out, max_shard_size=SHARD)
    return report


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def assert_same_files(a, b):
    a, b = contents(a), contents(b)
    assert a.keys() == b.keys() and "SHA256SUMS" in a
    for name in a:
        assert a[name] == b[name], name


def rows(report):
    return [(r.name, r.dtype, r.relative_error, r.reason, r.bytes_sparse) for r in report.layers]


@pytest.mark.parametrize(
    "family, more, options",
    [
        ("llama", {"tie_word_embeddings": True}, {}),
        ("gpt2", {}, {"skip": (), "quantize": "int8"}),
        ("qwen2", {}, {"skip": ("lm_head", "block:1"), "method": "wanda"}),
        ("opt", {}, {"preset": "fast", "true_sequential": True, "reconstruct": ()}),
        ("llama", {}, {"reconstruct": {"span": 1, "epochs": 1}}),
    ],
)
def test_the_folder_is_that_of_the_ordinary_way(family, more, options, tmp_path):
    """Tied and untied, Conv1D, biases, levels, block reconstruction; several shards."""
    folder = dense_folder(tmp_path / "dense", family, layers=3, **more)
    expected = ordinary(folder, tmp_path / "a", **options)
    report = streamed(folder, tmp_path / "b", tmp_path / "parts", **options)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    assert_same_files(tmp_path / "a", tmp_path / "b")
    assert rows(report) == rows(expected) and report.parameters == expected.parameters
    assert sk.from_pretrained(tmp_path / "b", verify=True)


def test_the_default_preset_is_without_its_permutation(tmp_path):
    folder, few = dense_folder(tmp_path / "dense", "llama", layers=2), {"span": 1, "epochs": 1}
    options = {"method": None, "preset": "default", "reconstruct": few}
    ordinary(folder, tmp_path / "a", permute=False, **options)
    with pytest.warns(UserWarning, match="preset default without permutation with source"):
        report = streamed(folder, tmp_path / "b", tmp_path / "parts", **options)
    assert report.method == "admm" and report.permutation is None
    assert_same_files(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match="one block at a time, for source, got a permutation"):
        streamed(folder, tmp_path / "c", tmp_path / "more", permute=True, **options)


@contextlib.contextmanager
def watching(monkeypatch):
    """A list of the bytes of tensors that live at each look: before each group of layers is solved,
    and before each shard is written. Those from before do not count."""
    looks = []

    def looking(function):
        def look(*args, **kwargs):
            gc.collect()
            tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
            storages = [t.untyped_storage() for t in tensors if not t.is_meta]
            looks.append(sum({s.data_ptr(): s.nbytes() for s in storages}.values()))
            return function(*args, **kwargs)

        return look

    gc.collect()
    gc.freeze()  # what there is now is neither looked at nor listed any more
    try:
        with monkeypatch.context() as patch:
            for module, name in ((run_module, "prune_group"), (staging, "save_file")):
                patch.setattr(module, name, looking(getattr(module, name)))
            yield looks
    finally:
        gc.unfreeze()


def test_one_block_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """Counted in bytes of live tensors: what lies outside the blocks, a block dense and compressed,
    the walk's own, a shard."""
    folder = dense_folder(tmp_path / "dense", layers=12)
    model = build(layers=12).to(torch.bfloat16)
    block = sum(p.nbytes for p in model.model.layers[0].parameters())
    outside = sum(p.nbytes for p in model.parameters()) - 12 * block
    hessians = 4 * (3 * 32**2 + 64**2)
    del model
    data = tokens(samples=2)
    hidden = 3 * data.numel() * 32 * 2
    work = 6 * 128 * 32 * 4  # float32 copies of the largest group's weights in the solver
    bound = outside + 2 * block + hessians + hidden + work + 2 * SHARD
    with watching(monkeypatch) as few:
        streamed(folder, tmp_path / "a", tmp_path / "parts", data=data)
    with watching(monkeypatch) as many:
        ordinary(folder, tmp_path / "b", data=data)
    assert len(few) == len(many) > 4 * 12
    assert max(few) < bound < max(many), (max(few), bound, max(many))
    assert_same_files(tmp_path / "a", tmp_path / "b")


def test_a_run_that_was_interrupted_goes_on(tmp_path, monkeypatch):
    """After three blocks; never on a folder that has changed."""
    folder = dense_folder(tmp_path / "dense")
    ordinary(folder, tmp_path / "a")
    prune = run_module.prune_group

    def stop(layers, hessian, options):
        if layers[0].block == 3:
            raise KeyboardInterrupt
        return prune(layers, hessian, options)

    monkeypatch.setattr(run_module, "prune_group", stop)
    with pytest.raises(KeyboardInterrupt):
        streamed(folder, tmp_path / "b", tmp_path / "parts")
    monkeypatch.undo()
    assert not (tmp_path / "b").exists()
    copied = shutil.copytree(folder, tmp_path / "copied", copy_function=shutil.copy)
    with pytest.raises(ValueError, match="weights: "):
        streamed(copied, tmp_path / "b", tmp_path / "parts")
    report = streamed(folder, tmp_path / "b", tmp_path / "parts")
    assert report.resumed == 3
    assert_same_files(tmp_path / "a", tmp_path / "b")


@pytest.mark.gpu
def test_the_same_on_a_gpu(tmp_path):
    """Blocks go to the GPU and become weights in its layout there."""
    folder = dense_folder(tmp_path / "dense", hidden_size=64, intermediate_size=128)
    options = {"device": "cuda"}
    expected = ordinary(folder, tmp_path / "a", **options)
    report = streamed(folder, tmp_path / "b", tmp_path / "parts", **options)
    assert_same_files(tmp_path / "a", tmp_path / "b")
    assert rows(report) == rows(expected)


def test_the_command_line(tmp_path, monkeypatch, capsys):
    """--stream, computed in float32 and saved in bfloat16; by itself where memory is short."""
    from sparsekern.cli import main, prune
    from sparsekern.eval import texts

    folder = dense_folder(tmp_path / "dense")
    monkeypatch.setattr(prune, "cpu_has_bfloat16", lambda: False)
    monkeypatch.setattr(prune, "needed", lambda tokenizer, path: object())
    monkeypatch.setattr(texts, "read_rows", lambda source, split: ["text"])
    monkeypatch.setattr(texts, "tokenize", lambda tokenizer, text: tokens(1, 4000)[0])
    (tmp_path / "states").mkdir()
    given = f"prune {folder} --samples 4 --window 32 --quiet --device cpu --max-shard-size 20KB"
    for name, more in (
        ("a", "--no-stream"),
        ("b", f"--stream --activations {tmp_path / 'states'}"),
        ("c", ""),
    ):
        if name == "c":
            monkeypatch.setattr(prune, "available_host_bytes", lambda: 1000)
        assert main.main([*given.split(), "--out", str(tmp_path / name), *more.split()]) == 0
        assert ("block by block from the files" in capsys.readouterr().out) == (name == "c")
    for name in "bc":
        (tmp_path / name / "prune_report.json").unlink()
        assert not (tmp_path / f"{name}.parts").exists()
    (tmp_path / "a" / "prune_report.json").unlink()
    assert_same_files(tmp_path / "a", tmp_path / "b")
    assert_same_files(tmp_path / "a", tmp_path / "c")
    assert not list((tmp_path / "states").iterdir())


@pytest.mark.parametrize(
    "family, skip",
    [
        ("mixtral", ("lm_head",)),
        ("gpt-oss", ("lm_head", "*.0.mlp.experts.*")),
        ("qwen3-moe", ("lm_head", "*.experts.1.down_proj")),
    ],
)
def test_experts(family, skip, tmp_path):
    """In one tensor and in one each, in the files; some left dense."""
    from python_tests.nn.expert_models import build as mixture
    from python_tests.nn.expert_models import ids

    mixture(family).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    options = {"data": ids(3, 8), "skip": skip, "method": "wanda"}
    expected = ordinary(tmp_path / "dense", tmp_path / "a", **options)
    report = streamed(tmp_path / "dense", tmp_path / "b", tmp_path / "parts", **options)
    assert_same_files(tmp_path / "a", tmp_path / "b")
    assert rows(report) == rows(expected)


def test_what_needs_the_whole_model_is_refused(tmp_path):
    folder = dense_folder(tmp_path / "dense", layers=2)
    for options, text in (
        ({"preset": "best"}, r"a rotation \(of preset best\)"),
        ({"reconstruct": {"span": None}}, "reconstruct of several blocks together"),
        ({"compress": False}, "compress=True with source"),
        ({"resume": None}, "a folder as resume"),
    ):
        with pytest.raises(ValueError, match=text):
            streamed(folder, tmp_path / "out", tmp_path / "parts", **options)
    ordinary(folder, tmp_path / "sparse")
    with pytest.raises(ValueError, match="a dense model, got 14 compressed layers"):
        Streamed(tmp_path / "sparse")
    model, _ = load_model(folder)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(ValueError, match="finite weights in model.layers.1.mlp.up_proj"):
        streamed(tmp_path / "nan", tmp_path / "out", tmp_path / "parts")
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="a chain of decoder blocks, to stream it, got T5"):
        streamed(tmp_path / "t5", tmp_path / "out", tmp_path / "parts of t5")
    assert not (tmp_path / "out").exists()

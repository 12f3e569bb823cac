"""Sensitivity: each row against the same done by hand, skip lists, files, the command line."""

import copy
import json
import math
import warnings

import pytest
import torch

import sparsekern as sk
from python_tests.nn import expert_models
from python_tests.oneshot.driver_models import build, run_prune, tokens
from sparsekern.cli import main as cli
from sparsekern.errors import FormatError
from sparsekern.eval import sensitivity as module
from sparsekern.eval.sensitivity import Row, SensitivityReport, sensitivity
from sparsekern.oneshot.skip import RULE_OF_THUMB, as_rules

TEXT = tokens(1, 96, 5).reshape(-1)
OPTIONS = dict(window=16, windows=4, device="cpu", progress=False)
PARTS = {"layer": 14, "type": 7, "block": 2}


def kl(dense, other):
    ids = TEXT[:64].view(4, 16)
    with torch.no_grad():
        p, q = (m(input_ids=ids).logits.double().log_softmax(-1) for m in (dense, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("mode", ["leave", "add"])
@pytest.mark.parametrize("by", ["layer", "type", "block"])
def test_rows_are_what_one_would_do_by_hand(by, mode):
    model = build()
    before = copy.deepcopy(model.state_dict())
    report = sensitivity(model, tokens(), TEXT, by=by, mode=mode, **OPTIONS)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert len(report.rows) == PARTS[by] and report.weights == 18432
    pruned = copy.deepcopy(model)
    run_prune(pruned, compress=False)
    dense_value = sk.perplexity(model, TEXT[:64], window=16)
    assert report.dense == pytest.approx(dense_value, rel=1e-5)
    base = model if mode == "add" else pruned
    assert report.base == pytest.approx(sk.perplexity(base, TEXT[:64], window=16), rel=1e-5)
    assert report.base_kl == pytest.approx(kl(model, base), abs=1e-6)
    if mode == "add":
        for row in report.rows[:3]:
            work = copy.deepcopy(model)
            # One part alone, on the dense model's inputs: no other change can precede it inside
            # the first block.
            targets = [n for n in row.layers if ".0." in n or by == "layer"][:1]
            if by != "layer":
                continue
            run_prune(work, compress=False, targets=targets, match_dense=0.0)
            assert row.perplexity == pytest.approx(
                sk.perplexity(work, TEXT[:64], window=16), rel=1e-4
            )
            assert row.effect == pytest.approx(kl(model, work), abs=1e-5) and row.error > 0
        return
    for row in report.rows[:3]:
        work = copy.deepcopy(pruned)
        for name in row.layers:
            work.get_submodule(name).weight.data.copy_(model.get_submodule(name).weight)
        assert row.perplexity == pytest.approx(sk.perplexity(work, TEXT[:64], window=16), rel=1e-5)
        assert row.effect == pytest.approx(report.base_kl - kl(model, work), abs=1e-5)
    assert sum(len(row.layers) for row in report.rows) == 14


@pytest.mark.parametrize("mode", ["leave", "add"])
def test_experts_in_one_parameter_are_parts(mode):
    """Of a model whose experts are taken apart for the sweep, and from data that is read once."""
    model = expert_models.build("mixtral")
    before = copy.deepcopy(model.state_dict())
    data = iter(expert_models.ids())
    knobs = dict(method="wanda", by="layer", mode=mode)
    report = sensitivity(model, data, TEXT, **knobs, **OPTIONS)
    assert {k: v.shape for k, v in before.items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    row = next(row for row in report.rows if row.name.endswith("1.mlp.experts.3.down_proj"))
    work = copy.deepcopy(model)
    rules = {"skip": ("lm_head", row.name)} if mode == "leave" else {"targets": (row.name,)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # less than half
        run_prune(work, "wanda", expert_models.ids(), compress=False, **rules)
    expected = sk.perplexity(work, TEXT[:64], window=16)
    assert row.perplexity == pytest.approx(expected, rel=1e-5)


def test_inference_mode_around_it():
    model, options = build(), dict(by="block", **OPTIONS)
    want = sensitivity(model, tokens(), TEXT, **options)
    with torch.inference_mode():
        got = sensitivity(model, tokens(), TEXT, **options)
        made = build()
    assert [row.effect for row in got.rows] == [row.effect for row in want.rows]
    with pytest.raises(ValueError, match="sensitivity: expected weights that can be changed"):
        sensitivity(made, tokens(), TEXT, **options)


def test_a_skip_list_goes_to_prune_model(tmp_path):
    model = build()
    report = sensitivity(model, tokens(), TEXT, **OPTIONS)
    file = tmp_path / "skip.json"
    names = report.save_skip(file, share=0.2)
    weights = sum(row.weights for row in report.rows if row.name in names)
    assert names and weights <= 0.2 * report.weights
    content = json.loads(file.read_text())
    assert content["skip"] == ["lm_head", *names] and content["budget"] == {"share": 0.2}
    done = run_prune(model, skip=file)
    dense = {row.name for row in done.skipped}
    assert dense == {"lm_head", *names}
    assert done.options["skip"] == ["lm_head", *names]


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [b"\xff", *lines],
        lambda lines: [*lines, b'{"name": "lm_head"}'],
        lambda lines: [*lines, b'{"name": "a", "perplexity": null, "kl": 1.0}'],
        lambda lines: [*lines, b'{"name": "a", "perplexity": 1.0, "kl": "x"}'],
    ],
)
def test_a_damaged_file_of_a_sweep(damage, tmp_path):
    file, model = tmp_path / "rows.jsonl", build()
    knobs = {**OPTIONS, "by": "block", "method": "magnitude", "out": file}
    sensitivity(model, tokens(), TEXT, **knobs)
    file.write_bytes(b"\n".join([*damage(file.read_bytes().splitlines()), b""]))
    with pytest.raises(FormatError, match=r"rows\.jsonl is no file of a sweep"):
        sensitivity(model, tokens(), TEXT, **knobs)


def rows():
    """Effects per weight: a 4, b 3, c 1, d negative."""
    numbers = [("a", 10, 40.0, 18.0, 5.0), ("b", 20, 60.0, 16.0, 40.0), ("c", 30, 30.0, 19.0, 1.0),
               ("d", 5, -3.0, 21.0, 1.0)]  # fmt: skip
    made = [Row(n, [n], w, 0.1, ppl, 1.0, effect, us) for n, w, effect, ppl, us in numbers]
    return SensitivityReport("layer", "leave", 10.0, 20.0, 2.0, 100, made)


def test_budgets():
    report = rows()
    assert report.skip_list(share=0.3) == ["a", "b"]
    assert report.skip_list(share=0.45) == ["a", "b"]  # c does not fit beside them
    assert report.skip_list(share=0.9) == ["a", "b", "c"]  # d does harm
    assert report.skip_list(milliseconds=0.006) == ["c", "a"]  # 30, 8 and 1.5 per us
    assert report.skip_list(perplexity=18.0) == ["a"]
    assert report.skip_list(perplexity=14.5) == ["a", "b"]  # 20 * 0.9 * 0.8 = 14.4
    with pytest.raises(ValueError, match="bring the perplexity to 10, got 13.68 with all"):
        report.skip_list(perplexity=10.0)
    with pytest.raises(ValueError, match="one of share, perplexity and milliseconds, got 2"):
        report.skip_list(share=0.1, perplexity=3.0)
    with pytest.raises(ValueError, match="a positive budget"):
        report.skip_list(share=-1.0)
    with pytest.raises(ValueError, match="share, at most 1, got 10. 10 % is 0.1"):
        report.skip_list(share=10)
    report.rows[0].extra_us = None
    with pytest.raises(ValueError, match="times of every part"):
        report.skip_list(milliseconds=1.0)
    report.mode = "add"
    with pytest.raises(ValueError, match='mode="leave" with perplexity'):
        report.skip_list(perplexity=15.0)


def test_table_and_plot(tmp_path):
    report = rows()
    lines = report.table(2).splitlines()
    assert lines[2].startswith("b") and lines[3].startswith("a") and "20.00%" in lines[2]
    assert "perplexity 10.000 dense, 20.000 before" in lines[-1]
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    report.plot(tmp_path / "x.svg")
    report.by = "block"
    report.plot(tmp_path / "y.svg")
    assert (tmp_path / "x.svg").stat().st_size > 1000 < (tmp_path / "y.svg").stat().st_size


def test_killed_and_resumed(tmp_path, monkeypatch):
    model, file = build(), tmp_path / "rows.jsonl"
    straight = sensitivity(model, tokens(), TEXT, by="type", **OPTIONS)
    known, calls = module._Evaluator.__call__, []

    def broken(self, other):
        calls.append(1)
        if len(calls) == 6:  # dense, base, three parts
            raise KeyboardInterrupt
        return known(self, other)

    monkeypatch.setattr(module._Evaluator, "__call__", broken)
    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, tokens(), TEXT, by="type", out=file, **OPTIONS)
    with open(file, "a") as stream:
        stream.write('{"name": "mlp.up')  # a line that was being written
    assert len(file.read_text().splitlines()) == 5
    calls = [0] * 10
    resumed = sensitivity(model, tokens(), TEXT, by="type", out=file, **OPTIONS)
    assert len(calls) == 10 + 2 + 4
    assert resumed == straight
    with pytest.raises(ValueError, match="same arguments, got other mode"):
        sensitivity(model, tokens(), TEXT, by="type", mode="add", out=file, **OPTIONS)
    (tmp_path / "other").write_text("hello\n")
    with pytest.raises(sk.FormatError, match="no file of a sweep"):
        sensitivity(model, tokens(), TEXT, out=tmp_path / "other", **OPTIONS)


def test_times(monkeypatch):
    times = {"32x32 float32": [5.0, 3.0]}
    monkeypatch.setattr(module.dense_rule, "measure", lambda *a: times)
    monkeypatch.setattr(module.dense_rule, "key", lambda layer: "32x32 float32")
    report = sensitivity(build(), tokens(), TEXT, by="block", time_tokens=(1,), **OPTIONS)
    assert [row.extra_us for row in report.rows] == [14.0, 14.0]


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(by="head"), "by in .* got 'head'"),
        (dict(mode="both"), "mode in"),
        (dict(window=128), "text of at least one window of 128 tokens, got 96"),
        (dict(text=TEXT + 64), r"text: token ids in 0\.\.63, got 68\.\."),
        (dict(preset="best"), "no rotation, got one"),
        (dict(preset="default"), "no permutation, got one"),
        (dict(permute=True), "no permutation, got one. Call sparsekern.permute first"),
    ],
)
def test_wrong_arguments(options, text):
    with pytest.raises(ValueError, match=text):
        sensitivity(build(), tokens(), **{"text": TEXT, **OPTIONS, **options})


def test_rule_of_thumb_and_files(tmp_path):
    report = run_prune(build(), skip=RULE_OF_THUMB)
    dense = {row.name for row in report.skipped}
    attention = {f"model.layers.0.self_attn.{kind}_proj" for kind in "qkvo"}
    assert dense == {"lm_head", *attention}
    gpt2 = run_prune(build("gpt2"), skip=("rule-of-thumb",))
    assert "transformer.h.0.attn.c_attn" in {row.name for row in gpt2.skipped}
    for content, error in (("{", "to hold JSON"), ('{"skip": 3}', "got .*skip")):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(sk.FormatError, match=error):
            as_rules(str(tmp_path / "x.json"))
    with pytest.raises(FileNotFoundError):
        as_rules("none.json")


def test_the_command(tmp_path, capsys):
    gguf_cases = pytest.importorskip("python_tests.integrations.gguf_cases")
    model = tmp_path / "tiny.gguf"
    gguf_cases.write_gguf(
        model, gguf_cases.gguf_tensors(gguf_cases.tiny_llama()), gguf_cases.metadata()
    )
    words = "the and then an hand 12 than these 34 a band stand other that is all there is to say "
    text = tmp_path / "a.txt"
    text.write_text("\n".join(words[i:] for i in range(60)))
    arguments = ["sensitivity", model, "--calibration", text, "--text", text, "--samples", 4]
    arguments += ["--window", 32, "--windows", 2, "--by", "type", "--device", "cpu", "--quiet"]
    out, skip = tmp_path / "rows.jsonl", tmp_path / "skip.json"
    arguments += ["--out", out, "--skip-out", skip, "--share", 0.5]
    assert cli.main([str(a) for a in arguments]) == 0
    printed = capsys.readouterr().out
    assert "mlp.down_proj" in printed and "layers stay dense" in printed
    assert json.loads(skip.read_text())["skip"][0] == "lm_head"
    assert len(out.read_text().splitlines()) == 8
    assert cli.main([str(a) for a in arguments[:-2]]) == 2
    assert "a budget" in capsys.readouterr().err
    folder = tmp_path / "out"
    prune = ["prune", model, "--out", folder, "--calibration", text, "--skip", skip, "--window", 32]
    prune += ["--samples", 4, "--device", "cpu", "--quiet", "--allow-partial", "--preset", "fast"]
    assert cli.main([str(a) for a in prune]) == 0
    report = json.loads((folder / "prune_report.json").read_text())
    assert report["preset"] == "fast" and report["calibration"]["unigrams"]["tokens"]
    capsys.readouterr()
    far = tmp_path / "far.txt"
    far.write_text("9 8 7 6 5 " * 200)
    for name, warns in ((text, False), (far, True)):
        arguments = ["eval", folder, "--text", name, "--window", 32, "--device", "cpu", "--quiet"]
        assert cli.main([str(a) for a in arguments]) == 0
        assert ("is far from the text" in capsys.readouterr().err) is warns
    assert math.isfinite(report["seconds"])

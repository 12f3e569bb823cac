"""A long run says what it will take: ticks within a block, time from the first batches and the
first block, memory before; and the defaults of a CPU."""

import logging

import pytest
import torch

from python_tests.clock import Clock
from python_tests.oneshot.driver_models import build, tokens
from sparsekern.oneshot import estimate
from sparsekern.oneshot.executor import calibrate
from sparsekern.oneshot.prune_model import prune_model

OPTIONS = dict(device="cpu", batch_size=1, progress=False)


class Bar:
    """What Progress needs of tqdm."""

    def __init__(self):
        self.postfix, self.lines, self.disable = [], [], False

    def set_postfix_str(self, text, refresh):
        self.postfix.append(text)

    def write(self, text, file):
        self.lines.append(text)


def test_every_batch_ticks():
    seen = []
    walk = calibrate(build(), tokens(), device="cpu", batch_size=2)
    walk.on_tick = lambda *tick: seen.append(tick)
    for group in walk:
        for layer in group.layers:
            group.replace(layer.name, layer.weight.clone())
    block = [tick[1:] for tick in seen if tick[0] == "block-00000"]
    assert block == [(phase, n, 3) for phase in ("hessian", "forward") for n in (1, 2, 3)]
    assert [tick for tick in seen if tick[0] == "block-00001"] == [
        ("block-00001", "hessian", n, 3) for n in (1, 2, 3)
    ], "nothing comes after the last block"


def test_the_report_and_the_log_have_the_estimate(caplog, monkeypatch):
    clock = Clock(1.0)
    monkeypatch.setattr(estimate, "time", clock)
    with caplog.at_level(logging.INFO, logger="sparsekern"):
        report = prune_model(build(layers=4), "sparsegpt", tokens(), **OPTIONS)
    found = report.estimate
    assert found["from"] == "the first block"
    assert 0.5 * clock.now < found["seconds"] < 2 * clock.now
    # 120 tokens of 32 float32, the dense model's inputs and outputs beside them; 7 Hessians.
    assert found["hidden_states"] == 3 * 120 * 32 * 4
    assert found["hessians"] == 4 * (6 * 32**2 + 64**2)
    texts = [r.message for r in caplog.records if "by the first" in r.message]
    assert len(texts) == 2
    assert "at least" in texts[0] and "by the first batches" in texts[0]
    assert "about" in texts[1] and "120 tokens on cpu" in texts[1] and "hidden states" in texts[1]
    assert type(report).from_json(report.to_json()).estimate.keys() == found.keys()


def test_a_long_run_says_so_beside_the_bar(monkeypatch):
    monkeypatch.setattr(estimate, "LONG_SECONDS", 0.0)
    walk = calibrate(build(layers=4), tokens(), device="cpu", batch_size=1)
    bar = Bar()
    watch = estimate.Progress(walk, walk.plan(), bar, "sparsekern.prune_model")
    for stage in walk.stages():
        for group in stage.groups():
            for layer in group.layers:
                group.replace(layer.name, layer.weight.clone())
        watch.done(stage.key)
    assert [line.split(" for ")[0].split(": ")[1].split(" ")[0] for line in bar.lines] == [
        "at",
        "about",
    ]
    assert "block-00003 hessian 6/6" in bar.postfix


def test_without_calibration_there_is_none():
    report = prune_model(build(), "magnitude", progress=False)
    assert report.estimate == {}


def test_more_hidden_states_than_memory_warns(monkeypatch):
    monkeypatch.setattr(estimate, "free_host_bytes", lambda: 1000)
    with pytest.warns(UserWarning, match="hidden states .* need .* Use fewer samples"):
        prune_model(build(), "wanda", tokens(), undo=False, **OPTIONS)


def test_words():
    assert estimate.duration(8.2) == "8 s"
    assert estimate.duration(600) == "10 min"
    assert estimate.duration(12000) == "3 h 20 min"
    assert estimate.duration(float("inf")) == "an unknown time"
    assert estimate.size(3 * 2**20) == "3 MiB"


def test_an_exception_keeps_what_was_known(monkeypatch):
    calls = []

    def score(w, hessian):
        calls.append(1)
        if len(calls) > 9:
            raise ZeroDivisionError
        return w.abs()

    walk_ticks = []
    monkeypatch.setattr(estimate.Progress, "done", lambda self, key: walk_ticks.append(key))
    with pytest.raises(ZeroDivisionError):
        prune_model(build(), score, tokens(), **OPTIONS)
    assert walk_ticks == ["block-00000"]


# ---- the command line ----------------------------------------------------------------------------


def windows(monkeypatch, device, positions=8192, **given):
    from types import SimpleNamespace

    from sparsekern.cli import prune
    from sparsekern.eval import texts

    monkeypatch.setattr(texts, "read_rows", lambda source, split: ["text"])
    monkeypatch.setattr(texts, "tokenize", lambda tokenizer, text: torch.arange(100_000))
    args = SimpleNamespace(
        method="wanda",
        calibration="builtin",
        model="m",
        seed=0,
        samples=None,
        window=None,
        preset=None,
        whole_documents=False,
        **dict.fromkeys(("quantize_method", "refine", "permute")),
    )
    vars(args).update(given)
    model = torch.nn.Linear(4, 4)
    model.config = SimpleNamespace(max_position_embeddings=positions)
    drawn = prune.calibration_of(args, model, object(), device)
    return len(drawn), drawn.rows[0].numel()


def test_windows_by_default(monkeypatch):
    assert windows(monkeypatch, "cuda") == (128, 2048)
    assert windows(monkeypatch, "cpu") == (20, 512)
    assert windows(monkeypatch, "cpu", positions=64) == (20, 64)
    assert windows(monkeypatch, "cpu", samples=3, window=100) == (3, 100)


def test_a_cpu_without_16_bit_units_computes_in_float32(monkeypatch, capsys):
    from sparsekern.cli import prune

    for dtype, unit, changed in (
        (torch.bfloat16, False, True),
        (torch.bfloat16, True, False),
        (torch.float16, True, True),
        (torch.float32, False, False),
    ):
        monkeypatch.setattr(prune, "cpu_has_bfloat16", lambda unit=unit: unit)
        model = build().to(dtype)
        assert prune.compute_in_float32(model, "cpu") == (dtype if changed else None)
        assert next(model.parameters()).dtype == (torch.float32 if changed else dtype)
        assert ("saved as" in capsys.readouterr().out) == changed
        assert prune.compute_in_float32(build().to(dtype), "cuda") is None


def test_a_16_bit_model_is_saved_in_its_dtype(tmp_path, monkeypatch):
    """prune on a CPU: computed in float32, and what is saved are the 16-bit numbers."""
    import sparsekern as sk
    from sparsekern.cli import main, prune
    from sparsekern.eval import texts

    transformers = pytest.importorskip("transformers")
    assert transformers
    build().to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(prune, "cpu_has_bfloat16", lambda: False)
    monkeypatch.setattr(prune, "needed", lambda tokenizer, path: object())
    monkeypatch.setattr(texts, "read_rows", lambda source, split: ["text"])
    monkeypatch.setattr(texts, "tokenize", lambda tokenizer, text: tokens(1, 4000)[0])
    code = main.main(
        ["prune", str(tmp_path / "dense"), "--method", "wanda", "--out", str(tmp_path / "out")]
        + ["--samples", "4", "--window", "32", "--quiet", "--device", "cpu"]
    )
    assert code == 0
    loaded = sk.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    layer = loaded.model.layers[0].mlp.up_proj
    assert isinstance(layer, sk.SparseLinear) and layer.weight.dtype == torch.bfloat16
    report = sk.PruneReport.from_json((tmp_path / "out" / "prune_report.json").read_text())
    row = report["model.layers.0.mlp.up_proj"]
    assert row.dtype == "bfloat16" and row.bytes_dense == 64 * 32 * 2
    assert row.bytes_sparse == layer.weight.nbytes

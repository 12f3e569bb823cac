"""prune_model, finetune.Masked, ASP and the command line with "4:8 in pairs"."""

import json

import pytest
import torch
from torch import nn

import sparsekern as sk
from python_tests.finetune.small import masks_of, network, train
from python_tests.oneshot.driver_models import build, tokens
from sparsekern import prune
from sparsekern.asp import ASP, create_mask
from sparsekern.finetune import Masked
from sparsekern.finetune.schedule import SRSTE, Magnitude, RigL, zeros_mask
from sparsekern.oneshot.prune_model import prune_model
from sparsekern.oneshot.report import PruneReport

PAIRS = prune.Pattern.of("4:8 in pairs")
KNOBS = dict(pattern="4:8 in pairs", compress=False, progress=False)


def groups_of(model, report):
    for row in report.pruned:
        yield row, model.get_submodule(row.name).weight.detach()


@pytest.mark.parametrize(
    "method, options",
    [
        ("magnitude", {}),
        ("wanda", {}),
        ("sparsegpt", {}),
        ("sparsegpt", {"match_dense": 0.0, "refine": 0}),
        ("sparsegpt", {"true_sequential": True}),
        ("admm", {"rounds": 12}),
        (lambda weight, hessian: weight.abs(), {}),
    ],
)
def test_every_method_prunes_in_pairs(method, options):
    model = build()
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = prune_model(model, method, tokens(), **KNOBS, **options)
    assert len(report.pruned) == 14 and report.pattern == PAIRS
    assert report.options["pattern"] == "4:8 in pairs" and not report.partial
    for row, weight in groups_of(model, report):
        touched = (weight != 0).view(-1, 4, 2).any(2).sum(1)
        assert touched.eq(2).all() and PAIRS.counts(weight).eq(4).all()
        assert row.pattern == "4:8 in pairs" and not row.is_24 and row.sparse
        assert row.relative_error is not None and 0 < row.relative_error < 1
        changed = (weight != dense[f"{row.name}.weight"])[weight != 0].any()
        assert bool(changed) == (method in ("sparsegpt", "admm"))
    assert "of the linear weights are 4:8 in pairs" in report.summary()
    assert PruneReport.from_json(report.to_json()) == report
    assert report.why_dense()[0][0].startswith("skip rule 'lm_head'")


def test_magnitude_needs_no_calibration_and_is_the_mask_of_its_name():
    model, twin = build(), build()
    report = prune_model(model, "magnitude", **KNOBS)
    for row, weight in groups_of(model, report):
        before = twin.get_submodule(row.name).weight.detach()
        assert torch.equal(weight, before * prune.magnitude_mask(before, 4, 8, 2))


def test_compress_is_refused_with_reason_and_remedy():
    model = build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for options in ({}, {"quantize": "fp8", "compress": False}):
        with pytest.raises(ValueError, match="got '4:8 in pairs'") as caught:
            prune_model(model, "magnitude", pattern=PAIRS, progress=False, **options)
    with pytest.raises(ValueError) as caught:
        prune_model(model, "magnitude", pattern=PAIRS, progress=False)
    assert "No kernel here runs it, and it is in general not 2:4" in str(caught.value)
    assert "compress=False" in str(caught.value)
    moving = {"span": None, "epochs": 1, "reselect": 0.5}
    with pytest.raises(ValueError, match=r"pattern \(2, 4\) with reselect"):
        prune_model(model, "sparsegpt", tokens(), reconstruct=moving, **KNOBS)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_width_of_12_stays_dense_with_the_reason():
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 32))
    report = prune_model(model, "magnitude", **KNOBS)
    assert [row.name for row in report.pruned] == ["2"]
    assert report["0"].reason == "in_features 12 is not a multiple of 8"


def test_a_method_that_cuts_pairs_apart_is_caught():
    def function(weight, hessian, *, pattern, mask=None):
        mask = prune.nm_mask(weight.abs(), *pattern)
        return weight * mask, mask, None

    method = prune.Method("apart", "", function)
    with pytest.raises(ValueError, match="at most 4 of 8 kept in .* by method apart, pairs whole"):
        prune_model(build(), method, **KNOBS)


def test_given_masks_are_reported_as_what_they_are():
    model = build()
    name = "model.layers.0.mlp.up_proj"
    weight = model.get_submodule(name).weight.detach()
    for mask, pattern, is_24 in (
        (prune.magnitude_mask(weight, 4, 8, 2), "4:8 in pairs", False),
        (prune.magnitude_mask(weight), None, True),
        (torch.ones_like(weight, dtype=torch.bool), None, False),
    ):
        report = prune_model(build(), "magnitude", masks={name: mask}, **KNOBS)
        assert (report[name].pattern, report[name].is_24) == (pattern, is_24)


def test_reconstruction_and_resume_keep_pairs(tmp_path):
    model, twin = build(), build()
    rounds = [{"span": 1, "epochs": 2}, {"span": None, "epochs": 1}]
    knobs = dict(KNOBS, reconstruct=rounds, batch_size=2)
    report = prune_model(model, "sparsegpt", tokens(), **knobs, resume=tmp_path / "run")
    assert any(fit["kept"] for fit in report.reconstruction)
    for _, weight in groups_of(model, report):
        assert not PAIRS.broken(weight).any()
    again = prune_model(twin, "sparsegpt", tokens(), **knobs, resume=tmp_path / "run")
    assert again.resumed == 3  # two blocks, and the window of the round after them
    for one, other in zip(model.parameters(), twin.parameters()):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="pattern"):
        other = dict(knobs, pattern=(4, 8))
        prune_model(build(), "sparsegpt", tokens(), **other, resume=tmp_path / "run")


# ------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    "schedule",
    [None, SRSTE(), Magnitude(every=1), RigL(every=1, freeze_at=50, fraction=0.5)],
    ids=lambda schedule: type(schedule).__name__,
)
def test_masked_keeps_and_moves_pairs(schedule):
    model = network()
    report = prune_model(model, "magnitude", **KNOBS)
    masked = Masked.from_report(model, report, schedule=schedule)
    first = masked.masks
    optimizer = masked.attach(torch.optim.AdamW(model.parameters(), 0.1))
    train(model, optimizer, 8)
    assert masked.check() == 0 and "4:8 in pairs" in repr(masked)
    for name, mask in masked.masks.items():
        weight = model.get_submodule(name).weight
        assert PAIRS.counts(mask).eq(4).all() and not PAIRS.broken(weight).any()
    moved = any(not torch.equal(mask, first[name]) for name, mask in masked.masks.items())
    assert moved == (schedule is not None)
    twin = network()
    other = Masked(twin, masked.masks, pattern=PAIRS)
    other.load_state_dict(masked.state_dict())
    assert other.pattern == PAIRS and other.check() == 0
    with pytest.raises(ValueError, match=r"pattern \(2, 4\), got '4:8 in pairs'"):
        masked.compress()


def test_masked_finds_pairs_and_counts_what_breaks_them():
    model = network()
    prune_model(model, "magnitude", **KNOBS)
    masked = Masked(model, pattern="4:8 in pairs")
    assert set(masked.masks) == {"up", "down"} and masked.check() == 0
    with torch.no_grad():
        model.up.weight.masked_fill_(~masked.masks["up"], 1.0)
    assert masked.check() == model.up.weight.numel() // 8
    with pytest.raises(
        ValueError, match="at most 4 kept per group of 8, pairs whole, in mask 'up'"
    ):
        Masked(network(), masks_of(network()), pattern=PAIRS)


def test_zeros_mask_fills_pairs():
    weight = torch.tensor([[0.0, 2.0, 0, 0, 0, 0, 0, 0], [1.0, 0, 0, 3.0, 0, 0, 0, 0]])
    assert zeros_mask(weight, 4, 8, 2).int().tolist() == [
        [1, 1, 0, 0, 0, 0, 1, 1],
        [1, 1, 1, 1, 0, 0, 0, 0],
    ]
    with pytest.raises(ValueError, match="at most 4 non-zeros in each group of 8, pairs counted"):
        zeros_mask(torch.tensor([[1.0, 0, 1, 0, 1, 0, 0, 0]]), 4, 8, 2)


def test_asp_masks_in_pairs():
    weight = torch.randn(16, 32)
    sums = weight.abs().double().view(-1, 4, 2).sum(2)
    choices = PAIRS.choices()
    best = (sums @ choices[:, ::2].double().t()).argmax(1)
    mask = create_mask(weight, "m8n4_1d_pairs")
    assert torch.equal(mask, choices[best].view(16, 32))
    with pytest.raises(ValueError, match="dimension 1 % 8 == 0"):
        create_mask(torch.randn(4, 12), "m8n4_1d_pairs")
    model = nn.Sequential(nn.Linear(32, 16))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    ASP.init_model_for_pruning(model, "m8n4_1d_pairs", verbosity=0, allow_permutation=False)
    ASP.init_optimizer_for_pruning(optimizer)
    ASP.compute_sparse_masks()
    model(torch.randn(4, 32)).square().sum().backward()
    optimizer.step()
    assert PAIRS.counts(model[0].weight).eq(4).all()


# --------------------------------------------------------------------------------- command line


def test_command_line_prunes_and_verifies_pairs(tmp_path, capsys):
    pytest.importorskip("gguf", reason="needs gguf")
    from python_tests.integrations import gguf_cases as cases
    from sparsekern.cli import main as cli
    from sparsekern.integrations.gguf.model import load_gguf

    cases.write_gguf(tmp_path / "t.gguf", cases.gguf_tensors(cases.tiny_llama()), cases.metadata())
    model, tokenizer = load_gguf(tmp_path / "t.gguf", torch.float32)
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    out = tmp_path / "pairs"
    arguments = ["prune", tmp_path / "dense", "--method", "magnitude", "--pattern", "4:8 in pairs"]
    arguments += ["--quiet", "--out", out]
    assert cli.main(list(map(str, arguments))) == 0
    assert "are 4:8 in pairs" in capsys.readouterr().out
    assert json.loads((out / "prune_report.json").read_text())["options"]["compress"] is False
    assert cli.main(["verify", str(out)]) == 0
    assert "14 of 14 pruned layers are 4:8 in pairs" in capsys.readouterr().out
    saved = sk.from_pretrained(out)
    saved.model.layers[0].mlp.up_proj.weight.data.fill_(1.0)
    saved.save_pretrained(out)
    assert cli.main(["verify", str(out)]) == 1
    text = capsys.readouterr().out
    assert "13 of 14" in text and "wrong    model.layers.0.mlp.up_proj" in text
    arguments[5] = "4:8 in threes"
    arguments[-1] = tmp_path / "other"
    assert cli.main(list(map(str, arguments))) == 2
    assert "sparsekern prune: expected --pattern" in capsys.readouterr().err

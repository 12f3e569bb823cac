"""Calibration against the dense model: Hessian.drift and prune.retarget against float64, and
prune_model(match_dense=...) against the same computed from hooks."""

import copy

import pytest
import torch

from python_tests.oneshot.driver_models import build, hook_inputs, run_prune, tokens
from python_tests.prune.test_sparsegpt import make_layer
from sparsekern import prune
from sparsekern.oneshot.collector import HessianCollector
from sparsekern.oneshot.discovery import Layer


def pair(samples=6, length=10, features=16):
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(samples, length, features, generator=generator)
    return dense, dense + 0.3 * torch.randn(samples, length, features, generator=generator)


def test_drift_is_the_product_of_the_difference():
    dense, x = pair()
    hessian = prune.Hessian(16)
    for part in (slice(0, 2), slice(2, 6)):
        hessian.add(x[part], dense[part])
    flat, d = x.reshape(-1, 16).double(), dense.reshape(-1, 16).double()
    torch.testing.assert_close(
        hessian.drift.double(), 2 / 6 * (d - flat).T @ flat, rtol=1e-4, atol=1e-4
    )
    plain = prune.Hessian(16)
    plain.add(x)
    assert plain.drift is None
    torch.testing.assert_close(hessian.matrix, plain.matrix, rtol=1e-4, atol=1e-4)


def test_retarget_solves_the_normal_equations():
    dense, x = pair()
    hessian = prune.Hessian(16)
    hessian.add(x, dense)
    w = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    flat, d = x.reshape(-1, 16).double(), dense.reshape(-1, 16).double()
    h = 2 / 6 * flat.T @ flat
    lam = 0.05 * h.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    full = torch.linalg.solve(h + lam, (2 / 6 * flat.T @ d + lam) @ w.double().T).T
    got = prune.retarget(w, hessian, share=1.0, damp=0.05)
    torch.testing.assert_close(got.double(), full, rtol=1e-4, atol=1e-4)
    half = prune.retarget(w, hessian, share=0.5, damp=0.05)
    torch.testing.assert_close(half, (w + got) / 2, rtol=1e-4, atol=1e-4)
    assert torch.equal(prune.retarget(w, hessian, share=0), w)
    exact = prune.retarget(w, hessian, share=1.0, damp=0.0).double()
    error = (flat @ exact.T - d @ w.double().T).square().sum()
    assert error < 0.95 * ((flat - d) @ w.double().T).square().sum(), "nearer to the dense outputs"


def test_equal_inputs_change_nothing():
    _, x = pair()
    hessian = prune.Hessian(16)
    hessian.add(x, x.clone())
    w = torch.randn(4, 16)
    torch.testing.assert_close(prune.retarget(w, hessian, share=1.0), w)


def test_bad_arguments_are_named():
    w, plain = make_layer(4, 16)
    dense, x = pair()
    hessian = prune.Hessian(16)
    hessian.add(x, dense)
    for call, text in (
        (lambda: prune.retarget(w, plain), "a Hessian with dense inputs"),
        (lambda: prune.retarget(w, hessian, share=1.5), "share from 0 to 1"),
        (lambda: prune.retarget(w, hessian, damp=-1), "a finite damp"),
        (lambda: hessian.add(x), "dense with every input, or with none"),
        (lambda: hessian.add(x, dense[:1]), "dense of x's shape"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_prune_model_matches_the_dense_model(share):
    """Block 0 is as without; q_proj of block 1 is retargeted with the inputs of both models."""
    model, ids = build(), tokens()
    dense = copy.deepcopy(model)
    plain, matched = copy.deepcopy(model), copy.deepcopy(model)
    run_prune(plain, calibration=ids, match_dense=0)
    report = run_prune(matched, calibration=ids, match_dense=share)
    assert report.options["match_dense"] == share
    first = [m.model.layers[0].mlp.up_proj.weight.to_dense() for m in (plain, matched)]
    torch.testing.assert_close(*first, rtol=1e-4, atol=1e-5)

    def q(m):
        return m.model.layers[1].self_attn.q_proj

    inputs = [
        hook_inputs(m, [q(m)], lambda m=m: m(ids, use_cache=False))[0][0] for m in (matched, dense)
    ]
    hessian = prune.Hessian(32)
    hessian.add(*inputs)
    target = prune.retarget(q(dense).weight.detach(), hessian, share=share)
    expected, mask, _ = prune.sparsegpt(target, hessian)
    expected = prune.refine(
        target, expected, mask, hessian, steps=prune.methods()["sparsegpt"].refine
    )
    got = q(matched).weight.to_dense()
    assert torch.equal(got != 0, mask)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(got, q(plain).weight.to_dense(), atol=1e-4)


def test_it_resumes_and_skipped_blocks_do_not_stop_it(tmp_path):
    whole, ids = build(layers=3), tokens()
    begun, skipped = copy.deepcopy(whole), copy.deepcopy(whole)
    options = dict(calibration=ids, match_dense=0.5)
    run_prune(whole, **options, resume=tmp_path / "resume")
    (tmp_path / "resume" / "block-00002.safetensors").unlink()
    report = run_prune(begun, **options, resume=tmp_path / "resume")
    assert report.resumed == 2
    for name, expected in whole.state_dict().items():
        assert torch.equal(begun.state_dict()[name], expected), name
    run_prune(skipped, **options, skip=("lm_head", 1))
    assert not hasattr(skipped.model.layers[1].mlp.up_proj, "values")


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(match_dense=2.0), "match_dense, a share from 0 to 1"),
        (dict(match_dense=0.5, method="wanda"), "sparsegpt or admm with match_dense"),
        (dict(match_dense=0.5, true_sequential=True), "match_dense or true_sequential"),
    ],
)
def test_options_that_do_not_fit(options, text):
    with pytest.raises(ValueError, match=text):
        run_prune(build(), **options)


def test_a_model_without_a_chain_of_blocks_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    with pytest.raises(ValueError, match="a chain of decoder blocks"):
        run_prune(model, calibration=[torch.randn(4, 8)], match_dense=0.5)


def test_default_is_a_quarter_where_the_model_and_the_options_allow_it():
    def matched(model, calibration, **options):
        return run_prune(model, calibration=calibration, **options).options.get("match_dense", 0)

    assert matched(build(), tokens()) == 0.25
    assert matched(build(), tokens(), true_sequential=True) == 0
    assert matched(build(), tokens(), method="wanda") == 0
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    assert matched(model, [torch.randn(64, 8)]) == 0


class Experts(torch.nn.Module):
    """Two experts; each gets the tokens on its side of a plane."""

    def __init__(self, features):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(features, features) for _ in range(2))

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        y = torch.zeros_like(flat)
        for expert, chosen in zip(self.experts, (flat[:, 0] > 0, flat[:, 0] <= 0)):
            y[chosen] = expert(flat[chosen])
        return y.view_as(x)


def test_experts_are_left_out():
    """Pruning changes who gets which token; a layer of all tokens is matched none the less."""
    torch.manual_seed(0)
    model = build(layers=3)
    for block in model.model.layers:
        block.mlp = Experts(32)
    report = run_prune(model, calibration=tokens())
    assert report.options["match_dense"] == 0.25
    experts = [row for row in report.pruned if "experts" in row.name]
    others = [row for row in report.pruned if "experts" not in row.name]
    assert len(experts) == 6 and others
    assert all("not matched to the dense model" in row.note for row in experts)
    assert not any("not matched" in (row.note or "") for row in others)


def test_layers_that_work_on_heads_are_matched():
    """Their inputs have several rows for each token."""
    whole, heads = torch.nn.Linear(8, 8), torch.nn.Linear(4, 4)
    layers = [Layer("whole", whole), Layer("heads", heads)]
    x = torch.randn(2, 5, 8)
    with HessianCollector(layers, torch.device("cpu")) as collector:
        for watches, scale in ((True, 1.0), (False, 1.1)):
            collector.watches_dense = watches
            heads(whole(x * scale).view(2, 5, 2, 4))
        collector.end_batch()
    for hessian in collector.hessians.values():
        assert hessian.drift is not None and not hessian.unmatched

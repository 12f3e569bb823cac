"""prune.refine against the exact least-squares fit in float64, and its place in prune_model."""

import copy

import pytest
import torch

import sparsekern as sk
from python_tests.oneshot.driver_models import build, tokens
from python_tests.prune.test_sparsegpt import make_layer
from sparsekern.prune import magnitude_mask, refine, sparsegpt, team


def least_squares(w, mask, h, damp):
    """Row by row in float64: the kept weights v with A_SS v = A_S· w, A = H + damp·mean(diag)·I."""
    w, a = w.double(), h.double().clone()
    a.diagonal().add_(damp * a.diagonal().mean())
    best = torch.zeros_like(w)
    for row, kept in enumerate(mask):
        best[row, kept] = torch.linalg.solve(a[kept][:, kept], a[kept] @ w[row])
    return best


def objective(w, pruned, h, damp):
    difference = w.double() - pruned.double()
    a = h.double().clone()
    a.diagonal().add_(damp * a.diagonal().mean())
    return ((difference @ a) * difference).sum().item()


@pytest.mark.parametrize("start", ["sparsegpt", "magnitude"])
def test_arrives_at_the_exact_fit(start):
    w, hessian = make_layer(24, 64)
    if start == "sparsegpt":
        pruned, mask, _ = sparsegpt(w, hessian)
    else:
        mask = magnitude_mask(w)
        pruned = w * mask
    expected = least_squares(w, mask, hessian.matrix, 0.01)
    got = refine(w, pruned, mask, hessian, steps=200)
    torch.testing.assert_close(got.double(), expected, rtol=2e-3, atol=2e-3)
    best = objective(w, expected, hessian.matrix, 0.01)
    assert objective(w, got, hessian.matrix, 0.01) <= best * (1 + 1e-4)
    assert best < 0.9 * objective(w, pruned, hessian.matrix, 0.01)


def test_every_step_lowers_the_error_and_keeps_the_mask():
    w, hessian = make_layer(32, 128, seed=3)
    pruned, mask, _ = sparsegpt(w, hessian)
    values = [objective(w, pruned, hessian.matrix, 0.01)]
    for steps in (1, 2, 4, 8, 16):
        got = refine(w, pruned, mask, hessian, steps=steps)
        assert got.dtype == w.dtype and not got[~mask].any()
        values.append(objective(w, got, hessian.matrix, 0.01))
    assert all(after < before for before, after in zip(values, values[1:]))
    assert torch.equal(refine(w, pruned, mask, hessian, steps=0), pruned)


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("damp", [0, 1e-8, 0.01, 1])
def test_steps_after_the_last_that_helps_do_no_harm(tokens, damp):
    """Few tokens are fitted soon: what is left of the residual is rounding, and stays."""
    torch.manual_seed(0)
    x, w = torch.randn(tokens, 64), torch.randn(8, 64)
    mask = magnitude_mask(w)
    start = objective(w, w * mask, x.T @ x, damp)
    got = refine(w, w * mask, mask, x.T @ x, steps=1000, damp=damp)
    assert objective(w, got, x.T @ x, damp) < 0.9 * start


def test_rows_are_solved_in_parts(monkeypatch):
    w, hessian = make_layer(10, 32)
    mask = magnitude_mask(w)
    whole = refine(w, w * mask, mask, hessian, steps=8)
    monkeypatch.setattr(team, "ELEMENTS", 3 * 32)
    torch.testing.assert_close(refine(w, w * mask, mask, hessian, steps=8), whole)


def test_inputs_that_were_always_zero_keep_their_weights():
    w, hessian = make_layer(8, 32)
    h = hessian.matrix.clone()
    h[5], h[:, 5] = 0, 0
    mask = magnitude_mask(w)
    pruned = w * mask
    got = refine(w, pruned, mask, h, steps=20)
    assert torch.equal(got[:, 5], pruned[:, 5]) and got.isfinite().all()
    assert torch.equal(refine(w, pruned, mask, torch.zeros_like(h), steps=5), pruned)


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_the_scale_of_the_hessian_does_not_matter(scale):
    w, hessian = make_layer(8, 32)
    mask = magnitude_mask(w)
    expected = refine(w, w * mask, mask, hessian, steps=12)
    got = refine(w, w * mask, mask, hessian.matrix * scale, steps=12)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_bad_arguments_are_named():
    w, hessian = make_layer(8, 32)
    mask = magnitude_mask(w)
    for change, error, text in (
        ({"mask": mask[:4]}, ValueError, "mask of w's shape"),
        ({"mask": mask.float()}, TypeError, "a bool mask"),
        ({"pruned": w[:, :16]}, ValueError, "pruned of w's shape"),
        ({"steps": -1}, ValueError, "steps from 0 to"),
        ({"damp": -0.1}, ValueError, "damp from 0 to"),
        ({"pruned": w * float("nan")}, ValueError, "pruned"),
    ):
        arguments = {"w": w, "pruned": w * mask, "mask": mask, "hessian": hessian, **change}
        with pytest.raises(error, match=text):
            refine(**arguments)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
def test_prune_model_lowers_the_error_of_every_layer_of_the_first_block(method):
    model, ids = build(), tokens()
    reports = [
        sk.prune_model(copy.deepcopy(model), method, ids, progress=False, **options)
        for options in ({"refine": 0}, {"refine": 16})
    ]
    plain, refined = ([r for r in report.pruned if r.block == 0] for report in reports)
    assert plain and all(b.relative_error < a.relative_error for a, b in zip(plain, refined))


def test_prune_model_needs_calibration_for_it():
    with pytest.raises(ValueError, match="calibration for refine"):
        sk.prune_model(build(), "magnitude", refine=4, progress=False)

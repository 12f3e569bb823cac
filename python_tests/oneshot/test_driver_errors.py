"""prune_model with arguments, models and data that do not fit: which error, and what is left
untouched."""

import copy
import sys

import pytest
import torch
from torch import nn

from python_tests.oneshot.driver_models import build, plain, tokens
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.oneshot.prune_model import prune_model
from sparsekern.prune import PruneError

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
UP = "model.layers.0.mlp.up_proj"


def scores_of_wrong_shape(w, hessian):
    return w[0]


def bool_mask(*shape):
    return torch.zeros(*shape, dtype=torch.bool)


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        (dict(method="sparsgpt"), ValueError, "'sparsgpt'"),
        (dict(method="wanda", calibration=None), ValueError, "calibration for wanda, got None"),
        (dict(calibration=[]), ValueError, "at least one sample"),
        (dict(calibration=torch.full((2, 8), 64)), ValueError, r"0\.\.63, got 64\.\.64"),
        (dict(calibration=torch.full((2, 8), -1)), ValueError, r"got -1\.\.-1"),
        (
            dict(calibration=torch.zeros(2, 8)),
            TypeError,
            r"integer token ids .* got \[2, 8\] float32",
        ),
        (dict(calibration=torch.zeros(2, 2, 8, dtype=torch.long)), ValueError, r"got \(2, 2, 8\)"),
        (dict(batch_size=0), ValueError, "batch_size from 1 to .*, got 0"),
        (
            dict(method="wanda", blocksize=8),
            ValueError,
            "that has blocks .* blocksize=8, which nothing",
        ),
        (dict(pattern=(4, 8)), ValueError, r"compress=True, got \(4, 8\)"),
        (dict(pattern=(4, 4), compress=False), ValueError, r"1 <= n < m, got \(4, 4\)"),
        (dict(on_error="ignore"), ValueError, "'ignore'"),
        (dict(offload_activations="maybe"), ValueError, "'maybe'"),
        (dict(method=scores_of_wrong_shape), ValueError, r"scores .*\[32, 32\].* got \(32,\)"),
        (
            dict(masks={"model.layers.0.mlp.up": bool_mask(64, 32)}),
            ValueError,
            f"Near matches: .*{UP}",
        ),
        (dict(masks={UP: bool_mask(32, 64)}), ValueError, r"\[64, 32\], got \[32, 64\]"),
        (dict(masks={UP: torch.zeros(64, 32)}), TypeError, r"bool \[64, 32\], got a tensor .*32"),
        (dict(masks={UP: bool_mask(64, 32).numpy()}), TypeError, r"bool \[64, 32\], got array"),
        (
            dict(device="meta"),
            ValueError,
            "device: a device that holds data, got meta. Pass device=",
        ),
        (dict(device="mtia"), ValueError, "device: a device that this torch has, got 'mtia'"),
        (dict(masks={UP: ~bool_mask(64, 32)}), ValueError, "at most 2 kept .* got 4"),
        (
            dict(masks={UP: bool_mask(64, 32)}, skip=(UP,)),
            ValueError,
            "to be prunable, got skip rule",
        ),
    ],
)
def test_arguments_that_do_not_fit(arguments, error, text):
    model = build("llama")
    before = copy.deepcopy(model.state_dict())
    arguments = {"calibration": tokens(), "device": "cpu", "progress": False, **arguments}
    with pytest.raises(error, match=text):
        prune_model(model, **arguments)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_bare_linear_or_nothing_to_prune():
    with pytest.raises(ValueError, match="bare Linear"):
        prune_model(nn.Linear(8, 8), "magnitude")
    with pytest.raises(ValueError, match="ReLU without any"):
        prune_model(nn.ReLU(), "magnitude")
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="meta tensor"):
        prune_model(model, "magnitude")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights(value):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(ValueError, match="finite weights in model.layers.1.mlp.up_proj"):
        prune_model(model, "magnitude", progress=False)
    assert not any(isinstance(m, SparseLinear) for m in model.modules())
    report = prune_model(model, "magnitude", on_error="skip", progress=False, device="cpu")
    row = report["model.layers.1.mlp.up_proj"]
    assert row.skipped and row.reason == "NaN or Inf in the weight" and len(report.pruned) == 13


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_non_finite_inputs(method):
    data = X.clone()
    data[2, 3] = float("nan")
    with pytest.raises(
        ValueError, match="finite inputs of up, gate, got NaN or Inf|finite inputs of gate, up"
    ):
        prune_model(plain(), method, data, progress=False, device="cpu")
    report = prune_model(plain(), method, data, on_error="skip", progress=False, device="cpu")
    assert not report.pruned
    assert report["up"].reason == report["down"].reason == "NaN or Inf in the inputs of this layer"


def test_a_group_that_fails_falls_back_to_its_layers(monkeypatch):
    """Only the layer that SparseGPT cannot do stays dense; other errors are never swallowed."""
    module = sys.modules["sparsekern.prune.sparsegpt"]
    model = plain()
    bad = model.up.weight.detach().clone()
    real = module.sparsegpt

    def failing(w, hessian, **kwargs):
        if any(torch.equal(w[i : i + 32], bad) for i in range(0, len(w), 32)):
            raise PruneError("sparsekern.prune.sparsegpt: expected something better.")
        return real(w, hessian, **kwargs)

    monkeypatch.setattr(module, "sparsegpt", failing)
    with pytest.raises(RuntimeError, match="something better"):
        prune_model(plain(), "sparsegpt", X, progress=False, device="cpu")
    report = prune_model(model, "sparsegpt", X, on_error="skip", progress=False, device="cpu")
    assert "something better" in report["up"].reason
    assert isinstance(model.up, nn.Linear) and isinstance(model.gate, SparseLinear)

    def out_of_memory(w, hessian, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(module, "sparsegpt", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        prune_model(plain(), "sparsegpt", X, on_error="skip", progress=False, device="cpu")

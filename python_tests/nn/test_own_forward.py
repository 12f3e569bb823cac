"""Subclasses of nn.Linear that compute something else: replaced by a SparseLinear they would lose
it, in silence."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparsekern as sk
from sparsekern.finetune import Masked, SparseTrainingLinear, sparse_training


class Scaled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class LowRank(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.a = nn.Linear(self.in_features, 2, bias=False)
        self.b = nn.Linear(2, self.out_features, bias=False)

    def forward(self, x):
        return super().forward(x) + self.b(self.a(x))


class Standardised(nn.Linear):
    def forward(self, x):
        rows = self.weight - self.weight.mean(1, keepdim=True)
        return F.linear(x, rows / rows.std(1, keepdim=True), self.bias)


class Called(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Noisy(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y + torch.randn_like(y) if self.training else y


class Gated(nn.Linear):
    def forward(self, x, gate=None):
        y = super().forward(x)
        return y if gate is None else y * gate


class Cast(nn.Linear):
    def forward(self, x):
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


def on_the_object():
    layer = nn.Linear(16, 8)
    layer.forward = lambda x: 2 * F.linear(x, layer.weight, layer.bias)
    return layer


OWN = {
    "Scaled has its own forward": lambda: Scaled(16, 8),
    "LowRank has its own forward": lambda: LowRank(16, 8),
    "Standardised has its own forward": lambda: Standardised(16, 8),
    "Called has its own __call__": lambda: Called(16, 8),
    "Linear has a forward of its own, set on the layer": on_the_object,
}
LOST = {
    "Noisy computes something else in training": lambda: Noisy(16, 8),
    r"Gated has a forward with further arguments \(gate\)": lambda: Gated(16, 8),
}


def sparse(layer):
    with torch.no_grad():
        layer.weight.mul_(sk.prune.magnitude_mask(layer.weight))
    return layer


@pytest.mark.parametrize("reason", [*OWN, *LOST])
def test_from_linear_refuses_it(reason):
    layer = sparse((OWN | LOST)[reason]())
    expected = rf"from_linear: expected a layer that computes x·Wᵀ \+ b alone, got {reason}. Leave"
    with pytest.raises(TypeError, match=expected):
        sk.SparseLinear.from_linear(layer)
    with pytest.raises(TypeError, match=expected):
        SparseTrainingLinear.from_linear(layer)


@pytest.mark.parametrize("reason", [*OWN, *LOST])
@pytest.mark.parametrize("compress", [True, False])
def test_prune_model_keeps_it_as_it_is(reason, compress):
    layer = (OWN | LOST)[reason]()
    model, state = nn.Sequential(layer, nn.Linear(8, 8)), torch.get_rng_state()
    before = layer.weight.detach().clone()
    report = sk.prune_model(model, "magnitude", compress=compress, progress=False)
    row = next(row for row in report.layers if row.name == "0")
    pruned = reason in LOST and not compress  # there it stays what it is, with zeros
    assert row.skipped == (not pruned) and model[0] is layer
    assert torch.equal(layer.weight, before) == (not pruned)
    assert pruned or row.reason == reason.replace("\\", "")
    assert torch.equal(torch.get_rng_state(), state)  # no number was drawn from torch's generator


def test_after_masked_training_it_stays_dense():
    model = nn.Sequential(sparse(Scaled(16, 8)), sparse(Noisy(8, 8)), sparse(nn.Linear(8, 8)))
    want, x = copy.deepcopy(model).eval(), torch.randn(3, 16)
    dense = Masked(model).compress()
    assert list(dense.values()) == [
        "Scaled has its own forward",
        "Noisy computes something else in training",
    ]
    assert isinstance(model[2], sk.SparseLinear)
    torch.testing.assert_close(model.eval()(x), want(x))
    assert sparse_training(nn.Sequential(Scaled(16, 8), nn.Linear(8, 8))) == ["1"]


def test_a_forward_that_is_the_same_is_replaced():
    for layer in (sparse(Cast(16, 8)), nn.utils.parametrizations.weight_norm(nn.Linear(16, 8))):
        mask, x = sk.prune.magnitude_mask(layer.weight.detach()), torch.randn(3, 16)
        made = sk.SparseLinear.from_linear(layer, mask)
        torch.testing.assert_close(made(x), F.linear(x, layer.weight * mask, layer.bias))

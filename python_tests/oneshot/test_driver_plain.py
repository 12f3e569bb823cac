"""prune_model on plain nn.Module trees: calibrated as a whole, and what cannot be replaced."""

import copy

import pytest
import torch
from torch import nn

from python_tests.oneshot.driver_models import (
    build,
    hessian64,
    hook_inputs,
    plain,
    record_hessians,
    run_prune,
)
from sparsekern import prune
from sparsekern.nn import replace
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.oneshot.prune_model import prune_model


class Residual(nn.Module):
    """Blocks joined by code outside of them: not a chain."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


class Chain(Residual):
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Stacked(Residual):
    """Blocks in an nn.Sequential, as timm has them."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*self.blocks)

    def forward(self, x):
        return self.blocks(x)


@pytest.mark.parametrize("cls, propagates", [(Residual, False), (Chain, True), (Stacked, True)])
def test_module_lists_that_are_not_a_chain_are_calibrated_as_a_whole(cls, propagates):
    torch.manual_seed(0)
    model = cls()
    dense = copy.deepcopy(model)
    x = torch.randn(4, 10, 16)
    seen = record_hessians(model, calibration=x)
    (inputs,) = hook_inputs(dense, [dense.blocks[2][0]], lambda: dense(x))
    matrix = next(h for w, h in seen if torch.equal(w, dense.blocks[2][0].weight))
    assert torch.allclose(matrix.double(), hessian64(inputs), rtol=1e-4) == (not propagates)


# ------------------------------------------------------------------------------- plain module trees


class Gaps(Residual):
    """A list with a place that has no module, as Informer's layers between its blocks."""

    def __init__(self):
        super().__init__()
        self.between = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.between.append(None)

    def forward(self, x):
        for block, layer in zip(self.blocks, self.between):
            x = block(x)
            x = x if layer is None else layer(x)
        return x


class TwoStreams(nn.Module):
    """What comes after the block reads more than its hidden states, as LXMERT's heads do."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x, y):
            return self.first(x) + y, self.second(y) + x

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([self.Block()])
        self.head = nn.Linear(16, 16)

    def forward(self, x):
        y = x.flip(1)
        for block in self.blocks:
            x, y = block(x, y)
        return self.head(x * y)


@pytest.mark.parametrize("kind, layers", [(Gaps, 5), (TwoStreams, 3)])
def test_trees_that_only_look_like_a_chain(kind, layers):
    torch.manual_seed(0)
    model, x = kind(), torch.randn(40, 16)
    zeros = copy.deepcopy(model)
    assert len(run_prune(model, "wanda", x).pruned) == layers
    run_prune(zeros, "wanda", x, compress=False)
    torch.testing.assert_close(model(x), zeros(x))


@pytest.mark.parametrize("form", ["tensor", "list", "dicts", "tuples", "generator"])
@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_plain_modules(method, form):
    x = torch.randn(12, 5, 16, generator=torch.Generator().manual_seed(0))
    calibration = {
        "tensor": x,
        "list": list(x.split(4)),
        "dicts": [{"x": part, "scale": 2.0} for part in x.split(4)],
        "tuples": [(part, 2.0) for part in x.split(4)],
        "generator": (part for part in x.split(4)),
    }[form]
    model = plain()
    report = run_prune(model, method, calibration)
    kinds = {name: type(module) for name, module in model.named_children()}
    assert kinds == dict.fromkeys(("up", "gate", "down"), SparseLinear) | dict.fromkeys(
        ("narrow", "unused"), nn.Linear
    )
    assert report["narrow"].reason == "in_features 6 is not a multiple of 4"
    assert report["unused"].reason == "never called on the calibration data"
    assert all(0 < row.relative_error < 1 for row in report.pruned)
    assert model(x).shape == x.shape


class Experts(nn.Module):
    """Each is called with the tokens that chose it, if there are any or not."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (x[:, 0] > 0) == (number == 0) if number < 2 else x[:, 0] > 1e9
            y[rows] = expert(x[rows])
        return y


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
def test_a_layer_that_is_called_without_a_row_was_not_called(method):
    model = nn.Sequential(Experts(), nn.ReLU(), Experts())
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    report = run_prune(model, method, [x[:20], x[20:]])
    dense = {row.name: row.reason for row in report.skipped}
    never = "never called on the calibration data"
    # After the ReLU no value is below zero, and what is zero takes the second expert.
    assert dense == {"0.experts.2": never, "2.experts.2": never}


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "admm", "magnitude"])
def test_a_layer_that_sees_only_zeros_is_known_as_little_as_one_never_called(method):
    """SparseGPT would zero the whole weight, and Wanda choose by place."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    before = model[1].weight.clone()
    report = run_prune(model, method, torch.randn(64, 16))
    reasons = {row.name: row.reason for row in report.skipped}
    if method == "magnitude":  # which asks no inputs
        assert reasons == {} and isinstance(model[1], SparseLinear)
    else:
        assert reasons == {"1": "its inputs were all zero on the calibration data"}
        assert torch.equal(model[1].weight, before)


TRANSFORMED = {
    "vmap": lambda f, x: torch.vmap(f)(x),
    "vmap along the last": lambda f, x: torch.vmap(f, in_dims=1)(x.t().contiguous()),
    "vmap twice": lambda f, x: torch.vmap(torch.vmap(f))(x[None]),
    "jacrev": lambda f, x: torch.vmap(torch.func.jacrev(f))(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
}


@pytest.mark.parametrize("how", TRANSFORMED)
def test_layers_inside_of_transforms_are_calibrated_on_what_they_see(how):
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)), torch.randn(40, 16)
    model = nn.Sequential(copy.deepcopy(plain))
    inner = model[0]
    model.forward = lambda x: TRANSFORMED[how](inner, x)
    for one in (plain, model):
        run_prune(one, "sparsegpt", x)
    for i in (0, 2):
        torch.testing.assert_close(inner[i].weight.to_dense(), plain[i].weight.to_dense())


def test_a_forward_that_needs_gradients_is_told_how():
    class Force(nn.Sequential):
        def forward(self, x):
            x = x.detach().requires_grad_()
            return torch.autograd.grad(super().forward(x).sum(), x)[0]

    with pytest.raises(RuntimeError, match=r"Decorate its forward with torch.enable_grad\(\)"):
        run_prune(Force(nn.Linear(16, 16)), "wanda", torch.randn(4, 16))


def test_torchs_transformer_layers_with_padding():
    """For inference they make nested tensors of padded batches, which hooks cannot read."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    padded = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    call = {"src": torch.randn(2, 5, 16), "src_key_padding_mask": padded}
    report = run_prune(model, "wanda", [call], compress=False)
    assert {row.name for row in report.pruned} == {
        f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)
    }
    assert model.use_nested_tensor


def test_true_sequential_on_a_plain_tree():
    x = torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(0))
    model, dense = plain(), plain()
    seen = record_hessians(model, calibration=x, true_sequential=True)
    for layer in (dense.up, dense.gate):
        replace.write_weight(
            layer, layer.weight.detach() * prune.magnitude_mask(layer.weight.detach())
        )
    (inputs,) = hook_inputs(dense, [dense.down], lambda: dense(x))
    matrix = next(h for w, h in seen if torch.equal(w, dense.down.weight))
    torch.testing.assert_close(matrix.double(), hessian64(inputs), rtol=1e-4, atol=1e-5)


def test_magnitude_needs_no_calibration():
    model = build("llama")
    report = prune_model(model, "magnitude", device="cpu", progress=False)
    assert len(report.pruned) == 14 and report.calibration is None
    assert all(row.relative_error is None for row in report.pruned)
    other = build("llama")
    run_prune(other, "magnitude")
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            assert torch.equal(
                module.weight.to_dense(), other.get_submodule(name).weight.to_dense()
            )


def test_a_module_registered_twice_is_replaced_twice():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    report = prune_model(model, "magnitude", progress=False, device="cpu")
    assert len(report.layers) == 1
    assert isinstance(model[0], SparseLinear) and model[0] is model[2]


def test_modules_that_read_the_weight_of_their_child_keep_it():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    report = prune_model(model, "magnitude", progress=False, device="cpu")
    assert not report.pruned and all(
        "reads the weight itself" in row.reason for row in report.layers
    )
    assert model(torch.randn(2, 3, 16)).shape == (2, 3, 16)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_cannot_be_replaced_is_skipped_with_the_reason():
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    model = nn.Sequential(Scaled(8, 8), parametrized, nn.Linear(8, 8).double(), nn.Linear(8, 8))
    report = prune_model(model, "magnitude", progress=False, device="cpu")
    reasons = [row.reason for row in report.layers]
    assert reasons[0] == "Scaled has its own forward"
    assert reasons[1] == "weight is parametrized"
    assert reasons[2].startswith("dtype float64")
    assert reasons[3] is None

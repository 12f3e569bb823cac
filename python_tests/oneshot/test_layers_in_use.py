"""Linear layers that the code around them uses in other ways than by calling them: the pruned model
computes what the dense one with its zeros does, or the layer stays dense with the reason."""

import copy
import functools
import operator
import types
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import sparsekern as sk
from sparsekern.oneshot.discovery import HARMLESS

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


class Pair(nn.Module):
    def __init__(self, first: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(16, 16) if first is None else first
        self.list = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.last = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


def dense_with_zeros(model: nn.Module, x: Tensor = X) -> tuple[Tensor, Tensor]:
    """Outputs of a model pruned with SparseLinear layers, and with zeros in the dense ones."""
    other = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sk.prune_model(model, "magnitude", progress=False)
        sk.prune_model(other, "magnitude", compress=False, progress=False)
    return model(x), other(x)


def helper(layer: nn.Module, x: Tensor) -> Tensor:
    return functional.linear(x, layer.weight, bias=layer.bias)


READERS = {
    "getattr": lambda self, x: functional.linear(x, getattr(self.first, "weight")),  # noqa: B009
    "one of a list": lambda self, x: functional.linear(x, self.list[0].weight),
    "helper": lambda self, x: helper(self.first, x),
    "loop": lambda self, x: functools.reduce(
        lambda y, layer: functional.linear(y, layer.weight), self.list, x
    ),
    "by keyword": lambda self, x: self.first(input=x),
    "attributes": lambda self, x: self.first(x) * self.first.factor,
}


@pytest.mark.parametrize("reader", READERS)
def test_weights_of_layers_in_functional_linear(reader):
    model = Pair()
    model.first.factor = 3.0
    model.forward = types.MethodType(lambda self, x: self.last(READERS[reader](self, x)), model)
    got, expected = dense_with_zeros(model)
    assert isinstance(model.first, sk.SparseLinear)
    torch.testing.assert_close(got, expected)


def test_other_uses_of_a_weight_say_what_to_do():
    layer = sk.SparseLinear.from_sparse24(sk.prune_compress(torch.randn(16, 16)))
    for use in (
        lambda w: torch.cat([w, w]),
        lambda w: torch.matmul(X, w),
        lambda w: torch.einsum("to,oi->ti", X, w),
        lambda w: w @ X.t(),
        lambda w: 2 * w,
        lambda w: w == 0,  # Python's own would be False
        lambda w: w != torch.zeros(16, 16),
        lambda w: w > 0,
        lambda w: abs(-w),
        lambda w: w[0],
        list,
        lambda w: operator.setitem(w, 0, 0.0),
        lambda w: operator.imul(w, 2),
    ):
        with pytest.raises(TypeError, match="expected calls of the layer.*2:4 weight.*skip="):
            use(layer.weight)
    with pytest.raises(AttributeError, match=r"got .t of a 2:4 weight. Use weight.to_dense\(\)"):
        layer.weight.t()
    with pytest.raises(AttributeError, match=r"got a value for .data. Give the layer another one"):
        layer.weight.data = torch.zeros(16, 16)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = layer.weight.nothing
    assert not hasattr(layer.weight, "mean")
    weight = layer.weight
    assert weight == weight and weight != weight.clone() and weight in {weight, None}


ASKING = {
    "dtype": lambda w: w.dtype == X.dtype,
    "device": lambda w: w.device == X.device,
    "shape": lambda w: w.shape[0],
    "requires_grad": lambda w: 2 + w.requires_grad * 0,
    "is_meta": lambda w: not w.is_meta,
    "is_cuda": lambda w: not w.is_cuda,
    "is_floating_point": lambda w: w.is_floating_point(),
    "ndim": lambda w: w.ndim,
    "size": lambda w: w.size(1) * w.size()[0] * w.size(dim=-1),
    "dim": lambda w: w.dim(),
}


@pytest.mark.parametrize("what", sorted(HARMLESS))
def test_what_a_forward_may_ask_of_a_weight_is_answered_as_of_a_dense_one(what):
    """Every attribute that leaves a layer prunable is one that the 2:4 weight has."""
    model = Pair()
    model.forward = types.MethodType(
        lambda self, x: self.last(self.first(x) * ASKING[what](self.first.weight)), model
    )
    got, expected = dense_with_zeros(model)
    assert isinstance(model.first, sk.SparseLinear)
    torch.testing.assert_close(got, expected)


def test_a_weight_is_frozen_and_can_be_told_so():
    weight = sk.prune_compress(torch.randn(16, 16))
    weight.requires_grad = False
    assert weight.requires_grad_(False) is weight and not weight.requires_grad
    with pytest.raises(ValueError, match="expected requires_grad=False: .* got True. Train the"):
        weight.requires_grad = True


def test_hooks_stay_and_can_be_removed():
    model = Pair()
    handles = [
        model.first.register_forward_hook(lambda m, args, y: y + 1),
        model.first.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
    ]
    got, expected = dense_with_zeros(model)
    torch.testing.assert_close(got, expected)
    for handle in handles:
        handle.remove()
    assert not model.first._forward_hooks and not model.first._forward_pre_hooks
    torch.testing.assert_close(sk.decompress_model(copy.deepcopy(model))(X), model(X))


def test_a_failure_keeps_hooks_too():
    model = Pair()
    model.first.register_forward_hook(lambda m, args, y: y + 1)
    before = model(X)

    def fails(w, hessian):
        if calls:
            raise RuntimeError("no more")
        calls.append(1)
        return w.abs()

    calls: list[int] = []
    with pytest.raises(RuntimeError, match="no more"):
        sk.prune_model(model, fails, X, progress=False, undo=True)
    assert torch.equal(model(X), before)


class Named(nn.Linear):
    def twice(self, x: Tensor) -> Tensor:
        return self(self(x))


class Initialised(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


def test_layers_that_nothing_can_stand_for_stay_dense():
    own = Pair()
    own.first.forward = types.MethodType(lambda self, x: helper(self, x) * 2, own.first)
    expanded = Pair()
    expanded.first.weight = nn.Parameter(torch.randn(16, 1).expand(16, 16))
    narrow, elsewhere = Pair(), [Pair() for _ in range(3)]
    narrow.first.bias = nn.Parameter(torch.ones(1))
    object.__setattr__(elsewhere[0], "other", elsewhere[0].first)
    elsewhere[1].others = {"a": elsewhere[1].first}
    elsewhere[2].others = [elsewhere[2].first.forward]
    held = [Pair() for _ in range(3)]
    held[0].last.register_buffer("none", None)
    held[0].first.register_buffer("seen", torch.ones(1))
    held[1].first.register_parameter("gain", nn.Parameter(torch.ones(1)))
    held[2].first.add_module("inner", nn.Linear(16, 16))
    for model, reason in (
        (own, "a forward of its own"),
        (narrow, "its bias is [1] of torch.float32"),
        *((model, "Pair holds it outside of its modules, too") for model in elsewhere),
        (held[0], "Linear holds more than weight and bias (seen)"),
        (held[1], "Linear holds more than weight and bias (gain)"),
        (held[2], "Linear holds more than weight and bias (inner)"),
        (Pair(Named(16, 16)), "Named has methods of its own (twice)"),
        (expanded, "share their memory"),
    ):
        report = sk.prune_model(model, "magnitude", progress=False)
        assert reason in (report["first"].reason or "") and report["last"].is_24
        model(X)
    model = Pair(Initialised(16, 16))
    assert sk.prune_model(model, "magnitude", progress=False).share == 1
    # Without a SparseLinear in their place nothing is in the way.
    model = Pair(Named(16, 16))
    assert sk.prune_model(model, "magnitude", compress=False, progress=False).share == 1


def in_a_closure(model):
    layer = model.first
    return lambda x: layer(x)


HOLDERS = {
    "a closure": in_a_closure,
    "a partial": lambda model: functools.partial(lambda f, x: f(x), model.first),
    "a list in a dict": lambda model: {"a": [model.first]},
    "an object": lambda model: types.SimpleNamespace(first=model.first),
}


@pytest.mark.parametrize("where", HOLDERS)
@pytest.mark.parametrize("undo", [False, True])
def test_who_holds_a_layer_out_of_sight_calls_the_one_in_its_place(where, undo):
    model, zeros, calls = Pair(), Pair(), []
    model.holder = HOLDERS[where](model)
    model.first.register_forward_hook(lambda *_: calls.append(1))

    def forward(self, x):
        holder = self.holder
        if not callable(holder):
            holder = holder["a"][0] if isinstance(holder, dict) else holder.first
        return self.last(holder(x))

    model.forward = types.MethodType(forward, model)
    sk.prune_model(model, "wanda", X, progress=False, undo=undo)
    sk.prune_model(zeros, "wanda", X, progress=False, compress=False)
    assert isinstance(model.first, sk.SparseLinear)
    calls.clear()
    torch.testing.assert_close(model(X), zeros(X))
    assert calls == [1]
    copied = copy.deepcopy(model)
    sk.decompress_model(model)
    with torch.no_grad():
        model.first.weight.mul_(2)
        zeros.first.weight.mul_(2)
        torch.testing.assert_close(model(X), zeros(X))
        if where != "a closure":  # which no copy has of its own
            zeros.first.weight.mul_(0.5)
            torch.testing.assert_close(copied(X), zeros(X))


def test_a_compiled_layer():
    model = Pair()
    model.first = torch.compile(model.first, backend="eager")
    before = model(X)
    report = sk.prune_model(model, "magnitude", progress=False)
    assert report.share == 1 and not torch.equal(model(X), before)
    torch.testing.assert_close(model(X), model.last(model.first._orig_mod(X)))


def test_models_that_cannot_be_changed():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(16, 16), nn.ReLU()))
    for model in (scripted, nn.Sequential(scripted, nn.Linear(16, 16))):
        with pytest.raises(TypeError, match="expected a model of Python code, got TorchScript"):
            sk.prune_model(model, "magnitude", progress=False)
    exported = torch.export.export(nn.Sequential(nn.Linear(16, 16)), (X,)).module()
    with pytest.raises(
        TypeError, match="expected a model of Python code, got a graph of torch.exp"
    ):
        sk.prune_model(exported, "magnitude", progress=False)
    with torch.inference_mode():
        model = Pair()
    with pytest.raises(
        ValueError, match="first.weight, got inference tensors. Build or load the model"
    ):
        sk.prune_model(model, "magnitude", progress=False)

"""SparseExperts: found by what a forward does, equal to the module it stands for, and back."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import sparsekern as sk
from python_tests.nn.expert_models import FAMILIES, Bank, Mixture, build, ids, logits
from sparsekern.nn.sparse_experts import (
    SparseExperts,
    decompress_experts,
    find_experts,
    fuse_experts,
    unfuse_experts,
)

TRANSPOSED = ("gpt-oss", "llama4")


@pytest.mark.parametrize("family", FAMILIES)
def test_apart_and_together(family):
    """The same logits with the experts apart; together again the same Parameters, bit for bit."""
    model = build(family)
    before, parameters = logits(model), dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in parameters.items()}
    made = unfuse_experts(model)
    assert made and all(isinstance(new, SparseExperts) for _, new in made.values())
    for old, new in made.values():
        turned = family in TRANSPOSED
        assert new.recipe.matrices == (("gate_up_proj", turned), ("down_proj", turned))
        assert new.kind is type(old) and not new.is_sparse
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)
    for old, new in made.values():
        assert fuse_experts(model, new, old) is old
    assert list(dict(model.named_parameters())) == list(parameters)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name] and torch.equal(parameter, values[name])
    assert torch.equal(logits(model), before)


def test_a_bank_of_our_own_is_found_by_what_it_computes():
    torch.manual_seed(0)
    model = Mixture()
    bank, recipe = find_experts(model)["bank"]
    assert bank is model.bank
    assert recipe.matrices == (("first", False), ("second", True), ("last", True))
    assert recipe.experts == 4 and recipe.form == "routed"
    x = torch.randn(50, 16)
    before = model(x)
    unfuse_experts(model)
    torch.testing.assert_close(model(x), before)
    assert model.bank.second.shape == (4, 16, 32)  # code around it may ask
    assert model.bank.second.dtype == torch.float32 and len(model.bank.second) == 4


@pytest.mark.parametrize(
    "use",
    [
        lambda self, x: torch.einsum("ti,eoi->to", x, self.first),
        lambda self, x: x @ self.first[0] + self.first[0].sum(),
        lambda self, x: x @ self.first[0] + torch.nn.functional.linear(x, self.first[0]),
        lambda self, x: x @ self.first[:2].sum(0),
        lambda self, x: x @ self.first[0].double().float(),
    ],
)
def test_other_uses_of_a_parameter_are_not_experts(use):
    """Anything but products, or products both ways round."""

    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Parameter(torch.randn(4, 16, 16))

        def forward(self, x, index, weight):
            return use(self, x)

    model = nn.Sequential(Other())
    model[0](torch.randn(3, 16), None, None)
    assert find_experts(model) == {}


def test_a_forward_that_depends_on_the_weights_is_not_trusted():
    """Its products are all there is on stand-ins, and the result still differs."""

    class Odd(Bank):
        def forward(self, x, indices, scores):
            y = super().forward(x, indices, scores)
            return y + self.first.ndim + float(isinstance(self.first, nn.Parameter))

    torch.manual_seed(0)
    assert find_experts(nn.Sequential(Odd(4, 16))) == {}


def test_on_meta():
    with torch.device("meta"):
        model = Mixture()
    assert list(unfuse_experts(model)) == ["bank"]
    assert model.bank.expert(3)["last"].weight.is_meta
    last = model.bank.expert(3)["last"]
    assert (last.in_features, last.out_features) == (32, 16)


def sparse(family="mixtral", **more):
    model = build(family, **more)
    sk.prune_model(model, "magnitude", device="cpu", progress=False)
    return model


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_state_dict_copies_and_pickles(family):
    model = sparse(family)
    expected = logits(model)
    state = model.state_dict()
    assert any(name.endswith("experts.3.down_proj.compressed") for name in state)
    assert not any(name.endswith("experts.down_proj") for name in state)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    other = sparse(family, seed=5)
    assert not torch.equal(logits(other), expected)
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    other.load_state_dict(torch.load(stream, weights_only=True))
    assert torch.equal(logits(other), expected)
    inner = next(m for m in model.modules() if isinstance(m, SparseExperts))
    assert "4 of 4 2:4" in repr(inner) and inner.kind.__name__ in repr(inner)


def test_other_dtypes_and_training_flags():
    model = sparse().to(torch.bfloat16)
    reference = copy.deepcopy(model)
    names = decompress_experts(reference)
    assert names and not any(isinstance(m, SparseExperts) for m in reference.modules())
    reference.set_experts_implementation("eager")
    assert torch.equal(logits(model), logits(reference))
    model.train()
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_decompressed_is_dense_with_zeros(family):
    model = sparse(family)
    dense, other = copy.deepcopy(model), build(family)
    sk.prune_model(other, "magnitude", device="cpu", progress=False, compress=False)
    for name in decompress_experts(dense):
        for key, parameter in dense.get_submodule(name)._parameters.items():
            assert torch.equal(parameter, other.get_submodule(name)._parameters[key])
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-5, atol=1e-6)


def test_gradients_reach_inputs_biases_and_dense_experts():
    model = build("gpt-oss")
    sk.prune_model(model, "magnitude", skip=("lm_head", "*.0.gate_up_proj"), progress=False)
    model(ids()).logits.square().mean().backward()
    experts = model.model.layers[0].mlp.experts
    for tensor in (
        model.model.embed_tokens.weight,
        experts.gate_up_proj_bias,
        experts.expert(0)["gate_up_proj"].weight,
    ):
        assert tensor.grad is not None and float(tensor.grad.abs().sum()) > 0


def test_dense_experts_beside_sparse_ones_keep_their_own_memory_only():
    model = build("mixtral")
    sk.prune_model(model, "magnitude", skip=("lm_head", "*.1.down_proj"), progress=False)
    left = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.lm_head]
    assert len(left) == 2
    assert all(m.weight.untyped_storage().nbytes() == m.weight.nbytes for m in left)


def test_compile_leaves_the_loop_out_of_its_graphs():
    torch.manual_seed(0)
    model, x = Mixture(), torch.randn(20, 16)
    sk.prune_model(model, "magnitude", progress=False)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), expected)
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(model, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()
    with pytest.raises(NotImplementedError, match="dense experts for torch.export, .*decompress_"):
        torch.export.export(model, (x,), strict=False)


def test_an_expert_alone():
    """What its layers see is what that expert would see of these tokens."""
    model = Mixture()
    unfuse_experts(model)
    seen = []
    for layer in model.bank.layers("first"):
        layer.register_forward_pre_hook(lambda m, args: seen.append((m, args[0])))
    x = torch.randn(5, 16)
    assert model.bank.alone(2, x)
    busy = [(m, got) for m, got in seen if got.numel()]
    assert len(busy) == 1 and busy[0][0] is model.bank.layers("first")[2]
    assert torch.equal(busy[0][1], x)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu(family):
    """bf16 on the CUDA kernels, against dense weights with the same zeros."""
    model = build(family).to("cuda", torch.bfloat16)
    sk.prune_model(model, "magnitude", progress=False)
    dense = copy.deepcopy(model)
    decompress_experts(dense)
    tokens = ids(2, 12, seed=7).cuda()
    got, expected = logits(model, tokens).float(), logits(dense, tokens).float()
    assert float((got - expected).norm() / expected.norm()) < 0.03

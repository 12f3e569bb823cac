"""sparsekern.optimize(gated=True): silu(gate) · up in the launch of gate and up."""

import copy
import pickle

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.nn import gated_mlp
from sparsekern.nn.gated_mlp import GatedMLP, _computes_formula


class Mlp(nn.Module):
    def __init__(self, act=nn.SiLU, bias=False):
        super().__init__()
        self.gate_proj = nn.Linear(16, 24, bias=bias)
        self.up_proj = nn.Linear(16, 24, bias=bias)
        self.down_proj = nn.Linear(24, 16, bias=bias)
        self.act_fn = act()

    def forward(self, hidden):
        """Of a decoder."""
        product = self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))
        return product


class Clamped(Mlp):
    def forward(self, x):
        x = x.clamp(-1, 1)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Swapped(Mlp):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


def pruned(kind=Mlp, **options):
    torch.manual_seed(0)
    model = nn.Sequential(kind(**options)).eval()
    sk.prune_model(model, "magnitude", skip=(), progress=False)
    return model


@pytest.fixture
def kernel(monkeypatch):
    """As if there were a kernel; the op is composed of two layers on the CPU. Counts its calls."""
    calls = []
    original = gated_mlp.gated_linear

    def counted(x, gate, up):
        calls.append(tuple(x.shape))
        return original(x, gate, up)

    monkeypatch.setattr(gated_mlp, "_no_kernel", lambda gate, up: None)
    monkeypatch.setattr(gated_mlp, "gated_linear", counted)
    return calls


@torch.no_grad()
def test_few_tokens_take_the_op_and_many_do_not(kernel):
    model = pruned()
    inputs = [torch.randn(1, tokens, 16) for tokens in (1, 32, 33)]
    before = [model(x) for x in inputs]
    names = list(model.state_dict())
    report = sk.optimize(model, gated=True)
    assert report.gated == ["0"] and not report.skipped
    assert str(report) == "2 layers in 1 launches, 1 of them with silu(gate) * up"
    for x, wanted in zip(inputs, before):
        torch.testing.assert_close(model(x), wanted)
    assert kernel == [(1, 1, 16), (1, 32, 16)]
    assert list(model.state_dict()) == names
    assert isinstance(model[0], Mlp) and repr(model[0]).startswith("Mlp(")
    report.undo()
    assert type(model[0]) is Mlp and torch.equal(model(inputs[0]), before[0])
    assert len(kernel) == 2


@torch.no_grad()
def test_other_weights_and_copies_are_not_fused(kernel):
    model = pruned()
    sk.optimize(model, gated=True)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied[0]) is Mlp
    x = torch.randn(2, 16)
    wanted = model(x)
    kernel.clear()
    model[0].up_proj.weight = model[0].up_proj.weight.clone()
    torch.testing.assert_close(model(x), wanted)
    assert isinstance(model[0], GatedMLP) and kernel == []


def test_gradients_flow(kernel):
    model, x = pruned(), torch.randn(3, 16, requires_grad=True)
    model(x).sum().backward()
    wanted, x.grad = x.grad, None
    sk.optimize(model, gated=True)
    model(x).sum().backward()
    torch.testing.assert_close(x.grad, wanted)


def test_compiles_without_breaks(kernel, monkeypatch):
    monkeypatch.setattr(gated_mlp, "gated_linear", sk.gated_linear)
    model, x = pruned(), torch.randn(3, 16)
    graphs = []

    def keep(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    with torch.no_grad():
        wanted = model(x)
        sk.optimize(model, gated=True)
        got = torch.compile(model, backend=keep, fullgraph=True)(x)
    torch.testing.assert_close(got, wanted)
    assert sum("gated_linear" in target for target in graphs[0]) == 1


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"kind": Clamped}, "the forward of Clamped is not known"),
        ({"kind": Swapped}, "the forward of Swapped is not known"),
        ({"act": nn.GELU}, "the activation is GELU, not SiLU"),
        ({"bias": True}, "gate or up has a bias"),
    ],
)
def test_what_is_not_fused(kernel, options, why):
    model = pruned(**options)
    report = sk.optimize(model, gated=True)
    assert report.groups == [("0.gate_proj", "0.up_proj")] and not report.gated
    assert why in report.skipped["0.gate_proj", "0.up_proj", "silu"]


def test_nothing_is_fused_without_a_kernel_or_unasked():
    model = pruned()
    report = sk.optimize(model, gated=True)
    if not torch.cuda.is_available():
        assert "no kernel for a gated pair" in str(report) and not report.gated
    assert not sk.optimize(pruned()).gated


def test_models_of_transformers():
    pytest.importorskip("transformers")
    from transformers.models.gemma.modeling_gemma import GemmaMLP
    from transformers.models.llama.modeling_llama import LlamaMLP
    from transformers.models.mistral.modeling_mistral import MistralMLP
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

    assert all(map(_computes_formula, (LlamaMLP, MistralMLP, Qwen2MLP, GemmaMLP)))
    assert not _computes_formula(nn.Linear)


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu():
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the kernel needs Hopper")
    torch.manual_seed(0)
    mlp = Mlp().eval()
    mlp.gate_proj, mlp.up_proj = (nn.Linear(512, 1024, bias=False) for _ in range(2))
    mlp.down_proj = nn.Linear(1024, 512, bias=False)
    model = nn.Sequential(mlp).to("cuda", torch.bfloat16)
    sk.prune_model(model, "magnitude", skip=(), progress=False)
    x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    wanted = model(x)
    assert sk.optimize(model, gated=True).gated == ["0"]
    torch.testing.assert_close(model(x), wanted, rtol=2e-2, atol=2e-2)

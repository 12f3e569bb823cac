"""Every weight of a matrix product is in the report, and a run that did less than asked says so."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import sparsekern as sk
from python_tests.oneshot.driver_models import build, is_24, run_prune, tokens, transformers
from sparsekern.nn.own_forward import computes_linear
from sparsekern.nn.sparse_linear import SparseLinear

X = torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(0))
SMALL = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=128,
)


def magnitude(model, **options):
    return sk.prune_model(model, "magnitude", progress=False, device="cpu", **options)


class Projection(nn.Module):
    """A linear layer under another name, with its own forward."""

    def __init__(self, out_features=16, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, 16))
        self.bias = nn.Parameter(torch.randn(out_features)) if bias else None

    def forward(self, hidden_states):
        y = hidden_states @ self.weight.T
        return y if self.bias is None else y + self.bias


class Tripled(Projection):
    def forward(self, x):
        return 3 * super().forward(x)


class Squared(Projection):
    def forward(self, x):
        return super().forward(x) ** 2


def test_linear_layers_are_recognised_by_what_they_compute():
    for bias in (True, False):
        assert computes_linear(Projection(bias=bias)) and computes_linear(
            nn.Linear(8, 4, bias=bias)
        )
    for other in (Tripled(), Squared(), nn.Embedding(16, 16), nn.Conv1d(4, 4, 1), nn.LayerNorm(16)):
        assert not computes_linear(other)
    model = nn.Sequential(Projection(), Projection(bias=False))
    dense = copy.deepcopy(model)
    report = sk.prune_model(model, "wanda", X, progress=False, device="cpu")
    assert len(report.pruned) == 2 and report.share == 1
    assert all(isinstance(m, SparseLinear) for m in model)
    expected = X @ (dense[0].weight * model[0].weight.mask()).T + dense[0].bias
    torch.testing.assert_close(model[0](X), expected)


def test_falcon_is_pruned():
    model = transformers.FalconForCausalLM(
        transformers.FalconConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=128
        )
    ).eval()
    report = run_prune(model, "sparsegpt", tokens() % 128)
    assert len(report.pruned) == 8 and report.share > 0.9 and not report.partial


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 16, 32))
        self.route = nn.Linear(16, 4)

    def forward(self, x):
        return self.route(x) @ torch.einsum("...i,eio->...eo", x, self.gate_up_proj)


def test_experts_in_one_parameter_are_rows_and_a_warning():
    model = nn.Sequential(Experts())
    with pytest.warns(UserWarning, match=r"less than half was pruned: 3.0% .*97% experts in one"):
        report = magnitude(model)
    row = report["0.gate_up_proj"]
    assert row.skipped and row.shape == (4, 16, 32) and row.reason.startswith("experts in one")
    assert report.partial and report.share == 64 / (64 + 4 * 16 * 32)
    assert ", 3.0% of the linear weights are 2:4" in report.summary()
    assert "4x16x32" in report.table()


@pytest.mark.parametrize("name", ["MixtralConfig", "Qwen3MoeConfig", "GptOssConfig"])
def test_experts_of_transformers(name):
    config = getattr(transformers, name)(
        **SMALL,
        num_key_value_heads=2,
        head_dim=16,
        **(
            dict(num_experts=4, moe_intermediate_size=64)
            if "Qwen" in name
            else dict(num_local_experts=4)
        ),
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    inside = sum(p.numel() for n, p in model.named_parameters() if "experts" in n and p.dim() == 3)
    report = magnitude(model)
    experts = sum(row.elements for row in report.pruned if ".experts." in row.name)
    assert experts == inside > 0 and not report.partial and report.share > 0.9


def test_weights_that_are_computed_in_every_forward():
    """torch.nn.utils.prune and the old weight norm put a plain tensor where the parameter was."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    torch_prune.l1_unstructured(model[0], "weight", 0.3)
    before = model(X)
    report = magnitude(model, compress=False, skip=(), targets=("0", "1"))
    assert "computed in every forward from bias, weight_orig" in report["0"].reason
    assert report["1"].reason is None and report["2"].reason == "no target"
    assert not torch.equal(model(X), before)


def test_a_second_run_lists_what_is_2_4_already():
    model = build()
    first = run_prune(model, "magnitude")
    with pytest.warns(UserWarning, match="nothing was pruned, 14 layers were 2:4 already"):
        again = run_prune(model, "magnitude")
    assert again.share == first.share > 0.8 and len(again.layers) == len(first.layers)
    assert {row.reason for row in again.layers if row.is_24} == {"already 2:4"}
    row = again["model.layers.0.mlp.up_proj"]
    assert row.bytes_sparse == first[row.name].bytes_sparse and row.bytes_dense == 64 * 32 * 4


def test_float64_and_quantised_dtypes_say_so():
    with pytest.warns(UserWarning, match="nothing was pruned: 0.0% .*dtype float64"):
        assert magnitude(build().double()).partial
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[0].weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False)
    assert "quantised: dtype int8" in magnitude(model)["0"].reason


class Wrapped(torch.Tensor):
    """Stands for a quantised tensor subclass."""


def test_tensor_subclasses_are_not_called_tied():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    for layer in model[:2]:
        data = torch.randn(16, 16).as_subclass(Wrapped)
        layer.weight = nn.Parameter(data, requires_grad=False)
    report = magnitude(model)
    assert all("Wrapped" in report[name].reason for name in ("0", "1"))
    assert report["2"].reason is None


class Adapted(nn.Module):
    """As peft builds it."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(16, 16)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(16, 8, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(8, 16, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_adapters_stay_trainable_and_their_base_is_pruned():
    model = nn.Sequential(Adapted())
    report = sk.prune_model(model, "wanda", X, progress=False, device="cpu")
    assert [row.name for row in report.pruned] == ["0.base_layer"]
    assert report["0.lora_A.default"].reason == "adapter of 0"
    model(X).sum().backward()
    assert model[0].lora_B["default"].weight.grad is not None


def test_a_base_whose_weight_dora_reads_stays_dense():
    peft = pytest.importorskip("peft", reason="needs peft, which is no dependency")
    config = peft.LoraConfig(use_dora=True, target_modules=["0"])
    adapted = peft.get_peft_model(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), config)
    report = sk.prune_model(adapted, "wanda", X, progress=False, device="cpu")
    assert [row.name for row in report.pruned] == ["base_model.model.1"]
    base = report["base_model.model.0.base_layer"]
    assert base.reason == "an adapter (peft.tuners.lora.layer) reads the weight itself"
    assert adapted(X).isfinite().all()


class Owner(nn.Module):
    """Reads the weight of one child, and the dtype of the other's."""

    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.called(x.to(self.called.weight.dtype)) @ self.read.weight.t()


def test_a_weight_that_its_owner_reads_stays_dense():
    model = nn.Sequential(Owner())
    report = magnitude(model)
    assert report["0.read"].reason == "Owner reads the weight itself"
    assert report["0.called"].reason is None
    assert model(X).shape == X.shape


class Rescaler(nn.Module):
    """Reads weights two levels below, of blocks in a list; and once through a chain from self."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"inner": Owner()}) for _ in range(2))
        self.first = nn.Sequential()
        self.first.inner = Owner()

    def forward(self, x):
        for block in self.blocks:
            x = x / block.inner.called.weight.abs().amax()
        return x + self.first.inner.called.weight.abs().amax()


def test_a_weight_that_is_read_from_further_up_stays_dense():
    model = nn.Sequential(Rescaler())
    report = magnitude(model)
    for name in ("0.blocks.0.inner", "0.blocks.1.inner", "0.first.inner"):
        assert report[f"{name}.called"].reason == "Rescaler reads the weight itself"
        assert report[f"{name}.read"].reason == "Owner reads the weight itself"


def test_mamba_without_calibration_still_runs():
    config = transformers.MambaConfig(
        hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4, time_step_rank=4
    )
    model = transformers.MambaForCausalLM(config).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = magnitude(model)
        assert model(tokens(2, 8)).logits.isfinite().all()
    assert "reads the weight itself" in report["backbone.layers.0.mixer.dt_proj"].reason
    assert report["backbone.layers.0.mixer.in_proj"].reason is None


def test_other_kinds_of_weights_have_their_reason():
    model = nn.ModuleDict(
        dict(
            conv=nn.Conv2d(4, 8, 3),
            lstm=nn.LSTM(16, 16),
            linear=nn.Linear(64, 64),
            table=nn.Embedding(9, 4),
        )
    )
    report = magnitude(model)
    assert report["conv"].reason == "convolution"
    assert report["lstm.weight_ih_l0"].reason == "recurrent layer (LSTM)"
    assert report["linear"].reason is None and len(report.layers) == 4


def test_a_users_own_skip_is_not_called_partial():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = run_prune(build(layers=3), "magnitude", skip=("lm_head", 0, 1))
    assert report.share < 0.5 and not report.partial


def test_targets_beside_skip():
    report = run_prune(
        build(), "wanda", targets=("*.mlp.*", "block:1"), skip=("lm_head", "*.q_proj")
    )
    names = {row.name.split(".", 2)[2] for row in report.pruned}
    assert names == {
        *(f"{i}.mlp.{part}_proj" for i in (0, 1) for part in ("up", "gate", "down")),
        *(f"1.self_attn.{part}_proj" for part in "kvo"),
    }
    assert report["model.layers.0.self_attn.k_proj"].reason == "no target"
    with pytest.raises(ValueError, match=r"target rule '\*\.fc1' to match"):
        run_prune(build(), "wanda", targets="*.fc1")


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models_are_pruned(whole):
    """A model that was compiled and has run, or a compiled part of one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.ReLU(), nn.Linear(16, 16)))
    if whole:
        compiled = torch.compile(model, backend="eager")
    else:
        model[1] = torch.compile(model[1], backend="eager")
        compiled = model
    before = compiled(X)
    report = sk.prune_model(compiled, "wanda", X, progress=False, device="cpu")
    assert len(report.pruned) == 2
    linears = [m for m in compiled.modules() if isinstance(m, SparseLinear)]
    assert len(linears) == 2 and all(is_24(m.weight.to_dense()) for m in linears)
    after = compiled(X)
    expected = linears[1](torch.relu(linears[0](X)))
    torch.testing.assert_close(after, expected)
    assert not torch.allclose(after, before)

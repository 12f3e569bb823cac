"""ASP's calls against what NVIDIA's documentation and published code define."""

import itertools
import warnings

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.asp import ASP, CALCULATORS, PATTERN_ORDER, create_mask, m4n2_1d

pytestmark = pytest.mark.filterwarnings("ignore:.*input channels are not permuted")


@pytest.fixture(autouse=True)
def forget():
    yield
    for model in list(ASP._states):
        ASP.forget(model)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 5))


def published_rule(matrix):
    """argmax over the six patterns, in the order of a set of permutations, of |w| · pattern in
    float32: the definition of m4n2_1d, group by group."""
    patterns = list(set(itertools.permutations([1.0, 1.0, 0.0, 0.0])))
    mask = torch.zeros_like(matrix, dtype=torch.bool)
    for row in range(matrix.shape[0]):
        for first in range(0, matrix.shape[1], 4):
            four = matrix[row, first : first + 4].float().abs()
            sums = torch.stack([(four * torch.tensor(p)).sum() for p in patterns])
            best = max(range(6), key=lambda i: (float(sums[i]), -i))
            mask[row, first : first + 4] = torch.tensor(patterns[best]) > 0
    return mask


def test_pattern_order_is_that_of_the_set():
    patterns = list(set(itertools.permutations([1.0, 1.0, 0.0, 0.0])))
    assert tuple(tuple(i for i in range(4) if p[i]) for p in patterns) == PATTERN_ORDER


@pytest.mark.parametrize("kind", ["normal", "ties", "rounding", "zeros", "bfloat16"])
def test_m4n2_1d_is_the_published_rule_with_ties(kind, device):
    w = torch.randn(24, 32)
    if kind == "ties":
        w = (2 * w).round()
    if kind == "rounding":  # one large weight: the sums of the three pairs with it round alike
        w[:, ::4] = 1e9
        w[:, 1::4] *= 1e-3
    if kind == "zeros":
        w[::2] = 0
    if kind == "bfloat16":
        w = w.bfloat16()
    mask = m4n2_1d(w.to(device)).cpu()
    assert torch.equal(mask, published_rule(w))
    assert (mask.reshape(-1, 4).sum(1) == 2).all()
    if kind == "rounding":  # where it differs from keeping the two largest
        assert not torch.equal(mask, sk.prune.magnitude_mask(w))


@pytest.mark.parametrize("shape", [(8, 16), (8, 16, 3), (8, 16, 3, 5), (8, 16, 2, 3, 2), (16,)])
def test_masks_go_along_input_channels(shape):
    w = torch.randn(shape)
    mask = create_mask(w)
    assert mask.shape == w.shape
    channels = mask if w.dim() == 1 else mask.movedim(1, -1)
    assert (channels.reshape(-1, 4).sum(1) == 2).all()
    rows = w if w.dim() == 1 else w.movedim(1, -1)
    want = published_rule(rows.reshape(-1, rows.shape[-1]))
    assert torch.equal(channels.reshape(want.shape), want)


@pytest.mark.parametrize("pattern", CALCULATORS)
def test_two_dimensional_patterns_are_valid(pattern):
    mask = create_mask(torch.randn(16, 32), pattern)
    width = 8 if "m8" in pattern else 4
    assert (mask.reshape(-1, width).sum(1) == width // 2).all()
    if "2d" in pattern:
        assert (mask.t().reshape(-1, 4).sum(1) == 2).all()


def test_the_usual_script_runs_and_saves_what_asp_saves(tmp_path):
    model = net()
    dense = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    ASP.prune_trained_model(model, optimizer)
    assert ASP.is_sparsity_enabled()
    x, y = torch.randn(64, 32), torch.randn(64, 5)
    first = None
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        first = first or loss.item()
    assert loss.item() < first
    state = model.state_dict()
    torch.save(state, tmp_path / "model.pt")
    for layer in ("0", "2"):
        mask = state[f"{layer}.__weight_mma_mask"]
        assert torch.equal(mask, published_rule(dense[f"{layer}.weight"]))
        assert not state[f"{layer}.weight"][~mask].any()
    assert "3.__weight_mma_mask" not in state  # 5 rows: the size rule
    assert ASP.masked(model).check() == 0

    again = net(1)  # the documented way back: init, load, optimizer
    ASP.init_model_for_pruning(again, verbosity=0, whitelist=[nn.Linear])
    assert not ASP.is_sparsity_enabled(again)
    again.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert ASP.is_sparsity_enabled()
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1, momentum=0.9)
    ASP.init_optimizer_for_pruning(optimizer)
    nn.functional.mse_loss(again(x), y).backward()
    optimizer.step()
    assert ASP.masked(again).check() == 0
    with torch.no_grad():
        want = again(x)
        assert ASP.masked(again).compress() == {}
        torch.testing.assert_close(again(x), want)
    assert isinstance(again[0], sk.SparseLinear)


def test_restore_and_recompute():
    model = net()
    dense = model[0].weight.detach().clone()
    ASP.init_model_for_pruning(model, verbosity=0, allow_recompute_mask=True)
    assert not ASP.is_sparsity_enabled()
    ASP.compute_sparse_masks()
    assert ASP.is_sparsity_enabled() and (model[0].weight == 0).sum() * 2 == dense.numel()
    assert torch.equal(model[0].weight + model.state_dict()["0.__weight_mma_pruned_p"], dense)
    ASP.restore_pruned_weights()
    assert torch.equal(model[0].weight, dense) and not ASP.is_sparsity_enabled()
    with torch.no_grad():
        model[0].weight.mul_(torch.randn_like(dense))
    ASP.compute_sparse_masks()
    first = model.state_dict()["0.__weight_mma_mask"].clone()
    ASP.compute_sparse_masks()  # computed again from the restored weights: the same
    assert torch.equal(first, model.state_dict()["0.__weight_mma_mask"])
    plain = net()
    ASP.init_model_for_pruning(plain, verbosity=0)
    ASP.compute_sparse_masks()
    with pytest.raises(ValueError, match="allow_recompute_mask=True"):
        ASP.restore_pruned_weights()
    with pytest.raises(ValueError, match="allow_recompute_mask=True"):
        ASP.compute_sparse_masks()


def test_many_models_and_the_names():
    one, two = net(), net(1)
    ASP.init_model_for_pruning(one, verbosity=0, disallowed_layer_names=["2"])
    ASP.init_model_for_pruning(two, verbosity=0, allowed_layer_names=["2"])
    optimizers = [torch.optim.AdamW(m.parameters()) for m in (one, two)]
    for optimizer in optimizers:  # each finds its own model
        ASP.init_optimizer_for_pruning(optimizer)
    ASP.compute_sparse_masks(one)
    ASP.compute_sparse_masks(two)
    for model, optimizer in zip((one, two), optimizers):
        model(torch.randn(4, 32)).sum().backward()
        optimizer.step()
        assert ASP.masked(model).check() == 0
    assert [e.name for e in ASP.masked(one).entries] == ["0.weight"]
    assert [e.name for e in ASP.masked(two).entries] == ["2.weight"]
    assert ASP.already_init_asp_model() and not ASP.already_init_asp_model(net())
    with pytest.raises(ValueError, match="not initialised yet"):
        ASP.init_model_for_pruning(one)


def test_convolutions_and_attention():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(16, 8, 3)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x):
            y = self.conv(x).flatten(2)
            y = torch.cat((y, y), 1).transpose(1, 2)
            return self.attention(y, y, y)[0]

    model = Both()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ASP.prune_trained_model(model, optimizer)
    names = [entry.name for entry in ASP.masked().entries]
    assert names == ["conv.weight", "attention.in_proj_weight", "attention.out_proj.weight"]
    model(torch.randn(2, 16, 6, 6)).sum().backward()
    optimizer.step()
    assert ASP.masked().check() == 0 and ASP.is_sparsity_enabled()
    reasons = ASP.masked().compress()
    assert set(reasons) == set(names) and "reads the weight itself" in reasons[names[2]]


def test_custom_calculator_and_custom_layer():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(8, 16))

        def forward(self, x):
            return x @ self.kernel.t()

    model = nn.Sequential(Own(), nn.Linear(8, 8))
    ASP.init_model_for_pruning(
        model,
        mask_calculator=lambda w: torch.arange(w.shape[1]).expand_as(w) % 2 == 0,
        verbosity=0,
        whitelist=[nn.Linear],
        custom_layer_dict={Own: ["kernel"]},
    )
    ASP.compute_sparse_masks()
    assert not model[0].kernel[:, 1::2].any() and model[0].kernel[:, ::2].all()
    assert len(ASP.masked().entries) == 1  # the Linear's 8 columns break the size rule


def test_permutation_flag_is_answered():
    with pytest.warns(UserWarning, match="input channels are not permuted here"):
        ASP.init_model_for_pruning(net(), verbosity=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ASP.init_model_for_pruning(net(), verbosity=1, allow_permutation=False)
    with pytest.warns(UserWarning, match="no graph is saved"):
        ASP.set_permutation_saving_params(True)


def test_errors():
    with pytest.raises(RuntimeError, match="init_model_for_pruning first"):
        ASP.compute_sparse_masks(net())
    with pytest.raises(ValueError, match="init_model_for_pruning first"):
        ASP.init_optimizer_for_pruning(torch.optim.SGD(net().parameters(), 0.1))
    with pytest.raises(ValueError, match="'m4n2_3d'"):
        ASP.init_model_for_pruning(net(), "m4n2_3d")
    with pytest.raises(ValueError, match="custom_layer_dict"):
        ASP.init_model_for_pruning(net(), whitelist=[nn.Bilinear])
    for wrong in (lambda w: None, lambda w: torch.ones_like(w)):
        model = net()
        ASP.init_model_for_pruning(model, wrong, verbosity=0, allow_permutation=False)
        with pytest.raises(ValueError, match="a bool mask .* from mask_calculator, got .* Return"):
            ASP.compute_sparse_masks(model)


def test_one_optimizer_of_two_models():
    one, two = net(), net(1)
    for model in (one, two):
        ASP.init_model_for_pruning(model, verbosity=0, allow_permutation=False)
    optimizer = torch.optim.AdamW([*one.parameters(), *two.parameters()])
    ASP.init_optimizer_for_pruning(optimizer)
    for model in (one, two):
        ASP.compute_sparse_masks(model)
        model(torch.randn(4, 32)).sum().backward()
    optimizer.step()
    assert ASP.masked(one).check() == 0 and ASP.masked(two).check() == 0
    with pytest.raises(ValueError, match="not attached yet"):
        ASP.init_optimizer_for_pruning(optimizer)


def test_a_weight_belongs_to_one_model():
    inner = net()
    ASP.init_model_for_pruning(inner, verbosity=0, allow_permutation=False)
    outer = nn.Sequential(nn.Linear(32, 32), inner)
    with pytest.raises(ValueError, match="1.0 in one model, got another one"):
        ASP.init_model_for_pruning(outer, verbosity=0, allow_permutation=False)
    assert not any("mma" in name for name, _ in outer[0].named_buffers())


def test_a_model_is_left_alone_when_its_optimizer_does_not_fit():
    model = net()
    for optimizer, error in ((None, TypeError), (torch.optim.SGD(net().parameters()), ValueError)):
        with pytest.raises(error, match="optimizer"):
            ASP.prune_trained_model(model, optimizer)
        assert not ASP.already_init_asp_model(model) and not list(model.buffers())


def test_masks_that_are_not_2_of_4_stay_dense_with_the_reason():
    for pattern, compute in (("m8n4_1d_pairs", True), ("m4n2_1d", False)):
        model = net()
        ASP.init_model_for_pruning(model, pattern, verbosity=0, allow_permutation=False)
        if compute:
            ASP.compute_sparse_masks(model)
        reasons = ASP.masked(model).compress()
        assert set(reasons.values()) == {"its mask is not 2:4"} and type(model[0]) is nn.Linear


def test_arguments_that_would_do_less_than_asked():
    def start(**options):
        ASP.init_model_for_pruning(net(), verbosity=0, allow_permutation=False, **options)

    with pytest.warns(UserWarning, match=r"\['module.0'\], which no layer has"):
        start(disallowed_layer_names=["module.0"])
    for options, error, text in (
        ({"whitelist": nn.Linear}, TypeError, "whitelist: a list"),
        ({"whitelist": ["Linear"]}, ValueError, "known types in whitelist, got 'Linear'"),
        ({"disallowed_layer_names": "2"}, TypeError, "disallowed_layer_names: a list"),
        ({"custom_layer_dict": {nn.Linear: "weight"}}, TypeError, "a list of names, got 'weight'"),
        ({"custom_layer_dict": {nn.Linear: ["w"]}}, ValueError, r"got \['w'\]. It has"),
    ):
        with pytest.raises(error, match=text):
            start(**options)


def initialised(model, **options):
    ASP.init_model_for_pruning(model, verbosity=0, allow_permutation=False, **options)
    ASP.compute_sparse_masks(model)
    return [entry.name for entry in ASP.masked(model).entries]


def test_what_stays_dense_is_said():
    model = net()
    model[0].weight.requires_grad_(False)
    torch.nn.utils.weight_norm(model[2])
    model.append(nn.Linear(16, 16))
    text = r"1 frozen \(requires_grad=False\): 0.weight; 1 computed in every forward: 2.weight"
    with pytest.warns(UserWarning, match=f"left dense: {text}"):
        assert initialised(model) == ["4.weight"]
    for parameter in (model := net()).parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match=r"none in Sequential \(3 frozen .*: 0.weight, 2.weight"):
        initialised(model)
    with torch.device("meta"), pytest.raises(ValueError, match="0.weight in memory, got a meta"):
        initialised(net())


def test_adapters_stay_dense():
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(target_modules=["0"], r=16)
    model = peft.get_peft_model(net(), config)
    model.get_base_model()[2].weight.requires_grad_(True)
    with pytest.warns(UserWarning, match="2 part of an adapter"):
        assert initialised(model) == ["base_model.model.2.weight"]


def test_conv1d_is_masked_along_in_features():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils", reason="needs transformers")
    conv = pytorch_utils.Conv1D
    model = nn.Sequential(conv(48, 32), conv(16, 48))
    dense = model[0].weight.detach().t().clone()
    initialised(model, custom_layer_dict={conv: ["weight"]}, allow_recompute_mask=True)
    assert torch.equal(model[0].weight.t(), dense * create_mask(dense))
    ASP.restore_pruned_weights(model)
    assert torch.equal(model[0].weight.t(), dense)
    ASP.compute_sparse_masks(model)
    assert ASP.masked(model).compress() == {}
    assert torch.equal(model[0].weight.to_dense(), dense * create_mask(dense))


def test_a_module_goes_by_each_of_its_names():
    for options in ({"disallowed_layer_names": ["3"]}, {"allowed_layer_names": ["2"]}):
        model = net()
        model[3] = model[0]
        assert initialised(model, **options) == ["2.weight"]
